"""Rule tables: what a module `interop/<system>.py` provides about the PyTorch files of a system."""

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xmodal_jax.interop.rules import ConversionError, Entry
from xmodal_jax.models import registry

Shapes = Mapping[str, Sequence[int]]  # torch key -> shape


class RuleTable(Protocol):
  """The interface of a rule table. A module may also define

  TOWERS: Mapping[str, Sequence[Entry]]
    Rules for public files of one tower, by side ("image", "text"): config.init_image and
    config.init_text. Without it a system starts from whole checkpoints only.
  HALF_PATHS: Sequence[str]
    Regular expressions for the paths that config.init_half rounds to float16.
  ASSUMED: Sequence[str]
    Keys of config.model, as "text.heads", that change what is computed and that no state dict
    records. `infer_config` gives them the values of the published models.
  ASSUMED_HINTS: Mapping[str, str]
    Key of ASSUMED -> which files have other values, in words.
  parse_beside, parse_beside_text, parse_beside_image: beside.Parser
    For a json beside a file that records those of ASSUMED: beside files of the whole model, and of
    one tower.
  optimizer_names(names, groups) -> list[str]
    The torch parameter names in the order of the ids of an optimizer file. names: in the order of
    the state dict; groups: number of parameters of each parameter group. Without it both orders are
    the same.
  """

  RULES: Sequence[Entry]
  """The whole state dict of a checkpoint, in both directions."""

  def infer_config(
    self, shapes: Shapes, scalars: Mapping[str, int] | None = None
  ) -> dict[str, Any]:
    """config.model of a state dict. scalars: numbers beside the tensors of a TorchScript archive.

    Raises ConversionError for a state dict of another system, see `check_keys`.
    """

  def resize(self, path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Interpolates the position table at `path` to `shape`; other arrays are returned unchanged."""


def rule_table(name: str) -> RuleTable:
  """The rule table of a registered system. Raises ValueError for another name."""
  return importlib.import_module(registry.entry(name).interop)


# Keys that only files of one kind have, what these are and what to do, for error messages; a third
# entry: keys that these files do not have.
_WHOLE = "take the file of the whole model"
_OF_CLIP = "take OpenAI's .pt or open_clip's file of the same model"
_SIGNATURES = (
  (
    r"(.*\.)?lora_(A|B|down|up|embedding)|base_model\.model\.",
    "a LoRA or PEFT adapter: merge it into its base (merge_and_unload), save model.state_dict()",
  ),
  (r"(.*\.)?(dist_token|head_dist\.)", "a distilled DeiT: take the DeiT of this size without it"),
  (r"image_model\.(vit|vision_transformer)\.|cross_model\.|team_block_list\.", "TEAM"),
  (r"vit_model\.layers\.|cross_modal_(text|image)_transform", "HAT"),
  (r"img_txt_enc\.", "TGDT (or TERAN)"),
  (r"image_encoder\.model\.|text_encoder\.model\.", "ZeroVL"),
  (r"(.*\.)?layers\.\d+\.blocks\.\d+\.attn\.relative_position", "Swin Transformer"),
  (r"(.*\.)?vision_model\.head\.(probe|attention)", "SigLIP in Hugging Face's names: not read"),
  (r"(.*\.)?visual\.trunk\.", "open_clip with an image tower of timm (SigLIP, ...): not read"),
  (r"(.*\.)?text_decoder\.", "CoCa or BLIP: not read"),
  (r"(.*\.)?visual\.blocks\.\d+\.attn\.", "EVA-CLIP: not read"),
  (
    r"(.*\.)?text\.(transformer|token_embedding|positional_embedding)",
    f"open_clip's CustomTextCLIP, whose text tower has other names: not read; {_OF_CLIP}",
  ),
  (
    r"(.*\.)?vision_model\.",
    f"the image tower of Hugging Face's CLIP alone: {_WHOLE}",
    r"(.*\.)?text_model\.",
  ),
  (
    r"(.*\.)?text_model\.(encoder|embeddings)\.",
    f"the text tower of Hugging Face's CLIP alone: {_WHOLE}",
    r"(.*\.)?vision_model\.",
  ),
  (
    r"(.*\.)?(text|vision)_model\.(encoder|embeddings)\.",
    f"CLIP in Hugging Face's names: not read; {_OF_CLIP}",
  ),
  (
    r"(.*\.)?embeddings\.patch_embeddings\.",
    "a vision transformer in Hugging Face's names: not read; take timm's file of the same model",
  ),
  (r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.\d+\.attention)", "BERT"),
  (r"(mask_token|decoder_blocks\.)", "a masked autoencoder: not read"),
  (
    r"visual\.(conv1|class_embedding)",
    f"the image tower of OpenAI CLIP alone: {_WHOLE}",
    r"token_embedding|text",
  ),
  (r"visual\.(conv1|class_embedding)|text_projection", "OpenAI CLIP"),
  (r"blocks\.\d+\.attn\.qkv", "timm vision transformer"),
  (r"layer1\.0\.conv1\.weight", "torchvision ResNet"),
)


def describe_keys(keys: Iterable[str]) -> str:
  """What a state dict with these keys seems to be, in words for an error message.

  >>> describe_keys(["img_txt_enc.img_proj.weight"])
  'it seems to be of TGDT (or TERAN)'
  """
  keys = list(keys)
  have = lambda pattern: any(re.match(pattern, key) for key in keys)
  for pattern, what, *absent in _SIGNATURES:
    if have(pattern) and not any(map(have, absent)):
      return f"it seems to be {'' if what.startswith(('a ', 'the ')) else 'of '}{what}"
  prefix = keys[0].partition(".")[0] + "." if keys else ""
  shared = len(keys) > 1 and all(key.startswith(prefix) for key in keys)
  hint = f"; all begin with {prefix!r}, which tools/convert.py --prefix strips" if shared else ""
  return f"first keys: {', '.join(keys[:3])}{hint}"


def check_keys(system: str, shapes: Shapes, ranks: Mapping[str, int]) -> None:
  """Raises ConversionError unless the state dict has all keys of `ranks` with that many axes.

  The message says what the state dict seems to be instead.
  """
  if wrong := [key for key, rank in ranks.items() if len(shapes.get(key, ())) != rank]:
    what = describe_keys(shapes)
    raise ConversionError(missing=[f"not a {system} state dict ({what}); no {', '.join(wrong)}"])
