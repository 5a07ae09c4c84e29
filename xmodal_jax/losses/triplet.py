"""Hinge losses on score matrices: a pair has to beat the others by a margin."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xmodal_jax.losses.pairwise import ring as ring_lib
from xmodal_jax.losses.pairwise.ring import Ring

Array = jax.Array

REDUCTIONS = ("max", "sum", "mean")


def triplet(scores: Array, margin: float = 0.2, reduce: str = "max") -> Array:
  """Hinge of every row and every column of scores [B, B] against its diagonal entry -> [].

  "max": the hardest negative of each row and column (VSE++, Faghri et al., 2018); "sum": all of
  them; "mean": their sum divided by B - 1. Summed, not averaged, over rows and columns. Of equally
  hard negatives the first has the gradient.
  """
  _check(reduce)
  own = jnp.eye(len(scores), dtype=bool)
  positive = jnp.diagonal(scores)
  total = 0.0
  for axis, own_score in ((1, positive[:, None]), (0, positive)):
    if reduce == "max":
      hardest = _first_largest(jnp.where(own, -jnp.inf, scores), axis)
      total += jnp.maximum(margin + hardest - positive, 0).sum()
    else:
      total += jnp.where(own, 0, jnp.maximum(margin + scores - own_score, 0)).sum()
  return total / (len(scores) - 1) if reduce == "mean" else total


def _check(reduce: str) -> None:
  if reduce not in REDUCTIONS:
    raise ValueError(f"reduce is {reduce!r}; there are {', '.join(REDUCTIONS)}")


def _first_largest(x: Array, axis: int) -> Array:
  """The maximum; of equals the first has the gradient, which x.max gives to all in parts."""
  index = jnp.expand_dims(x.argmax(axis), axis)
  return jnp.take_along_axis(x, index, axis).squeeze(axis)


def hinges(
  score: Callable[[Any, Any], Array],
  images: Any,
  texts: Any,
  margin: float = 0.2,
  reduce: str = "max",
  ring: Ring | None = None,
) -> tuple[Array, dict[str, Array]]:
  """`triplet` of the scores of all pairs, (images [I, ...], texts [T, ...]) -> [I, T].

  With a ring `score` sees rows of either side at a time, and may close over no array. Returns
  (loss [], {accuracy_i2t, accuracy_t2i}).
  """
  if ring is None:
    scores = score(images, texts)
    right = jnp.diagonal(scores)
    first = lambda s: ((s >= right[:, None]).sum(1) == 1).mean()
    accuracy = {"accuracy_i2t": first(scores), "accuracy_t2i": first(scores.T)}
    return triplet(scores, margin, reduce), accuracy
  _check(reduce)
  of = {"own": ring_lib.OWN, "hardest": ring_lib.Largest()}
  tile = lambda shared, left, right, i, j: score(left["x"], right["x"])
  left, right = {"x": images}, {"x": texts}
  if reduce != "max":
    left["own"] = right["own"] = ring_lib.own_scores(tile, left, right, ring)
    of["sum"] = ring_lib.Sum(lambda scores, tile: _hinge(scores, tile, margin))
  sides = ring_lib.reduce(tile, left, right, ring, of_left=of, of_right=of)
  one = lambda side: (
    jnp.maximum(margin + side["hardest"][0] - side["own"], 0) if reduce == "max" else side["sum"]
  )
  total = sum(one(side).sum() for side in sides)
  loss = total / (len(sides[0]["own"]) - 1) if reduce == "mean" else total
  accuracy = [(side["own"] > side["hardest"][0]).mean() for side in sides]
  return loss, dict(zip(("accuracy_i2t", "accuracy_t2i"), accuracy, strict=True))


def _hinge(scores: Array, tile: ring_lib.Tile, margin: float) -> Array:
  hinge = jnp.maximum(margin + scores - tile.queries["own"][:, None], 0)
  return jnp.where(tile.i[:, None] == tile.j, 0, hinge)


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
  et al., 2023, section III-C). Of equally large differences the first has the gradient.
  """
  worst = _first_largest(jnp.abs(among_texts - among_images), 0)
  return jax.nn.relu(worst - margin).sum()


def intra(
  measure: Callable[[Array, Array], Array],
  images: Array,
  texts: Array,
  margin: float = 0.3,
  ring: Ring | None = None,
) -> Array:
  """`consistency` of the vectors of pictures and of their texts, [B, E] twice -> []."""
  if ring is None:
    return consistency(measure(images, images), measure(texts, texts), margin)

  def difference(shared, left, right, i, j):
    return jnp.abs(measure(left[1], right[1]) - measure(left[0], right[0]))

  rows = images, texts
  of = {"worst": ring_lib.Largest(own=True)}
  _, columns = ring_lib.reduce(difference, rows, rows, ring, of_right=of)
  return jax.nn.relu(columns["worst"][0] - margin).sum()


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
