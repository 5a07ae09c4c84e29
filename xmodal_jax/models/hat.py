"""HAT: hierarchical alignment transformers (Bin et al., 2023)."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.losses import cross_attention, triplet
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import bert, registry, swin

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SWIN_B = dict(kind="swin", **swin.SIZES["base"])
_BERT = dict(vocab=30522, context=512, width=768, depth=12, heads=12, mlp=3072)

PRESETS = {
  "swin_b": dict(
    system="hat",
    embed=768,
    image=_SWIN_B,
    text=_BERT,
    # (image stage or block, text block), counted from 0. In released files the first pair's
    # projections have no number.
    levels=((3, 11), (1, 3), (2, 9)),
  ),
}

OBJECTIVE = dict(direction="i2t", sharpness=9.0, margin=0.2, reduce="max", first_levels=())

# What a config means that lacks these keys of the model section.
DEFAULTS = {"image.act": "quick_gelu"}  # of kind "clip"
# Keys of the model section that do not change what is computed from a text or an image.
TRAINING = ("margin", "reduce", "first_levels")


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  Includes options that a file does not record: remat and unroll, dropout, the objective.
  """
  if name not in PRESETS:
    raise ConfigError(f"hat has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  c["image"] |= dict(remat="", unroll=1, drop_path=0.1)
  c["text"] |= dict(remat="", unroll=1, dropout=0.1, attention_dropout=0.1)
  return c | OBJECTIVE


class HAT(base.System):
  """Token features of several depths of both towers; a pair's score is a sum over these levels.

  batch: image [B, S, S, 3], text_ids int [B, L], text_mask bool [B, L]. Features: level_0,
  level_1 ... float32 [B, P, E] of images, [B, L, E] of texts with mask bool [B, L].

  image: `kind` is a name of towers.registry. levels: pairs (index into the image tower's `states`,
  block of the text tower), counted from 0. direction, sharpness: see losses.cross_attention.
  margin, reduce: of the triplet loss on the sum over levels. first_levels: indices of the levels
  that the first stage of retrieval scores, () for all; the second stage adds the others.
  """

  mean, std = MEAN, STD
  stream = True

  def __init__(
    self,
    *,
    embed: int,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    levels: Sequence[Sequence[int]],
    direction: str = "i2t",
    sharpness: float = 9.0,
    margin: float = 0.2,
    reduce: str = "max",
    first_levels: Sequence[int] = (),
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("model.direction", direction, cross_attention.DIRECTIONS)
    self.direction, self.sharpness = direction, sharpness
    self.margin, self.reduce = margin, reduce
    self.levels = tuple((int(i), int(t)) for i, t in levels)
    every = tuple(range(len(self.levels)))
    self.first = tuple(first_levels) or every
    if not set(self.first) <= set(every):
      raise ConfigError(f"model.first_levels is {self.first}; there are the levels {every}")
    self.later = tuple(n for n in every if n not in self.first)
    if self.later:
      self.top_k_text, self.top_k_image, self.stage_mix = 50, 100, 1.0
      self.second_stage = (*(f"level_{n}" for n in self.later), "mask")
    kw = dict(dtype=dtype, rngs=rngs)
    self.kind = image["kind"]
    tower = registry.build_image_tower(image, **kw)
    # The parameter prefix has the tower's kind: files of other kinds have other parameters.
    self.image = nnx.Dict({self.kind: tower})
    self.text = bert.Bert(**text, **kw)
    project = functools.partial(
      layers.linear,
      dout=embed,
      axes=("embed", None),
      kernel_init=layers.normal(0.02),
      bias_init=layers.zeros,
      **kw,
    )
    self.image_proj = nnx.Dict(
      {str(n): project(tower.widths[i]) for n, (i, _) in enumerate(self.levels)}
    )
    self.text_proj = nnx.Dict({str(n): project(text["width"]) for n in every})

  def probe_features(self, batch):
    """The mean over the last tokens."""
    tokens = self.image[self.kind].states(self.pixels(batch["image"]))[-1]
    return tokens.astype(jnp.float32).mean(1)

  def encode_image(self, batch, key=None):
    states = self.image[self.kind].states(self.pixels(batch["image"]), key)
    return {
      f"level_{n}": layers.apply_dense(self.image_proj[str(n)], states[i]).astype(jnp.float32)
      for n, (i, _) in enumerate(self.levels)
    }

  def encode_text(self, batch, key=None):
    mask = batch["text_mask"]
    states = self.text.states(batch["text_ids"], mask, key)[1:]
    out = {
      f"level_{n}": layers.apply_dense(self.text_proj[str(n)], states[t]).astype(jnp.float32)
      for n, (_, t) in enumerate(self.levels)
    }
    # With two stages `mask` is a feature of the second (`second_stage`); the first has a copy.
    return out | {"mask": mask} | ({"first_mask": mask} if self.later else {})

  def level_scores(
    self, images, texts, levels: Sequence[int], direction: str = ""
  ) -> list[Float[Array, "i t"]]:
    """Scores of all pairs at each of the levels, float32."""
    mask = texts["first_mask"] if "mask" not in texts else texts["mask"]
    return [
      cross_attention.attended_scores(
        images[f"level_{n}"],
        texts[f"level_{n}"],
        mask,
        self.sharpness,
        direction or self.direction,
        batch_sharding=self.batch_sharding,
      )
      for n in levels
    ]

  def score(self, images, texts):
    return sum(self.level_scores(images, self.replicate(texts), self.first))

  def rerank(self, images, texts):
    """Scores of the levels that the first stage left out; stage_mix 1 adds those of the first."""
    return sum(self.aligned_scores(images, texts, self.later))

  def aligned_scores(self, images, texts, levels: Sequence[int]) -> list[Float[Array, "g m"]]:
    """Scores of M texts, features [G, M, ...], for each of G images at each of the levels."""
    return [
      cross_attention.aligned_scores(
        images[f"level_{n}"], texts[f"level_{n}"], texts["mask"], self.sharpness, self.direction
      )
      for n in levels
    ]

  def objective(self, images, texts, batch, key):
    del batch, key
    levels = range(len(self.levels))
    v = {f"level_{n}": images[f"level_{n}"] for n in levels}
    t = {f"level_{n}": texts[f"level_{n}"] for n in levels} | {"mask": texts["mask"]}

    def scores(v, t):
      return sum(self.level_scores(v, t, levels))

    all_texts = t if self.ring else self.replicate(t)
    loss, metrics = triplet.triplet_loss(scores, v, all_texts, self.margin, self.reduce, self.ring)
    own = self.aligned_scores(v, jax.tree.map(lambda x: x[:, None], t), levels)
    return loss, metrics | {f"positive_{n}": s.mean() for n, s in enumerate(own)}


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> HAT:
  """A HAT from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return HAT(**config, dtype=dtype, rngs=rngs)
