"""Attention, dense layers and pre-norm Transformer blocks that the towers are made of.

Every parameter carries its logical axes ("embed", "heads", "mlp", "vocab") as metadata `axes`; the
sharding rules of a config turn them into mesh axes. Leading axes without a name are layers. Where
an axis consists of parts that may not be cut, their number is metadata under the axis's name.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

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


def add(x: Array, param: Array) -> Array:
  """[..., *S] + a parameter [*S], in x's dtype; the parameter's gradient is summed in float32.

  That sum is over all rows of a batch, and in bfloat16 a sum stops growing at 256 times its terms.
  """
  return _add(x, param, x.ndim - param.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add(x, param, lead):
  del lead
  return x + param.astype(x.dtype)


_add.defvjp(
  lambda x, param, lead: (_add(x, param, lead), None),
  lambda lead, _, d: (d, d.sum(tuple(range(lead)), dtype=jnp.float32)),
)


class Linear(nnx.Linear):
  """nnx.Linear with a bias as `add` has it."""

  def __call__(self, x: Array) -> Array:
    """[..., din] -> [..., dout] in the compute dtype."""
    y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
    return y if self.bias is None else add(y, self.bias[...])


def linear(
  din: int,
  dout: int,
  axes: tuple[str | None, str | None],
  *,
  kernel_init: Init | None = None,
  bias_init: Init | None = None,
  use_bias: bool = True,
  heads: int = 0,
  dtype=jnp.float32,
  rngs: nnx.Rngs,
) -> Linear:
  """Dense layer with kernel [din, dout] in float32; torch's default initialisation.

  heads: how many the axis "heads" is of, where there is one.
  """
  default = uniform(din**-0.5)
  metadata = lambda axes: {"axes": axes} | ({"heads": heads} if "heads" in axes else {})
  return Linear(
    din,
    dout,
    use_bias=use_bias,
    kernel_init=kernel_init or default,
    bias_init=bias_init or default,
    kernel_metadata=metadata(axes),
    bias_metadata=metadata(axes[-1:]),
    dtype=dtype,
    rngs=rngs,
  )


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Zeroes entries with probability `rate` and scales the rest up; the identity without a key."""
  if key is None or not rate:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


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


def attention(
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
    dense = functools.partial(linear, heads=heads, dtype=dtype, rngs=rngs)
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
    split = lambda z: z.reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, D/H]
    y = rows(self.ln_1(x))
    y = attention(split(self.q(y)), split(self.k(y)), split(self.v(y)), causal=self.causal)
    x = x + self.out(y.reshape(-1, x.shape[-1])).reshape(x.shape)
    y = ACTIVATIONS[self.act](self.wi(rows(self.ln_2(x))))
    return x + self.wo(y).reshape(x.shape)


class Attention(nnx.Module):
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
    y = attention(*self.heads_of(query, key, value), mask=mask)
    return self.join(y)

  def heads_of(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Projected and split: [B, L, D] -> [B, L, H, D/H] each."""
    return tuple(
      f(rows(x)).reshape(*x.shape[:2], self.heads, -1)
      for f, x in ((self.q, query), (self.k, key), (self.v, value))
    )

  def join(self, y: Array) -> Array:
    """[B, Q, H, D/H] -> [B, Q, D], projected."""
    return self.out(y.reshape(-1, y.shape[2] * y.shape[3])).reshape(*y.shape[:2], -1)


def rows(x: Array) -> Array:
  """[..., D] -> [N, D]: what dense layers are given. With one contracted axis their weight
  gradients are plain matmuls, which made a training step about 10 % faster on CPU."""
  return x.reshape(-1, x.shape[-1])


def spread(x: Array, rows: NamedSharding | None, *, stacked: bool = False) -> Array:
  """[B, ...], or [N, B, ...] where stacked, with B over the devices as `rows` says, the rest whole.

  Where parameters are sharded, compilers otherwise follow these: activations were cut along their
  width and added up over the devices behind every matmul, which moves more than the parameters do
  (ZeRO; Rajbhandari et al., 2020). The identity without `rows`, on one device, and inside of what
  each device does for itself.
  """
  return _constrain(x, rows, lambda spec: (None, *spec) if stacked else spec)


def _constrain(x: Array, rows: NamedSharding | None, of: Callable) -> Array:
  """x with the entries of a spec that `of` makes of those of the rows."""
  if rows is None or rows.mesh.size == 1 or jax.sharding.get_abstract_mesh().manual_axes:
    return x
  spec = of(rows.spec)
  return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, PartitionSpec(*spec)))


def lookup(table: Array, ids: Array, dtype, rows: NamedSharding | None = None) -> Array:
  """Rows of a table: [V, D], int [B, L] -> [B, L, D] in dtype. rows: see `spread`.

  Cast after it is looked up, so that the gradients of a word add up in float32. Where the table's
  width is sharded it is gathered first: for one that is not, compilers can leave every device its
  own rows of the batch, and sum over the devices that share the vocabulary.
  """
  table = _constrain(table, rows, lambda _: (PartitionSpec.UNCONSTRAINED, None))
  return spread(jnp.take(table, ids, axis=0), rows).astype(dtype)


def stack(depth: int, *args, rngs: nnx.Rngs, block: type = Block, **kwargs) -> nnx.Module:
  """`depth` blocks held as one whose arrays lead with a layer axis."""
  make = lambda key: block(*args, rngs=nnx.Rngs(key), **kwargs)
  return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def depth_of(blocks: nnx.Module) -> int:
  """How many blocks a stack holds."""
  return len(jax.tree.leaves(blocks)[0])


def scan(
  blocks: nnx.Module,
  x: Array,
  *args,
  key: Array | None = None,
  remat: str = "",
  unroll: int = 1,
  collect: bool = False,
  rows: NamedSharding | None = None,
) -> Array:
  """Applies stacked blocks in turn, x = block(x, *args). x [B, L, D] -> [B, L, D].

  key: split over the blocks, which then get theirs as `key`. remat: name of a
  `jax.checkpoint_policies` entry, "" for none. unroll: layers per scan iteration; the parameters
  are the same however the loop is compiled. collect: every block's output instead, [N, B, L, D].
  rows: see `spread`.
  """

  def step(x, layer):
    block, k = layer
    x = spread(block(x, *args) if k is None else block(x, *args, key=k), rows)
    return x, x if collect else None

  keys = None if key is None else jax.random.split(key, depth_of(blocks))
  body, start = recompute(step, remat), spread(x, rows)
  last, each = jax.lax.scan(body, start, (blocks, keys), unroll=unroll)
  return spread(each, rows, stacked=True) if collect else last


def recompute(body: Callable, policy: str, *, once: bool = False) -> Callable:
  """The body of a scan whose activations are kept or computed again as the policy says.

  once: it runs outside of a loop, or in one of a single iteration, which compilers unroll: they
  would find there that the same is computed twice, and keep it.
  """
  if not policy:
    return body
  return jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=once)
