"""A system outside of the package: the mean colour of an image against a bag of words."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.losses import contrastive
from xmodal_jax.models import base, layers

PRESETS = {"base": dict(system="toy", embed=8, image=dict(size=16), text=dict(vocab=714))}


def preset(name: str) -> dict[str, Any]:
  """The model section of a config."""
  return dict(PRESETS[name])


class Toy(base.System):
  """Mean pixel and mean word embedding, each projected, compared by cosine.

  batch: image [B, S, S, 3], text_ids int [B, L]. Features: embed float32 [B, E], unit rows.
  """

  mean = std = (0.5, 0.5, 0.5)

  def __init__(self, *, embed: int, image: Mapping, text: Mapping, dtype: Any, rngs: nnx.Rngs):
    del image  # its size is read by the input pipeline alone
    self.image = layers.linear(3, embed, (None, None), dtype=dtype, rngs=rngs)
    table = jax.random.normal(rngs.params(), (text["vocab"], embed))
    self.word = nnx.Param(table, axes=("vocab", None))

  def encode_image(self, batch, key=None):
    return {"embed": base.l2_normalize(self.image(self.pixels(batch["image"]).mean((1, 2))))}

  def encode_text(self, batch, key=None):
    words = layers.lookup(self.word[...], batch["text_ids"], jnp.float32, self.batch_sharding)
    return {"embed": base.l2_normalize(words.mean(1))}

  def score(self, images, texts):
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def objective(self, images, texts, batch, key):
    return contrastive.infonce(images["embed"], texts["embed"], jnp.float32(10.0), ring=self.ring)


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> Toy:
  config = {k: v for k, v in config.items() if k != "system"}
  return Toy(**config, dtype=dtype, rngs=rngs)
