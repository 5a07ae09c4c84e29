"""The pre-norm Transformer block of CLIP and ViT."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from xmodal_jax.models.layers.attention import dot_product_attention
from xmodal_jax.models.layers.dense import (
  ACTIVATIONS,
  flatten_leading,
  layer_norm,
  linear,
  merge_heads,
  normal,
  split_heads,
  uniform,
  zeros,
)


class Block(nnx.Module):
  """Pre-norm Transformer block without dropout. x [B, L, D] -> [B, L, D].

  std: standard deviations (attention, projection, mlp) of normal initialisation, as CLIP's text
  tower has it; None: the defaults of torch's MultiheadAttention and Linear, with the Xavier bound
  of the fused [3D, D] matrix.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    *,
    mlp_dim: int,
    act: str,
    eps: float = 1e-5,
    causal: bool = False,
    std: tuple[float, float, float] | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    attn, proj, mlp = map(normal, std) if std else (uniform((6 / (4 * dim)) ** 0.5), None, None)
    dense = functools.partial(linear, heads=heads, dtype=dtype, rngs=rngs)
    self.heads, self.act, self.causal = heads, act, causal
    self.ln_1 = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    # Three kernels: a fused one, sharded on its output, would have to be resharded to be split.
    self.q, self.k, self.v = (
      dense(dim, dim, ("embed", "heads"), kernel_init=attn, bias_init=zeros) for _ in range(3)
    )
    self.out = dense(dim, dim, ("heads", "embed"), kernel_init=proj, bias_init=zeros)
    self.ln_2 = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    self.wi = dense(dim, mlp_dim, ("embed", "mlp"), kernel_init=mlp)
    self.wo = dense(mlp_dim, dim, ("mlp", "embed"), kernel_init=proj)

  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    y = flatten_leading(self.ln_1(x))
    q, k, v = (split_heads(f(y), len(x), self.heads) for f in (self.q, self.k, self.v))
    y = merge_heads(dot_product_attention(q, k, v, causal=self.causal))
    x = x + self.out(y).reshape(x.shape)
    y = ACTIVATIONS[self.act](self.wi(flatten_leading(self.ln_2(x))))
    return x + self.wo(y).reshape(x.shape)
