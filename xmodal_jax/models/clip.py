"""CLIP (Radford et al., 2021) and its fine-tuning for retrieval, CLIP_ITM."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.losses import contrastive
from xmodal_jax.models import base, layers
from xmodal_jax.models.towers import clip_text, registry

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Parameters that are float16 in the released files and in CLIP_ITM's training: convolutions, dense
# layers and projections. Embeddings, positions, norms and the scale are float32.
HALF_PATHS = (
  r"(^|/)(patch|conv\d|down_conv|q|k|v|c|out|wi|wo|proj)/kernel$",
  r"(^|/)(q|k|v|c|out|wi|wo)/bias$",
)


def _vit(size, patch, width, depth):
  sizes = dict(size=size, patch=patch, width=width, depth=depth, heads=width // 64)
  return dict(kind="vit", **sizes, pool="cls")


def _resnet(size, width, depths):
  return dict(kind="resnet", size=size, width=width, depths=depths, heads=width // 2)


def _preset(embed: int, image: dict, text_width: int, **text_kw) -> dict[str, Any]:
  txt = dict(vocab=49408, context=77, width=text_width, depth=12, heads=text_width // 64)
  both = dict(image=image, text=txt | dict(causal=True) | text_kw)
  return dict(system="clip", embed=embed, act="quick_gelu", mean=MEAN, std=STD, **both)


# CLIP's released models: embed, image tower, text width.
PRESETS = {
  "rn50": _preset(1024, _resnet(224, 64, (3, 4, 6, 3)), 512),
  "rn101": _preset(512, _resnet(224, 64, (3, 4, 23, 3)), 512),
  "rn50x4": _preset(640, _resnet(288, 80, (4, 6, 10, 6)), 640),
  "rn50x16": _preset(768, _resnet(384, 96, (6, 8, 18, 8)), 768),
  "rn50x64": _preset(1024, _resnet(448, 128, (3, 15, 36, 10)), 1024),
  "vit_b32": _preset(512, _vit(224, 32, 768, 12), 512),
  "vit_b16": _preset(512, _vit(224, 16, 768, 12), 512),
  "vit_l14": _preset(768, _vit(224, 14, 1024, 24), 768),
  "vit_l14_336": _preset(768, _vit(336, 14, 1024, 24), 768),
  # Not a released model: small enough to train from scratch on two CPU cores.
  "tiny": _preset(128, _vit(112, 16, 192, 4) | {"heads": 3}, 192, depth=3, heads=3),
}


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict."""
  if name not in PRESETS:
    raise ConfigError(f"clip has no variant {name!r}; there are {', '.join(PRESETS)}")
  # Rematerialization of the scan over layers: see layers.scan. Saving only the outputs of dense
  # layers takes a third less memory for ViT-B/32, and no more time on CPU.
  loop = {"remat": "dots_with_no_batch_dims_saveable", "unroll": 1}
  return copy.deepcopy(PRESETS[name]) | loop | {"loss": "infonce", "same_image": "keep"}


# What a config of CLIP means that lacks these keys of its model section.
DEFAULTS = {
  "act": "quick_gelu", "mean": MEAN, "std": STD, "image.pool": "cls", "text.causal": True,
}  # fmt: skip

# Values of model.image.kind whose name in towers.registry differs.
_KINDS = {"vit": "clip"}


class CLIP(base.System):
  """Two towers, pooled and projected; pairs are scored by cosine.

  batch: image [B, S, S, 3], text_ids int [B, L]. Features: embed float32 [B, E], unit vectors.
  image: `kind` is "vit", "resnet" or another name of towers.registry. act: a name of
  layers.ACTIVATIONS, of the text tower and of an image tower of kind "vit". mean, std: pixel
  statistics. loss: "infonce", or "sigmoid" (SigLIP; Zhai et al., 2023) with a learned bias.
  same_image: see losses.contrastive.infonce. remat, unroll: see layers.scan.
  """

  def __init__(
    self,
    *,
    embed: int,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    act: str = "quick_gelu",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: Any = jnp.float32,
    remat: str = "",
    unroll: int = 1,
    loss: str = "infonce",
    same_image: str = "keep",
    rngs: nnx.Rngs,
  ):
    check_choice("model.loss", loss, ("infonce", "sigmoid"))
    self.mean, self.std = base.pixel_statistics(mean, std)
    check_choice("model.same_image", same_image, contrastive.SAME_IMAGE)
    self.same_image = same_image
    kw = dict(dtype=dtype, rngs=rngs)
    kind = _KINDS.get(image["kind"], image["kind"])
    acts = dict(act=act) if kind == "clip" else {}
    image = acts | dict(image) | dict(kind=kind, remat=remat, unroll=unroll)
    self.image = registry.build_image_tower(image, output_dim=embed, **kw)
    self.image_proj = nnx.data(None)
    if not self.image.projects:
      proj = layers.linear(self.image.widths[-1], embed, ("embed", None), use_bias=False, **kw)
      self.image_proj = nnx.data(proj)
    text = dict(act=act) | dict(text) | dict(remat=remat, unroll=unroll)
    self.text = clip_text.TextTransformer(embed=embed, **text, **kw)
    self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)), axes=())
    bias = nnx.Param(jnp.float32(contrastive.INITIAL_BIAS), axes=()) if loss == "sigmoid" else None
    self.logit_bias = nnx.data(bias)

  def image_features(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> Float[Array, "b e"]:
    """Embeddings of normalised pixels before the L2 norm."""
    pooled = self.image.pooled(self.image(images, key))
    return self.image.project(pooled) if self.image_proj is None else self.image_proj(pooled)

  def text_features(self, ids: Int[Array, "b l"]) -> Float[Array, "b e"]:
    """Embeddings of token ids before the L2 norm."""
    return self.text.pool(self.text(ids), ids)

  def probe_features(self, batch):
    """A ViT's class token through its final norm; a ResNet's attention pool output."""
    return self.image.pooled(self.image(self.pixels(batch["image"]))).astype(jnp.float32)

  def encode_image(self, batch, key=None):
    return {"embed": base.l2_normalize(self.image_features(self.pixels(batch["image"]), key))}

  def encode_text(self, batch, key=None):
    return {"embed": base.l2_normalize(self.text_features(batch["text_ids"]))}

  def score(self, images, texts):
    """Cosine [I, T]; the scale is positive and does not change the order."""
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def objective(self, images, texts, batch, key):
    scale, embeds = jnp.exp(self.logit_scale[...]), (images["embed"], texts["embed"])
    same = dict(image_id=batch.get("image_id"), same_image=self.same_image)
    if self.logit_bias is None:
      loss, metrics = contrastive.infonce(*embeds, scale, **same, ring=self.ring)
    else:
      loss, metrics = contrastive.sigmoid(
        *embeds, scale, self.logit_bias[...], **same, ring=self.ring
      )
    return loss, metrics | contrastive.same_image_metrics(batch) | {"logit_scale": scale}


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> CLIP:
  """A CLIP from the model section of a config (see PRESETS; optional keys remat, unroll)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return CLIP(**config, dtype=dtype, rngs=rngs)
