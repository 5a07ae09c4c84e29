"""ZeroVL: contrastive pre-training with limited resources (Cui et al., 2022)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.losses import contrastive, triplet
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import bert, vit

Array = jax.Array

# Pixel statistics: ImageNet's, and what ImageNet-21k models of timm were trained with. The two
# released files differ in them, and nothing in a file says which it is.
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

TEMPERATURE, BOUNDS = 0.02, (0.001, 0.5)  # what cosines are divided by
EPS = 1e-8  # added to a norm

_VIT = dict(size=224, patch=16, width=768, depth=12, heads=12)
_BERT = dict(vocab=30522, context=512, width=768, depth=12, heads=12, mlp=3072)
_BOTH = dict(system="zerovl", embed=512, image=_VIT, text=_BERT)

PRESETS = {
  "pretrain": dict(**_BOTH, **IMAGENET, learn_temperature=False),
  "14m": dict(**_BOTH, **IMAGENET, learn_temperature=True),
  "100m": dict(**_BOTH, **HALF, learn_temperature=True),
  # The image tower and a classifier of ImageNet-1K, as a linear probe leaves them.
  "linear_probe": dict(system="zerovl", image=_VIT, classes=1000, **HALF),
}

LOSSES = {
  "nce": dict(smoothing=0.0, gather_gradient=True, groups=1),
  "sigmoid": {},
  "triplet": dict(margin=0.2, reduce="max"),
}
"""Objectives and their options. gather_gradient: False: a query's candidates get no gradient, so
each direction trains one tower (the release's default; its recipes set True). groups: equal runs of
rows that are contrasted each for itself. The others: see losses.contrastive and losses.triplet."""


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  With what is not in a file: how loops over layers are compiled, dropout, and the objective.
  """
  if name not in PRESETS:
    raise ValueError(f"zerovl has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  c["image"] |= dict(remat="dots_with_no_batch_dims_saveable", unroll=1)
  if "text" not in c:
    return c
  c["text"] |= dict(remat="", unroll=1, dropout=0.1, attention_dropout=0.1)
  return c | dict(
    temperature=TEMPERATURE, loss=dict(name="nce", **LOSSES["nce"]), mixup=dict(beta=0.0, block=0)
  )


class ZeroVL(base.System):
  """timm ViT and BERT, each projected without bias, compared by cosine over a temperature.

  batch: image [B, S, S, 3], text_ids int [B, L], text_mask bool [B, L].
  Features: embed float32 [B, E], unit rows; of texts in training as the projection gives them,
  because that is where mixup comes in.
  loss: a name of LOSSES with its options. learn_temperature: a parameter, bounded by BOUNDS.
  mixup: beta 0: none; else each step mixes either the pictures or the texts of all pairs with those
  of their partners, see losses.contrastive.mixup_partners, by a weight drawn from Beta(beta, beta).
  Without `text` and with `classes`: an image tower and a linear classifier of its features.
  """

  def __init__(
    self,
    *,
    image: Mapping[str, Any],
    text: Mapping[str, Any] | None = None,
    embed: int = 0,
    classes: int = 0,
    mean: Sequence[float] = IMAGENET["mean"],
    std: Sequence[float] = IMAGENET["std"],
    temperature: float = TEMPERATURE,
    learn_temperature: bool = False,
    loss: Mapping[str, Any] | None = None,
    mixup: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.mean, self.std = tuple(mean), tuple(std)
    kw = dict(dtype=dtype, rngs=rngs)
    self.image = vit.ViT(act="gelu", eps=1e-6, **image, **kw)
    project = lambda width: layers.linear(width, embed, ("embed", None), use_bias=False, **kw)
    self.text = nnx.data(None if text is None else bert.Bert(**text, **kw))
    self.image_proj = nnx.data(project(image["width"]) if text else None)
    self.text_proj = nnx.data(project(text["width"]) if text else None)
    # float32: a classifier is small, and trained on features that are.
    head = layers.linear(image["width"], classes, ("embed", None), rngs=rngs) if classes else None
    self.classifier = nnx.data(head)
    loss = dict(loss or {"name": "nce"})
    self.loss_name = loss.pop("name")
    if self.loss_name not in LOSSES:
      raise ValueError(f"model.loss.name is {self.loss_name!r}; there are {', '.join(LOSSES)}")
    known = LOSSES[self.loss_name]
    if unknown := loss.keys() - known.keys():
      options = ", ".join(known) or "none"
      raise ValueError(
        f"model.loss.{min(unknown)} is no option of {self.loss_name}; it has {options}"
      )
    self.options = tuple((known | loss).items())
    mixup = mixup or dict(beta=0.0, block=0)
    self.beta, self.block = mixup["beta"], mixup["block"]
    if self.beta and self.loss_name != "nce":
      raise ValueError(f"model.mixup.beta is {self.beta}: mixup has targets with loss 'nce' only")
    self.fixed = None if learn_temperature else temperature
    scalar = lambda value: nnx.data(nnx.Param(jnp.float32(value), axes=()))
    self.temperature = scalar(temperature) if learn_temperature else nnx.data(None)
    self.logit_bias = (
      scalar(contrastive.INITIAL_BIAS) if self.loss_name == "sigmoid" else nnx.data(None)
    )

  def tau(self) -> Array:
    """The temperature in use; beyond its bounds a learned one has no gradient."""
    value = jnp.float32(self.fixed) if self.temperature is None else self.temperature[...]
    return jnp.clip(value, *BOUNDS)

  def probe_features(self, batch):
    tower = self.image
    return tower.ln_post(tower(self._pixels(batch))[:, 0]).astype(jnp.float32)

  def _pixels(self, batch) -> Array:
    x = self.pixels(batch["image"])
    if "image_partner" not in batch:
      return x
    mix = batch["image_mix"][:, None, None, None]
    return mix * x + (1 - mix) * self.pixels(batch["image_partner"])

  def encode_image(self, batch, key=None):
    return {"embed": normalize(self.image_proj(self.probe_features(batch)))}

  def encode_text(self, batch, key=None):
    x = self.text_proj(self.text(batch["text_ids"], batch["text_mask"], key)[:, 0])
    x = x.astype(jnp.float32)
    return {"embed": normalize(x) if key is None else x}

  def score(self, images, texts):
    """Cosine [I, T]: the temperature does not change an order."""
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def draw(self, batch, key: Array) -> tuple[Array, Array]:
    """(weight of a row itself [], whether it is the pictures that are mixed bool [])."""
    del batch
    k_weight, k_coin = jax.random.split(key)
    return jax.random.beta(k_weight, self.beta, self.beta), jax.random.bernoulli(k_coin)

  def prepare(self, batch, key):
    if not self.beta:
      return batch
    weight, of_image = self.draw(batch, key)
    image = batch["image"]
    rows = lambda x: jnp.full(len(image), x, jnp.float32)
    return dict(batch) | {
      # As they came, in bytes: the batch in float32 would be four times as large.
      "image_partner": self.partner(image),
      "image_mix": rows(jnp.where(of_image, weight, 1)),
      "text_mix": rows(jnp.where(of_image, 1, weight)),
    }

  def partner(self, x: Array) -> Array:
    """Rows of [B, ...] in the order of their mixup partners."""
    n = self.block or len(x)
    contrastive.mixup_partners(len(x), n)  # raises where the blocks do not divide the batch
    return x.reshape(-1, n, *x.shape[1:])[:, ::-1].reshape(x.shape)

  def mixed(self, images, texts, batch) -> tuple[Array, Array, Array | float]:
    """(pictures [B, E], texts [B, E], unit rows, and the weight of a row's own target)."""
    image, text, weight = images["embed"], texts["embed"], 1.0
    if self.beta:
      of_text = batch["text_mix"][:, None]
      text = of_text * text + (1 - of_text) * self.partner(text)
      weight = (batch["image_mix"] * batch["text_mix"])[0]  # one of them is 1
    return image, normalize(text), weight

  def objective(self, images, texts, batch, key):
    del key
    image, text, mix = self.mixed(images, texts, batch)
    tau, options = self.tau(), dict(self.options)
    if self.loss_name == "sigmoid":
      loss, metrics = contrastive.sigmoid(image, text, 1 / tau, self.logit_bias[...], self.ring)
      return loss, metrics | {"temperature": tau}
    if self.loss_name == "triplet":
      loss, _ = triplet.triplet_loss(triplet.dot, image, text, **options, ring=self.ring)
      return loss, {"temperature": tau}
    (i2t, of_i2t), (t2i, of_t2i) = contrastive.bidirectional_nce(
      image, text, tau, mix=mix, block=self.block, **options, ring=self.ring
    )
    metrics = {
      "loss_i2t": i2t,
      "loss_t2i": t2i,
      "accuracy_i2t": of_i2t["accuracy"],
      "accuracy_t2i": of_t2i["accuracy"],
      "temperature": tau,
    }
    if self.beta or options["smoothing"]:
      # What the original's accumulating runner reports as its loss.
      metrics["loss_unmixed"] = (of_i2t["loss_unmixed"] + of_t2i["loss_unmixed"]) / 2
      metrics["mix"] = mix
    return (i2t + t2i) / 2, metrics


def normalize(x: Array) -> Array:
  """x / (|x| + EPS) over the last axis in float32, as the original writes it."""
  x = x.astype(jnp.float32)
  # The root of 0 has no gradient: a row of zeros stays one, and gets none.
  square = (x * x).sum(-1, keepdims=True)
  norm = jnp.sqrt(jnp.where(square > 0, square, 1))
  return x / (jnp.where(square > 0, norm, 0) + EPS)


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> ZeroVL:
  """A ZeroVL from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return ZeroVL(**config, dtype=dtype, rngs=rngs)
