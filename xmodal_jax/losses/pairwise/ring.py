"""Blockwise reductions over all pairs of a batch, without the matrix of their scores.

A loss over all image-text pairs needs a few statistics of each row and column of the score matrix
[B, B]: a log-sum-exp, a hardest negative, a sum. `reduce` computes them from tiles of chunk x chunk
scores. Each device keeps its rows of one side; the rows of the other side pass through all devices
in a ppermute ring, together with the statistics of their columns, as keys and values do in Ring
Attention (Liu et al., 2023). The backward pass runs the same ring again: it recomputes each tile
and accumulates the gradients of both sides. Memory is that of the rows and one tile, whatever the
size of the batch and the number of devices. On one device only the tiling remains.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.losses.pairwise.statistics import POSITIVE, Statistic, Tile

Tree = Any
# score(shared, left, right, i, j): float32 [n, m] of n rows of left, which are the rows i of the
# batch, and m rows of right, the rows j.
Score = Callable[[Tree, Tree, Tree, Array, Array], Array]


class Ring(NamedTuple):
  """Splits a batch for `reduce`: tiles of at most chunk x chunk pairs, rows sharded on devices."""

  chunk: int
  batch_sharding: NamedSharding | None = None

  def tile_size(self, batch: int) -> int:
    """Rows of a tile for a batch of so many rows; ValueError if it does not divide evenly."""
    _, devices = sharding.batch_mesh_axes(self.batch_sharding)
    local = batch // devices
    size = min(self.chunk, local)
    if size < 1 or batch % devices or local % size:
      raise ConfigError(
        f"config.loss_chunk is {self.chunk}: tiles of so many rows do not divide the rows of a "
        f"device, config.batch_size={batch} over {devices}; set one that does, or 0"
      )
    return size


def reduce(
  score: Score,
  left: Tree,
  right: Tree,
  ring: Ring,
  *,
  left_stats: Mapping[str, Statistic] | None = None,
  right_stats: Mapping[str, Statistic] | None = None,
  shared: Tree = (),
  stop_candidate_gradient: bool = False,
  diagonal_only: bool = False,
) -> tuple[dict[str, Tree], dict[str, Tree]]:
  """Blockwise pairwise reduction over a ppermute ring.

  Args:
    score: see Score. It must not close over arrays: gradients flow to the floats in left, right and
      shared only.
    left, right: pytrees of arrays [B, ...].
    ring: tile size and batch sharding.
    left_stats: name -> statistic of each row of left, reduced over right.
    right_stats: name -> statistic of each row of right, reduced over left.
    shared: pytree that every tile needs whole, such as a temperature.
    stop_candidate_gradient: gradients reach rows as queries only, not as candidates.
    diagonal_only: visit only the tiles that contain matching pairs (i, i).

  Returns (left statistics, right statistics): dicts with the given names of states [B, ...].

      def score(scale, left, right, i, j):
        return scale * left @ right.T

      stats = {"logsumexp": LogSumExp(), "positive": POSITIVE}
      rows, _ = reduce(score, images, texts, Ring(chunk=256), left_stats=stats, shared=scale)
      loss = (rows["logsumexp"] - rows["positive"]).mean()  # InfoNCE, image to text
  """
  left_stats, right_stats = dict(left_stats or {}), dict(right_stats or {})
  if _nbytes(left) < _nbytes(right):  # the smaller side is the one to send round

    def transposed(shared, left, right, i, j):
      return score(shared, right, left, j, i).T

    right_states, left_states = reduce(
      transposed,
      right,
      left,
      ring,
      left_stats=right_stats,
      right_stats=left_stats,
      shared=shared,
      stop_candidate_gradient=stop_candidate_gradient,
      diagonal_only=diagonal_only,
    )
    return left_states, right_states
  axes, devices = sharding.batch_mesh_axes(ring.batch_sharding)
  reduction = _Reduction(
    score=score,
    left_stats=left_stats,
    right_stats=right_stats,
    stop_candidate_gradient=stop_candidate_gradient,
    diagonal_only=diagonal_only,
    tile_size=ring.tile_size(_row_count(left)),
    mesh=ring.batch_sharding.mesh if axes else None,
    axes=axes,
    devices=devices,
  )
  sides = (shared, left, right)
  return _statistics(reduction, tuple(map(_floats, sides)), tuple(map(_non_floats, sides)))


def positive_scores(
  score: Score, left: Tree, right: Tree, ring: Ring, shared: Tree = ()
) -> Float[Array, " b"]:
  """Scores of the matching pairs, the diagonal of the score matrix; see `reduce`."""
  stats, _ = reduce(
    score, left, right, ring, left_stats={"positive": POSITIVE}, shared=shared, diagonal_only=True
  )
  return stats["positive"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Reduction:
  """The static arguments of one call of `reduce`."""

  score: Score
  left_stats: dict[str, Statistic]
  right_stats: dict[str, Statistic]
  stop_candidate_gradient: bool
  diagonal_only: bool
  tile_size: int
  mesh: jax.sharding.Mesh | None
  axes: tuple[str, ...]  # mesh axes that shard the rows
  devices: int  # along these axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(r: _Reduction, floats: tuple, non_floats: tuple) -> tuple[dict, dict]:
  """floats, non_floats: the leaves of (shared, left, right), split by dtype."""
  shared, left, right = map(_merge, floats, non_floats)
  rows = P(r.axes)
  return _per_device(r, functools.partial(_forward, r), (rows, rows))(shared, left, right)


def _statistics_fwd(r, floats, non_floats):
  states = _statistics(r, floats, non_floats)
  return states, (floats, non_floats, states)


def _statistics_bwd(r, residuals, gradients):
  floats, non_floats, states = residuals
  stats = (r.left_stats, r.right_stats)
  gradients = tuple(_values(of, g) for of, g in zip(stats, gradients, strict=True))
  shared, left, right = zip(floats, non_floats, strict=True)
  rows = P(r.axes)
  backward = _per_device(r, functools.partial(_backward, r), (P(), rows, rows))
  return backward(shared, left, right, states, gradients), None


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


def _per_device(r: _Reduction, f: Callable[..., Tree], out_specs: tuple) -> Callable[..., Tree]:
  """f(shared, *sharded) on each device, with its rows of `sharded` and all of `shared`."""
  if not r.axes:
    return f

  def mapped(shared, *sharded):
    in_specs = (P(), *[P(r.axes)] * len(sharded))
    return jax.shard_map(f, mesh=r.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
      shared, *sharded
    )

  return mapped


def _forward(r: _Reduction, shared: Tree, left: Tree, right: Tree) -> tuple[dict, dict]:
  """Statistics of a device's rows of left and right, arrays [b, ...]."""

  def visit(left, right, left_state, right_state, _, i, j):
    scores = r.score(shared, left, right, i, j)
    left_state = _update(r.left_stats, left_state, scores, Tile(left, i, j, shared))
    right_state = _update(r.right_stats, right_state, scores.T, Tile(right, j, i, shared))
    return left_state, right_state, ()

  rows = _row_count(left)
  left_states, right_states = (
    {name: statistic.init(rows) for name, statistic in stats.items()}
    for stats in (r.left_stats, r.right_stats)
  )
  return _ring_loop(r, visit, left, right, left_states, right_states, ())[:2]


