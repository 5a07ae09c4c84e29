"""Statistics of a row over all its candidates, updated tile by tile.

A loss over all pairs needs few numbers per row of the score matrix: a log-sum-exp, a hardest
negative, a sum. `ring.reduce` computes them without holding the matrix.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = Any
NO_INDEX = 2**31 - 1  # index of a candidate that does not exist


class Tile(NamedTuple):
  """Which pairs the scores [n, m] of a tile belong to: n queries and m candidates.

  queries: arrays [n, ...]; i int [n], j int [m]: batch rows of the queries and of the candidates;
  shared: the argument of `reduce`.
  """

  queries: Tree
  i: Array
  j: Array
  shared: Tree


class Statistic:
  """A reduction of each query's scores over all candidates.

  init(n): the state of n queries before any candidate. update(state, scores, tile): the state after
  a tile's candidates; tiles come in any order.

  A differentiable statistic defines gradient_term(state, scores, tile) [n]: given the final state
  as a constant, the sum of this term over all tiles has the statistic's gradient. Its state is a
  single array, or a tuple that begins with the value.
  """

  gradient_term: Callable[[Tree, Array, Tile], Array] | None = None

  def init(self, n: int) -> Tree:
    raise NotImplementedError

  def update(self, state: Tree, scores: Array, tile: Tile) -> Tree:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sum(Statistic):
  """Sum over candidates of f(scores, tile) [n, m]."""

  f: Callable[[Array, Tile], Array]

  def init(self, n):
    return jnp.zeros(n)

  def update(self, state, scores, tile):
    return state + self.f(scores, tile).sum(1)

  def gradient_term(self, state, scores, tile):
    return self.f(scores, tile).sum(1)


def score_at(candidate: Callable[[Array], Array]) -> Sum:
  """The score of one candidate per query. candidate: int [n] rows of queries -> rows [n]."""

  def select(scores, tile):
    return jnp.where(candidate(tile.i)[:, None] == tile.j, scores, 0)

  return Sum(select)


POSITIVE = score_at(lambda i: i)  # the score of the matching pair, on the diagonal


class LogSumExp(Statistic):
  """Log-sum-exp of the scores of all candidates."""

  def init(self, n):
    return jnp.full(n, -jnp.inf)

  def update(self, state, scores, tile):
    return jnp.logaddexp(state, jax.nn.logsumexp(scores, axis=1))

  def gradient_term(self, state, scores, tile):
    return jnp.exp(scores - state[:, None]).sum(1)


class MaxNegative(Statistic):
  """The largest score off the diagonal, without a gradient."""

  def init(self, n):
    return jnp.full(n, -jnp.inf)

  def update(self, state, scores, tile):
    return jnp.maximum(state, _mask_diagonal(scores, tile).max(1))


@dataclasses.dataclass(frozen=True)
class Max(Statistic):
  """(largest score, index of its candidate); of equal scores the lowest index.

  The backward pass finds the candidate by its index, because a recomputed score may differ in the
  last bit.
  """

  include_diagonal: bool = False

  def init(self, n):
    return jnp.full(n, -jnp.inf), jnp.full(n, NO_INDEX, jnp.int32)

  def update(self, state, scores, tile):
    scores = scores if self.include_diagonal else _mask_diagonal(scores, tile)
    value, index = scores.max(1), tile.j[scores.argmax(1)]
    replace = (value > state[0]) | ((value == state[0]) & (index < state[1]))
    return jnp.where(replace, value, state[0]), jnp.where(replace, index, state[1])

  def gradient_term(self, state, scores, tile):
    return jnp.where(state[1][:, None] == tile.j, scores, 0).sum(1)


def _mask_diagonal(scores: Array, tile: Tile) -> Array:
  return jnp.where(tile.i[:, None] == tile.j, -jnp.inf, scores)
