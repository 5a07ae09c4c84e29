"""Retrieval metrics from a score matrix: ranks by counting, recalls, COCO 1K, CxC, ECCV Caption.

A rank is a count. The 0-based rank of candidate c for a query with scores s is

  rank(c) = #{j : s_j > s_c} + #{j < c : s_j = s_c}

its position after a stable descending sort, so ties go to the lower index. The rank of a query is
the best rank of its positives, which is that of the highest-scoring one (the lowest index among
equals): one threshold per query, and one comparison per score. Nothing is sorted. A collapsed
model (all scores equal) therefore scores chance, not 100, and scores that are not finite raise.

Scores are compared as float32. Recalls are percentages, ranks in reports count from 1.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

RECALL_AT = (1, 5, 10)
# Rows per block: the column counts of a block are held in uint8, which 255 rows cannot overflow.
_BLOCK = 255


class NonFiniteError(ValueError):
  """Embeddings or scores hold NaN or infinity."""


class Positives(NamedTuple):
  """The positives of some queries, as positions in the score matrix.

  query: int [Q] position of each query. total: int [Q] number of positives, counting those that
  are not among the candidates (ECCV Caption has two). pair: int [P] which of the Q queries a pair
  belongs to, ascending; item: int [P] its candidate.
  """

  query: np.ndarray
  total: np.ndarray
  pair: np.ndarray
  item: np.ndarray


class Ranked(NamedTuple):
  """How a model ranks the captions of pictures and the pictures of captions.

  i2t, t2i: scores [I, T] that rank captions and pictures; the same array where there is one stage.
  caption_image: int [T], as for `retrieval_ranks`. shortlists: with a second stage, (candidates
  [Q, k] ascending, their scores [Q, k]) of pictures and of captions, which lead in i2t and t2i.
  """

  i2t: np.ndarray
  t2i: np.ndarray
  caption_image: np.ndarray
  shortlists: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None


def check_finite(name: str, array: np.ndarray) -> None:
  """Raises NonFiniteError with the count and the first of the rows of `array` [N, ...] that hold
  NaN or infinity."""
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
  """
  scores, caption_image = _checked(scores, caption_image)
  (i2t,), (t2i,) = _count_ahead(scores, *_own_targets(scores, caption_image))
  return i2t, t2i


def top(scores: np.ndarray, k: int) -> np.ndarray:
  """Positions of the k highest of each row of [Q, N], ascending; ties go to the lower position."""
  k = min(k, scores.shape[1])
  out = np.empty((len(scores), k), np.int64)
  for start in range(0, len(scores), 1024):  # bounds the copy that a partition makes
    block = scores[start : start + 1024]
    chosen = np.argpartition(block, -k, axis=1)[:, -k:] if k < block.shape[1] else None
    if chosen is None:
      out[start : start + len(block)] = np.arange(k)
      continue
    lowest = np.take_along_axis(block, chosen, 1).min(1, keepdims=True)
    chosen.sort(1)
    for row in np.flatnonzero((block >= lowest).sum(1) > k):  # a tie at the last place
      chosen[row] = np.sort(np.argsort(-block[row], kind="stable")[:k])
    out[start : start + len(block)] = chosen
  return out


