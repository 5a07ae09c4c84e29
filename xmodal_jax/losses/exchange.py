"""Rows of a batch that is sharded over devices, fetched without gathering the batch."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.losses.ring import shared_by

Array = jax.Array


def take_rows(x: Array, index: Array, rows: NamedSharding | None = None) -> Array:
  """x[index] for x [B, ...] and index int [B, n] -> [B, n, ...], differentiable.

  rows: how the first axis of x and index is sharded. In each round a device asks every device for
  one row, until all have what they want: as many rounds as the most rows that one of D devices
  wants of another, about b n / D and a few for the b rows of a device. Memory is that of the answer
  and of two rows for each device; gathering x would take B. The gradient goes the same way back,
  and is added up in float32. With one device, or without `rows`: x[index].
  """
  axes, _ = shared_by(rows)
  return _take(x, index, rows) if axes else x[index]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(x: Array, index: Array, rows: NamedSharding) -> Array:
  def local(x, index):
    def fetch(which, asked, out):
      return out.at[which].set(exchange(x[asked]), mode="drop")

    rounds, exchange = _rounds(index, len(x), rows)
    out = rounds(fetch, jnp.zeros((index.size, *x.shape[1:]), x.dtype))
    return out.reshape(*index.shape, *x.shape[1:])

  return _on_each(local, rows)(x, index)


def _forward(x: Array, index: Array, rows: NamedSharding) -> tuple[Array, tuple[Array, Array]]:
  return _take(x, index, rows), (jnp.zeros((len(x), 0), x.dtype), index)


def _backward(rows: NamedSharding, saved: tuple[Array, Array], g: Array) -> tuple:
  like, index = saved
  if not jnp.issubdtype(like.dtype, jnp.inexact):
    return None, None

  def local(like, index, g):
    g = g.reshape(index.size, *g.shape[index.ndim :])

    def give_back(which, asked, out):
      # What nobody asked for is a zero.
      given = exchange(g.at[which].get(mode="fill", fill_value=0))
      return out.at[asked].add(given.astype(jnp.float32))

    rounds, exchange = _rounds(index, len(like), rows)
    out = rounds(give_back, jnp.zeros((len(like), *g.shape[1:]), jnp.float32))
    return out.astype(like.dtype)

  return _on_each(local, rows)(like, index, g), None


_take.defvjp(_forward, _backward)


def _on_each(local, rows: NamedSharding):
  spec = P(shared_by(rows)[0])
  return jax.shard_map(local, mesh=rows.mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _rounds(index: Array, count: int, rows: NamedSharding):
  """(rounds, exchange) on a device of `count` rows that wants those of `index`, of the batch.

  rounds(f, out): out = f(which, asked, out) again and again. which int [D]: places in the flat
  index that ask in this round, one of each device's rows, past the end for none; asked int [D]:
  own rows that the devices ask for. exchange: [D, ...], one for each device -> from each device.
  """
  axes, devices = shared_by(rows)
  flat = index.reshape(-1)
  owner, row = flat // count, flat % count
  order = jnp.argsort(owner)
  sorted_owner = owner[order]
  turn = jnp.arange(len(flat)) - jnp.searchsorted(sorted_owner, sorted_owner)
  turn = jnp.zeros_like(turn).at[order].set(turn)  # a place's turn among those of its owner
  exchange = functools.partial(
    jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
  )

  def rounds(f, out):
    def one(k, out):
      to = jnp.where(turn == k, owner, devices)
      which = jnp.full(devices, len(flat)).at[to].set(jnp.arange(len(flat)), mode="drop")
      asked = exchange(row.at[which].get(mode="fill", fill_value=0))
      return f(which, asked, out)

    with jax.named_scope("exchange"):
      return jax.lax.fori_loop(0, jax.lax.pmax(turn.max() + 1, axes), one, out)

  return rounds, exchange
