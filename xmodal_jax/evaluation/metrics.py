"""Retrieval metrics from a score matrix: ranks, recalls, folds, accuracy (numpy only).

Ranks are computed by counting. The 0-based rank of candidate c for a query with scores s is

  rank(c) = #{j : s_j > s_c} + #{j < c : s_j = s_c}

its position after a stable descending sort: ties go to the lower index. The rank of a query is the
best rank of its positives, that of the highest-scoring one (the lowest index among equals):
one threshold per query and one comparison per score, no sorting. A collapsed model, whose scores
are all equal, therefore has the recalls of chance and not 100; scores that are not finite raise.

Scores are compared as float32. Recalls are percentages, and medr and meanr count ranks from 1.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from xmodal_jax.errors import UserError

RECALL_AT = (1, 5, 10)
# Rows per block: column counts within a block are uint8, which 255 rows cannot overflow.
_BLOCK = 255


# Second-stage candidates int [Q, k] of each query, ascending, and their scores float32 [Q, k].
Shortlist = tuple[np.ndarray, np.ndarray]

# Of each query, the score float32 [Q] of its best positive and that positive's position int64 [Q].
Target = tuple[np.ndarray, np.ndarray]


class NonFiniteError(UserError):
  """Embeddings or scores hold NaN or infinity."""


class Ranked(NamedTuple):
  """Scores that rank the captions of every image and the images of every caption.

  i2t, t2i: [I, T], scores that rank captions and scores that rank images; the same array when there
  is one stage. caption_image: int [T], as for `retrieval_ranks`. shortlists: with a second stage,
  those of the images and of the captions, whose candidates lead in i2t and t2i.
  """

  i2t: np.ndarray
  t2i: np.ndarray
  caption_image: np.ndarray
  shortlists: tuple[Shortlist, Shortlist] | None = None


def check_finite(name: str, array: np.ndarray) -> None:
  """Raises NonFiniteError if rows of `array` [N, ...] hold NaN or infinity, naming the first."""
  array = np.asarray(array)
  flat = array.reshape(len(array), -1)
  good = np.empty(len(flat), bool)
  for start in range(0, len(flat), _BLOCK):
    good[start : start + _BLOCK] = np.isfinite(flat[start : start + _BLOCK]).all(1)
  if not good.all():
    bad = np.flatnonzero(~good)
    first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    raise NonFiniteError(
      f"{name}: {len(bad)} of {len(good)} rows hold NaN or infinity (rows {first})"
    )


def retrieval_ranks(scores: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """0-based ranks of both directions.

  Args:
    scores: [I, T], any float type, compared as float32.
    caption_image: int [T], the row of the image that each caption describes; every image has at
      least one caption, in any number and order.

  Returns:
    int64 [I], the best rank of each image's captions, and int64 [T], that of each caption's image.

  Raises:
    ValueError: caption_image does not fit the scores. NonFiniteError: scores are not finite.

  >>> scores = np.array([[0.9, 0.2, 0.8], [0.1, 0.7, 0.3]])
  >>> retrieval_ranks(scores, caption_image=np.array([0, 0, 1]))
  (array([0, 1]), array([0, 1, 1]))
  """
  scores, caption_image = check_scores(scores, caption_image)
  images, captions = own_targets(scores, caption_image)
  (i2t,), (t2i,) = count_ahead(scores, [images], [captions])
  return i2t, t2i


def top(scores: np.ndarray, k: int) -> np.ndarray:
  """Positions int64 [Q, min(k, N)] of the k highest scores of each row of [Q, N], ascending.

  Ties go to the lower position.
  """
  k = min(k, scores.shape[1])
  out = np.empty((len(scores), k), np.int64)
  for start in range(0, len(scores), 1024):  # bounds the copy that np.argpartition makes
    block = scores[start : start + 1024]
    chosen = np.argpartition(block, -k, axis=1)[:, -k:] if k < block.shape[1] else None
    if chosen is None:
      out[start : start + len(block)] = np.arange(k)
      continue
    lowest = np.take_along_axis(block, chosen, 1).min(1, keepdims=True)
    chosen.sort(1)
    for row in np.flatnonzero((block >= lowest).sum(1) > k):  # ties with the k-th score
      chosen[row] = np.sort(np.argsort(-block[row], kind="stable")[:k])
    out[start : start + len(block)] = chosen
  return out


def published_ranks(hits: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """0-based ranks int64 [Q] of the best positive in a shortlist, as TGDT's program computes them.

  That program gives rank 0 to a query without a positive in its shortlist, as if it had been found.
  hits: bool [Q, k], which candidates are positives. scores: [Q, k]; ties to the lower position.
  """
  order = np.argsort(-scores, axis=1, kind="stable")
  return np.take_along_axis(hits, order, 1).argmax(1)


def recalls(ranks: np.ndarray) -> dict[str, float]:
  """Recalls, median rank and mean rank of 0-based `ranks` [Q].

  r{K} = 100 * mean(rank < K). Hodosh et al., "Framing Image Description as a Ranking Task",
  JAIR 47, 2013. medr = floor(median(rank)) + 1, as in VSE++ (Faghri et al., BMVC 2018): with an
  even number of queries the median may lie between two ranks, and the better one is reported.
  meanr = mean(rank) + 1.

  >>> recalls(np.array([0, 3, 7, 20]))
  {'r1': 25.0, 'r5': 50.0, 'r10': 75.0, 'medr': 6.0, 'meanr': 8.5}
  """
  ranks = np.asarray(ranks)
  out = {f"r{k}": 100 * int(np.count_nonzero(ranks < k)) / len(ranks) for k in RECALL_AT}
  out["medr"] = float(np.floor(np.median(ranks))) + 1.0
  out["meanr"] = float(np.mean(ranks)) + 1.0
  return out


def accuracy(ranks: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Classification accuracy in percent: top1, top5 and mean_per_class.

  ranks [N]: 0-based rank of each image's own class among all classes. labels int [N]: that class.
  mean_per_class: the mean over classes, of those that have images, of their top1.

  >>> accuracy(ranks=np.array([0, 0, 6, 2]), labels=np.array([0, 0, 0, 1]))
  {'top1': 50.0, 'top5': 75.0, 'mean_per_class': 33.33333333333333}
  """
  right = np.asarray(ranks) == 0
  count, hits = np.bincount(labels), np.bincount(labels, weights=right)
  return {
    "top1": 100 * float(right.mean()),
    "top5": 100 * float((np.asarray(ranks) < 5).mean()),
    "mean_per_class": 100 * float((hits[count > 0] / count[count > 0]).mean()),
  }


