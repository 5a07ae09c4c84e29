"""TGDT: token-guided dual transformer (Liu et al., 2023), on TERAN (Messina et al., 2021)."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.losses import local, triplet
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import bert, regions

Array = jax.Array

STAGES = ("lower", "upper", "joint")
LOSSES = ("all", "matching", "alignment")

_STACK = dict(depth=2, heads=4, mlp=2048)


def _preset(upper: bool, shared: bool) -> dict[str, Any]:
  return dict(
    system="tgdt",
    embed=1024,
    image=dict(features=2048, depth=4, heads=4, mlp=2048),
    text=dict(vocab=30522, context=512, width=768, depth=6, heads=12, mlp=3072),
    lower=dict(_STACK),
    upper=dict(_STACK) if upper else {},
    shared=shared,
  )


# The network of all six configs, and those of the two layouts of its first stage, TERAN.
PRESETS = {
  "tgdt": _preset(True, False),
  "teran": _preset(False, False),
  "teran_shared": _preset(False, True),
}


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  With what is not in a file: how loops over layers are compiled, dropout, and the objective.
  """
  if name not in PRESETS:
    raise ValueError(f"tgdt has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  loop = dict(remat="", unroll=1, dropout=0.1)
  for part in ("image", "lower", "upper"):
    c[part] |= loop if c[part] else {}
  c["text"] |= loop | dict(attention_dropout=0.1)
  return c | OBJECTIVE | ({} if c["upper"] else WITHOUT_UPPER)


OBJECTIVE = dict(
  stage="joint",
  loss="all",
  mode="MrSw",
  scale=10.0,
  margin=0.2,
  intra_margin=0.3,
  reduce="max",
  measure="dot",
  first_stage="global",
  mask_upper_stack=True,
  skip_last_word=False,
  zero_slots=0,
  upper_tokens=False,
  lower_dropout=True,
)


# The first stage's layout has no global vectors.
WITHOUT_UPPER = dict(stage="lower", loss="alignment", first_stage="local")


class TGDT(base.System):
  """Two transformers on regions and on words give tokens; small ones on these give vectors.

  batch: regions [B, R, F], boxes [B, R, 4] as shares of the picture, region_mask bool [B, R],
  text_ids int [B, L], text_mask bool [B, L]. Features: embed float32 [B, E] (global), tokens
  [B, R, E] of regions, [B, L - 1, E] of words, mask of those that count, all unit vectors; zero
  bool [B], see losses.local.

  stage: what trains, and on which tokens. "lower": all below the upper stacks, on the alignment
  loss of their tokens (TERAN); "upper": the upper stacks alone, on losses of theirs (TGDT as
  released); "joint": everything, alignment on lower tokens and matching on global vectors.
  loss: "matching", hinges on global scores and the intra-modal term; "alignment", hinges on local
  scores; "all", their sum. mode: of local scores, see losses.local; scale: what they are multiplied
  by. reduce, margin: of the hinges; intra_margin: of the intra-modal term. measure: of vectors.
  first_stage: "global", re-ranked by local scores, or "local" alone.

  The following are off unless a released model is to be reproduced to the letter.
  mask_upper_stack False: upper stacks see the padding up to the longest text of the batch, which
  global vectors then depend on. skip_last_word: the last word piece does not count. zero_slots: in
  evaluation pictures of fewer regions have zeros beside them; in training those of fewer than the
  batch's most have. upper_tokens: local scores in evaluation from upper tokens. lower_dropout
  False: with "upper", none in what does not train.
  """

  top_k_text, top_k_image, stage_mix = 50, 100, 1.0
  second_stage = ("tokens", "mask", "zero")

  def __init__(
    self,
    *,
    embed: int,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    lower: Mapping[str, Any],
    upper: Mapping[str, Any],
    shared: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    **objective,
  ):
    if unknown := objective.keys() - OBJECTIVE.keys():
      raise ValueError(f"model.{min(unknown)} is no key of tgdt; it has {', '.join(OBJECTIVE)}")
    default = OBJECTIVE if upper else OBJECTIVE | WITHOUT_UPPER
    self.options = tuple((default | objective).items())
    chosen = dict(self.options)
    for key, choices in CHOICES.items():
      if chosen[key] not in choices:
        raise ValueError(f"model.{key} is {chosen[key]!r}; there are {', '.join(choices)}")
    self.stage = chosen["stage"]
    if not upper and (self.stage != "lower" or chosen["first_stage"] != "local"):
      raise ValueError(
        "model.upper is empty, so there are no global vectors: set model.stage='lower' and "
        "model.first_stage='local'"
      )
    if self.stage == "lower" and chosen["loss"] != "alignment":
      raise ValueError("model.stage='lower' trains tokens alone: set model.loss='alignment'")
    if chosen["first_stage"] == "local":
      self.top_k_text = self.top_k_image = 0
      self.second_stage, self.stream = (), True
    kw = dict(dtype=dtype, rngs=rngs)
    self.image, self.text = regions.RegionTower(**image, **kw), bert.Bert(**text, **kw)
    project = lambda width: layers.linear(width, embed, ("embed", None), **kw)
    self.image_proj, self.text_proj = project(image["features"]), project(text["width"])
    stack = lambda section: regions.Encoder(embed, **section, **kw)
    self.text_lower = stack(lower)
    self.image_lower = nnx.data(None if shared else stack(lower))
    self.text_upper = nnx.data(stack(upper) if upper else None)
    self.image_upper = nnx.data(stack(upper) if upper else None)

  def option(self, name: str) -> Any:
    return dict(self.options)[name]

  def prepare(self, batch, key):
    """Adds what a part of the batch cannot know of the whole."""
    del key
    rows = lambda mask: jnp.full(len(mask), mask.sum(1).max())
    most = rows(batch["region_mask"])
    return dict(batch) | {"longest": rows(batch["text_mask"]), "most_regions": most}

  def lower_image(self, batch, key: Array | None = None) -> Array:
    """[B, 1 + R, E], before any norm."""
    k_tower, k_local = _split(key)
    mask = batch["region_mask"]
    x = self.image(batch["regions"], batch["boxes"], mask, k_tower)
    x = self.image_proj(layers.flatten_leading(x)).reshape(*x.shape[:2], -1)
    stack = self.text_lower if self.image_lower is None else self.image_lower
    return stack(x, regions.with_first(mask), k_local)

  def lower_text(self, batch, key: Array | None = None) -> Array:
    """[B, L, E], before any norm."""
    k_tower, k_local = _split(key)
    x = self.text(batch["text_ids"], batch["text_mask"], k_tower)
    x = self.text_proj(layers.flatten_leading(x)).reshape(*x.shape[:2], -1)
    return self.text_lower(x, batch["text_mask"], k_local)

  def _encode(self, batch, lower, upper, mask: Array, seen: Array, key: Array | None):
    """(tokens [B, P, E] and embed [B, E], both unit vectors) of one side.

    lower: (batch, key) -> [B, P, E]; upper: the stack on it. mask [B, P]: own tokens; seen [B, P]:
    those that the upper stack sees if it is not masked.
    """
    k_lower, k_upper = _split(key)
    apart = self.stage == "upper"
    x = lower(batch, k_lower if not apart or self.option("lower_dropout") else None)
    tokens, out = x, {}
    if upper is not None:
      y = jax.lax.stop_gradient(x) if apart else x
      y = upper(y, mask if self.option("mask_upper_stack") else seen, k_upper)
      out["embed"] = base.l2_normalize(y[:, 0])
      of_upper = apart if key is not None else self.option("upper_tokens")
      tokens = y if of_upper else x
    return base.l2_normalize(tokens, eps=1e-12), out

  def encode_image(self, batch, key=None):
    own = batch["region_mask"]
    count = own.sum(1)
    most = batch.get("most_regions", jnp.full(len(own), count.max()))
    seen = jnp.arange(own.shape[1]) < most[:, None]
    tokens, out = self._encode(
      batch, self.lower_image, self.image_upper, *map(regions.with_first, (own, seen)), key
    )
    slots = self.option("zero_slots")
    zero = count < (jnp.full(len(own), slots) if key is None else most * (slots > 0))
    return out | {"tokens": tokens[:, 1:], "mask": own, "zero": zero}

  def encode_text(self, batch, key=None):
    own = batch["text_mask"]
    length = own.sum(1)
    longest = batch.get("longest", jnp.full(len(own), length.max()))
    seen = jnp.arange(own.shape[1]) < longest[:, None]
    tokens, out = self._encode(batch, self.lower_text, self.text_upper, own, seen, key)
    # Of [CLS] words [SEP] the words; [CLS] is left out of the tokens.
    words = length - (3 if self.option("skip_last_word") else 2)
    mask = jnp.arange(own.shape[1] - 1) < words[:, None]
    zero = (length < longest) & (self.option("zero_slots") > 0)
    return out | {"tokens": tokens[:, 1:], "mask": mask, "zero": zero}

  def local_scores(self, images, texts) -> Array:
    """Local scores of all pairs, float32 [I, T]."""
    scores = local.local_scores(
      images["tokens"],
      images["mask"],
      texts["tokens"],
      texts["mask"],
      self.option("mode"),
      image_zero=images["zero"],
      text_zero=texts["zero"],
    )
    return self.option("scale") * scores

  def score(self, images, texts):
    if self.option("first_stage") == "local":
      return self.local_scores(images, self.replicate(texts))
    return triplet.MEASURES[self.option("measure")](images["embed"], texts["embed"])

  def rerank(self, images, texts):
    """Local scores; with stage_mix 1 the global ones are added, as published."""
    scores = local.aligned_scores(
      images["tokens"], images["mask"], texts["tokens"], texts["mask"], images["zero"]
    )
    return self.option("scale") * scores

  def objective(self, images, texts, batch, key):
    del batch, key
    margin, reduce = self.option("margin"), self.option("reduce")
    total, metrics = 0.0, {}
    if self.option("loss") != "alignment":
      measure = triplet.MEASURES[self.option("measure")]
      v, t = images["embed"], texts["embed"]
      inter, _ = triplet.triplet_loss(measure, v, t, margin, reduce, self.ring)
      intra = triplet.intra_modal_consistency(measure, v, t, self.option("intra_margin"), self.ring)
      total += inter + intra
      metrics |= {"loss_matching": inter + intra, "loss_inter": inter, "loss_intra": intra}
    if self.option("loss") != "matching":
      v, t = ({k: x[k] for k in ("tokens", "mask", "zero")} for x in (images, texts))
      t = t if self.ring else self.replicate(t)
      alignment, _ = triplet.triplet_loss(self.local_scores, v, t, margin, reduce, self.ring)
      total += alignment
      metrics["loss_alignment"] = alignment
    return total, metrics


CHOICES = dict(
  stage=STAGES,
  loss=LOSSES,
  mode=local.MODES,
  reduce=triplet.REDUCTIONS,
  measure=tuple(triplet.MEASURES),
  first_stage=("global", "local"),
)


def _split(key: Array | None) -> tuple[Array | None, Array | None]:
  return (None, None) if key is None else tuple(jax.random.split(key))


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> TGDT:
  """A TGDT from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return TGDT(**config, dtype=dtype, rngs=rngs)


def check_start(config: Mapping[str, Any]) -> str:
  """What is doubtful about a run without parameters to start from; "" if nothing is."""
  if config.get("stage") != "upper":
    return ""
  return (
    "model.stage='upper' trains the upper stacks alone, and config.init is empty: the network "
    "below stays random. Train it first (stage 'lower'), and start from that workdir"
  )
