"""Vision Transformer (Dosovitskiy et al., 2021) in the forms of CLIP, timm and DeiT."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.models import layers
from xmodal_jax.models.towers.base import ImageTower

POOLS = ("cls", "mean")


class ViT(ImageTower):
  """Patches, class token, positions, pre-norm blocks. images [B, S, S, 3] -> tokens [B, P, D].

  P = 1 + (S / patch) ** 2: the class token, then the patches row-major. `__call__` and `states`
  return the residual stream without the final norm `ln_post`.

  act: a name of layers.ACTIVATIONS. pool: one of POOLS, the vector of an image: "cls", the class
    token through `ln_post`; "mean", the mean over the patches of all tokens through `ln_post`.
  norm_tokens: whether `tokens` applies `ln_post`; as published, TEAM reads DeiT's tokens with it
    and CLIP's without. ln_pre: a LayerNorm before the first block. output_dim: width of the
    projection of the pooled vector, None for no projection. remat, unroll: see layers.scan.
  drop_path: not implemented, ignored; accepted so that a config of a Swin can switch to a ViT.
  """

  projects = True
  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    *,
    size: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: int = 4,
    act: str = "gelu",
    pool: str = "cls",
    eps: float = 1e-6,
    ln_pre: bool = False,
    patch_bias: bool = True,
    norm_tokens: bool = False,
    output_dim: int | None = None,
    drop_path: float = 0.0,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    del drop_path
    check_choice("model.image.act", act, layers.ACTIVATIONS)
    check_choice("model.image.pool", pool, POOLS)
    if size % patch:
      raise ConfigError(f"image size {size} is not a multiple of the patch size {patch}")
    self.widths, self.norm_tokens, self.pool = (width,) * depth, norm_tokens, pool
    self.dtype, self.loop = dtype, dict(remat=remat, unroll=unroll)
    kw = dict(dtype=dtype, rngs=rngs)
    normal = layers.normal(width**-0.5)
    self.patch = layers.PatchEmbed(width, patch, use_bias=patch_bias, **kw)
    self.cls = nnx.Param(normal(rngs.params(), (width,), jnp.float32), axes=("embed",))
    positions = (size // patch) ** 2 + 1
    pos = normal(rngs.params(), (positions, width), jnp.float32)
    self.pos = nnx.Param(pos, axes=(None, "embed"))
    self.ln_pre = nnx.data(layers.layer_norm(width, eps=eps, **kw) if ln_pre else None)
    self.blocks = layers.stack(
      depth, width, heads, mlp_dim=mlp_ratio * width, act=act, eps=eps, **kw
    )
    self.ln_post = layers.layer_norm(width, eps=eps, **kw)
    self.proj = nnx.data(None)
    if output_dim is not None:
      self.proj = nnx.data(
        layers.linear(width, output_dim, ("embed", None), kernel_init=normal, use_bias=False, **kw)
      )

  def embed(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b p d"]:
    """The input of the first block."""
    x = self.patch(images)
    cls = layers.add(jnp.zeros((len(x), 1, x.shape[-1]), self.dtype), self.cls[...])
    x = layers.add(jnp.concatenate([cls, x], axis=1), self.pos[...])
    return x if self.ln_pre is None else self.ln_pre(x)

  def __call__(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> Float[Array, "b p d"]:
    del key  # no dropout
    return self._blocks(images)

  def states(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> Float[Array, "n b p d"]:
    """The output of each of N blocks."""
    del key
    return self._blocks(images, collect=True)

  def _blocks(self, images, **kw):
    x = self.embed(images)
    return layers.scan(self.blocks, x, batch_sharding=self.batch_sharding, **self.loop, **kw)

  def tokens(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
    return self.ln_post(x) if self.norm_tokens else x

  def pooled(self, x: Float[Array, "b p d"]) -> Float[Array, "b d"]:
    """The class token through the final norm, or the mean over patches, see `pool`."""
    return self.ln_post(x[:, 0]) if self.pool == "cls" else self.ln_post(x[:, 1:]).mean(1)

  def project(self, pooled: Float[Array, "b d"]) -> Float[Array, "b e"]:
    return self.proj(pooled)
