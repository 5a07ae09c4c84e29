"""Scaled dot-product attention and a multi-head layer on it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.models.layers.dense import dropout, flatten_leading, linear, uniform, zeros

Array = jax.Array


def _attention_einsum(q, k, v, mask=None, *, causal=False, rate=0.0, key=None):
  s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  if causal:
    s = jnp.where(jnp.tri(*s.shape[-2:], dtype=bool), s, -jnp.inf)
  if mask is not None:  # not -inf: a row without any key is then a mean, and no NaN
    s = jnp.where(mask[:, None, None], s, jnp.finfo(s.dtype).min)
  p = dropout(jax.nn.softmax(s, axis=-1).astype(v.dtype), rate, key)  # [B, H, Q, K]
  return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def _attention_fused(q, k, v, mask=None, *, causal=False):
  mask = None if mask is None else mask[:, None, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)


def _attention_cudnn(q, k, v, *, causal=False):
  queries, keys = q.shape[1], k.shape[1]
  # JAX gives cuDNN even lengths alone. A key too many is behind all queries if causal.
  q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
  seen = jnp.full(k.shape[:1], keys, jnp.int32) if keys % 2 and not causal else None
  out = jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, key_value_seq_lengths=seen, implementation="cudnn"
  )
  return out[:, :queries]


def _cudnn_takes(q: Array) -> bool:
  """Whether cuDNN's flash attention computes this: it is of half precision and small heads."""
  return q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and _has_cudnn()


@functools.cache
def _has_cudnn() -> bool:
  """Whether this process's devices are NVIDIA's, Ampere or later. JAX traces cuDNN's form there
  alone: elsewhere it raises."""
  device = jax.local_devices()[0]
  cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
  return cuda and float(device.compute_capability) >= 8


def dot_product_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  mask: Array | None = None,
  causal: bool = False,
  rate: float = 0.0,
  key: Array | None = None,
) -> Array:
  """Scaled dot-product attention, softmax in float32.

  q [B, Q, H, D], k, v [B, K, H, D], mask bool [B, K] of the keys that are seen -> [B, Q, H, D].
  rate: dropout of the weights, with a key. The form is chosen where the program is lowered: on CPU
  the backward pass of `jax.nn.dot_product_attention`, which has no dropout, was measured 3.5 times
  slower than the plain einsums; on NVIDIA GPUs scores without a mask are never written to memory.
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

  def __call__(self, query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """query [B, Q, D], key, value [B, K, D], mask bool [B, K] -> [B, Q, D]."""
    y = dot_product_attention(*self.heads_of(query, key, value), mask=mask)
    return self.join(y)

  def heads_of(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Projected and split: [B, L, D] -> [B, L, H, D/H] each."""
    return tuple(
      f(flatten_leading(x)).reshape(*x.shape[:2], self.heads, -1)
      for f, x in ((self.q, query), (self.k, key), (self.v, value))
    )

  def join(self, y: Array) -> Array:
    """[B, Q, H, D/H] -> [B, Q, D], projected."""
    return self.out(y.reshape(-1, y.shape[2] * y.shape[3])).reshape(*y.shape[:2], -1)
