"""Statistics of all pairs of a batch, tile by tile, with one side travelling round the devices.

A loss over all pairs of pictures and texts needs a few numbers of every row and every column of
their matrix of scores: a log-sum-exp, a hardest negative, a sum. Here that matrix never exists.
Each device keeps its rows of one side; those of the other pass by in a ring of devices, in tiles of
`chunk` rows, and take the statistics of their columns with them. The gradient walks the same way
once more: every tile of scores is computed again, and what it owes to either side is added to
buffers that stay, or travel, with the rows. So memory is that of the rows themselves and of a tile,
whatever the size of the batch and the number of devices. On one device tiles alone remain.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array
Tree = Any

NOWHERE = 2**31 - 1  # index of a candidate where there is none


class Ring(NamedTuple):
  """Tiles of at most chunk x chunk pairs; rows: how the rows of both sides are sharded."""

  chunk: int
  batch_sharding: NamedSharding | None = None

  def tile(self, count: int) -> int:
    """Rows of a tile; raises ValueError where they do not divide those of a device."""
    _, devices = shared_by(self.batch_sharding)
    local = count // devices
    size = min(self.chunk, local)
    if size < 1 or count % devices or local % size:
      raise ValueError(
        f"config.loss_chunk is {self.chunk}: tiles of so many rows do not divide the rows of a "
        f"device, config.batch_size={count} over {devices}; set one that does, or 0"
      )
    return size


def shared_by(batch_sharding: NamedSharding | None) -> tuple[tuple[str, ...], int]:
  """(mesh axes that share the rows of a batch, how many devices these are); (), 1 for one."""
  axes = () if batch_sharding is None else batch_sharding.spec[0]
  axes = (axes,) if isinstance(axes, str) else axes
  axes = tuple(a for a in axes if batch_sharding.mesh.shape[a] > 1)
  return axes, math.prod(batch_sharding.mesh.shape[a] for a in axes)


class Tile(NamedTuple):
  """Where the scores [n, m] of a tile are: n queries against m candidates.

  queries: arrays [n, ...] of the queries' side; i int [n], j int [m]: rows of the batch that the
  queries and the candidates are; shared: what all tiles have in common.
  """

  queries: Tree
  i: Array
  j: Array
  shared: Tree


class Statistic:
  """A number, or several, of each query over all candidates.

  `empty(n)`: of n queries and no candidate; `fold(state, scores, tile)`: with those of a tile, in
  whatever order tiles come. Its gradient, if it has one, is that of the sum of
  `term(state, scores, tile)` [n] over all tiles, where state is the final one, a constant; the
  state is then a single array, or a tuple that begins with the value.
  """

  term: Callable[[Tree, Array, Tile], Array] | None = None

  def empty(self, n: int) -> Tree:
    raise NotImplementedError

  def fold(self, state: Tree, scores: Array, tile: Tile) -> Tree:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sum(Statistic):
  """Sum over candidates of f(scores, tile) [n, m]."""

  f: Callable[[Array, Tile], Array]

  def empty(self, n):
    return jnp.zeros(n)

  def fold(self, state, scores, tile):
    return state + self.f(scores, tile).sum(1)

  def term(self, state, scores, tile):
    return self.f(scores, tile).sum(1)


def score_of(candidate: Callable[[Array], Array]) -> Sum:
  """The score of one candidate of each query: int [n] rows of the queries -> those of theirs."""
  return Sum(lambda scores, tile: jnp.where(candidate(tile.i)[:, None] == tile.j, scores, 0))


OWN = score_of(lambda i: i)  # of the pair that belongs together


class LogSumExp(Statistic):
  """Of the scores of all candidates."""

  def empty(self, n):
    return jnp.full(n, -jnp.inf)

  def fold(self, state, scores, tile):
    return jnp.logaddexp(state, jax.nn.logsumexp(scores, axis=1))

  def term(self, state, scores, tile):
    return jnp.exp(scores - state[:, None]).sum(1)


class Rival(Statistic):
  """The largest score of another row, without a gradient."""

  def empty(self, n):
    return jnp.full(n, -jnp.inf)

  def fold(self, state, scores, tile):
    return jnp.maximum(state, _others(scores, tile).max(1))


@dataclasses.dataclass(frozen=True)
class Largest(Statistic):
  """(largest score, index of its candidate, the first of equals). own: whether a row's own counts.

  The index is kept because a score that is computed again need not be the same to the last bit.
  """

  own: bool = False

  def empty(self, n):
    return jnp.full(n, -jnp.inf), jnp.full(n, NOWHERE, jnp.int32)

  def fold(self, state, scores, tile):
    scores = scores if self.own else _others(scores, tile)
    value, index = scores.max(1), tile.j[scores.argmax(1)]
    first = (value > state[0]) | ((value == state[0]) & (index < state[1]))
    return jnp.where(first, value, state[0]), jnp.where(first, index, state[1])

  def term(self, state, scores, tile):
    return jnp.where(state[1][:, None] == tile.j, scores, 0).sum(1)


def _others(scores: Array, tile: Tile) -> Array:
  return jnp.where(tile.i[:, None] == tile.j, -jnp.inf, scores)


def reduce(
  score: Callable[[Tree, Tree, Tree, Array, Array], Array],
  left: Tree,
  right: Tree,
  ring: Ring,
  *,
  of_left: Mapping[str, Statistic] | None = None,
  of_right: Mapping[str, Statistic] | None = None,
  shared: Tree = (),
  still: bool = False,
  own_only: bool = False,
) -> tuple[dict[str, Tree], dict[str, Tree]]:
  """Statistics of every row of left [B, ...] over right [B, ...], and of right over left.

  score(shared, left, right, i, j): float32 [n, m] of n rows of left, which are rows i of the batch,
  and m of right, rows j. It may close over no array: gradients go to floats in left, right and
  shared. of_left, of_right: name -> statistic; the results have their names, arrays [B, ...].
  still: candidates get no gradient, only queries. own_only: only tiles with pairs (i, i).
  """
  of_left, of_right = dict(of_left or {}), dict(of_right or {})
  if _bytes(left) < _bytes(right):  # the smaller side travels
    turned = lambda shared, left, right, i, j: score(shared, right, left, j, i).T
    kw = dict(shared=shared, still=still, own_only=own_only)
    sides = reduce(turned, right, left, ring, of_left=of_right, of_right=of_left, **kw)
    return sides[1], sides[0]
  count = len(jax.tree.leaves(left)[0])
  axes, devices = shared_by(ring.batch_sharding)
  how = dict(size=ring.tile(count), axes=axes, devices=devices, own_only=own_only)
  walk = functools.partial(_walk, **how)

  def forward(shared, left, right):
    def visit(mine, other, state, moving, _, i, j):
      s = score(shared, mine, other, i, j)
      state = _fold(of_left, state, s, Tile(mine, i, j, shared))
      return state, _fold(of_right, moving, s.T, Tile(other, j, i, shared)), ()

    local = len(jax.tree.leaves(left)[0])
    empty = lambda of: {name: statistic.empty(local) for name, statistic in of.items()}
    return walk(visit, left, right, empty(of_left), empty(of_right), ())[:2]

  def backward(shared, left, right, states, gradients):
    """left, right, shared as (floats, rest) -> gradients of the floats."""

    def visit(mine, other, d_mine, d_other, d_shared, i, j):
      (mine, rest, state, g), (other, other_rest, other_state, other_g) = mine, other

      def terms(common, mine, other):
        common = _join(common, shared[1])
        mine, other = _join(mine, rest), _join(other, other_rest)
        alone = jax.lax.stop_gradient if still else lambda x: x
        s = score(common, mine, alone(other), i, j)
        s_right = (score(common, alone(mine), other, i, j) if still else s).T
        return (
          _terms(of_left, state, s, Tile(mine, i, j, common)),
          _terms(of_right, other_state, s_right, Tile(other, j, i, common)),
        )

      _, pull = jax.vjp(terms, shared[0], mine, other)
      more = pull((g, other_g))
      add = functools.partial(jax.tree.map, lambda total, x: total + x)
      return add(d_mine, more[1]), add(d_other, more[2]), add(d_shared, more[0])

    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))
    d_left, d_right, d_shared = walk(
      visit,
      (*left, states[0], gradients[0]),
      (*right, states[1], gradients[1]),
      *map(zeros, (left[0], right[0], shared[0])),
    )
    d_shared = jax.lax.psum(d_shared, axes) if axes else d_shared
    like = functools.partial(jax.tree.map, lambda d, x: d.astype(x.dtype))
    return like(d_shared, shared[0]), like(d_left, left[0]), like(d_right, right[0])

  def everywhere(f, whole, out):
    """f on each device; whole: how many of its first arguments every device has all of."""
    if not axes:
      return f
    row = P(axes)
    specs = lambda *args: tuple(P() if k < whole else row for k in range(len(args)))
    return lambda *args: jax.shard_map(
      f, mesh=ring.batch_sharding.mesh, in_specs=specs(*args), out_specs=out(row), check_vma=False
    )(*args)

  @jax.custom_vjp
  def statistics(floats, rest):
    shared, left, right = map(_join, floats, rest)
    return everywhere(forward, 1, lambda row: (row, row))(shared, left, right)

  def kept(floats, rest):
    states = statistics(floats, rest)
    return states, (floats, rest, states)

  def gradient(saved, g):
    floats, rest, states = saved
    g = tuple(_values(of, side) for of, side in zip((of_left, of_right), g, strict=True))
    pull = everywhere(backward, 1, lambda row: (P(), row, row))
    shared, left, right = zip(floats, rest, strict=True)
    return pull(shared, left, right, states, g), None

  statistics.defvjp(kept, gradient)
  sides = (shared, left, right)
  return statistics(tuple(map(_floats, sides)), tuple(map(_rest, sides)))


def own_scores(
  score: Callable[..., Array], left: Tree, right: Tree, ring: Ring, shared: Tree = ()
) -> Array:
  """Scores of the pairs that belong together, float32 [B]; see `reduce`."""
  sides = reduce(score, left, right, ring, of_left={"own": OWN}, shared=shared, own_only=True)
  return sides[0]["own"]


def _walk(
  visit: Callable[..., tuple[Tree, Tree, Tree]],
  staying: Tree,
  travelling: Tree,
  kept: Tree,
  carried: Tree,
  total: Tree,
  *,
  size: int,
  axes: tuple[str, ...],
  devices: int,
  own_only: bool,
) -> tuple[Tree, Tree, Tree]:
  """Visits all pairs of tiles; on each device -> kept, carried and total at the end.

  visit(staying, travelling, kept, carried, total, i, j), the first four of one tile each, gives the
  next (kept, carried, total). `carried` goes with `travelling` and is back home at the end.
  """
  rows = len(jax.tree.leaves(staying)[0])
  tiles = rows // size
  here = jax.lax.axis_index(axes) if devices > 1 else 0
  hops = 1 if own_only else devices
  at = lambda tree, k: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k * size, size), tree)
  put = lambda tree, part, k: jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, k * size, 0), tree, part
  )
  number = lambda device, k: device * rows + k * size + jnp.arange(size, dtype=jnp.int32)
  ring = [(d, (d + 1) % devices) for d in range(devices)]
  onward = lambda tree: jax.lax.ppermute(tree, axes, ring) if hops > 1 else tree

  def column(step, carry):
    """A tile that travels, with all that stay."""
    travelling, kept, carried, total = carry
    c, owner = step % tiles, (here - step // tiles) % devices
    guest = at(travelling, c)

    def row(r, carry):
      kept, part, total = carry
      own, part, total = visit(
        at(staying, r), guest, at(kept, r), part, total, number(here, r), number(owner, c)
      )
      return put(kept, own, r), part, total

    first, last = (c, c + 1) if own_only else (0, tiles)
    kept, part, total = jax.lax.fori_loop(first, last, row, (kept, at(carried, c), total))
    # Tile by tile: a second buffer as large as all rows of a device is never needed. What travels
    # unchanged does not wait for the tile's scores.
    travelling = put(travelling, onward(guest), c) if hops > 1 else travelling
    return travelling, kept, put(carried, onward(part), c), total

  return jax.lax.fori_loop(0, hops * tiles, column, (travelling, kept, carried, total))[1:]


def _fold(of: dict[str, Statistic], states: dict, scores: Array, tile: Tile) -> dict[str, Tree]:
  return {name: s.fold(states[name], scores, tile) for name, s in of.items()}


def _terms(of: dict[str, Statistic], states: dict, scores: Array, tile: Tile) -> dict[str, Array]:
  return {name: s.term(states[name], scores, tile) for name, s in of.items() if s.term is not None}


def _values(of: dict[str, Statistic], states: dict) -> dict[str, Array]:
  """Of statistics with a gradient the values, which states begin with."""
  return {name: jax.tree.leaves(states[name])[0] for name, s in of.items() if s.term is not None}


def _is_float(x: Array) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _floats(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def _rest(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: None if _is_float(x) else x, tree)


def _join(floats: Tree, rest: Tree) -> Tree:
  return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None)


def _bytes(tree: Tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