def summarise(scores: np.ndarray, caption_image: np.ndarray) -> dict[str, float]:
  """`recalls` of both directions as i2t_* and t2i_*, and their sums; see `summarise_ranks`.

  scores [I, T], caption_image int [T] as for `retrieval_ranks`.

  >>> summarise(np.eye(20), np.arange(20))
  {'i2t_r1': 100.0, ..., 't2i_meanr': 1.0, 'rsum': 600.0, 'mean_r': 100.0, 'mean_r1': 100.0}
  """
  return summarise_ranks(*retrieval_ranks(scores, caption_image))


def summarise_ranked(
  ranked: Ranked, summarise: Callable[[np.ndarray, np.ndarray], dict[str, float]] = summarise
) -> dict[str, float]:
  """`summarise` with the scores of each direction: i2t_* from `i2t`, t2i_* from `t2i`."""
  i2t = summarise(ranked.i2t, ranked.caption_image)
  if ranked.t2i is ranked.i2t:
    return i2t
  return merge_directions(i2t, summarise(ranked.t2i, ranked.caption_image))


def summarise_published(ranked: Ranked) -> dict[str, float]:
  """`summarise` as TGDT's program computes it: shortlists ranked by `published_ranks`."""
  if ranked.shortlists is None:
    return summarise_ranked(ranked)
  (captions, caption_scores), (images, image_scores) = ranked.shortlists
  owner = ranked.caption_image
  return summarise_ranks(
    published_ranks(owner[captions] == np.arange(len(captions))[:, None], caption_scores),
    published_ranks(images == owner[:, None], image_scores),
  )


