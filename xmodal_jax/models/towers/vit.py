"""Vision Transformer (Dosovitskiy et al., 2021) in the forms of CLIP, timm and DeiT."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models import layers

Array = jax.Array


class ViT(nnx.Module):
  """Patches, class token, positions, pre-norm blocks. images [B, S, S, 3] -> tokens [B, P, D].

  P = 1 + (S / patch) ** 2, class token first, patches row-major. The tokens are the raw residual
  stream: the owner applies `ln_post` to what it needs, because systems differ in that; `pool` is
  CLIP's way, and exists where `embed` is given.
  """

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
    eps: float = 1e-6,
    ln_pre: bool = False,
    patch_bias: bool = True,
    embed: int | None = None,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if size % patch:
      raise ValueError(f"image size {size} is not a multiple of the patch size {patch}")
    self.dtype, self.loop = dtype, dict(remat=remat, unroll=unroll)
    normal, fan_in = layers.normal(width**-0.5), layers.uniform((3 * patch**2) ** -0.5)
    param = lambda *shape: normal(rngs.params(), shape, jnp.float32)
    norm = lambda: layers.layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
    self.patch = nnx.Conv(
      3,
      width,
      (patch, patch),
      use_bias=patch_bias,
      kernel_init=fan_in,
      bias_init=fan_in,
      kernel_metadata={"axes": (None, None, None, "embed")},
      bias_metadata={"axes": ("embed",)},
      rngs=rngs,
    )
    self.cls = nnx.Param(param(width), axes=("embed",))
    self.pos = nnx.Param(param((size // patch) ** 2 + 1, width), axes=(None, "embed"))
    self.ln_pre = nnx.data(norm() if ln_pre else None)
    self.blocks = layers.stack(
      depth,
      width,
      heads,
      mlp_dim=mlp_ratio * width,
      act=act,
      eps=eps,
      dtype=dtype,
      rngs=rngs,
    )
    self.ln_post = norm()
    self.proj = nnx.data(
      None
      if embed is None
      else layers.linear(
        width,
        embed,
        ("embed", None),
        kernel_init=normal,
        use_bias=False,
        dtype=dtype,
        rngs=rngs,
      )
    )

  def embed(self, images: Array) -> Array:
    """images [B, S, S, 3] -> [B, P, D]: the input of the first block."""
    b, s, p = len(images), images.shape[1], self.patch.kernel.shape[0]
    g = s // p
    # A convolution with kernel = stride is a matmul over patches, which every backend does well.
    x = images.astype(self.dtype).reshape(b, g, p, g, p, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, g * g, p * p * 3)
    x = x @ self.patch.kernel[...].reshape(p * p * 3, -1).astype(self.dtype)  # [B, g*g, D]
    if self.patch.bias is not None:
      x = layers.add(x, self.patch.bias[...])
    cls = layers.add(jnp.zeros((b, 1, x.shape[-1]), self.dtype), self.cls[...])
    x = layers.add(jnp.concatenate([cls, x], axis=1), self.pos[...])
    return x if self.ln_pre is None else self.ln_pre(x)

  def __call__(self, images: Array) -> Array:
    return self._blocks(images)

  def states(self, images: Array) -> Array:
    """Every block's output [N, B, P, D]."""
    return self._blocks(images, collect=True)

  def _blocks(self, images: Array, **kw) -> Array:
    return layers.scan(
      self.blocks, self.embed(images), batch_sharding=self.batch_sharding, **self.loop, **kw
    )

  def pool(self, tokens: Array) -> Array:
    """tokens [B, P, D] -> [B, embed]: the class token, normalised and projected."""
    return self.proj(self.ln_post(tokens[:, 0]))
