"""Rules between TGDT's and TERAN's state dicts and our parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import tables, towers
from xmodal_jax.interop.conversion import ConversionError, Entry, Ignore, Rule, Tied

_ALL, _BERT = "img_txt_enc.", "img_txt_enc.txt_enc.bert_model."


def _stack(torch: str, ours: str) -> list[Rule]:
  """torch.nn.TransformerEncoder."""
  layer, blocks = f"{torch}.layers.{{layer}}", f"{ours}/blocks"
  return [
    *towers.attention(f"{layer}.self_attn", blocks),
    *towers.dense(f"{layer}.linear1", f"{blocks}/wi"),
    *towers.dense(f"{layer}.linear2", f"{blocks}/wo"),
    *towers.norm(f"{layer}.norm1", f"{blocks}/ln_1"),
    *towers.norm(f"{layer}.norm2", f"{blocks}/ln_2"),
  ]


_REGIONS = _ALL + "img_enc.pos_encoding_image.map"

RULES: Sequence[Entry] = [
  Ignore(_BERT + "embeddings.position_ids"),
  *towers.bert(_BERT, "text"),
  Tied(_ALL + "txt_enc.word_embeddings.weight", _BERT + "embeddings.word_embeddings.weight"),
  # Heads whose results nothing reads.
  *(
    Ignore(name + ".*", parameter=True)
    for name in (
      *(_BERT + "pooler", _ALL + "txt_enc.map", _ALL + "img_enc.fc"),
      *(_ALL + "text_agg_emb", _ALL + "img_agg_emb", "img_first_emb", "cap_first_emb"),
    )
  ),
  *towers.dense(f"{_REGIONS}.0", "image/wi"),
  *towers.dense(f"{_REGIONS}.2", "image/wo"),
  *_stack(_ALL + "img_enc.transformer_encoder", "image/encoder"),
  *towers.dense(_ALL + "img_proj", "image_proj"),
  *towers.dense(_ALL + "cap_proj", "text_proj"),
  *_stack(_ALL + "transformer_encoder_1", "text_lower"),
  *_stack(_ALL + "transformer_encoder_2", "image_lower"),
  *_stack(_ALL + "transformer_encoder_text", "text_upper"),
  *_stack(_ALL + "transformer_encoder_img", "image_upper"),
]

# Public files of one tower: a Hugging Face BERT, of which the first layers are used.
TOWERS: Mapping[str, Sequence[Entry]] = {
  "text": [
    *towers.bert("bert.", "text"),
    *towers.BERT_REST,
    Ignore("bert.encoder.layer.*", keep=False),  # layers above those in use
  ],
}

# The optimizer's first group in its order; the second is the text tower.
_GROUP = (
  "img_enc.", "img_proj.", "cap_proj.", "transformer_encoder_1.", "transformer_encoder_2.",
  "img_first_emb.", "cap_first_emb.", "text_agg_emb.", "img_agg_emb.", "transformer_encoder_text.",
  "transformer_encoder_img.",
)  # fmt: skip


def optimizer_names(names: Sequence[str], groups: Sequence[int]) -> list[str]:
  """Names in the order of the original's optimizer, from that of its state dict.

  The text tower is the second group, and absent where it did not train.
  """
  bare = {name: name.removeprefix(_ALL) for name in names}
  first = [n for prefix in _GROUP for n in names if bare[n].startswith(prefix)]
  second = [n for n in names if bare[n].startswith("txt_enc.")]
  return first if len(groups) == 1 else first + second


def infer_config(
  shapes: Mapping[str, Sequence[int]], scalars: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (TGDT spec, 7)."""
  del scalars
  words, places = (_BERT + f"embeddings.{x}_embeddings.weight" for x in ("word", "position"))
  hidden = _BERT + "encoder.layer.0.intermediate.dense.weight"
  box, joint = f"{_REGIONS}.2.weight", _ALL + "img_proj.weight"
  inner = lambda stack: shapes.get(f"{stack}.layers.0.linear1.weight", (0,))[0]
  need = {words: 2, places: 2, hidden: 2, box: 2, joint: 2}
  wrong = [k for k, rank in need.items() if len(shapes.get(k, ())) != rank]
  if wrong:
    what = tables.describe_keys(shapes)
    raise ConversionError(missing=[f"not a TGDT state dict ({what}); no {', '.join(wrong)}"])
  count = lambda prefix: len(towers.distinct(re.escape(prefix) + r"(\d+)\..*", shapes))

  def stack(name: str) -> dict[str, int]:
    """The number of heads is in no file: every published stack has 4."""
    name = _ALL + name
    return dict(depth=count(f"{name}.layers."), heads=4, mlp=inner(name))

  vocab, width = shapes[words]
  upper = stack("transformer_encoder_text")
  return dict(
    system="tgdt",
    embed=shapes[joint][0],
    image=dict(features=shapes[box][0]) | stack("img_enc.transformer_encoder"),
    text=dict(
      vocab=vocab,
      context=shapes[places][0],
      width=width,
      depth=count(_BERT + "encoder.layer."),
      heads=max(width // 64, 1),
      mlp=shapes[hidden][0],
    ),
    lower=stack("transformer_encoder_1"),
    upper=upper if upper["depth"] else {},
    shared=not count(_ALL + "transformer_encoder_2.layers."),
  )


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Nothing is resized."""
  del path, shape
  return value