def merge_directions(i2t: dict[str, float], t2i: dict[str, float]) -> dict[str, float]:
  """Joins the image-to-text numbers of one report and the text-to-image numbers of another.

  Sums over both directions are computed again. For two stages, where the directions have different
  score matrices.
  """
  out = {k: (t2i if "t2i" in k else i2t)[k] for k in i2t}
  for prefix in (k.removesuffix("rsum") for k in i2t if k.endswith("rsum")):
    r1 = [out[f"{prefix}{d}_r1"] for d in ("i2t", "t2i")]
    out[f"{prefix}rsum"] = sum(out[f"{prefix}{d}_r{k}"] for d in ("i2t", "t2i") for k in RECALL_AT)
    out[f"{prefix}mean_r"] = out[f"{prefix}rsum"] / (2 * len(RECALL_AT))
    out[f"{prefix}mean_r1"] = sum(r1) / 2
  return out


def folds(scores: np.ndarray, caption_image: np.ndarray, n_folds: int = 5) -> dict[str, float]:
  """`summarise` averaged over `n_folds` consecutive blocks of images with their own captions.

  On the 5,000 COCO test images in the order of the ids this is the 1K protocol (Karpathy and
  Fei-Fei, CVPR 2015). Captions of other folds are no candidates. scores [I, T], caption_image int
  [T].
  """
  scores, caption_image = check_scores(scores, caption_image)
  return average(
    [
      summarise(scores[rows, columns], caption_image[columns] - rows.start)
      for rows, columns in split_folds(len(scores), caption_image, n_folds)
    ]
  )


def split_folds(
  n_images: int,
  caption_image: np.ndarray,
  n_folds: int,
  image_id: np.ndarray | None = None,
) -> list[tuple[slice, slice | np.ndarray]]:
  """Rows and columns of `n_folds` consecutive blocks of images with their own captions.

  n_images: of the whole split. image_id: int [I], ascending, the positions in the split of the rows
  of the scores; None: all of it. An image that is not among them leaves its own fold smaller and
  moves no other image to another fold. Raises ValueError if n_images is not divisible by n_folds,
  or a fold has no image.
  """
  size, rest = divmod(n_images, n_folds)
  if rest or not size:
    raise ValueError(f"{n_images} images do not make {n_folds} folds of equal size")
  image_id = np.arange(n_images) if image_id is None else image_id
  bounds = np.searchsorted(image_id, np.arange(0, n_images + 1, size)).tolist()
  parts = []
  for start, stop in itertools.pairwise(bounds):
    ours = np.flatnonzero((caption_image >= start) & (caption_image < stop))
    if not len(ours):
      raise UserError(f"fold {len(parts) + 1} of {n_folds} has no image that could be read")
    # A slice is a view; captions that are not adjacent are copied.
    adjacent = ours[-1] - ours[0] + 1 == len(ours)
    columns = slice(int(ours[0]), int(ours[-1]) + 1) if adjacent else ours
    parts.append((slice(start, stop), columns))
  return parts


def average(parts: Sequence[dict[str, float]], *, published: bool = False) -> dict[str, float]:
  """The mean of each number over folds. published: rsum times six, as TGDT's program prints it."""
  out = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
  if published:
    out["rsum"] *= 2 * len(RECALL_AT)
  return out


