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
  axes, _ = shared_by(rows)
  if not axes:
    return x[index]
  local = functools.partial(_take, axes)
  spec = P(axes)
  taken = jax.shard_map(local, mesh=rows.mesh, in_specs=spec, out_specs=spec, check_vma=False)(
    x.reshape(len(x), -1), index.reshape(-1)
  )
  return taken.reshape(*index.shape, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(axes: tuple[str, ...], x: Array, index: Array) -> Array:
  """x [b, w], index [a] of global rows -> [a, w] on each device."""
  gather = lambda part: jax.lax.all_gather(part, axes, tiled=True)[index]
  return _by_columns(gather, x, len(index), len(x), len(index), axes)


def _forward(axes: tuple[str, ...], x: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
  return _take(axes, x, index), (jnp.zeros((len(x), 0)), index)


def _backward(axes: tuple[str, ...], saved: tuple[Array, Array], g: Array) -> tuple:
  count, index = len(saved[0]), saved[1]
  if g.dtype == jax.dtypes.float0:
    return None, None

  def scatter(part):
    every = jnp.zeros((count * jax.lax.axis_size(axes), part.shape[1]), g.dtype)
    return jax.lax.psum_scatter(every.at[index].add(part), axes, tiled=True)

  return _by_columns(scatter, g, count, count, len(index), axes), None


_take.defvjp(_forward, _backward)


def _by_columns(
  f: Callable[[Array], Array], x: Array, length: int, own: int, wanted: int, axes: tuple[str, ...]
) -> Array:
  """f(x) for f that treats columns alike, [_, w] -> [length, w], on some columns at a time.

  own, wanted: rows that a device has, and wants of all.
  """
  columns = x.shape[1]
  # What is given and what is gathered: together half of what is wanted.
  width = columns * wanted // (2 * own * (jax.lax.axis_size(axes) + 1))
  width = min(max(width, 1), columns)

  def some(out, start):
    part = f(jax.lax.dynamic_slice_in_dim(x, start, width, 1))
    return jax.lax.dynamic_update_slice_in_dim(out, part, start, 1), None

  # The last columns are done twice where the width does not divide their number.
  starts = jnp.minimum(jnp.arange(0, columns, width), columns - width)
  return jax.lax.scan(some, jnp.zeros((length, columns), x.dtype), starts)[0]
