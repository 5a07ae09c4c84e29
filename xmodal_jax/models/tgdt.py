"""TGDT: token-guided dual transformer (Liu et al., 2023), on TERAN (Messina et al., 2021)."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.losses import local, triplet
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import bert, regions

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


# TGDT's network, and the two layouts of the network of its first stage, TERAN.
PRESETS = {
  "tgdt": _preset(True, False),
  "teran": _preset(False, False),
  "teran_shared": _preset(False, True),
}


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

# TERAN has no upper stacks, so no global vectors.
WITHOUT_UPPER = dict(stage="lower", loss="alignment", first_stage="local")

CHOICES = dict(
  stage=STAGES,
  loss=LOSSES,
  mode=local.MODES,
  reduce=triplet.REDUCTIONS,
  measure=tuple(triplet.MEASURES),
  first_stage=("global", "local"),
)

# Keys of the model section that do not change what is computed from a text or an image.
TRAINING = (
  *("stage", "scale", "margin", "intra_margin", "reduce", "lower_dropout"),
  *("first_stage",),  # an evaluation's choice
)


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  Includes options that a file does not record: remat and unroll, dropout, the objective.
  """
  if name not in PRESETS:
    raise ConfigError(f"tgdt has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  loop = dict(remat="", unroll=1, dropout=0.1)
  for part in ("image", "lower", "upper"):
    c[part] |= loop if c[part] else {}
  c["text"] |= loop | dict(attention_dropout=0.1)
  return c | OBJECTIVE | ({} if c["upper"] else WITHOUT_UPPER)


class TGDT(base.System):
  """Transformers on region features and on words give tokens; small upper stacks on the tokens give
  global vectors.

  batch: regions [B, R, F], boxes [B, R, 4] as fractions of the image, region_mask bool [B, R],
  text_ids int [B, L], text_mask bool [B, L]. Features: embed float32 [B, E] (global vectors),
  tokens [B, R, E] of regions, [B, L - 1, E] of words, all unit vectors, with mask bool; zero bool
  [B]: see losses.local.

  stage: what is trained, and on which tokens.
    "lower": everything below the upper stacks, by the alignment loss on lower tokens (TERAN).
    "upper": the upper stacks alone, by losses on their outputs (TGDT as released).
    "joint": everything: alignment loss on lower tokens, matching loss on global vectors.
  loss: "matching", triplet loss on global scores plus the intra-modal term; "alignment", triplet
    loss on local scores; "all", their sum.
  mode: of local scores, see losses.local; scale: factor of local scores.
  reduce, margin: of the triplet losses; intra_margin: of the intra-modal term.
  measure: similarity of global vectors.
  first_stage: "global", re-ranked by local scores, or "local" alone.

  For exact reproduction of the released models only:
  mask_upper_stack False: upper stacks attend to padding up to the longest text (most regions) of
    the batch, on which global vectors then depend.
  skip_last_word: the last word piece is masked.
  zero_slots: in evaluation, images with fewer regions than this have zero vectors beside them; in
    training (if not 0), images with fewer regions than the batch's maximum.
  upper_tokens: local scores in evaluation use upper tokens.
  lower_dropout False: with stage "upper", no dropout in the frozen part.
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
    chosen = _checked_objective(objective, bool(upper))
    self.options, self.stage = tuple(chosen.items()), chosen["stage"]
    if chosen["first_stage"] == "local":
      self.top_k_text = self.top_k_image = 0
      self.second_stage, self.stream = (), True
    kw = dict(dtype=dtype, rngs=rngs)
    self.image, self.text = regions.RegionTower(**image, **kw), bert.Bert(**text, **kw)
    project = functools.partial(layers.linear, dout=embed, axes=("embed", None), **kw)
    self.image_proj, self.text_proj = project(image["features"]), project(text["width"])
    stack = functools.partial(regions.Encoder, embed, **kw)
    self.text_lower = stack(**lower)
    self.image_lower = nnx.data(None if shared else stack(**lower))
    self.text_upper = nnx.data(stack(**upper) if upper else None)
    self.image_upper = nnx.data(stack(**upper) if upper else None)

  def option(self, name: str) -> Any:
    return dict(self.options)[name]

  def prepare(self, batch, key):
    """Adds maxima over the batch, which a chunk of the batch cannot compute."""
    del key

    def largest_count(mask):
      return jnp.full(len(mask), mask.sum(1).max())

    longest, most = largest_count(batch["text_mask"]), largest_count(batch["region_mask"])
    return dict(batch) | {"longest": longest, "most_regions": most}

  def lower_image(self, batch, key: PRNGKeyArray | None = None) -> Float[Array, "b l e"]:
    """Lower tokens of images, L = 1 + R, not normalised."""
    k_tower, k_stack = _split(key)
    mask = batch["region_mask"]
    x = self.image(batch["regions"], batch["boxes"], mask, k_tower)
    stack = self.text_lower if self.image_lower is None else self.image_lower
    return stack(layers.apply_dense(self.image_proj, x), regions.with_first(mask), k_stack)

  def lower_text(self, batch, key: PRNGKeyArray | None = None) -> Float[Array, "b l e"]:
    """Lower tokens of texts, not normalised."""
    k_tower, k_stack = _split(key)
    x = self.text(batch["text_ids"], batch["text_mask"], k_tower)
    return self.text_lower(layers.apply_dense(self.text_proj, x), batch["text_mask"], k_stack)

  def _encode(
    self,
    batch,
    lower,
    upper,
    mask: Bool[Array, "b l"],
    padded_mask: Bool[Array, "b l"],
    key: PRNGKeyArray | None,
  ) -> tuple[Float[Array, "b l e"], dict[str, Float[Array, "b e"]]]:
    """(tokens, {"embed": global vectors} where there is an upper stack) of one side, unit vectors.

    lower: (batch, key) -> lower tokens; upper: the upper stack or None. mask: tokens of the row;
    padded_mask: mask of the upper stack where the option mask_upper_stack is off.
    """
    k_lower, k_upper = _split(key)
    frozen = self.stage == "upper"
    x = lower(batch, k_lower if not frozen or self.option("lower_dropout") else None)
    if upper is None:
      return base.l2_normalize(x, eps=1e-12), {}
    y = jax.lax.stop_gradient(x) if frozen else x
    y = upper(y, mask if self.option("mask_upper_stack") else padded_mask, k_upper)
    upper_tokens = frozen if key is not None else self.option("upper_tokens")
    tokens = base.l2_normalize(y if upper_tokens else x, eps=1e-12)
    return tokens, {"embed": base.l2_normalize(y[:, 0])}

  def encode_image(self, batch, key=None):
    mask = batch["region_mask"]
    count = mask.sum(1)
    most = batch.get("most_regions", jnp.full(len(mask), count.max()))
    padded_mask = jnp.arange(mask.shape[1]) < most[:, None]
    masks = regions.with_first(mask), regions.with_first(padded_mask)
    tokens, out = self._encode(batch, self.lower_image, self.image_upper, *masks, key)
    slots = self.option("zero_slots")
    zero = count < (jnp.full(len(mask), slots) if key is None else most * (slots > 0))
    return out | {"tokens": tokens[:, 1:], "mask": mask, "zero": zero}

  def encode_text(self, batch, key=None):
    mask = batch["text_mask"]
    length = mask.sum(1)
    longest = batch.get("longest", jnp.full(len(mask), length.max()))
    padded_mask = jnp.arange(mask.shape[1]) < longest[:, None]
    tokens, out = self._encode(batch, self.lower_text, self.text_upper, mask, padded_mask, key)
    # Tokens are [CLS] words [SEP]; [CLS] is dropped below, [SEP] is masked.
    words = length - (3 if self.option("skip_last_word") else 2)
    word_mask = jnp.arange(mask.shape[1] - 1) < words[:, None]
    zero = (length < longest) & (self.option("zero_slots") > 0)
    return out | {"tokens": tokens[:, 1:], "mask": word_mask, "zero": zero}

  def local_scores(self, images, texts) -> Float[Array, "i t"]:
    """Local scores of all pairs, float32."""
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
    """Local scores; stage_mix 1 adds the global ones, as published."""
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
      all_texts = t if self.ring else self.replicate(t)
      alignment, _ = triplet.triplet_loss(
        self.local_scores, v, all_texts, margin, reduce, self.ring
      )
      total += alignment
      metrics["loss_alignment"] = alignment
    return total, metrics


def _checked_objective(given: Mapping[str, Any], upper: bool) -> dict[str, Any]:
  """OBJECTIVE with the given options; upper: whether there are upper stacks. Raises ConfigError."""
  if unknown := given.keys() - OBJECTIVE.keys():
    raise ConfigError(f"model.{min(unknown)} is no key of tgdt; it has {', '.join(OBJECTIVE)}")
  out = OBJECTIVE | ({} if upper else WITHOUT_UPPER) | dict(given)
  for key, choices in CHOICES.items():
    check_choice(f"model.{key}", out[key], choices)
  if not upper and (out["stage"] != "lower" or out["first_stage"] != "local"):
    raise ConfigError(
      "model.upper is empty, so there are no global vectors: set model.stage='lower' and "
      "model.first_stage='local'"
    )
  if out["stage"] == "lower" and out["loss"] != "alignment":
    raise ConfigError("model.stage='lower' trains tokens alone: set model.loss='alignment'")
  return out


def _split(key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, PRNGKeyArray | None]:
  return (None, None) if key is None else tuple(jax.random.split(key))


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> TGDT:
  """A TGDT from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return TGDT(**config, dtype=dtype, rngs=rngs)


def check_start(config: Mapping[str, Any]) -> str:
  """A warning about training from random parameters, "" if none is due."""
  if config.get("stage") != "upper":
    return ""
  return (
    "model.stage='upper' trains the upper stacks alone, and config.init is empty: the network "
    "below stays random. Train it first (stage 'lower'), and start from that workdir"
  )
