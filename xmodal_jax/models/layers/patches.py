"""Patch embedding of image towers."""

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from xmodal_jax.models.layers.dense import add, uniform


class PatchEmbed(nnx.Conv):
  """Projects non-overlapping patches: [B, S, S, 3] -> [B, (S/patch)^2, D], patches row-major.

  Initialised as torch's Conv2d. Parameters: kernel [patch, patch, 3, D], bias [D].
  """

  def __init__(
    self, width: int, patch: int, *, use_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    bound = uniform((3 * patch**2) ** -0.5)
    super().__init__(
      3,
      width,
      (patch, patch),
      use_bias=use_bias,
      kernel_init=bound,
      bias_init=bound,
      kernel_metadata={"axes": (None, None, None, "embed")},
      bias_metadata={"axes": ("embed",)},
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b p d"]:
    patch = self.kernel.shape[0]
    # A convolution with kernel = stride is a matmul over patches, which is fast on every backend.
    x = rearrange(images.astype(self.dtype), "b (i p) (j q) c -> (b i j) (p q c)", p=patch, q=patch)
    x = x @ rearrange(self.kernel[...], "p q c d -> (p q c) d").astype(self.dtype)
    x = x if self.bias is None else add(x, self.bias[...])
    return x.reshape(len(images), -1, x.shape[-1])
