"""Rules between CLIP_ITM's and OpenAI CLIP's state dicts and our parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import tables, towers
from xmodal_jax.interop.conversion import ConversionError, Ignore, Rule, conv, same
from xmodal_jax.losses import contrastive
from xmodal_jax.models.layers import positions


def _bottleneck(torch: str, ours: str, first: int = 0) -> list[Rule]:
  rules = []
  for i in "123":
    rules.append(Rule(f"{torch}.conv{i}.weight", f"{ours}/conv{i}/kernel", conv, first=first))
    rules += towers.batch_norm(f"{torch}.bn{i}", f"{ours}/bn{i}", first)
  return rules


_TEXT = [
  Rule("logit_scale", "logit_scale"),
  # open_clip's name; CLIP's own files have none.
  Rule("logit_bias", "logit_bias", default=contrastive.INITIAL_BIAS),
  Rule("token_embedding.weight", "text/token/embedding"),
  Rule("positional_embedding", "text/pos"),
  Rule("text_projection", "text/proj/kernel", same),  # already [in, out]
  *towers.norm("ln_final", "text/ln_final"),
  *towers.clip_blocks("transformer", "text"),
]

_VIT = towers.clip_vit("visual", "image")

_RESNET = [
  *_bottleneck("visual", "image/stem"),
  *_bottleneck("visual.layer{s}.0", "image/stage{s}/first"),
  Rule("visual.layer{s}.0.downsample.0.weight", "image/stage{s}/first/down_conv/kernel", conv),
  *towers.batch_norm("visual.layer{s}.0.downsample.1", "image/stage{s}/first/down_bn"),
  *_bottleneck("visual.layer{s}.{layer}", "image/stage{s}/rest", first=1),
  Rule("visual.attnpool.positional_embedding", "image/pool/pos"),
  *(r for x in "qkvc" for r in towers.dense(f"visual.attnpool.{x}_proj", f"image/pool/{x}")),
]

_IGNORED = [
  Ignore("input_resolution"),
  Ignore("context_length"),
  Ignore("vocab_size"),
  Ignore("*.num_batches_tracked"),
  Ignore("*attn_mask", keep=False),  # causal, made by the model
]

RULES: Sequence[Rule | Ignore] = [*_TEXT, *_VIT, *_RESNET, *_IGNORED]


def infer_config(
  shapes: Mapping[str, Sequence[int]], scalars: Mapping[str, int] | None = None
) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (spec of CLIP, 7.3).

  scalars: input_resolution, context_length, vocab_size of a TorchScript archive, which must agree.
  ConversionError names what the file seems to be where it is no CLIP.
  """
  _refuse_others(shapes)
  distinct, side = towers.distinct, towers.side
  embed = shapes["text_projection"][1]
  width = shapes["ln_final.weight"][0]
  if "visual.proj" in shapes:
    dim, _, patch, _ = shapes["visual.conv1.weight"]
    depth = len(distinct(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_weight", shapes))
    size = patch * side(shapes["visual.positional_embedding"][0], "visual.positional_embedding")
    image = dict(kind="vit", size=size, patch=patch, width=dim, depth=depth, heads=dim // 64)
  else:
    depths = tuple(len(distinct(rf"visual\.layer{s}\.(\d+)\..*", shapes)) for s in (1, 2, 3, 4))
    name = "visual.attnpool.positional_embedding"
    size = 32 * side(shapes[name][0], name)
    dim = shapes["visual.layer1.0.conv1.weight"][0]
    image = dict(kind="resnet", size=size, width=dim, depths=depths)
  text = dict(
    vocab=shapes["token_embedding.weight"][0],
    context=shapes["positional_embedding"][0],
    width=width,
    depth=len(distinct(r"transformer\.resblocks\.(\d+)\..*", shapes)),
    heads=width // 64,
  )
  found = dict(input_resolution=size, context_length=text["context"], vocab_size=text["vocab"])
  for name, value in (scalars or {}).items():
    if found[name] != value:
      raise ConversionError(misshapen=[f"{name} is {value}, the weights say {found[name]}"])
  return dict(system="clip", embed=embed, image=image, text=text)


def _refuse_others(shapes: Mapping[str, Sequence[int]]) -> None:
  ranks = {
    "positional_embedding": 2, "text_projection": 2, "token_embedding.weight": 2,
    "ln_final.weight": 1, "visual.conv1.weight": 4, "transformer.resblocks.0.ln_1.weight": 1,
  }  # fmt: skip
  if "visual.proj" in shapes:
    ranks |= {"visual.positional_embedding": 2, "visual.proj": 2}
  else:
    ranks |= {"visual.attnpool.positional_embedding": 2, "visual.layer1.0.conv1.weight": 4}
  wrong = [k for k, rank in ranks.items() if len(shapes.get(k, ())) != rank]
  if wrong:
    what = tables.describe_keys(shapes)
    raise ConversionError(missing=[f"not a CLIP state dict ({what}); no {', '.join(wrong)}"])


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Image positions of another resolution are resized; everything else is left as it is."""
  if path == "image/pos" and value.shape != shape:
    return positions.resize_table(value, shape[0])
  return value
