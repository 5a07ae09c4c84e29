"""Scaled dot-product attention and a multi-head layer on it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xmodal_jax.models.layers.dense import (
  dropout,
  flatten_leading,
  linear,
  merge_heads,
  split_heads,
  uniform,
  zeros,
)


def _attention_einsum(q, k, v, mask=None, *, causal=False, rate=0.0, key=None):
  s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  if causal:
    s = jnp.where(jnp.tri(*s.shape[-2:], dtype=bool), s, -jnp.inf)
  if mask is not None:  # not -inf: a query whose keys are all masked gets their mean, not NaN
    s = jnp.where(mask[:, None, None], s, jnp.finfo(s.dtype).min)
  p = dropout(jax.nn.softmax(s, axis=-1).astype(v.dtype), rate, key)  # [B, H, Q, K]
  return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def _attention_fused(q, k, v, mask=None, *, causal=False):
  mask = None if mask is None else mask[:, None, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def _attention_cudnn(q, k, v, *, causal=False):
  queries, keys = q.shape[1], k.shape[1]
  # JAX supports cuDNN for even lengths only. The key of padding is masked by its position where
  # attention is causal, and by the sequence length otherwise.
  q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
  seen = jnp.full(k.shape[:1], keys, jnp.int32) if keys % 2 and not causal else None
  out = jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, key_value_seq_lengths=seen, implementation="cudnn"
  )
  return out[:, :queries]


def _cudnn_takes(q: Array) -> bool:
  """Whether cuDNN's flash attention supports q: half precision, heads of at most 128."""
  return q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and _has_cudnn()


@functools.cache
def _has_cudnn() -> bool:
  """Whether this process has NVIDIA GPUs, Ampere or later; JAX raises where it traces cuDNN's
  attention without one."""
  device = jax.local_devices()[0]
  cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
  return cuda and float(device.compute_capability) >= 8


def dot_product_attention(
  q: Float[Array, "b q h d"],
  k: Float[Array, "b k h d"],
  v: Float[Array, "b k h d"],
  *,
  mask: Bool[Array, "b k"] | None = None,
  causal: bool = False,
  rate: float = 0.0,
  key: PRNGKeyArray | None = None,
) -> Float[Array, "b q h d"]:
  """Scaled dot-product attention, softmax in float32.

  mask: keys that are attended to. rate: dropout of the attention weights, with a key.

  The implementation is chosen by the platform that the program is lowered for. On CPU, einsums: the
  backward pass of `jax.nn.dot_product_attention` was measured 3.5 times slower. On NVIDIA GPUs
  without a mask, flash attention, which never writes the weights to memory. Elsewhere JAX's, except
  with dropout, which JAX's does not have.
  """
  if key is not None and rate:
    return _attention_einsum(q, k, v, mask, causal=causal, rate=rate, key=key)
  forms = {"cpu": _attention_einsum, "default": _attention_fused}
  if mask is None and _cudnn_takes(q):
    forms["cuda"] = _attention_cudnn
  masks = () if mask is None else (mask,)
  bound = {name: functools.partial(form, causal=causal) for name, form in forms.items()}
  return jax.lax.platform_dependent(q, k, v, *masks, **bound)


class MultiHeadAttention(nnx.Module):
  """Multi-head attention with a fused torch `in_proj`: query, key, value and output projections.

  Initialised as torch's MultiheadAttention: Xavier bound on the fused [3D, D] matrix.
  """

  def __init__(self, dim: int, heads: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
    dense = functools.partial(linear, heads=heads, dtype=dtype, rngs=rngs)
    self.heads = heads
    xavier = uniform((6 / (4 * dim)) ** 0.5)
    self.q, self.k, self.v = (
      dense(dim, dim, ("embed", "heads"), kernel_init=xavier, bias_init=zeros) for _ in range(3)
    )
    self.out = dense(dim, dim, ("heads", "embed"), bias_init=zeros)

  def __call__(
    self,
    query: Float[Array, "b q d"],
    key: Float[Array, "b k d"],
    value: Float[Array, "b k d"],
    mask: Bool[Array, "b k"] | None = None,
  ) -> Float[Array, "b q d"]:
    q, k, v = self.project(query, key, value)
    return self.join(dot_product_attention(q, k, v, mask=mask))

  def project(
    self,
    query: Float[Array, "b q d"],
    key: Float[Array, "b k d"],
    value: Float[Array, "b k d"],
  ) -> tuple[Float[Array, "b q h e"], Float[Array, "b k h e"], Float[Array, "b k h e"]]:
    """Queries, keys and values of each head."""
    pairs = ((self.q, query), (self.k, key), (self.v, value))
    return tuple(split_heads(f(flatten_leading(x)), len(x), self.heads) for f, x in pairs)

  def join(self, y: Float[Array, "b q h e"]) -> Float[Array, "b q d"]:
    """The output projection of all heads."""
    return self.out(merge_heads(y)).reshape(*y.shape[:2], -1)
