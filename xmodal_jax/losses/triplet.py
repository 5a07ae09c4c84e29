"""Hinge losses on scores: a matching pair must beat other pairs by a margin.

loss, metrics = triplet_loss(cosine, images, texts, margin=0.2)  # images, texts [B, E]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from xmodal_jax.errors import ConfigError
from xmodal_jax.losses.pairwise import ring as ring_lib
from xmodal_jax.losses.pairwise import statistics
from xmodal_jax.losses.pairwise.ring import Ring

Scalar = Float[Array, ""]

REDUCTIONS = ("max", "sum", "mean")


def triplet_from_scores(
  scores: Float[ArrayLike, "b b"], margin: float = 0.2, reduce: str = "max"
) -> Scalar:
  """Triplet loss of every row and every column of a score matrix against its diagonal entry.

  reduce: "max", the hardest negative of each row and column (VSE++, Faghri et al., 2018); "sum",
  all negatives; "mean", their sum divided by B - 1. The result is summed, not averaged, over rows
  and columns. Of equally hard negatives the first gets the gradient.
  """
  _check_reduce(reduce)
  diagonal = jnp.eye(len(scores), dtype=bool)
  positive = jnp.diagonal(scores)
  total = 0.0
  for axis, positive_of_query in ((1, positive[:, None]), (0, positive)):
    if reduce == "max":
      hardest = _max_first(jnp.where(diagonal, -jnp.inf, scores), axis)
      total += jnp.maximum(margin + hardest - positive, 0).sum()
    else:
      hinge = jnp.maximum(margin + scores - positive_of_query, 0)
      total += jnp.where(diagonal, 0, hinge).sum()
  return total / (len(scores) - 1) if reduce == "mean" else total


def _check_reduce(reduce: str) -> None:
  if reduce not in REDUCTIONS:
    raise ConfigError(f"reduce is {reduce!r}; expected one of {', '.join(REDUCTIONS)}")


def _max_first(x: Float[Array, "m n"], axis: int) -> Float[Array, " k"]:
  """Maximum whose gradient goes to the first of equal entries; x.max splits it among them."""
  index = jnp.expand_dims(x.argmax(axis), axis)
  return jnp.take_along_axis(x, index, axis).squeeze(axis)


def triplet_loss(
  score: Callable[[Any, Any], Array],
  images: Any,
  texts: Any,
  margin: float = 0.2,
  reduce: str = "max",
  ring: Ring | None = None,
) -> tuple[Scalar, dict[str, Array]]:
  """`triplet_from_scores` of the scores of all pairs.

  Args:
    score: (images [I, ...], texts [T, ...]) -> [I, T]. With a ring it gets some rows of each side
      at a time and must not close over arrays.
    images, texts: pytrees of arrays [B, ...]; row i of images matches row i of texts.
    margin, reduce: see `triplet_from_scores`.
    ring: computes the loss blockwise.

  Returns (loss, {accuracy_i2t, accuracy_t2i}).
  """
  if ring is None:
    scores = score(images, texts)
    accuracy = {"accuracy_i2t": _accuracy(scores), "accuracy_t2i": _accuracy(scores.T)}
    return triplet_from_scores(scores, margin, reduce), accuracy
  _check_reduce(reduce)

  def tile_score(shared, left, right, i, j):
    return score(left["x"], right["x"])

  def hinge_of_negatives(scores, tile):
    hinge = jnp.maximum(margin + scores - tile.queries["positive"][:, None], 0)
    return jnp.where(tile.i[:, None] == tile.j, 0, hinge)

  stats = {"positive": statistics.POSITIVE, "hardest": statistics.Max()}
  left, right = {"x": images}, {"x": texts}
  if reduce != "max":
    left["positive"] = right["positive"] = ring_lib.positive_scores(tile_score, left, right, ring)
    stats["sum"] = statistics.Sum(hinge_of_negatives)
  sides = ring_lib.reduce(tile_score, left, right, ring, left_stats=stats, right_stats=stats)

  def hinge(side):
    if reduce == "max":
      return jnp.maximum(margin + side["hardest"][0] - side["positive"], 0)
    return side["sum"]

  total = sum(hinge(side).sum() for side in sides)
  loss = total / (len(sides[0]["positive"]) - 1) if reduce == "mean" else total
  accuracy = [(side["positive"] > side["hardest"][0]).mean() for side in sides]
  return loss, dict(zip(("accuracy_i2t", "accuracy_t2i"), accuracy, strict=True))


def _accuracy(scores: Float[Array, "b b"]) -> Scalar:
  """Share of rows whose diagonal entry is strictly the largest."""
  return ((scores >= jnp.diagonal(scores)[:, None]).sum(1) == 1).mean()


def consistency(
  image_similarities: Float[ArrayLike, "b b"],
  text_similarities: Float[ArrayLike, "b b"],
  margin: float = 0.3,
) -> Scalar:
  """Intra-modal consistency of TGDT (Liu et al., 2023, section III-C).

  Sum over columns of max(0, max over rows of |difference| - margin). Of equally large differences
  the first gets the gradient.
  """
  worst = _max_first(jnp.abs(text_similarities - image_similarities), 0)
  return jax.nn.relu(worst - margin).sum()


def intra_modal_consistency(
  measure: Callable[[Array, Array], Array],
  images: Float[ArrayLike, "b e"],
  texts: Float[ArrayLike, "b e"],
  margin: float = 0.3,
  ring: Ring | None = None,
) -> Scalar:
  """`consistency` of the similarities among images and among their texts.

  measure: one of MEASURES. ring: computes the loss blockwise.
  """
  if ring is None:
    return consistency(measure(images, images), measure(texts, texts), margin)

  def difference(shared, left, right, i, j):
    return jnp.abs(measure(left[1], right[1]) - measure(left[0], right[0]))

  pairs = images, texts
  stats = {"worst": statistics.Max(include_diagonal=True)}
  _, columns = ring_lib.reduce(difference, pairs, pairs, ring, right_stats=stats)
  return jax.nn.relu(columns["worst"][0] - margin).sum()


def dot(images: Float[Array, "i e"], texts: Float[Array, "t e"]) -> Float[Array, "i t"]:
  """Dot products of all pairs."""
  return jnp.dot(images, texts.T, precision="highest")


def cosine(images: Float[Array, "i e"], texts: Float[Array, "t e"]) -> Float[Array, "i t"]:
  """Cosine similarities of all pairs."""
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  return dot(unit(images), unit(texts))


def order(images: Float[Array, "i e"], texts: Float[Array, "t e"]) -> Float[Array, "i t"]:
  """Order embeddings, -|max(0, text - image)| (Vendrov et al., 2016)."""
  above = jax.nn.relu(texts - images[:, None])
  square = (above * above).sum(-1)
  # sqrt has an infinite gradient at 0; the inner where keeps it out of the backward pass.
  return -jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


MEASURES = {"dot": dot, "cosine": cosine, "order": order}
