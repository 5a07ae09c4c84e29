"""ZeroVL: contrastive pre-training with limited resources (Cui et al., 2022)."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.losses import contrastive, triplet
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import bert, registry

# Pixel statistics: ImageNet's, and those of timm's ImageNet-21k models. The two released files
# differ in them, and the files do not record which were used.
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

TEMPERATURE, BOUNDS = 0.02, (0.001, 0.5)  # cosines are divided by the temperature
EPS = 1e-8  # added to the norm in `normalize`

_VIT = dict(size=224, patch=16, width=768, depth=12, heads=12)
_BERT = dict(vocab=30522, context=512, width=768, depth=12, heads=12, mlp=3072)
_BOTH = dict(system="zerovl", embed=512, image=_VIT, text=_BERT)

PRESETS = {
  "pretrain": dict(**_BOTH, **IMAGENET, learn_temperature=False),
  "14m": dict(**_BOTH, **IMAGENET, learn_temperature=True),
  "100m": dict(**_BOTH, **HALF, learn_temperature=True),
  # The image tower with a classifier of ImageNet-1K: the files of a linear probe.
  "linear_probe": dict(system="zerovl", image=_VIT, classes=1000, **HALF),
}

LOSSES = {
  "nce": dict(smoothing=0.0, gather_gradient=True, groups=1),
  "sigmoid": {},
  "triplet": dict(margin=0.2, reduce="max"),
}
"""Objectives and their options.

gather_gradient: False: candidates get no gradient, so that each direction trains one tower (the
  default of the released code; its recipes set True).
groups: the batch is cut into so many contiguous groups, each with a contrastive loss of its own.
The others: see losses.contrastive and losses.triplet.
"""

# Keys of the model section that do not change what is computed from a text or an image.
TRAINING = ("temperature",)


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict.

  Includes options that a file does not record: remat and unroll, dropout, the objective.
  """
  if name not in PRESETS:
    raise ConfigError(f"zerovl has no variant {name!r}; there are {', '.join(PRESETS)}")
  c = copy.deepcopy(PRESETS[name])
  c["image"] |= dict(remat="dots_with_no_batch_dims_saveable", unroll=1)
  if "text" not in c:
    return c
  c["text"] |= dict(remat="", unroll=1, dropout=0.1, attention_dropout=0.1)
  return c | dict(
    temperature=TEMPERATURE,
    loss=dict(name="nce", **LOSSES["nce"]),
    same_image="keep",
    mixup=dict(beta=0.0, block=0),
  )