def published_ranks(hits: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """0-based ranks int64 [Q] of the best positive in a shortlist, as the program of TGDT has them.

  A query none of whose positives is in its shortlist has rank 0 there, as if it were found at once.
  hits: bool [Q, k], which candidates are positives. scores: [Q, k]; ties to the lower position.
  """
  order = np.argsort(-scores, axis=1, kind="stable")
  return np.take_along_axis(hits, order, 1).argmax(1)


def recalls(ranks: np.ndarray) -> dict[str, float]:
  """Recalls of 0-based `ranks` [Q], and their median and mean counted from 1.

  r{K} = 100 * mean(rank < K). Hodosh et al., "Framing Image Description as a Ranking Task",
  JAIR 47, 2013. medr = floor(median(rank)) + 1, as in VSE++ (Faghri et al., BMVC 2018): with an
  even number of queries the median may lie between two ranks, and the better one is reported.
  meanr = mean(rank) + 1.
  """
  ranks = np.asarray(ranks)
  out = {f"r{k}": 100 * int(np.count_nonzero(ranks < k)) / len(ranks) for k in RECALL_AT}
  out["medr"] = float(np.floor(np.median(ranks))) + 1.0
  out["meanr"] = float(np.mean(ranks)) + 1.0
  return out


def accuracy(ranks: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Percentages of pictures whose class is among the first 1 and 5 of all, as top1 and top5.

  ranks [N]: 0-based, of the picture's own class among all classes. labels int [N]: that class.
  mean_per_class: top1 of each class that has pictures, averaged over these classes.
  """
  right = np.asarray(ranks) == 0
  count, hits = np.bincount(labels), np.bincount(labels, weights=right)
  return {
    "top1": 100 * float(right.mean()),
    "top5": 100 * float((np.asarray(ranks) < 5).mean()),
    "mean_per_class": 100 * float((hits[count > 0] / count[count > 0]).mean()),
  }


def summarise(scores: np.ndarray, caption_image: np.ndarray) -> dict[str, float]:
  """`recalls` of both directions as i2t_* and t2i_*, and their sums.

  rsum = the sum of the six recalls; mean_r = rsum / 6; mean_r1 = mean of the two R@1.
  scores [I, T], caption_image int [T] as for `retrieval_ranks`.
  """
  return _summary(*retrieval_ranks(scores, caption_image))


def summarise_ranked(
  ranked: Ranked, summarise: Callable[[np.ndarray, np.ndarray], dict[str, float]] = summarise
) -> dict[str, float]:
  """`summarise` (or what else makes a report of scores) of both directions, each by its own."""
  i2t = summarise(ranked.i2t, ranked.caption_image)
  if ranked.t2i is ranked.i2t:
    return i2t
  return merge_directions(i2t, summarise(ranked.t2i, ranked.caption_image))


def summarise_published(ranked: Ranked) -> dict[str, float]:
  """`summarise` as the program of TGDT has it: shortlists ranked by `published_ranks`."""
  if ranked.shortlists is None:
    return summarise_ranked(ranked)
  (captions, caption_scores), (pictures, picture_scores) = ranked.shortlists
  owner = ranked.caption_image
  return _summary(
    published_ranks(owner[captions] == np.arange(len(captions))[:, None], caption_scores),
    published_ranks(pictures == owner[:, None], picture_scores),
  )


def merge_directions(i2t: dict[str, float], t2i: dict[str, float]) -> dict[str, float]:
  """One report of two: image to text of the first, text to image of the second, sums anew.

  For systems that rerank each direction on its own, whose two score matrices differ.
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
  Fei-Fei, CVPR 2015). Captions of other folds are no candidates. scores [I, T], caption_image [T].
  """
  scores, caption_image = _checked(scores, caption_image)
  return average(
    [
      summarise(scores[rows, columns], caption_image[columns] - rows.start)
      for rows, columns in split_folds(len(scores), caption_image, n_folds)
    ]
  )


def split_folds(
  n_images: int, caption_image: np.ndarray, n_folds: int
) -> list[tuple[slice, slice | np.ndarray]]:
  """Rows and columns of consecutive blocks of images with their own captions.

  Raises ValueError where `n_images` do not divide into `n_folds`.
  """
  size, rest = divmod(n_images, n_folds)
  if rest or not size:
    raise ValueError(f"{n_images} images do not make {n_folds} folds of equal size")
  parts = []
  for start in range(0, n_images, size):
    ours = np.flatnonzero(caption_image // size == start // size)
    # A slice is a view; captions scattered over the columns have to be copied.
    adjacent = ours[-1] - ours[0] + 1 == len(ours)
    columns = slice(int(ours[0]), int(ours[-1]) + 1) if adjacent else ours
    parts.append((slice(start, start + size), columns))
  return parts


def average(parts: Sequence[dict[str, float]], *, published: bool = False) -> dict[str, float]:
  """The mean over reports of folds. published: rsum six times too large, as in TGDT's program."""
  out = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
  if published:
    out["rsum"] *= 2 * len(RECALL_AT)
  return out


def read_positives(
  directory: Any, name: str, query_ids: Sequence[int], item_ids: Sequence[int]
) -> Positives:
  """Reads `name`.json or `name`.json.gz of `directory` (a pathlib or epath path): query id -> ids.

  query_ids and item_ids give the ids of the rows and columns (or columns and rows) of the scores.
  Every query must be among query_ids. A positive that is no candidate counts in `total` only.
  """
  path = directory / f"{name}.json"
  if path.exists():
    table = json.loads(path.read_bytes())
  else:
    table = json.loads(gzip.decompress((directory / f"{name}.json.gz").read_bytes()))
  query_at = {int(x): i for i, x in enumerate(query_ids)}
  item_at = {int(x): i for i, x in enumerate(item_ids)}
  table = {int(query): set(map(int, items)) for query, items in table.items()}
  unknown = [query for query in table if query not in query_at]
  if unknown:
    raise ValueError(
      f"{name}: {len(unknown)} of {len(table)} queries are not in the test set (ids {unknown[:5]})"
    )
  pairs = [
    (n, item_at[item])
    for n, items in enumerate(table.values())
    for item in items
    if item in item_at
  ]
  pair, item = np.array(pairs, np.int64).reshape(-1, 2).T
  query = np.array([query_at[x] for x in table], np.int64)
  total = np.array([len(items) for items in table.values()], np.int64)
  return Positives(query, total, pair, item)


def precision_at_r(rows: Iterable[np.ndarray], positives: Positives) -> dict[str, float]:
  """Recalls and R-precision metrics of queries with R positives each, R different per query.

  With hit_k = 1 where the candidate of 0-based rank k is a positive, and P_k the share of hits
  among the first k + 1 candidates:

    r{K} = 100 * mean over queries of [any hit_k, k < K]
    rprecision = 100 * mean of P_{R-1}
    map_at_r = 100 * mean of (1/R) sum_{k < R} hit_k P_k

  Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, section 3.2; used by Chun et al.,
  "ECCV Caption", ECCV 2022, whose numbers these are. Only the first max(R, 10) candidates of a
  query are put in order.

  Args:
    rows: the scores [N] of each query, in the order of `positives.query`.
    positives: from `read_positives`.
  """
  bounds = np.searchsorted(positives.pair, np.arange(len(positives.query) + 1))
  found = {k: [] for k in RECALL_AT}
  precision, average = [], []
  for n, row in enumerate(rows):
    row, total = np.asarray(row, np.float32), positives.total[n]
    depth = min(max(total, *RECALL_AT), len(row))
    lowest = np.partition(row, len(row) - depth)[len(row) - depth]
    candidates = np.flatnonzero(row >= lowest)
    first = candidates[np.argsort(-row[candidates], kind="stable")[:depth]]
    hits = np.isin(first, positives.item[bounds[n] : bounds[n + 1]])
    for k in RECALL_AT:
      found[k].append(hits[:k].any())
    hits = hits[:total]
    precision.append(hits.sum() / total)
    average.append(np.sum(hits * np.cumsum(hits) / np.arange(1, len(hits) + 1)) / total)
  out = {f"r{k}": 100.0 * float(np.mean(v)) for k, v in found.items()}
  out["rprecision"] = 100.0 * float(np.mean(precision))
  out["map_at_r"] = 100.0 * float(np.mean(average))
  return out


def coco_protocol(
  scores: np.ndarray,
  image_ids: Sequence[int],
  caption_ids: Sequence[int],
  caption_image: np.ndarray,
  eccv_dir: Any,
) -> dict[str, float]:
  """Everything that is reported on the COCO 5K test split.

  coco_5k_*: `summarise`. coco_1k_*: `folds`. cxc_{i2t,t2i}_*: `recalls` with the positives of
  Crisscrossed Captions (Parekh et al., EACL 2021), whose rank is that of the best positive.
  eccv_{i2t,t2i}_*: `precision_at_r` with those of ECCV Caption (Chun et al., ECCV 2022).

  Args:
    scores: [I, T]; read in row blocks, never copied or transposed as a whole.
    image_ids: [I] COCO image ids in the order of the rows, which is that of the 1K folds.
    caption_ids: [T] COCO caption annotation ids in the order of the columns.
    caption_image: int [T] row of each caption's image.
    eccv_dir: folder with {cxc,eccv}_{image_to_caption,caption_to_image}.json or .json.gz.
  """
  scores, caption_image = _checked(scores, caption_image)
  if scores.shape != (len(image_ids), len(caption_ids)):
    raise ValueError(
      f"scores {scores.shape} of {len(image_ids)} image and {len(caption_ids)} caption ids"
    )
  read = lambda name, direction: read_positives(
    eccv_dir,
    f"{name}_{direction}",
    *((image_ids, caption_ids) if direction == "image_to_caption" else (caption_ids, image_ids)),
  )
  cxc_i2t, cxc_t2i = read("cxc", "image_to_caption"), read("cxc", "caption_to_image")
  own_rows, own_columns = _own_targets(scores, caption_image)
  (i2t, cxc_rows), (t2i, cxc_columns) = _count_ahead(
    scores,
    [*own_rows, _best(cxc_i2t.query[cxc_i2t.pair], cxc_i2t.item, scores)],
    [*own_columns, _best(cxc_t2i.query[cxc_t2i.pair], cxc_t2i.item, scores.T)],
  )
  eccv_i2t, eccv_t2i = read("eccv", "image_to_caption"), read("eccv", "caption_to_image")
  # 1,332 of the columns, 27 MB: gathered row by row, as the matrix lies in memory.
  eccv_columns = scores[:, eccv_t2i.query]
  report = {
    "coco_5k": _summary(i2t, t2i),
    "coco_1k": folds(scores, caption_image),
    "cxc": _summary(cxc_rows[cxc_i2t.query], cxc_columns[cxc_t2i.query]),
    "eccv_i2t": precision_at_r((scores[i] for i in eccv_i2t.query), eccv_i2t),
    "eccv_t2i": precision_at_r(eccv_columns.T.copy(), eccv_t2i),
  }
  return {f"{name}_{key}": value for name, part in report.items() for key, value in part.items()}


def _checked(scores: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  scores, caption_image = np.asarray(scores), np.asarray(caption_image)
  if scores.ndim != 2 or caption_image.shape != (scores.shape[1],) or not caption_image.size:
    raise ValueError(f"scores {scores.shape} do not fit caption_image {caption_image.shape}")
  if caption_image.min() < 0 or caption_image.max() >= len(scores):
    raise ValueError(f"caption_image has images outside the {len(scores)} rows of the scores")
  bare = len(scores) - len(np.unique(caption_image))
  if bare:
    raise ValueError(f"{bare} of {len(scores)} images have no caption")
  return scores, caption_image


def _summary(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
  """Recalls of 0-based ranks [I] and [T] with the sums over both directions."""
  directions = {"i2t": recalls(i2t), "t2i": recalls(t2i)}
  out = {f"{d}_{key}": value for d, part in directions.items() for key, value in part.items()}
  out["rsum"] = sum(part[f"r{k}"] for part in directions.values() for k in RECALL_AT)
  out["mean_r"] = out["rsum"] / (2 * len(RECALL_AT))
  out["mean_r1"] = (out["i2t_r1"] + out["t2i_r1"]) / 2
  return out


# A target: float32 [Q] score of each query's best positive and int64 [Q] its position.
_Target = tuple[np.ndarray, np.ndarray]


def _best(query: np.ndarray, item: np.ndarray, scores: np.ndarray) -> _Target:
  """The best of the positive pairs query [P], item [P] for each query (row) of scores [Q, N].

  A query without a pair gets -inf and the position past the end: it ranks behind everything.
  """
  value = np.asarray(scores[query, item], np.float32)
  best = np.full(len(scores), -np.inf, np.float32)
  np.maximum.at(best, query, value)
  where = np.full(len(scores), scores.shape[1], np.int64)
  highest = value == best[query]
  np.minimum.at(where, query[highest], item[highest])
  return best, where


def _own_targets(
  scores: np.ndarray, caption_image: np.ndarray
) -> tuple[list[_Target], list[_Target]]:
  captions = np.arange(len(caption_image))
  return [_best(caption_image, captions, scores)], [_best(captions, caption_image, scores.T)]


def _count_ahead(
  scores: np.ndarray, rows: Sequence[_Target], columns: Sequence[_Target]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """The 0-based ranks of targets of the rows and of the columns of scores [I, T], in one pass.

  Each row is read from memory once and serves all counts while it is in cache: along the row for
  its own query, and added to a running count per column, so that no column is ever gathered.
  Returns int64 [I] per target of `rows` and int64 [T] per target of `columns`.
  """
  n_rows, n_columns = scores.shape
  row_ranks = [np.zeros(n_rows, np.int64) for _ in rows]
  column_ranks = [np.zeros(n_columns, np.int64) for _ in columns]
  tallies = [np.zeros(n_columns, np.uint8) for _ in columns]
  ahead, tied = np.empty((2, n_columns), bool)
  # Equal scores count only above the positive's row: `above` holds for the columns not there yet.
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
