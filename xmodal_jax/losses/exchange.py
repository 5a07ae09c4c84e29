"""Rows of a batch that is sharded over devices, fetched in the memory of the answer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.losses.ring import shared_by

Array = jax.Array


def take_rows(x: Array, index: Array, rows: NamedSharding | None = None) -> Array:
  """x[index] for x [B, ...] and index int [B, n] -> [B, n, ...], differentiable.

  rows: how the first axis of x and index is sharded. Some columns of all rows are gathered at a
  time, so few that they take half of the answer's memory, which is b n rows for the b rows of a
  device, whatever the number of devices; x as a whole would take B. The gradient goes the same way
  back. With one device, or without `rows`: x[index].
  """
  axes, devices = shared_by(rows)
  if not axes:
    return x[index]
  flat = x.reshape(len(x), -1)
  # A device gives b rows and gathers b times as many as there are devices; it wants b n.
  width = flat.shape[1] * index.size // (2 * len(x) * (devices + 1))
  width = min(max(width, 1), flat.shape[1])
  local, spec = functools.partial(_take, axes, len(x), width), P(axes)
  taken = jax.shard_map(local, mesh=rows.mesh, in_specs=spec, out_specs=spec, check_vma=False)(
    flat, index.reshape(-1)
  )
  return taken.reshape(*index.shape, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _take(axes: tuple[str, ...], batch: int, width: int, x: Array, index: Array) -> Array:
  """x [b, w], index [a] of the batch's rows -> [a, w] on each device, `width` columns at a time."""
  gather = lambda part: jax.lax.all_gather(part, axes, tiled=True)[index]
  return _by_columns(gather, x, len(index), width)


def _forward(axes, batch, width, x, index):
  return _take(axes, batch, width, x, index), index


def _backward(axes, batch, width, index, g):
  def scatter(part):
    every = jnp.zeros((batch, part.shape[1]), g.dtype).at[index].add(part)
    return jax.lax.psum_scatter(every, axes, tiled=True)

  return _by_columns(scatter, g, batch // jax.lax.axis_size(axes), width), None


_take.defvjp(_forward, _backward)


def _by_columns(f: Callable[[Array], Array], x: Array, length: int, width: int) -> Array:
  """f(x) for f that treats columns alike, [_, w] -> [length, w], on `width` columns at a time."""
  columns = x.shape[1]

  def some(out, start):
    part = f(jax.lax.dynamic_slice_in_dim(x, start, width, 1))
    return jax.lax.dynamic_update_slice_in_dim(out, part, start, 1), None

  # The last columns are done twice where the width does not divide their number.
  starts = jnp.minimum(jnp.arange(0, columns, width), columns - width)
  return jax.lax.scan(some, jnp.zeros((length, columns), x.dtype), starts)[0]
