"""Dense layers, norms, embeddings and dropout with float32 parameters."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xmodal_jax.errors import ConfigError
from xmodal_jax.models.layers.partitioning import constrain, constrain_batch

ArrayLike = Array | np.ndarray  # parameters as restored from a file are NumPy arrays
Init = Callable[[Array, tuple[int, ...], jnp.dtype], Array]

zeros = nnx.initializers.zeros_init()


def uniform(bound: float) -> Init:
  """U(-bound, bound): torch's default for Linear and Conv is bound = fan_in ** -0.5."""
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(std: float) -> Init:
  return nnx.initializers.normal(std)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x * sigmoid(1.702 x), the activation of CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "quick_gelu": quick_gelu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}


def layer_norm(dim: int, *, eps: float = 1e-5, dtype=jnp.float32, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """torch's LayerNorm: two-pass variance, statistics in float32 for any compute dtype."""
  return nnx.LayerNorm(
    dim,
    epsilon=eps,
    use_fast_variance=False,
    dtype=dtype,
    scale_metadata={"axes": ("embed",)},
    bias_metadata={"axes": ("embed",)},
    rngs=rngs,
  )


def add(x: Float[Array, "..."], param: Float[ArrayLike, "*s"]) -> Float[Array, "..."]:
  """x [..., *S] + param [*S] in x's dtype; the parameter's gradient is summed in float32.

  The gradient is a sum over all rows of a batch; a bfloat16 sum stops growing at 256 times its
  terms.
  """
  return _add(x, param, x.ndim - param.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add(x, param, leading):
  del leading
  return x + param.astype(x.dtype)


def _add_forward(x, param, leading):
  return _add(x, param, leading), None


def _add_backward(leading, _, gradient):
  return gradient, gradient.sum(tuple(range(leading)), dtype=jnp.float32)


_add.defvjp(_add_forward, _add_backward)


class Linear(nnx.Linear):
  """nnx.Linear that adds its bias by `add`."""

  def __call__(self, x: Float[Array, "*n din"]) -> Float[Array, "*n dout"]:
    """In the compute dtype."""
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

  axes: logical axes of the kernel. heads: number of heads, for kernels with an axis "heads", which
  is sharded by whole heads. Raises ConfigError for heads that do not divide that axis.
  """
  default = uniform(din**-0.5)
  for axis, size in zip(axes, (din, dout), strict=True):
    if axis == "heads" and heads and size % heads:
      raise ConfigError(f"{heads} heads do not divide a width of {size}: change model.*.heads")

  def metadata(axes):
    return {"axes": axes} | ({"heads": heads} if "heads" in axes else {})

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


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
  """Zeroes entries with probability `rate` and scales the rest up; the identity without a key."""
  if key is None or not rate:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def flatten_leading(x: Float[Array, "*n d"]) -> Float[Array, "m d"]:
  """[..., D] -> [M, D], the input of dense layers: with one contracted axis their weight gradients
  are plain matmuls, which made a training step about 10 % faster on CPU."""
  return x.reshape(-1, x.shape[-1])


def apply_dense(dense: nnx.Module, x: Float[Array, "*n din"]) -> Float[Array, "*n dout"]:
  """dense(x) computed on flattened leading axes, see `flatten_leading`."""
  return dense(flatten_leading(x)).reshape(*x.shape[:-1], -1)


def split_heads(x: Float[Array, "n d"], batch: int, heads: int) -> Float[Array, "b l h k"]:
  """[B * L, H * K] -> [B, L, H, K]: a projection on flattened leading axes, cut into heads."""
  return rearrange(x, "(b l) (h k) -> b l h k", b=batch, h=heads)


def merge_heads(x: Float[Array, "b l h k"]) -> Float[Array, "n d"]:
  """[B, L, H, K] -> [B * L, H * K], the inverse of `split_heads`."""
  return rearrange(x, "b l h k -> (b l) (h k)")


def lookup(
  table: Float[ArrayLike, "v d"],
  ids: Int[Array, "b l"],
  dtype,
  batch_sharding: NamedSharding | None = None,
) -> Float[Array, "b l d"]:
  """Embeddings of ids, in dtype. batch_sharding: see `constrain_batch`.

  The cast comes after the lookup, so that gradients of a word are summed in float32. A table
  sharded along its width is gathered along it first. Otherwise compilers cannot keep the batch
  sharded by rows while they sum over the devices that share the vocabulary.
  """
  table = constrain(
    jnp.asarray(table), batch_sharding, lambda _: (PartitionSpec.UNCONSTRAINED, None)
  )
  return constrain_batch(jnp.take(table, ids, axis=0), batch_sharding).astype(dtype)
