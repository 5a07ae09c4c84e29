"""The rule table of CLIP: state dicts of CLIP_ITM, OpenAI CLIP and open_clip."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_jax.interop import beside, tables, towers
from xmodal_jax.interop.rules import ConversionError, Ignore, Rule, conv, same
from xmodal_jax.losses import contrastive
from xmodal_jax.models import clip


def _bottleneck(torch: str, ours: str, first: int = 0) -> list[Rule]:
  """Three convolutions with BatchNorm: a residual block of a ResNet, and its stem."""
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
  Ignore("*attn_mask", keep=False),  # causal, computed by the model
]

RULES: Sequence[Rule | Ignore] = [*_TEXT, *_VIT, *_RESNET, *_IGNORED]

# Other models have the same keys: open_clip's ViTs of LAION and DataComp compute GELU.
_ASSUMED = clip.DEFAULTS
ASSUMED = ("act", "image.heads", "image.pool", "text.heads", "text.causal", "mean", "std")
ASSUMED_HINTS = {"act": "LAION's and DataComp's ViTs of open_clip want {flag}act=gelu"}
parse_beside = beside.parse_clip


def infer_config(shapes: tables.Shapes, scalars: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The model section of a config from the shapes of a state dict (spec of CLIP, 7.3).

  scalars: input_resolution, context_length, vocab_size of a TorchScript archive, which must agree
  with the shapes. The values of ASSUMED are those of OpenAI's models. Raises ConversionError for
  another system.
  """
  vit = not any(key.startswith(("visual.layer1.", "visual.attnpool.")) for key in shapes)
  tables.check_keys("CLIP", shapes, _required_keys(vit))
  if vit:
    image = dict(kind="vit", pool=_ASSUMED["image.pool"]) | towers.vit_config(
      shapes,
      pos="visual.positional_embedding",
      patch="visual.conv1.weight",
      blocks="visual.transformer.resblocks.",
    )
  else:
    pos = "visual.attnpool.positional_embedding"
    image = dict(
      kind="resnet",
      size=32 * towers.grid_side(shapes[pos][0], pos),
      width=shapes["visual.layer1.0.conv1.weight"][0],
      depths=tuple(towers.count_layers(f"visual.layer{s}.", shapes) for s in (1, 2, 3, 4)),
      heads=towers.heads(shapes["visual.attnpool.q_proj.weight"][0]),
    )
  width = shapes["ln_final.weight"][0]
  text = dict(
    vocab=shapes["token_embedding.weight"][0],
    context=shapes["positional_embedding"][0],
    width=width,
    depth=towers.count_layers("transformer.resblocks.", shapes),
    heads=towers.heads(width),
    causal=_ASSUMED["text.causal"],
  )
  found = dict(
    input_resolution=image["size"], context_length=text["context"], vocab_size=text["vocab"]
  )
  for name, value in (scalars or {}).items():
    if found[name] != value:
      raise ConversionError(misshapen=[f"{name} is {value}, the weights say {found[name]}"])
  out = dict(system="clip", embed=shapes["text_projection"][1], image=image, text=text)
  out |= {key: _ASSUMED[key] for key in ("act", "mean", "std")}
  return out | (dict(loss="sigmoid") if "logit_bias" in shapes else {})


def _required_keys(vit: bool) -> dict[str, int]:
  ranks = {
    "positional_embedding": 2, "text_projection": 2, "token_embedding.weight": 2,
    "ln_final.weight": 1, "visual.conv1.weight": 4, "transformer.resblocks.0.ln_1.weight": 1,
  }  # fmt: skip
  if vit:
    return ranks | {"visual.positional_embedding": 2, "visual.proj": 2}
  ranks |= {"visual.attnpool.positional_embedding": 2, "visual.attnpool.q_proj.weight": 2}
  return ranks | {"visual.layer1.0.conv1.weight": 4}


def resize(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Image positions of another resolution are interpolated; other arrays are unchanged."""
  return towers.resize_positions(value, shape) if path == "image/pos" else value
