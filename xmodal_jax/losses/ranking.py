"""Hinge losses on score matrices: a pair has to beat the others by a margin."""

import jax
import jax.numpy as jnp

Array = jax.Array

REDUCTIONS = ("max", "sum", "mean")


def triplet(scores: Array, margin: float = 0.2, reduce: str = "max") -> Array:
  """Hinge of every row and every column of scores [B, B] against its diagonal entry -> [].

  "max": the hardest negative of each row and column (VSE++, Faghri et al., 2018); "sum": all of
  them; "mean": their sum divided by B - 1. Summed, not averaged, over rows and columns.
  """
  if reduce not in REDUCTIONS:
    raise ValueError(f"reduce is {reduce!r}; there are {', '.join(REDUCTIONS)}")
  own = jnp.eye(len(scores), dtype=bool)
  positive = jnp.diagonal(scores)
  total = 0.0
  for axis, own_score in ((1, positive[:, None]), (0, positive)):
    hinge = jnp.where(own, 0, jnp.maximum(margin + scores - own_score, 0))
    total += hinge.max(axis).sum() if reduce == "max" else hinge.sum()
  return total / (len(scores) - 1) if reduce == "mean" else total


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


def consistency(among_images: Array, among_texts: Array, margin: float = 0.3) -> Array:
  """How far similarities among pictures are from those among their texts, [B, B] twice -> [].

  Sum over columns of max(0, max over rows of |difference| - margin): TGDT's intra-modal term (Liu
  et al., 2023, section III-C).
  """
  return jax.nn.relu(jnp.abs(among_texts - among_images).max(0) - margin).sum()


def dot(a: Array, b: Array) -> Array:
  """[I, E], [T, E] -> [I, T]."""
  return jnp.dot(a, b.T, precision="highest")


def cosine(a: Array, b: Array) -> Array:
  """[I, E], [T, E] -> [I, T]."""
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  return dot(unit(a), unit(b))


def order(images: Array, texts: Array) -> Array:
  """-|max(0, text - picture)| of all pairs (Vendrov et al., 2016): [I, E], [T, E] -> [I, T]."""
  above = jax.nn.relu(texts - images[:, None])
  square = (above * above).sum(-1)
  # The root of 0 has no gradient.
  return -jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


MEASURES = {"dot": dot, "cosine": cosine, "order": order}
