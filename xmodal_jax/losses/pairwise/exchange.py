"""Rows of a batch that is sharded over devices, fetched without gathering the batch."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.losses.pairwise.ring import shared_by

Array = jax.Array


def take_rows(x: Array, index: Array, batch_sharding: NamedSharding | None = None) -> Array:
  """x[index] for x [B, ...] and index int [B, n] -> [B, n, ...], differentiable.

  rows: how the first axis of x and index is sharded. One buffer per device, the rows it asked for,
  goes once round the ring of devices and is filled in where the rows live, so that memory is that
  of the answer, b n rows for the b rows of a device, whatever the number of devices; gathering x
  would take B. The gradient goes the same way back. With one device, or without `rows`: x[index].
  """
  axes, devices = shared_by(batch_sharding)
  if not axes:
    return x[index]
  local = functools.partial(_ring, axes=axes, devices=devices)
  spec = P(axes)
  return jax.shard_map(local, mesh=batch_sharding.mesh, in_specs=(spec, spec), out_specs=spec)(
    x, index
  )


def _ring(x: Array, index: Array, *, axes: tuple[str, ...], devices: int) -> Array:
  """x [b, ...], index [b, n] of global rows -> [b, n, ...] on each device."""
  here, onward = jax.lax.axis_index(axes), [(i, (i + 1) % devices) for i in range(devices)]

  def hop(carry, _):
    wanted, index = carry
    owner, row = index // len(x), index % len(x)
    mine = (owner == here).reshape(-1, *[1] * (x.ndim - 1))
    wanted = jnp.where(mine, x[row], wanted)
    return jax.lax.ppermute((wanted, index), axes, onward), None

  flat = index.reshape(-1)  # [b * n]
  # As many hops as devices: the last one brings every buffer home.
  empty = jnp.zeros((len(flat), *x.shape[1:]), x.dtype)
  empty = jax.lax.pcast(empty, axes, to="varying")
  # Recomputed, or the masks of all hops, as wide as the rows, would be kept for the gradient.
  (wanted, _), _ = jax.lax.scan(jax.checkpoint(hop), (empty, flat), length=devices)
  return wanted.reshape(*index.shape, *x.shape[1:])