class ZeroVL(base.System):
  """timm ViT and BERT, each projected without bias; pairs are scored by cosine / temperature.

  batch: image [B, S, S, 3], text_ids int [B, L], text_mask bool [B, L].
  Features: embed float32 [B, E], unit vectors; those of texts in training are not normalised, since
  mixup acts on the projections.
  image: sizes of the tower; `kind` is a name of towers.registry, by default "timm".
  loss: a name of LOSSES with its options. learn_temperature: a parameter, clipped to BOUNDS.
  same_image: see losses.contrastive.infonce; mixup partners remain targets.
  mixup: beta 0: none. Else each step mixes either the images or the texts of all pairs with those
  of their partners (losses.contrastive.mixup_partners), with a weight drawn from Beta(beta, beta).
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
    same_image: str = "keep",
    mixup: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.mean, self.std = base.pixel_statistics(mean, std)
    kw = dict(dtype=dtype, rngs=rngs)
    self.image = registry.build_image_tower({"kind": "timm"} | dict(image), **kw)
    self.text = nnx.data(None if text is None else bert.Bert(**text, **kw))
    width = self.image.widths[-1]
    project = functools.partial(layers.linear, axes=("embed", None), use_bias=False, **kw)
    self.image_proj = nnx.data(project(width, embed) if text else None)
    self.text_proj = nnx.data(project(text["width"], embed) if text else None)
    # float32 whatever the compute dtype: it is small, and its input is float32.
    head = layers.linear(width, classes, ("embed", None), rngs=rngs) if classes else None
    self.classifier = nnx.data(head)
    self.loss_name, self.options = _loss_options(loss or {"name": "nce"})
    check_choice("model.same_image", same_image, contrastive.SAME_IMAGE)
    self.same_image = same_image
    mixup = mixup or dict(beta=0.0, block=0)
    self.beta, self.block = mixup["beta"], mixup["block"]
    if self.beta and self.loss_name != "nce":
      raise ConfigError(f"model.mixup.beta is {self.beta}: mixup needs model.loss.name='nce'")
    self.fixed = None if learn_temperature else temperature
    self.temperature = _scalar(temperature if learn_temperature else None)
    self.logit_bias = _scalar(contrastive.INITIAL_BIAS if self.loss_name == "sigmoid" else None)

  def tau(self) -> Float[Array, ""]:
    """The temperature, clipped to BOUNDS; beyond them a learned one has no gradient."""
    value = jnp.float32(self.fixed) if self.temperature is None else self.temperature[...]
    return jnp.clip(value, *BOUNDS)

  def probe_features(self, batch):
    return self.image.pooled(self.image(self._pixels(batch))).astype(jnp.float32)

  def _pixels(self, batch) -> Float[Array, "b s s 3"]:
    """Normalised pixels, mixed with those of the partner where `prepare` added one."""
    x = self.pixels(batch["image"])
    if "image_partner" not in batch:
      return x
    mix = batch["image_mix"][:, None, None, None]
    return mix * x + (1 - mix) * self.pixels(batch["image_partner"])

  def encode_image(self, batch, key=None):
    pooled = self.image.pooled(self.image(self._pixels(batch), key)).astype(jnp.float32)
    return {"embed": normalize(self.image_proj(pooled))}

  def encode_text(self, batch, key=None):
    x = self.text_proj(self.text(batch["text_ids"], batch["text_mask"], key)[:, 0])
    x = x.astype(jnp.float32)
    return {"embed": normalize(x) if key is None else x}

  def score(self, images, texts):
    """Cosine [I, T]; the temperature is positive and does not change the order."""
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def draw(self, batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """(weight of a pair's own image or text, whether images are mixed rather than texts)."""
    del batch
    k_weight, k_coin = jax.random.split(key)
    return jax.random.beta(k_weight, self.beta, self.beta), jax.random.bernoulli(k_coin)

  def prepare(self, batch, key):
    if not self.beta:
      return batch
    weight, mix_images = self.draw(batch, key)
    image = batch["image"]
    full = functools.partial(jnp.full, len(image), dtype=jnp.float32)
    return dict(batch) | {
      # Kept as uint8; `_pixels` mixes chunk by chunk, since float32 would take four times as much.
      "image_partner": self.partner(image),
      "image_mix": full(jnp.where(mix_images, weight, 1)),
      "text_mix": full(jnp.where(mix_images, 1, weight)),
    }

  def partner(self, x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """The batch in the order of mixup partners: reversed within each block."""
    n = self.block or len(x)
    contrastive.mixup_partners(len(x), n)  # raises where the blocks do not divide the batch
    return x.reshape(-1, n, *x.shape[1:])[:, ::-1].reshape(x.shape)

  def mixed(
    self, images, texts, batch
  ) -> tuple[Float[Array, "b e"], Float[Array, "b e"], Float[Array, ""] | float]:
    """Unit vectors of images and texts, texts mixed, and the weight of a row's own target."""
    image, text, weight = images["embed"], texts["embed"], 1.0
    if self.beta:
      text_mix = batch["text_mix"][:, None]
      text = text_mix * text + (1 - text_mix) * self.partner(text)
      weight = (batch["image_mix"] * batch["text_mix"])[0]  # one of the two is 1
    return image, normalize(text), weight

  def objective(self, images, texts, batch, key):
    del key
    image, text, mix = self.mixed(images, texts, batch)
    tau, count = self.tau(), contrastive.same_image_metrics(batch)
    same = dict(image_id=batch.get("image_id"), same_image=self.same_image)
    if self.loss_name == "sigmoid":
      loss, metrics = contrastive.sigmoid(
        image, text, 1 / tau, self.logit_bias[...], **same, ring=self.ring
      )
      return loss, metrics | count | {"temperature": tau}
    if self.loss_name == "triplet":
      sides, dot = contrastive.mask_same_image(triplet.dot, image, text, **same)
      loss, _ = triplet.triplet_loss(dot, *sides, **dict(self.options), ring=self.ring)
      return loss, count | {"temperature": tau}
    loss, metrics = self._nce(image, text, tau, mix, same)
    return loss, metrics | count

  def _nce(self, image, text, tau, mix, same):
    options = dict(self.options)
    (i2t, i2t_metrics), (t2i, t2i_metrics) = contrastive.bidirectional_nce(
      image,
      text,
      tau,
      mix=mix,
      mixed=bool(self.beta),
      block=self.block,
      **options,
      **same,
      ring=self.ring,
    )
    metrics = {
      "loss_i2t": i2t,
      "loss_t2i": t2i,
      "accuracy_i2t": i2t_metrics["accuracy"],
      "accuracy_t2i": t2i_metrics["accuracy"],
      "temperature": tau,
    }
    if self.beta or options["smoothing"]:
      # The loss that the original's runner for accumulated gradients logs.
      metrics["loss_unmixed"] = (i2t_metrics["loss_unmixed"] + t2i_metrics["loss_unmixed"]) / 2
      metrics["mix"] = mix
    return (i2t + t2i) / 2, metrics


def normalize(x: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
  """x / (|x| + EPS) over the last axis in float32, as the original has it."""
  x = x.astype(jnp.float32)
  # The root at 0 has no gradient: a row of zeros stays 0 and gets none.
  square = (x * x).sum(-1, keepdims=True)
  norm = jnp.sqrt(jnp.where(square > 0, square, 1))
  return x / (jnp.where(square > 0, norm, 0) + EPS)


def _loss_options(loss: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Any], ...]]:
  """(name, its options with defaults filled in) of the `loss` section; raises ConfigError."""
  options = dict(loss)
  name = options.pop("name")
  check_choice("model.loss.name", name, LOSSES)
  known = LOSSES[name]
  if unknown := options.keys() - known.keys():
    names = ", ".join(known) or "none"
    raise ConfigError(f"model.loss.{min(unknown)} is no option of {name}; it has {names}")
  return name, tuple((known | options).items())


def _scalar(value: float | None):
  """A float32 parameter [], or an empty slot."""
  return nnx.data(None if value is None else nnx.Param(jnp.float32(value), axes=()))


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> ZeroVL:
  """A ZeroVL from the model section of a config (see `preset`)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return ZeroVL(**config, dtype=dtype, rngs=rngs)