def _backward(
  r: _Reduction, shared: tuple, left: tuple, right: tuple, states: tuple, gradients: tuple
) -> tuple[Tree, Tree, Tree]:
  """Gradients of the floats of shared, left and right, each given as (floats, non-floats).

  states, gradients: (of left, of right), the final states and the gradients of their values.
  """
  stop = jax.lax.stop_gradient if r.stop_candidate_gradient else lambda x: x

  def visit(left, right, d_left, d_right, d_shared, i, j):
    left, left_rest, left_state, left_gradient = left
    right, right_rest, right_state, right_gradient = right

    def gradient_terms(common, left, right):
      common = _merge(common, shared[1])
      left, right = _merge(left, left_rest), _merge(right, right_rest)
      scores = right_scores = r.score(common, left, stop(right), i, j)
      if r.stop_candidate_gradient:  # for the statistics of right, left holds the candidates
        right_scores = r.score(common, stop(left), right, i, j)
      right_scores = right_scores.T
      return (
        _gradient_terms(r.left_stats, left_state, scores, Tile(left, i, j, common)),
        _gradient_terms(r.right_stats, right_state, right_scores, Tile(right, j, i, common)),
      )

    _, vjp = jax.vjp(gradient_terms, shared[0], left, right)
    of_shared, of_left, of_right = vjp((left_gradient, right_gradient))
    return _add(d_left, of_left), _add(d_right, of_right), _add(d_shared, of_shared)

  d_left, d_right, d_shared = _ring_loop(
    r,
    visit,
    (*left, states[0], gradients[0]),
    (*right, states[1], gradients[1]),
    *map(_float32_zeros, (left[0], right[0], shared[0])),
  )
  d_shared = jax.lax.psum(d_shared, r.axes) if r.axes else d_shared
  return (
    _cast_like(d_shared, shared[0]),
    _cast_like(d_left, left[0]),
    _cast_like(d_right, right[0]),
  )


