"""Rules and sizes of the towers: names and layouts of public PyTorch files, under any prefix.

Each function takes the prefix in the file and our path, and gives the rules of one component. The
functions `*_config` read a tower's sizes off the shapes of a state dict.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop.rules import (
  Alias,
  Constant,
  ConversionError,
  Entry,
  Ignore,
  Rule,
  conv,
  linear,
  same,
  split,
  squeeze,
)
from xmodal_jax.interop.tables import Shapes
from xmodal_jax.models.layers import positions


def norm(torch: str, ours: str, first: int = 0) -> list[Rule]:
  """LayerNorm."""
  return [
    Rule(f"{torch}.weight", f"{ours}/scale", first=first),
    Rule(f"{torch}.bias", f"{ours}/bias", first=first),
  ]


def batch_norm(torch: str, ours: str, first: int = 0) -> list[Rule]:
  """BatchNorm with its running statistics."""
  names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
  return [Rule(f"{torch}.{a}", f"{ours}/{b}", first=first) for a, b in names.items()]


def dense(torch: str, ours: str) -> list[Rule]:
  """torch.nn.Linear."""
  return [
    Rule(f"{torch}.weight", f"{ours}/kernel", linear),
    Rule(f"{torch}.bias", f"{ours}/bias"),
  ]


def fused(weight: str, bias: str, ours: str) -> list[Rule]:
  """One matrix whose rows are query, key and value, in this order. ours: parent path of q, k, v."""
  paths = lambda name: tuple(f"{ours}/{x}/{name}" for x in "qkv")
  return [
    Rule(weight, paths("kernel"), split(3, linear)),
    Rule(bias, paths("bias"), split(3)),
  ]


def attention(torch: str, ours: str) -> list[Rule]:
  """torch.nn.MultiheadAttention."""
  return [
    *fused(f"{torch}.in_proj_weight", f"{torch}.in_proj_bias", ours),
    *dense(f"{torch}.out_proj", f"{ours}/out"),
  ]


def clip_blocks(torch: str, ours: str) -> list[Rule]:
  """OpenAI CLIP's `transformer`."""
  block, blocks = f"{torch}.resblocks.{{layer}}", f"{ours}/blocks"
  return [
    *attention(f"{block}.attn", blocks),
    *norm(f"{block}.ln_1", f"{blocks}/ln_1"),
    *norm(f"{block}.ln_2", f"{blocks}/ln_2"),
    *dense(f"{block}.mlp.c_fc", f"{blocks}/wi"),
    *dense(f"{block}.mlp.c_proj", f"{blocks}/wo"),
  ]


def clip_vit(torch: str, ours: str) -> list[Rule]:
  """The ViT of OpenAI CLIP, `visual` in its files."""
  return [
    Rule(f"{torch}.conv1.weight", f"{ours}/patch/kernel", conv),
    Rule(f"{torch}.class_embedding", f"{ours}/cls"),
    Rule(f"{torch}.positional_embedding", f"{ours}/pos"),
    Rule(f"{torch}.proj", f"{ours}/proj/kernel", same),  # already [in, out]
    *norm(f"{torch}.ln_pre", f"{ours}/ln_pre"),
    *norm(f"{torch}.ln_post", f"{ours}/ln_post"),
    *clip_blocks(f"{torch}.transformer", ours),
  ]


def clip_half(ours: str) -> tuple[str, ...]:
  """Regular expressions for the paths of an OpenAI ViT that its published files have in float16."""
  return (
    rf"^{ours}/(patch|proj)/kernel$",
    rf"^{ours}/blocks/(q|k|v|out|wi|wo)/(kernel|bias)$",
  )


