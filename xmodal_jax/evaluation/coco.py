"""The COCO 5K test protocol: recalls, Crisscrossed Captions, ECCV Caption (numpy only).

`tools/benchmarks/ranks.py` times it beside the published eccv_caption package.
"""

import functools
import gzip
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import metrics

FOLDS = 5  # of COCO 1K

_FILES = (
  "cxc_image_to_caption", "cxc_caption_to_image", "eccv_image_to_caption", "eccv_caption_to_image",
)  # fmt: skip


class Positives(NamedTuple):
  """The positives of some queries, as positions in the score matrix.

  query: int [Q], position of each query. total: int [Q], number of its positives, counting those
  that are no candidates (ECCV Caption has two). The P pairs of a query and a positive candidate:
  pair: int [P], index of the pair's query in `query`, ascending; item: int [P], its candidate.
  """

  query: np.ndarray
  total: np.ndarray
  pair: np.ndarray
  item: np.ndarray


def check_files(directory: Any) -> None:
  """Raises ConfigError if a file of positives is missing. directory: config.eval.eccv_dir."""
  missing = [
    name
    for name in _FILES
    if not any((directory / f"{name}{suffix}").exists() for suffix in (".json", ".json.gz"))
  ]
  if missing:
    raise ConfigError(
      f"config.eval.eccv_dir: {directory} has no {missing[0]}.json or .json.gz; expected the "
      f"folder of the eccv_caption project's id files, with {', '.join(_FILES)}"
    )


def read_positives(
  directory: Any, name: str, query_ids: Sequence[int], item_ids: Sequence[int]
) -> Positives:
  """Reads {query id: [ids of its positives]} from NAME.json or NAME.json.gz.

  Args:
    directory: a pathlib or epath path.
    query_ids, item_ids: ids of the rows and columns of the scores, or of columns and rows.

  Raises:
    ValueError: a query is not in query_ids. A positive that is not in item_ids is no error: it
      counts in `Positives.total` only.
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
    raise ConfigError(
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
  query are sorted.

  Args:
    rows: the scores [N] of each query, in the order of `positives.query`.
    positives: from `read_positives`.

  >>> positives = Positives(query=np.array([0]), total=np.array([2]),
  ...                       pair=np.array([0, 0]), item=np.array([1, 2]))
  >>> precision_at_r([[0.9, 0.8, 0.1]], positives)  # the ranks of the positives are 1 and 2
  {'r1': 0.0, 'r5': 100.0, 'r10': 100.0, 'rprecision': 50.0, 'map_at_r': 25.0}
  """
  bounds = np.searchsorted(positives.pair, np.arange(len(positives.query) + 1))
  found = {k: [] for k in metrics.RECALL_AT}
  precision, average = [], []
  for n, row in enumerate(rows):
    row, total = np.asarray(row, np.float32), positives.total[n]
    depth = min(max(total, *metrics.RECALL_AT), len(row))
    lowest = np.partition(row, len(row) - depth)[len(row) - depth]
    candidates = np.flatnonzero(row >= lowest)
    first = candidates[np.argsort(-row[candidates], kind="stable")[:depth]]
    hits = np.isin(first, positives.item[bounds[n] : bounds[n + 1]])
    for k in metrics.RECALL_AT:
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
  """The numbers of the COCO 5K test split that are of all its images.

  The folds of COCO 1K are not among them: with two stages they are rankings of their own, see
  `report.report`. coco_5k_*: `metrics.summarise`. cxc_*: the same numbers with the positives of
  Crisscrossed Captions (Parekh et al., EACL 2021); a query's rank is that of its best positive.
  eccv_{i2t,t2i}_*: `precision_at_r` with those of ECCV Caption (Chun et al., ECCV 2022).

  Args:
    scores: [I, T]; read in blocks of rows, never copied or transposed as a whole.
    image_ids: [I] COCO image ids of the rows.
    caption_ids: [T] COCO caption annotation ids of the columns.
    caption_image: int [T] row of each caption's image.
    eccv_dir: folder with {cxc,eccv}_{image_to_caption,caption_to_image}.json or .json.gz.

  Raises:
    ValueError: the ids do not fit the scores, or the files not the ids.
  """
  scores, caption_image = metrics.check_scores(scores, caption_image)
  if scores.shape != (len(image_ids), len(caption_ids)):
    raise ConfigError(
      f"scores {scores.shape} of {len(image_ids)} image and {len(caption_ids)} caption ids"
    )
  read_both = functools.partial(_read_directions, eccv_dir, image_ids, caption_ids)
  cxc_i2t, cxc_t2i = read_both("cxc")
  own_rows, own_columns = metrics.own_targets(scores, caption_image)
  (i2t, cxc_rows), (t2i, cxc_columns) = metrics.count_ahead(
    scores,
    [own_rows, metrics.best_positives(cxc_i2t.query[cxc_i2t.pair], cxc_i2t.item, scores)],
    [own_columns, metrics.best_positives(cxc_t2i.query[cxc_t2i.pair], cxc_t2i.item, scores.T)],
  )
  eccv_i2t, eccv_t2i = read_both("eccv")
  # 1,332 of the columns, 27 MB, gathered row by row: the matrix is in row-major order.
  eccv_columns = scores[:, eccv_t2i.query]
  report = {
    "coco_5k": metrics.summarise_ranks(i2t, t2i),
    "cxc": metrics.summarise_ranks(cxc_rows[cxc_i2t.query], cxc_columns[cxc_t2i.query]),
    "eccv_i2t": precision_at_r((scores[i] for i in eccv_i2t.query), eccv_i2t),
    "eccv_t2i": precision_at_r(eccv_columns.T.copy(), eccv_t2i),
  }
  return {f"{name}_{key}": value for name, part in report.items() for key, value in part.items()}


def _read_directions(
  directory: Any, image_ids: Sequence[int], caption_ids: Sequence[int], name: str
) -> tuple[Positives, Positives]:
  """Positives of images and of captions of the dataset `name`."""
  return (
    read_positives(directory, f"{name}_image_to_caption", image_ids, caption_ids),
    read_positives(directory, f"{name}_caption_to_image", caption_ids, image_ids),
  )
