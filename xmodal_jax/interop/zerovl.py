"""The rule table of ZeroVL."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import beside, tables, towers
from xmodal_jax.interop.rules import ConversionError, Entry, Ignore, Rule, linear
from xmodal_jax.losses import contrastive
from xmodal_jax.models import zerovl

_IMAGE, _TEXT = "image_encoder.model.model.", "text_encoder.model.model."

RULES: Sequence[Entry] = [
  *towers.timm_vit(_IMAGE, "image"),
  Ignore(f"{_TEXT}embeddings.position_ids"),
  # A BERT built without pre-trained weights has a pooler, whose output is unused.
  Ignore(f"{_TEXT}pooler.*", parameter=True),
  *towers.bert(_TEXT, "text"),
  Rule("image_projection.linear.weight", "image_proj/kernel", linear),
  Rule("text_projection.linear.weight", "text_proj/kernel", linear),
  # A constant temperature is in no file: learning it starts from the published value.
  Rule("loss.temperature", "temperature", default=zerovl.TEMPERATURE),
  Rule("loss.bias", "logit_bias", default=contrastive.INITIAL_BIAS),
  *towers.dense("classifier", "classifier"),
]

# Public files of single towers: timm's vit_base_patch16_224_in21k, and a Hugging Face BERT.
TOWERS: Mapping[str, Sequence[Entry]] = {
  "image": [*towers.timm_vit("", "image"), *towers.TIMM_REST],
  "text": [*towers.bert("bert.", "text"), *towers.BERT_REST],
}


ASSUMED = ("image.heads", "text.heads", "mean", "std")
parse_beside_text = beside.parse_bert


def infer_config(shapes: tables.Shapes, scalars: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (ZeroVL spec, 7).

  Pixel statistics are in no file: they come from PRESETS.
  """
  del scalars
  image_keys = dict(
    pos=_IMAGE + "pos_embed", patch=_IMAGE + "patch_embed.proj.weight", blocks=_IMAGE + "blocks."
  )
  ranks = {image_keys["pos"]: 3, image_keys["patch"]: 4}
  probe = "classifier.weight" in shapes
  if not probe:
    ranks |= {"image_projection.linear.weight": 2, "text_projection.linear.weight": 2}
    ranks |= towers.bert_ranks(_TEXT)
  tables.check_keys("ZeroVL", shapes, ranks)
  others = [k for k in shapes if k.startswith((_IMAGE + "head.", _IMAGE + "pre_logits."))]
  if others:
    raise ConversionError(unknown=[f"{k}: of another program, ZeroVL has no head" for k in others])
  image = towers.vit_config(shapes, **image_keys)
  if probe:
    return dict(system="zerovl", image=image, classes=shapes["classifier.weight"][0])
  out = dict(
    system="zerovl",
    embed=shapes["image_projection.linear.weight"][0],
    image=image,
    text=towers.bert_config(shapes, _TEXT),
    learn_temperature="loss.temperature" in shapes,
  )
  return out | (dict(loss=dict(name="sigmoid")) if "loss.bias" in shapes else {})


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Image positions of another resolution are interpolated; other arrays are unchanged."""
  return towers.resize_positions(value, shape) if path == "image/pos" else value
