"""Gathers rows of a batch that is sharded over devices, without an all-gather of the batch."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Shaped

from xmodal_jax.distributed import sharding


def take_rows(
  x: Shaped[ArrayLike, "b ..."],
  index: Int[ArrayLike, "b n"],
  batch_sharding: NamedSharding | None = None,
) -> Shaped[Array, "b n ..."]:
  """x[index], differentiable, by a ppermute ring over the devices that share the batch.

  batch_sharding: how the first axis of x and of index is sharded. With one device, or without a
  sharding, it is plain indexing. Otherwise each device sends one buffer for the rows that it needs
  round the ring, and every device fills in the rows that it holds. Memory per device is that of the
  result, n rows for each local row, whatever the number of devices; an all-gather of x would take
  all B rows.
  """
  axes, devices = sharding.batch_mesh_axes(batch_sharding)
  if not axes:
    return jnp.asarray(x)[index]
  local = functools.partial(_take_rows_local, axes=axes, devices=devices)
  spec = P(axes)
  return jax.shard_map(local, mesh=batch_sharding.mesh, in_specs=(spec, spec), out_specs=spec)(
    x, index
  )


def _take_rows_local(
  x: Shaped[ArrayLike, "b ..."], index: Int[Array, "b n"], *, axes: tuple[str, ...], devices: int
) -> Shaped[Array, "b n ..."]:
  """On each device; `index` holds rows of the global batch."""
  device = jax.lax.axis_index(axes)
  next_device = [(d, (d + 1) % devices) for d in range(devices)]

  def hop(carry, _):
    buffer, index = carry
    owner, row = index // len(x), index % len(x)
    held_here = (owner == device).reshape(-1, *[1] * (x.ndim - 1))
    buffer = jnp.where(held_here, x[row], buffer)
    return jax.lax.ppermute((buffer, index), axes, next_device), None

  index_flat = index.reshape(-1)  # [b * n]
  empty = jnp.zeros((len(index_flat), *x.shape[1:]), x.dtype)
  empty = jax.lax.pcast(empty, axes, to="varying")
  # One hop per device: the last one returns every buffer to the device that needs it. Without the
  # checkpoint the gradient would store the masks of all hops, each as large as the buffer.
  (buffer, _), _ = jax.lax.scan(jax.checkpoint(hop), (empty, index_flat), length=devices)
  return buffer.reshape(*index.shape, *x.shape[1:])
