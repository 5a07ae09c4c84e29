"""Rule tables of the systems by name, and what a state dict seems to be of."""

import importlib
import re
import types
from collections.abc import Iterable

from xmodal_jax.models import registry

# What a state dict is of, by keys that only such files have: for messages.
_SIGNATURES = (
  (r"image_model\.(vit|vision_transformer)\.|cross_model\.|team_block_list\.", "TEAM"),
  (r"vit_model\.layers\.|cross_modal_(text|image)_transform", "HAT"),
  (r"img_txt_enc\.", "TGDT (or TERAN)"),
  (r"image_encoder\.model\.|text_encoder\.model\.", "ZeroVL"),
  (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position", "Swin Transformer"),
  (r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.\d+\.attention)", "BERT"),
  (r"visual\.(conv1|class_embedding)|text_projection", "OpenAI CLIP"),
  (r"(text|vision)_model\.(encoder|embeddings)\.", "Hugging Face CLIP, with other names"),
  (r"blocks\.\d+\.attn\.qkv", "timm vision transformer"),
  (r"layer1\.0\.conv1\.weight", "torchvision ResNet"),
)


def rule_table(name: str) -> types.ModuleType:
  """The interop module of a system: `RULES`, `infer_config`, `resize`, optionally `TOWERS`,
  `HALF_PATHS`, `optimizer_names`."""
  return importlib.import_module(registry.entry(name).interop)


def describe_keys(keys: Iterable[str]) -> str:
  """What a state dict with these keys seems to be, in words for an error message."""
  keys = list(keys)
  for pattern, what in _SIGNATURES:
    if any(re.match(pattern, key) for key in keys):
      return f"it seems to be of {what}"
  return f"first keys: {', '.join(keys[:3])}"
