"""Rules between TEAM's state dicts and our parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import tables, towers
from xmodal_jax.interop.conversion import Alias, ConversionError, Entry, Ignore, Rule, linear
from xmodal_jax.models import team
from xmodal_jax.models.layers import positions

_BLOCK, _OURS = "team_block_list.{layer}", "matching/blocks"

RULES: Sequence[Entry] = [
  # The Chinese release has one block under another name, and no temperatures.
  Alias(r"^cross_model\.", "team_block_list."),
  *(
    Rule(name, name, default=team.TEMPERATURE, default_beside=r"cross_model\..*")
    for name in ("logit_scale", "logit_scale_team")
  ),
  Ignore("text_model.bert.embeddings.position_ids"),
  *towers.bert("text_model.bert.", "text"),
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


# What passes through float16 on the way from an OpenAI CLIP file into the original.
HALF_PATHS = (
  r"^image/clip/(patch|proj)/kernel$",
  r"^image/clip/blocks/(q|k|v|out|wi|wo)/(kernel|bias)$",
)


def optimizer_names(names: Sequence[str], groups: Sequence[int]) -> list[str]:
  """Parameter names in the order of an optimizer file's ids; groups: sizes of its groups.

  With two groups the image tower, which learns at a tenth of the rate, comes last.
  """
  if len(groups) == 1:
    return list(names)
  slow = [n for n in names if "image_model" in n and "tensor_fc" not in n]
  return [n for n in names if n not in set(slow)] + slow


def infer_config(
  shapes: Mapping[str, Sequence[int]], scalars: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (TEAM spec, 7.3)."""
  del scalars
  deit, clip = "image_model.vit.", "image_model.vision_transformer."
  kind = "deit" if deit + "pos_embed" in shapes else "clip"
  need = {
    "image_tensor_fc.weight": 2,
    "text_model.projector.weight": 2,
    "text_model.bert.embeddings.word_embeddings.weight": 2,
    "text_model.bert.embeddings.position_embeddings.weight": 2,
    "text_model.bert.encoder.layer.0.intermediate.dense.weight": 2,
  }
  if kind == "deit":
    need |= {deit + "pos_embed": 3, deit + "patch_embed.proj.weight": 4}
  else:
    need |= {clip + "positional_embedding": 2, clip + "conv1.weight": 4}
  wrong = [k for k, rank in need.items() if len(shapes.get(k, ())) != rank]
  if wrong:
    what = tables.describe_keys(shapes)
    raise ConversionError(missing=[f"not a TEAM state dict ({what}); no {', '.join(wrong)}"])

  if kind == "deit":
    pos, patch_name, layer = deit + "pos_embed", deit + "patch_embed.proj.weight", r"blocks\.(\d+)"
    rows, tower = shapes[pos][1], deit
  else:
    pos, patch_name = clip + "positional_embedding", clip + "conv1.weight"
    rows, tower, layer = shapes[pos][0], clip, r"transformer\.resblocks\.(\d+)"
  width, _, patch, _ = shapes[patch_name]
  size = patch * towers.side(rows, pos)
  count = lambda pattern: len(towers.distinct(pattern + r"\..*", shapes))
  vocab, text_width = shapes["text_model.bert.embeddings.word_embeddings.weight"]
  token_embed, dim = shapes["image_tensor_fc.weight"]
  heads = lambda width: max(width // 64, 1)
  return dict(
    system="team",
    embed=shapes["text_model.projector.weight"][0],
    image=dict(
      kind=kind,
      size=size,
      patch=patch,
      width=width,
      depth=count(re.escape(tower) + layer),
      heads=heads(width),
    ),
    text=dict(
      vocab=vocab,
      context=shapes["text_model.bert.embeddings.position_embeddings.weight"][0],
      width=text_width,
      depth=count(r"text_model\.bert\.encoder\.layer\.(\d+)"),
      heads=heads(text_width),
      mlp=shapes["text_model.bert.encoder.layer.0.intermediate.dense.weight"][0],
    ),
    project_text="text_model.projector_token_embeds.weight" in shapes,
    matching=dict(
      depth=count(r"(?:team_block_list|cross_model)\.(\d+)"),
      heads=heads(dim),
      mlp_ratio=2,
      embed=token_embed,
    ),
  )


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Image positions of another resolution are resized; everything else is left as it is."""
  if path in ("image/deit/pos", "image/clip/pos") and value.shape != shape:
    return positions.resize_table(value, shape[0])
  return value
