"""Attention, dense layers and pre-norm Transformer blocks that the towers are made of.

Every parameter carries its logical axes ("embed", "heads", "mlp", "vocab") as metadata `axes`; the
sharding rules of a config turn them into mesh axes. Leading axes without a name are layers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array
Init = Callable[[Array, tuple[int, ...], jnp.dtype], Array]

zeros = nnx.initializers.zeros_init()


def uniform(bound: float) -> Init:
  """U(-bound, bound): torch's default for Linear and Conv is bound = fan_in ** -0.5."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(std: float) -> Init:
  return nnx.initializers.normal(std)


def quick_gelu(x: Array) -> Array:
  """x * sigmoid(1.702 x), the activation of CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "quick_gelu": quick_gelu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "relu": jax.nn.relu,
}


def layer_norm(dim: int, *, eps: float = 1e-5, dtype=jnp.float32, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """torch's LayerNorm: two-pass variance; statistics in float32 whatever the compute dtype."""
  return nnx.LayerNorm(
    dim,
    epsilon=eps,
    use_fast_variance=False,
    dtype=dtype,
    scale_metadata={"axes": ("embed",)},
    bias_metadata={"axes": ("embed",)},
    rngs=rngs,
  )


def linear(
  din: int,
  dout: int,
  axes: tuple[str | None, str | None],
  *,
  kernel_init: Init | None = None,
  bias_init: Init | None = None,
  use_bias: bool = True,
  dtype=jnp.float32,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """Dense layer with kernel [din, dout] in float32; torch's default initialisation."""
  default = uniform(din**-0.5)
  return nnx.Linear(
    din,
    dout,
    use_bias=use_bias,
    kernel_init=kernel_init or default,
    bias_init=bias_init or default,
    kernel_metadata={"axes": axes},
    bias_metadata={"axes": axes[-1:]},
    dtype=dtype,
    rngs=rngs,
  )


def _attention_einsum(q: Array, k: Array, v: Array, causal: bool) -> Array:
  s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  if causal:
    s = jnp.where(jnp.tri(*s.shape[-2:], dtype=bool), s, -jnp.inf)
  p = jax.nn.softmax(s, axis=-1).astype(v.dtype)  # [B, H, Q, K]
  return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def attention(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
  """Scaled dot-product attention, softmax in float32. q, k, v [B, L, H, D] -> [B, L, H, D].

  The form is chosen where the program is lowered: on CPU the backward pass of
  `jax.nn.dot_product_attention` was measured 3.5 times slower than the plain einsums.
  """
  return jax.lax.platform_dependent(
    q,
    k,
    v,
    cpu=functools.partial(_attention_einsum, causal=causal),
    default=functools.partial(jax.nn.dot_product_attention, is_causal=causal),
  )


class Block(nnx.Module):
  """Pre-norm Transformer block without dropout. x [B, L, D] -> [B, L, D].

  `std` = (attention, projection, mlp) are the normal initialisations of CLIP's text tower (CLIP
  spec, initialisation); without it the torch defaults of a MultiheadAttention and Linear apply,
  Xavier bound taken on the fused [3D, D] matrix.
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
    dense = functools.partial(linear, dtype=dtype, rngs=rngs)
    self.heads, self.act, self.causal = heads, act, causal
    self.ln_1 = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    # q, k, v apart: a fused kernel sharded on its output must be reshuffled to be split.
    self.q, self.k, self.v = (
      dense(dim, dim, ("embed", "heads"), kernel_init=attn, bias_init=zeros) for _ in range(3)
    )
    self.out = dense(dim, dim, ("heads", "embed"), kernel_init=proj, bias_init=zeros)
    self.ln_2 = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    self.wi = dense(dim, mlp_dim, ("embed", "mlp"), kernel_init=mlp)
    self.wo = dense(mlp_dim, dim, ("mlp", "embed"), kernel_init=proj)

  def __call__(self, x: Array) -> Array:
    # Dense layers see [B * L, D]: with one contracted axis their weight gradients are plain
    # matmuls, which made a training step about 10 % faster on CPU.
    flat = lambda z: z.reshape(-1, z.shape[-1])
    split = lambda z: z.reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, D/H]
    y = flat(self.ln_1(x))
    y = attention(split(self.q(y)), split(self.k(y)), split(self.v(y)), causal=self.causal)
    x = x + self.out(y.reshape(-1, x.shape[-1])).reshape(x.shape)
    y = ACTIVATIONS[self.act](self.wi(flat(self.ln_2(x))))
    return x + self.wo(y).reshape(x.shape)


def stack(depth: int, *args, rngs: nnx.Rngs, **kwargs) -> Block:
  """`depth` blocks held as one Block whose arrays lead with a layer axis."""
  make = lambda key: Block(*args, rngs=nnx.Rngs(key), **kwargs)
  return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def scan(blocks: nnx.Module, x: Array, *, remat: str = "", unroll: int = 1) -> Array:
  """Applies stacked blocks in turn. x [B, L, D] -> [B, L, D].

  remat: name of a `jax.checkpoint_policies` entry, "" for none. unroll: layers per scan iteration;
  the parameters are the same however the loop is compiled.
  """
  body = recompute(lambda x, block: (block(x), None), remat)
  return jax.lax.scan(body, x, blocks, unroll=unroll)[0]


def recompute(body: Callable, policy: str) -> Callable:
  """The body of a scan whose activations are kept or computed again as the policy says."""
  if not policy:
    return body
  return jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False)
