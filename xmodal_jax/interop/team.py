"""The rule table of TEAM."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import beside, tables, towers
from xmodal_jax.interop.rules import Alias, Entry, Ignore, Rule, linear
from xmodal_jax.models import team

_BLOCK, _OURS = "team_block_list.{layer}", "matching/blocks"
_BERT = "text_model.bert."
_IMAGE_KEYS = {
  "deit": dict(
    pos="image_model.vit.pos_embed",
    patch="image_model.vit.patch_embed.proj.weight",
    blocks="image_model.vit.blocks.",
  ),
  "clip": dict(
    pos="image_model.vision_transformer.positional_embedding",
    patch="image_model.vision_transformer.conv1.weight",
    blocks="image_model.vision_transformer.transformer.resblocks.",
  ),
}

RULES: Sequence[Entry] = [
  # The Chinese release has one block under another name, and no temperatures.
  Alias(r"^cross_model\.", "team_block_list."),
  *(
    Rule(name, name, default=team.TEMPERATURE, default_beside=r"cross_model\..*")
    for name in ("logit_scale", "logit_scale_team")
  ),
  Ignore(_BERT + "embeddings.position_ids"),
  *towers.bert(_BERT, "text"),
  Rule("text_model.projector.weight", "text_proj/kernel", linear),
  *towers.dense("text_model.projector_token_embeds", "text_tokens"),
  *towers.timm_vit("image_model.vit.", "image/deit"),
  Rule("image_model.projector.weight", "image/deit/proj/kernel", linear),
  *towers.clip_vit("image_model.vision_transformer", "image/clip"),
  *towers.norm(f"{_BLOCK}.norm1", f"{_OURS}/ln_1"),
  *towers.norm(f"{_BLOCK}.norm2", f"{_OURS}/ln_2"),
  *towers.norm(f"{_BLOCK}.norm3", f"{_OURS}/ln_3"),
  *towers.attention(f"{_BLOCK}.self_attn", f"{_OURS}/self_attn"),
  *towers.attention(f"{_BLOCK}.cross_attn", f"{_OURS}/cross_attn"),
  *towers.dense(f"{_BLOCK}.ffn.fc1", f"{_OURS}/wi"),
  *towers.dense(f"{_BLOCK}.ffn.fc2", f"{_OURS}/wo"),
  *towers.dense("image_tensor_fc", "matching/image_fc"),
  *towers.dense("text_tensor_fc", "matching/text_fc"),
]

# Public files of single towers: DeiT or an OpenAI CLIP archive, and a Hugging Face BERT.
TOWERS: Mapping[str, Sequence[Entry]] = {
  "image": [
    *towers.timm_vit("", "image/deit"),
    *towers.TIMM_REST,
    *towers.clip_vit("visual", "image/clip"),
    *towers.CLIP_REST,
  ],
  "text": [*towers.bert("bert.", "text"), *towers.BERT_REST],
}


# The original loads these parameters of an OpenAI CLIP file through float16.
HALF_PATHS = towers.clip_half("image/clip")


def optimizer_names(names: Sequence[str], groups: Sequence[int]) -> list[str]:
  """Parameter names in the order of an optimizer file's ids; groups: sizes of its groups.

  With two groups the second one is the image tower, which has a tenth of the learning rate.
  """
  if len(groups) == 1:
    return list(names)
  slow = [n for n in names if "image_model" in n and "tensor_fc" not in n]
  return [n for n in names if n not in set(slow)] + slow


ASSUMED = ("image.act", "image.heads", "text.heads", "matching.heads")
parse_beside_text, parse_beside_image = beside.parse_bert, beside.parse_clip_image


def infer_config(shapes: tables.Shapes, scalars: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (TEAM spec, 7.3)."""
  del scalars
  kind = "deit" if "image_model.vit.pos_embed" in shapes else "clip"
  keys = _IMAGE_KEYS[kind]
  tables.check_keys(
    "TEAM",
    shapes,
    {"image_tensor_fc.weight": 2, "text_model.projector.weight": 2}
    | towers.bert_ranks(_BERT)
    | {keys["pos"]: 3 if kind == "deit" else 2, keys["patch"]: 4},
  )
  token_embed, width = shapes["image_tensor_fc.weight"]
  blocks = ("team_block_list.", "cross_model.")  # the Chinese release has the second name
  return dict(
    system="team",
    embed=shapes["text_model.projector.weight"][0],
    image=dict(kind=kind) | towers.vit_config(shapes, **keys),
    text=towers.bert_config(shapes, _BERT),
    project_text="text_model.projector_token_embeds.weight" in shapes,
    matching=dict(
      depth=max(towers.count_layers(prefix, shapes) for prefix in blocks),
      heads=towers.heads(width),
      mlp_ratio=2,
      embed=token_embed,
    ),
  )


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Image positions of another resolution are interpolated; other arrays are unchanged."""
  is_table = path in ("image/deit/pos", "image/clip/pos")
  return towers.resize_positions(value, shape) if is_table else value