def _ring_loop(
  r: _Reduction,
  visit: Callable[..., tuple[Tree, Tree, Tree]],
  resident: Tree,
  rotating: Tree,
  resident_state: Tree,
  rotating_state: Tree,
  total: Tree,
) -> tuple[Tree, Tree, Tree]:
  """Visits all pairs of tiles, on each device; returns (resident_state, rotating_state, total).

  `rotating` and `rotating_state` pass through all devices and end where they began. visit(resident,
  rotating, resident_state, rotating_state, total, i, j) gets one tile of the first four and the
  batch rows of its pairs, and returns the next (resident_state, rotating_state, total).
  """
  size, devices = r.tile_size, r.devices
  rows = _row_count(resident)
  tiles = rows // size
  device = jax.lax.axis_index(r.axes) if devices > 1 else 0
  hops = 1 if r.diagonal_only else devices
  next_device = [(d, (d + 1) % devices) for d in range(devices)]

  def get_tile(tree, k):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k * size, size), tree)

  def set_tile(tree, tile, k):
    return jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, k * size, 0), tree, tile
    )

  def batch_rows(owner, k):
    return owner * rows + k * size + jnp.arange(size, dtype=jnp.int32)

  def send(tree):
    return jax.lax.ppermute(tree, r.axes, next_device) if hops > 1 else tree

  def rotating_tile_step(step, carry):
    """One rotating tile against all resident tiles."""
    rotating, resident_state, rotating_state, total = carry
    c, owner = step % tiles, (device - step // tiles) % devices
    tile = get_tile(rotating, c)

    def resident_tile_step(k, carry):
      resident_state, tile_state, total = carry
      state, tile_state, total = visit(
        get_tile(resident, k),
        tile,
        get_tile(resident_state, k),
        tile_state,
        total,
        batch_rows(device, k),
        batch_rows(owner, c),
      )
      return set_tile(resident_state, state, k), tile_state, total

    first, end = (c, c + 1) if r.diagonal_only else (0, tiles)
    carry = (resident_state, get_tile(rotating_state, c), total)
    resident_state, tile_state, total = jax.lax.fori_loop(first, end, resident_tile_step, carry)
    # Sent tile by tile, so that no second buffer of a device's rows is needed. The permute of the
    # input does not depend on the scores and can overlap with their computation.
    rotating = set_tile(rotating, send(tile), c) if hops > 1 else rotating
    return rotating, resident_state, set_tile(rotating_state, send(tile_state), c), total

  carry = (rotating, resident_state, rotating_state, total)
  return jax.lax.fori_loop(0, hops * tiles, rotating_tile_step, carry)[1:]


def _update(stats: dict[str, Statistic], states: dict, scores: Array, tile: Tile) -> dict:
  return {name: s.update(states[name], scores, tile) for name, s in stats.items()}


def _differentiable(stats: dict[str, Statistic]) -> dict[str, Statistic]:
  return {name: s for name, s in stats.items() if s.gradient_term is not None}


def _gradient_terms(stats: dict[str, Statistic], states: dict, scores: Array, tile: Tile) -> dict:
  stats = _differentiable(stats)
  return {name: s.gradient_term(states[name], scores, tile) for name, s in stats.items()}


def _values(stats: dict[str, Statistic], states: dict) -> dict[str, Array]:
  """The values of the differentiable statistics, the first entry of their states."""
  return {name: jax.tree.leaves(states[name])[0] for name in _differentiable(stats)}


def _is_float(x: ArrayLike) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _floats(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: jnp.asarray(x) if _is_float(x) else None, tree)


def _non_floats(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: None if _is_float(x) else x, tree)


def _merge(floats: Tree, non_floats: Tree) -> Tree:
  """The inverse of (_floats, _non_floats)."""
  is_none = lambda x: x is None
  return jax.tree.map(lambda a, b: b if a is None else a, floats, non_floats, is_leaf=is_none)


def _add(a: Tree, b: Tree) -> Tree:
  return jax.tree.map(lambda x, y: x + y, a, b)


def _float32_zeros(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _cast_like(tree: Tree, like: Tree) -> Tree:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _row_count(tree: Tree) -> int:
  return len(jax.tree.leaves(tree)[0])


def _nbytes(tree: Tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
