"""CLIP (Radford et al., 2021) and its fine-tuning for retrieval, CLIP_ITM."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.losses import contrastive
from xmodal_jax.models import base
from xmodal_jax.models.towers import clip_text, resnet, vit

Array = jax.Array

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Parameters that the released files and CLIP_ITM's training hold in fp16: convolutions, dense
# layers and projections. Embeddings, positions, norms and the scale are float32.
HALF_PATHS = (
  r"(^|/)(patch|conv\d|down_conv|q|k|v|c|out|wi|wo|proj)/kernel$",
  r"(^|/)(q|k|v|c|out|wi|wo)/bias$",
)


def _vit(size, patch, width, depth):
  return dict(kind="vit", size=size, patch=patch, width=width, depth=depth, heads=width // 64)


def _resnet(size, width, depths):
  return dict(kind="resnet", size=size, width=width, depths=depths)


def _preset(embed: int, image: dict, text_width: int, **text_kw) -> dict[str, Any]:
  txt = dict(vocab=49408, context=77, width=text_width, depth=12, heads=text_width // 64)
  return dict(system="clip", embed=embed, image=image, text=txt | text_kw)


# Table of CLIP's released models: embed, image tower, text width.
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
  # Not a released model: from scratch on two CPU cores.
  "tiny": _preset(128, _vit(112, 16, 192, 4) | {"heads": 3}, 192, depth=3, heads=3),
}


def preset(name: str) -> dict[str, Any]:
  """The model section of a config for one of PRESETS, as a fresh nested dict."""
  if name not in PRESETS:
    raise ValueError(f"clip has no variant {name!r}; there are {', '.join(PRESETS)}")
  # How the loop over layers is compiled, beside what the model is: see layers.scan. Keeping only
  # the dense layers' outputs takes a third less memory for ViT-B/32, and no more time on CPU.
  loop = {"remat": "dots_with_no_batch_dims_saveable", "unroll": 1}
  return copy.deepcopy(PRESETS[name]) | loop | {"loss": "infonce"}


class CLIP(base.System):
  """Two towers, pooled and projected, compared by scaled cosine.

  batch: image [B, S, S, 3], text_ids int [B, L]. Features: embed float32 [B, E], unit rows.
  loss: "infonce", or "sigmoid" (SigLIP), which has a bias of its own.
  """

  mean, std = MEAN, STD

  def __init__(
    self,
    *,
    embed: int,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    dtype: Any = jnp.float32,
    remat: str = "",
    unroll: int = 1,
    loss: str = "infonce",
    rngs: nnx.Rngs,
  ):
    if loss not in ("infonce", "sigmoid"):
      raise ValueError(f"model.loss is {loss!r}; there are infonce, sigmoid")
    loop = dict(dtype=dtype, remat=remat, unroll=unroll)
    self.image = build_image_tower(image, embed, rngs=rngs, **loop)
    self.text = build_text_tower(text, embed, rngs=rngs, **loop)
    self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)), axes=())
    bias = nnx.Param(jnp.float32(contrastive.INITIAL_BIAS), axes=()) if loss == "sigmoid" else None
    self.logit_bias = nnx.data(bias)

  def image_features(self, images: Array, train: bool = False) -> Array:
    """Normalised pixels [B, S, S, 3] -> [B, E] before the L2 norm."""
    if isinstance(self.image, vit.ViT):
      return self.image.pool(self.image(images))
    return self.image(images, train=train)

  def text_features(self, ids: Array) -> Array:
    """ids int [B, L] -> [B, E] before the L2 norm."""
    return self.text.pool(self.text(ids), ids)

  def probe_features(self, batch):
    """Of a ViT the class token, normalised; of a ResNet what its attention pool gives."""
    images = self.pixels(batch["image"])
    if isinstance(self.image, vit.ViT):
      return self.image.ln_post(self.image(images)[:, 0]).astype(jnp.float32)
    return self.image(images).astype(jnp.float32)

  def encode_image(self, batch, key=None):
    x = self.image_features(self.pixels(batch["image"]), train=key is not None)
    return {"embed": base.l2_normalize(x)}

  def encode_text(self, batch, key=None):
    return {"embed": base.l2_normalize(self.text_features(batch["text_ids"]))}

  def score(self, images, texts):
    """Cosine [I, T]: exp(logit_scale) does not change an order."""
    return jnp.dot(images["embed"], texts["embed"].T, precision="highest")

  def objective(self, images, texts, batch, key):
    scale, pair = jnp.exp(self.logit_scale[...]), (images["embed"], texts["embed"])
    if self.logit_bias is None:
      loss, metrics = contrastive.infonce(*pair, scale, ring=self.ring)
    else:
      loss, metrics = contrastive.sigmoid(*pair, scale, self.logit_bias[...], self.ring)
    return loss, metrics | {"logit_scale": scale}


def build_image_tower(config: Mapping[str, Any], embed: int, *, unroll: int, **kw) -> nnx.Module:
  config = dict(config)
  kind = config.pop("kind")
  if kind == "vit":
    kw |= dict(act="quick_gelu", eps=1e-5, ln_pre=True, patch_bias=False)
    return vit.ViT(embed=embed, unroll=unroll, **config, **kw)
  if kind == "resnet":
    return resnet.ModifiedResNet(embed=embed, **config, **kw)
  raise ValueError(f"model.image.kind is {kind!r}; clip has 'vit' and 'resnet'")


def build_text_tower(config: Mapping[str, Any], embed: int, **kw) -> clip_text.TextTransformer:
  return clip_text.TextTransformer(embed=embed, **config, **kw)


def build(config: Mapping[str, Any], *, dtype=jnp.float32, rngs: nnx.Rngs) -> CLIP:
  """A CLIP from the model section of a config (see PRESETS; optional keys remat, unroll)."""
  config = {k: v for k, v in config.items() if k != "system"}
  return CLIP(**config, dtype=dtype, rngs=rngs)
