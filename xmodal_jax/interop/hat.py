"""The rule table of HAT."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import beside, tables, towers
from xmodal_jax.interop.rules import Entry, Ignore, Rule

_TEXT = "text_transformer."


def _projection(side: str, n: int) -> list[Rule]:
  return towers.dense(f"cross_modal_{side}_transform" + f"_{n}" * (n > 0), f"{side}_proj/{n}")


RULES: Sequence[Entry] = [
  *(rule for side in ("image", "text") for n in range(3) for rule in _projection(side, n)),
  *towers.swin("vit_model.", "image/swin"),
  *towers.bert(_TEXT, "text"),
  Ignore(_TEXT + "embeddings.position_ids"),
  Ignore(_TEXT + "pooler.*", parameter=True),  # its output is unused
]

# Public files of single towers: Microsoft's or timm's Swin, OpenAI's CLIP or timm's ViT, and a
# Hugging Face BERT.
TOWERS: Mapping[str, Sequence[Entry]] = {
  "image": [
    *towers.swin("", "image/swin"),
    *towers.SWIN_REST,
    *towers.timm_vit("", "image/timm"),
    *towers.TIMM_REST,
    *towers.clip_vit("visual", "image/clip"),
    *towers.CLIP_REST,
  ],
  "text": [*towers.bert("bert.", "text"), *towers.BERT_REST],
}


# OpenAI's files are published in float16.
HALF_PATHS = towers.clip_half("image/clip")

ASSUMED = ("image.act", "text.heads", "levels")
parse_beside_text, parse_beside_image = beside.parse_bert, beside.parse_clip_image


def infer_config(shapes: tables.Shapes, scalars: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (HAT spec, 7.2)."""
  del scalars
  patch, joint = "vit_model.patch_embed.proj.weight", "cross_modal_image_transform.weight"
  tables.check_keys("HAT", shapes, {patch: 4, joint: 2} | towers.bert_ranks(_TEXT))
  text = towers.bert_config(shapes, _TEXT)
  return dict(
    system="hat",
    embed=shapes[joint][0],
    image=dict(kind="swin") | towers.swin_config(shapes, "vit_model."),
    text=text,
    levels=((3, text["depth"] - 1), (1, 3), (2, 9)),
  )


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Position tables of another window are interpolated; other arrays are unchanged."""
  return towers.resize_swin_tables(path, value, shape)