def check_scores(scores: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both as arrays. Raises ValueError if they do not fit, or an image has no caption."""
  scores, caption_image = np.asarray(scores), np.asarray(caption_image)
  if scores.ndim != 2 or caption_image.shape != (scores.shape[1],) or not caption_image.size:
    raise ValueError(f"scores {scores.shape} do not fit caption_image {caption_image.shape}")
  if caption_image.min() < 0 or caption_image.max() >= len(scores):
    raise ValueError(f"caption_image has images outside the {len(scores)} rows of the scores")
  bare = len(scores) - len(np.unique(caption_image))
  if bare:
    raise ValueError(f"{bare} of {len(scores)} images have no caption")
  return scores, caption_image


def summarise_ranks(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
  """`recalls` of 0-based ranks [I] and [T] as i2t_* and t2i_*, and their sums.

  rsum = the sum of the six recalls; mean_r = rsum / 6; mean_r1 = mean of the two R@1.
  """
  directions = {"i2t": recalls(i2t), "t2i": recalls(t2i)}
  out = {f"{d}_{key}": value for d, part in directions.items() for key, value in part.items()}
  out["rsum"] = sum(part[f"r{k}"] for part in directions.values() for k in RECALL_AT)
  out["mean_r"] = out["rsum"] / (2 * len(RECALL_AT))
  out["mean_r1"] = (out["i2t_r1"] + out["t2i_r1"]) / 2
  return out


def best_positives(query: np.ndarray, item: np.ndarray, scores: np.ndarray) -> Target:
  """The best of the positive pairs (query int [P], item int [P]) of each row of scores [Q, N].

  A row without a pair gets the score -inf and position N, which rank behind all candidates.
  """
  value = np.asarray(scores[query, item], np.float32)
  best = np.full(len(scores), -np.inf, np.float32)
  np.maximum.at(best, query, value)
  where = np.full(len(scores), scores.shape[1], np.int64)
  highest = value == best[query]
  np.minimum.at(where, query[highest], item[highest])
  return best, where


def own_targets(scores: np.ndarray, caption_image: np.ndarray) -> tuple[Target, Target]:
  """Of each image (row) its best caption, and of each caption (column) its image."""
  captions = np.arange(len(caption_image))
  return (
    best_positives(caption_image, captions, scores),
    best_positives(captions, caption_image, scores.T),
  )


def count_ahead(
  scores: np.ndarray, rows: Sequence[Target], columns: Sequence[Target]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """0-based ranks of the targets of the rows and of the columns of scores [I, T], in one pass.

  A row is read from memory once, for its own ranks and for a running count per column, so that no
  column is gathered. Returns int64 [I] per target of `rows` and int64 [T] per target of `columns`.
  Raises NonFiniteError.
  """
  n_rows, n_columns = scores.shape
  row_ranks = [np.zeros(n_rows, np.int64) for _ in rows]
  column_ranks = [np.zeros(n_columns, np.int64) for _ in columns]
  tallies = [np.zeros(n_columns, np.uint8) for _ in columns]
  ahead, tied = np.empty((2, n_columns), bool)
  # Equal scores count only in rows above the positive's: `above` marks columns not yet there.
  above = [np.ones(n_columns, bool) for _ in columns]
  orders = [np.argsort(where, kind="stable") for _, where in columns]
  bounds = [
    np.searchsorted(where[order], np.arange(n_rows + 1)).tolist()
    for (_, where), order in zip(columns, orders, strict=True)
  ]
  for start in range(0, n_rows, _BLOCK):
    block = np.asarray(scores[start : start + _BLOCK], np.float32)
    for i, row in enumerate(block, start):
      if not np.isfinite(row, out=ahead).all():
        check_finite("scores", scores)
      for (value, where), ranks in zip(rows, row_ranks, strict=True):
        k, v = where[i], value[i]
        ranks[i] = np.count_nonzero(row[:k] >= v) + np.count_nonzero(row[k:] > v)
      for n, (value, _) in enumerate(columns):
        above[n][orders[n][bounds[n][i] : bounds[n][i + 1]]] = False
        np.greater(row, value, out=ahead)
        np.equal(row, value, out=tied)
        tied &= above[n]
        ahead |= tied
        tallies[n] += ahead.view(np.uint8)
    for ranks, tally in zip(column_ranks, tallies, strict=True):
      ranks += tally
      tally[:] = 0
  return row_ranks, column_ranks
