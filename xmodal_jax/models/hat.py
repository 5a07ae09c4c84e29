"""HAT: hierarchical alignment transformers (Bin et al., 2023)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.losses import cross_attention, triplet
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import bert, swin, vit

Array = jax.Array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SWIN_B = dict(kind="swin", **swin.SIZES["base"])
_BERT = dict(vocab=30522, context=512, width=768, depth=12, heads=12, mlp=3072)

PRESETS = {
  "swin_b": dict(
    system="hat",
    embed=768,
    image=_SWIN_B,
    text=_BERT,
    # (image stage or block, text block), counted from 0; the first is the one without a number.
    levels=((3, 11), (1, 3), (2, 9)),
  ),
}

OBJECTIVE = dict(direction="i2t", sharpness=9.0, margin=0.2, reduce="max", first_levels=())


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  With what is not in a file: how loops over layers are compiled, dropout, and the objective.
  """
  if name not in PRESETS:
    raise ValueError(f"hat has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  c["image"] |= dict(remat="", unroll=1, drop_path=0.1)
  c["text"] |= dict(remat="", unroll=1, dropout=0.1, attention_dropout=0.1)
  return c | OBJECTIVE


class HAT(base.System):
  """Tokens of several depths of both towers, compared depth by depth by attention between them.

  batch: image [B, S, S, 3], text_ids int [B, L], text_mask bool [B, L]. Features: level_0,
  level_1 ... float32 [B, P, E] of pictures, [B, L, E] of texts with mask bool [B, L].

  image: `kind` is "swin", or a form of ViT: "timm" or "clip". levels: pairs (stage of the Swin or
  block of the ViT, block of the text tower), counted from 0. direction, sharpness: see
  losses.cross_attention. margin, reduce: of the triplet loss on the sum over levels. first_levels:
  indices of the levels that the first stage of retrieval scores, () for all; the second adds the
  others.
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
    if direction not in cross_attention.DIRECTIONS:
      choices = ", ".join(cross_attention.DIRECTIONS)
      raise ValueError(f"model.direction is {direction!r}; there are {choices}")
    self.direction, self.sharpness = direction, sharpness
    self.margin, self.reduce = margin, reduce
    self.levels = tuple((int(i), int(t)) for i, t in levels)
    every = tuple(range(len(self.levels)))
    self.first = tuple(first_levels) or every
    if not set(self.first) <= set(every):
      raise ValueError(f"model.first_levels is {self.first}; there are the levels {every}")
    self.later = tuple(n for n in every if n not in self.first)
    if self.later:
      self.top_k_text, self.top_k_image, self.stage_mix = 50, 100, 1.0
      self.second_stage = (*(f"level_{n}" for n in self.later), "mask")
    kw = dict(dtype=dtype, rngs=rngs)
    image = dict(image)
    self.kind = image.pop("kind")
    if self.kind not in _TOWERS:
      raise ValueError(f"model.image.kind is {self.kind!r}; hat has {', '.join(_TOWERS)}")
    make, widths = _TOWERS[self.kind]
    # A tower stands under its kind, because files of another kind have other names for its parts.
    self.image = nnx.Dict({self.kind: make(**image, **kw)})
    self.text = bert.Bert(**text, **kw)
    project = lambda width: layers.linear(
      width, embed, ("embed", None), kernel_init=layers.normal(0.02), bias_init=layers.zeros, **kw
    )
    of = lambda stage: widths(image, stage)
    self.image_proj = nnx.Dict({str(n): project(of(i)) for n, (i, _) in enumerate(self.levels)})
    self.text_proj = nnx.Dict({str(n): project(text["width"]) for n in every})

  def probe_features(self, batch):
    tokens = _states(self.image[self.kind], self.pixels(batch["image"]), None)[-1]
    return tokens.astype(jnp.float32).mean(1)

  def encode_image(self, batch, key=None):
    states = _states(self.image[self.kind], self.pixels(batch["image"]), key)
    return {
      f"level_{n}": _project(self.image_proj[str(n)], states[i])
      for n, (i, _) in enumerate(self.levels)
    }

  def encode_text(self, batch, key=None):
    mask = batch["text_mask"]
    states = self.text.states(batch["text_ids"], mask, key)[1:]
    out = {
      f"level_{n}": _project(self.text_proj[str(n)], states[t])
      for n, (_, t) in enumerate(self.levels)
    }
    # In two stages the mask goes with the second; the first has its own.
    return out | {"mask": mask} | ({"first_mask": mask} if self.later else {})

  def level_scores(self, images, texts, levels: Sequence[int], direction: str = "") -> list[Array]:
    """Scores of all pairs at each of the levels, float32 [I, T]."""
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
    """What the levels that the first stage left out score; with stage_mix 1 the sum is all."""
    return sum(self.aligned_scores(images, texts, self.later))

  def aligned_scores(self, images, texts, levels: Sequence[int]) -> list[Array]:
    """Scores of M texts [G, M, ...] for each of G pictures at each of the levels, [G, M]."""
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
    loss, metrics = triplet.triplet_loss(
      lambda v, t: sum(self.level_scores(v, t, levels)),
      v,
      t if self.ring else self.replicate(t),
      self.margin,
      self.reduce,
      self.ring,
    )
    own = self.aligned_scores(v, jax.tree.map(lambda x: x[:, None], t), levels)
    return loss, metrics | {f"positive_{n}": s.mean() for n, s in enumerate(own)}


def _project(proj: nnx.Module, x: Array) -> Array:
  return proj(layers.flatten_leading(x)).reshape(*x.shape[:2], -1).astype(jnp.float32)


def _states(tower: nnx.Module, pixels: Array, key: Array | None) -> Sequence[Array]:
  """Tokens [B, P, D] of every stage of a Swin, or block of a ViT."""
  return tower(pixels, key) if isinstance(tower, swin.Swin) else tower.states(pixels)


def _vit(form: Mapping[str, Any]):
  make = lambda **kw: vit.ViT(**{k: v for k, v in kw.items() if k != "drop_path"}, **form)
  return make, lambda image, block: image["width"]


# Image towers by `image.kind`: how one is made, and the width of its i-th states.
_TOWERS = {
  "swin": (swin.Swin, lambda image, stage: image.get("embed", 128) * 2**stage),
  "timm": _vit(dict(act="gelu", eps=1e-6)),
  "clip": _vit(dict(act="quick_gelu", eps=1e-5, ln_pre=True, patch_bias=False)),
}


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> HAT:
  """A HAT from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return HAT(**config, dtype=dtype, rngs=rngs)
