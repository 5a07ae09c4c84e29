"""The rule table of TGDT and TERAN."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import beside, tables, towers
from xmodal_jax.interop.rules import Entry, Ignore, Rule, Tied

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
  # Heads whose outputs are unused.
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
  """Parameter names in the order of an optimizer file's ids; groups: sizes of its groups.

  The text tower is the second group, and absent if it was frozen.
  """
  bare = {name: name.removeprefix(_ALL) for name in names}
  first = [n for prefix in _GROUP for n in names if bare[n].startswith(prefix)]
  second = [n for n in names if bare[n].startswith("txt_enc.")]
  return first if len(groups) == 1 else first + second


ASSUMED = ("image.heads", "text.heads", "lower.heads", "upper.heads")
parse_beside_text = beside.parse_bert


def infer_config(shapes: tables.Shapes, scalars: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (TGDT spec, 7)."""
  del scalars
  features, joint = f"{_REGIONS}.2.weight", _ALL + "img_proj.weight"
  tables.check_keys("TGDT", shapes, towers.bert_ranks(_BERT) | {features: 2, joint: 2})

  def stack(name: str) -> dict[str, int]:
    """The number of heads is in no file: every published stack has 4."""
    mlp = shapes.get(f"{_ALL}{name}.layers.0.linear1.weight", (0,))[0]
    return dict(depth=towers.count_layers(f"{_ALL}{name}.layers.", shapes), heads=4, mlp=mlp)

  upper = stack("transformer_encoder_text")
  return dict(
    system="tgdt",
    embed=shapes[joint][0],
    image=dict(features=shapes[features][0]) | stack("img_enc.transformer_encoder"),
    text=towers.bert_config(shapes, _BERT),
    lower=stack("transformer_encoder_1"),
    upper=upper if upper["depth"] else {},
    shared=not stack("transformer_encoder_2")["depth"],
  )


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """No array depends on the input size: returned unchanged."""
  del path, shape
  return value
