"""Rules between ZeroVL's state dicts and our parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import towers
from xmodal_jax.interop.conversion import ConversionError, Entry, Ignore, Rule, linear
from xmodal_jax.losses import contrastive
from xmodal_jax.models import zerovl
from xmodal_jax.models.layers import positions

_IMAGE, _TEXT = "image_encoder.model.model.", "text_encoder.model.model."

RULES: Sequence[Entry] = [
  *towers.timm_vit(_IMAGE, "image"),
  Ignore(f"{_TEXT}embeddings.position_ids"),
  # BERT built without pre-trained weights had a pooler, which nothing reads.
  Ignore(f"{_TEXT}pooler.*", parameter=True),
  *towers.bert(_TEXT, "text"),
  Rule("image_projection.linear.weight", "image_proj/kernel", linear),
  Rule("text_projection.linear.weight", "text_proj/kernel", linear),
  # A constant temperature is in no file: a run that learns it begins at the published value.
  Rule("loss.temperature", "temperature", default=zerovl.TEMPERATURE),
  Rule("loss.bias", "logit_bias", default=contrastive.INITIAL_BIAS),
  *towers.dense("classifier", "classifier"),
]

# Public files of single towers: timm's vit_base_patch16_224_in21k, and a Hugging Face BERT.
TOWERS: Mapping[str, Sequence[Entry]] = {
  "image": [*towers.timm_vit("", "image"), *towers.TIMM_REST],
  "text": [*towers.bert("bert.", "text"), *towers.BERT_REST],
}


def infer_config(
  shapes: Mapping[str, Sequence[int]], scalars: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (ZeroVL spec, 7).

  Pixel statistics are in no file, so they are not among it: see PRESETS.
  """
  del scalars
  pos, patch_name = _IMAGE + "pos_embed", _IMAGE + "patch_embed.proj.weight"
  need = {pos: 3, patch_name: 4}
  probe = "classifier.weight" in shapes
  tables, hidden = _TEXT + "embeddings.", _TEXT + "encoder.layer.0.intermediate.dense.weight"
  words, places = (tables + f"{x}_embeddings.weight" for x in ("word", "position"))
  if not probe:
    need |= {"image_projection.linear.weight": 2, "text_projection.linear.weight": 2}
    need |= {words: 2, places: 2, hidden: 2}
  wrong = [k for k, rank in need.items() if len(shapes.get(k, ())) != rank]
  if wrong:
    what = tables.describe_keys(shapes)
    raise ConversionError(missing=[f"not a ZeroVL state dict ({what}); no {', '.join(wrong)}"])
  others = [k for k in shapes if k.startswith((_IMAGE + "head.", _IMAGE + "pre_logits."))]
  if others:
    raise ConversionError(unknown=[f"{k}: of another program, ZeroVL has no head" for k in others])
  width, _, patch, _ = shapes[patch_name]
  count = lambda prefix: len(towers.distinct(re.escape(prefix) + r"(\d+)\..*", shapes))
  heads = lambda width: max(width // 64, 1)
  image = dict(
    size=patch * towers.side(shapes[pos][1], pos),
    patch=patch,
    width=width,
    depth=count(_IMAGE + "blocks."),
    heads=heads(width),
  )
  if probe:
    return dict(system="zerovl", image=image, classes=shapes["classifier.weight"][0])
  vocab, text_width = shapes[words]
  text = dict(
    vocab=vocab,
    context=shapes[places][0],
    width=text_width,
    depth=count(_TEXT + "encoder.layer."),
    heads=heads(text_width),
    mlp=shapes[hidden][0],
  )
  return dict(
    system="zerovl",
    embed=shapes["image_projection.linear.weight"][0],
    image=image,
    text=text,
    learn_temperature="loss.temperature" in shapes,
  )


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Image positions of another resolution are resized; everything else is left as it is."""
  if path == "image/pos" and value.shape != shape:
    return positions.resize_table(value, shape[0])
  return value