def timm_vit(torch: str, ours: str) -> list[Rule]:
  """timm's and DeiT's VisionTransformer. torch: prefix with its dot, "" for none."""
  block, blocks = f"{torch}blocks.{{layer}}", f"{ours}/blocks"
  return [
    Rule(f"{torch}cls_token", f"{ours}/cls", squeeze(0, 1)),
    Rule(f"{torch}pos_embed", f"{ours}/pos", squeeze(0)),
    Rule(f"{torch}patch_embed.proj.weight", f"{ours}/patch/kernel", conv),
    Rule(f"{torch}patch_embed.proj.bias", f"{ours}/patch/bias"),
    *norm(f"{block}.norm1", f"{blocks}/ln_1"),
    *fused(f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", blocks),
    *dense(f"{block}.attn.proj", f"{blocks}/out"),
    *norm(f"{block}.norm2", f"{blocks}/ln_2"),
    *dense(f"{block}.mlp.fc1", f"{blocks}/wi"),
    *dense(f"{block}.mlp.fc2", f"{blocks}/wo"),
    *norm(f"{torch}norm", f"{ours}/ln_post"),
  ]


def bert(torch: str, ours: str) -> list[Rule]:
  """Hugging Face's BertModel without pooler. torch: prefix with its dot, "" for none."""
  table, layer, blocks = f"{torch}embeddings", f"{torch}encoder.layer.{{layer}}", f"{ours}/blocks"
  return [
    Rule(f"{table}.word_embeddings.weight", f"{ours}/word/embedding"),
    Rule(f"{table}.position_embeddings.weight", f"{ours}/pos"),
    Rule(f"{table}.token_type_embeddings.weight", f"{ours}/type"),
    *norm(f"{table}.LayerNorm", f"{ours}/ln"),
    *dense(f"{layer}.attention.self.query", f"{blocks}/q"),
    *dense(f"{layer}.attention.self.key", f"{blocks}/k"),
    *dense(f"{layer}.attention.self.value", f"{blocks}/v"),
    *dense(f"{layer}.attention.output.dense", f"{blocks}/out"),
    *norm(f"{layer}.attention.output.LayerNorm", f"{blocks}/ln_1"),
    *dense(f"{layer}.intermediate.dense", f"{blocks}/wi"),
    *dense(f"{layer}.output.dense", f"{blocks}/wo"),
    *norm(f"{layer}.output.LayerNorm", f"{blocks}/ln_2"),
  ]


def swin(torch: str, ours: str) -> list[Entry]:
  """Swin Transformer as in Microsoft's files and timm 0.4.12; for timm's of today see SWIN_REST.
  torch: prefix with its dot, "" for none.

  Public files are of classifiers, which normalise the last stage only: the norms of the other
  stages get their initial values. Index and mask buffers must have the values that the position
  tables imply.
  """
  layer, stage = f"{torch}layers.{{stage}}", f"{ours}/stages/{{stage}}"
  block, blocks = f"{layer}.blocks.{{layer}}", f"{stage}/blocks"
  table = f"{block}.attn.relative_position_bias_table"

  def stage_norms(name: str, path: str, default: float) -> list[Rule]:
    only = dict(default=default, default_beside=r"patch_embed\..*")  # keys of public files
    return [Rule(f"{torch}norm_{i}.{name}", f"{ours}/norms/{i}/{path}", **only) for i in range(3)]

  return [
    Rule(f"{torch}patch_embed.proj.weight", f"{ours}/patch/kernel", conv),
    Rule(f"{torch}patch_embed.proj.bias", f"{ours}/patch/bias"),
    *norm(f"{torch}patch_embed.norm", f"{ours}/patch_ln"),
    *norm(f"{block}.norm1", f"{blocks}/ln_1"),
    Rule(table, f"{blocks}/table"),
    Constant(f"{block}.attn.relative_position_index", table, _window_index),
    Constant(f"{block}.attn_mask", table, _window_mask),
    *fused(f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", blocks),
    *dense(f"{block}.attn.proj", f"{blocks}/out"),
    *norm(f"{block}.norm2", f"{blocks}/ln_2"),
    *dense(f"{block}.mlp.fc1", f"{blocks}/wi"),
    *dense(f"{block}.mlp.fc2", f"{blocks}/wo"),
    Rule(f"{layer}.downsample.reduction.weight", f"{stage}/merge/reduction/kernel", linear),
    *norm(f"{layer}.downsample.norm", f"{stage}/merge/ln"),
    *stage_norms("weight", "scale", 1.0),
    *stage_norms("bias", "bias", 0.0),
    *norm(f"{torch}norm", f"{ours}/norms/3"),
  ]


def window_of(rows: int) -> int:
  """Window size w of a position table of (2w-1)^2 rows; 0 for another number of rows."""
  length = math.isqrt(rows)
  return (length + 1) // 2 if length * length == rows and length % 2 else 0


def _window_index(shape: tuple[int, ...], stage: int, layer: int) -> np.ndarray | None:
  """The relative position index of a block, from the shape of its position table."""
  del stage, layer
  window = window_of(shape[0])
  return positions.relative_index(window) if window else None


def _window_mask(shape: tuple[int, ...], stage: int, layer: int) -> np.ndarray | None:
  """The attention mask of a block with shifted windows, from the shape of its position table.

  Every second block has one if the grid has several windows. All published files have an image size
  of 32 windows in patches of 4 pixels, that is 8, 4, 2 and 1 windows along a side by stage.
  """
  window, windows = window_of(shape[0]), 8 >> stage
  if window > 1 and windows > 1 and layer % 2:
    return positions.shift_mask(windows * window, window)
  return None


# Keys of public files that are not of the tower.
CLIP_REST: list[Entry] = [
  Ignore(name, keep=False)
  for name in (
    *("logit_scale", "input_resolution", "context_length", "vocab_size", "positional_embedding"),
    *("text_projection", "token_embedding.weight", "ln_final.*", "transformer.*"),
  )
]
TIMM_REST: list[Entry] = [Ignore(name, keep=False) for name in ("head.*", "pre_logits.*")]
SWIN_REST: list[Entry] = [
  # timm has moved a stage's downsampling to the start of the next stage.
  Alias(
    r"^layers\.([1-9]\d*)(?=\.downsample\.)",
    lambda match: f"layers.{int(match[1]) - 1}",
    unless=r"layers\.0\.downsample\..*",
  ),
  Ignore("head.*", keep=False),
]
BERT_REST: list[Entry] = [
  # Files with a language model's head have the prefix; the oldest have TensorFlow's names.
  Alias(r"^(?=embeddings\.|encoder\.|pooler\.)", "bert."),
  Alias(r"LayerNorm\.gamma$", "LayerNorm.weight"),
  Alias(r"LayerNorm\.beta$", "LayerNorm.bias"),
  *(Ignore(f"{n}.*", keep=False) for n in ("cls", "bert.pooler")),
  Ignore("bert.embeddings.position_ids", keep=False),
]


def count_layers(prefix: str, names: Iterable[str]) -> int:
  """How many numbers follow the prefix in the names.

  >>> count_layers("blocks.", ["blocks.0.norm1.weight", "blocks.1.norm1.weight", "norm.weight"])
  2
  """
  layer = re.compile(re.escape(prefix) + r"(\d+)\.")
  return len({match[1] for name in names if (match := layer.match(name))})


def grid_side(rows: int, name: str) -> int:
  """Side of the square grid of a position table of `rows` rows, one of which is of the CLS token.

  Raises ConversionError, which names the table, for another number of rows.
  """
  side = math.isqrt(max(rows - 1, 0))
  if side * side != rows - 1 or not side:
    raise ConversionError(misshapen=[f"{name}: {rows} rows are no square and one more"])
  return side


def heads(width: int) -> int:
  """The number of heads of a published transformer: no file has it, all have 64 units per head."""
  return max(width // 64, 1)


def vit_config(shapes: Shapes, *, pos: str, patch: str, blocks: str) -> dict[str, int]:
  """Sizes of a ViT. pos, patch: keys of position table and patch embedding; blocks: prefix."""
  width, _, patch_size, _ = shapes[patch]
  return dict(
    size=patch_size * grid_side(shapes[pos][-2], pos),
    patch=patch_size,
    width=width,
    depth=count_layers(blocks, shapes),
    heads=heads(width),
  )


def bert_ranks(prefix: str) -> dict[str, int]:
  """The keys that `bert_config` needs, and their numbers of axes."""
  names = ("embeddings.word_embeddings", "embeddings.position_embeddings")
  names += ("encoder.layer.0.intermediate.dense",)
  return {f"{prefix}{name}.weight": 2 for name in names}


def bert_config(shapes: Shapes, prefix: str) -> dict[str, int]:
  """Sizes of a BERT whose keys have this prefix."""
  words, places, hidden = bert_ranks(prefix)
  vocab, width = shapes[words]
  return dict(
    vocab=vocab,
    context=shapes[places][0],
    width=width,
    depth=count_layers(prefix + "encoder.layer.", shapes),
    heads=heads(width),
    mlp=shapes[hidden][0],
  )


def resize_positions(value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """A position table of another grid [1 + N, D], interpolated to `shape`; see `positions`."""
  return value if value.shape == tuple(shape) else positions.resize_table(value, shape[0])


def swin_config(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
  """Arguments of `Swin` from the shapes of a state dict whose keys have this prefix.

  The image size is 32 windows of the first table, for patches of 4, as in all published files.
  `patch` and `mlp_ratio` are left out where they have their defaults. Raises ConversionError.
  """
  stages = count_layers(f"{prefix}layers.", shapes)
  depths = tuple(count_layers(f"{prefix}layers.{i}.blocks.", shapes) for i in range(stages))
  block = lambda i: f"{prefix}layers.{i}.blocks.0."
  tables = [block(i) + "attn.relative_position_bias_table" for i in range(stages)]
  proj, hidden = f"{prefix}patch_embed.proj.weight", block(0) + "mlp.fc1.weight"
  need = {proj: 4, hidden: 2} | dict.fromkeys(tables, 2)
  wrong = [k for k, rank in need.items() if len(shapes.get(k, ())) != rank]
  if wrong or not stages:
    raise ConversionError(missing=[f"not a Swin state dict: no {', '.join(wrong)}"])
  embed, _, patch, _ = shapes[proj]
  rows = shapes[tables[0]][0]
  window = window_of(rows)
  if not window:
    raise ConversionError(
      misshapen=[f"{tables[0]}: {rows} rows are not the square of an odd number"]
    )
  out = dict(size=8 * window * patch, window=window, embed=embed, depths=depths)
  out |= dict(heads=tuple(shapes[name][1] for name in tables))
  rest = dict(patch=patch, mlp_ratio=shapes[hidden][0] // embed)
  return out | {k: v for k, v in rest.items() if v != 4}


def resize_swin_tables(path: str, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Position tables [depth, (2w-1)^2, H] of another window, interpolated per head to `shape`.

  Other arrays, and tables of this window, are returned unchanged. Raises ValueError for a number of
  rows that is no square.
  """
  if path.rsplit("/", 1)[-1] != "table" or value.ndim != 3 or value.shape[1] == shape[1]:
    return value
  depth, rows, heads = value.shape
  flat = value.swapaxes(0, 1).reshape(rows, depth * heads)
  flat = positions.resize_table(flat, shape[1], prefix=0)
  return np.ascontiguousarray(flat.reshape(shape[1], depth, heads).swapaxes(0, 1))
