"""Hinge losses on score matrices: a pair has to beat the others by a margin."""

import jax
import jax.numpy as jnp

Array = jax.Array

REDUCTIONS = ("max", "mean")


def triplet(scores: Array, margin: float = 0.2, reduce: str = "max") -> Array:
  """Hinge of every row and every column of scores [B, B] against its diagonal entry -> [].

  "max": the hardest negative of each row and column (VSE++, Faghri et al., 2018); "mean": all of
  them, divided by B - 1. Summed, not averaged, over rows and columns.
  """
  own = jnp.eye(len(scores), dtype=bool)
  positive = jnp.diagonal(scores)
  hinge = lambda positive: jnp.where(own, 0, jnp.maximum(margin + scores - positive, 0))
  return _reduce(hinge(positive[:, None]), 1, reduce, len(scores) - 1) + _reduce(
    hinge(positive), 0, reduce, len(scores) - 1
  )


def triplet_across(
  queries: Array, candidates: Array, shards: int, margin: float = 0.2, reduce: str = "max"
) -> Array:
  """ZeroVL's global triplet: only rows of other shards are negatives. [B, E] twice -> [shards].

  Each of `shards` equal runs of rows has a loss of its own, over its queries alone; candidates get
  no gradient. With one shard there is no negative, and the loss is 0. "mean" divides by the rows of
  a shard but one.
  """
  scores = queries @ jax.lax.stop_gradient(candidates).T  # [B, B]
  shard = jnp.arange(len(queries)) // (len(queries) // shards)
  positive = jnp.diagonal(scores)[:, None]
  hinge = jnp.maximum(margin + scores - positive, 0)
  hinge = jnp.where(shard[:, None] == shard, 0, hinge)
  rows = len(queries) // shards
  each = jnp.max(hinge, axis=1) if reduce == "max" else hinge.sum(1) / (rows - 1)
  return each.reshape(shards, -1).sum(1)


def _reduce(hinge: Array, axis: int, reduce: str, negatives: int) -> Array:
  if reduce not in REDUCTIONS:
    raise ValueError(f"reduce is {reduce!r}; there are {', '.join(REDUCTIONS)}")
  return hinge.max(axis).sum() if reduce == "max" else hinge.sum() / negatives
