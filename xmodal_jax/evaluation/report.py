"""From ranked scores to the numbers that config.eval asks for, under their names."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import records
from xmodal_jax.evaluation import metrics, ndcg

# Rows and columns of the score matrix: all, or those of a fold.
Part = tuple[slice, slice | np.ndarray]
WHOLE: Part = (slice(None), slice(None))


def methods(config: Any) -> list[str]:
  """What NDCG is computed by. Raises ValueError for what config.eval.ndcg or protocol cannot be."""
  e = config.eval
  names = [name.strip() for name in e.ndcg.split(",")] if e.ndcg else []
  unknown = [name for name in names if name not in ndcg.METHODS]
  if unknown or len(set(names)) < len(names):
    raise ValueError(
      f"config.eval.ndcg is {e.ndcg!r}: expected different ones of {', '.join(ndcg.METHODS)} "
      "with commas between them"
    )
  if e.protocol not in ("right", "original"):
    raise ValueError(f'config.eval.protocol is {e.protocol!r}: expected "right" or "original"')
  return names


def grades(
  config: Any, inputs: inputs_lib.Inputs, split_key: str, compute: bool = True
) -> dict[str, np.ndarray]:
  """Relevances float32 [T, I] of config.data[split_key] by method, for config.eval.ndcg.

  Those of config.eval.relevance_dir; ROUGE-L is computed where they lack it, and kept in the folder
  `relevances` of `inputs.data_home` for the next time. compute: False leaves out what would be.
  Raises ValueError for a file that does not fit the split, FileNotFoundError where there is none.
  """
  out, name = {}, config.data[split_key]
  folder = epath.Path(config.eval.relevance_dir or ".").expanduser()
  for method in methods(config):
    path = ndcg.find(folder, name, method) if config.eval.relevance_dir else None
    if path is None and method != "rougeL":
      where = f"config.eval.relevance_dir {str(config.eval.relevance_dir)!r}"
      raise FileNotFoundError(
        f"config.eval.ndcg names {method}, but {where} has no *-{name}-{method}.npy; it cannot be "
        "computed here: use the distributed files, or leave it out"
      )
    split = inputs.split(split_key)
    shape = int(split.captions_per_record.sum()), len(split)
    if path is None:
      path = _computed(split, name, shape, compute)
    if path is not None:
      out[method] = ndcg.read(path, *shape)
  return out


def _computed(
  split: records.Split, name: str, shape: tuple[int, int], compute: bool
) -> epath.Path | None:
  """The file of ROUGE-L relevances of a split, which is written first where it does not exist."""
  size = "x".join(map(str, shape))  # the fingerprint does not know how many captions count
  folder = inputs_lib.data_home() / "relevances"
  path = folder / f"{split.fingerprint[:16]}_{size}-{name}-rougeL.npy"
  if not path.exists():
    if not compute:
      return None
    start = time.monotonic()
    ndcg.write(path, ndcg.rouge_l_rows([record.captions for record in split]))
    logging.info("ROUGE-L of %s in %.0f s: %s", size, time.monotonic() - start, path)
  return path


def report(
  config: Any,
  split: records.Split,
  split_key: str,
  rank: Callable[[Part], metrics.Ranked],
  graded: Mapping[str, np.ndarray],
  *,
  published: bool = False,
) -> dict[str, float]:
  """The metrics that the config asks for; ECCV Caption, CxC and folds only on the test split.

  rank: ranks the whole, or one fold alone. graded: from `grades`. published: also published_*, the
  numbers of the program of TGDT.
  """
  e, test = config.eval, split_key == "test"
  whole = rank(WHOLE)
  wrong = [v.shape for v in graded.values() if v.shape != whole.i2t.T.shape]
  if wrong:
    raise ValueError(
      f"config.eval.ndcg: relevances {wrong[0]} for {whole.i2t.T.shape} captions and pictures; "
      "NDCG needs every picture of the split, and some could not be read"
    )
  owner = whole.caption_image
  coco = functools.partial(_coco, e, split)
  summarise = coco if e.eccv_dir and test else metrics.summarise
  out, theirs = _numbers(e, whole, graded, published, summarise)
  if e.folds and test and not e.eccv_dir:
    n_images = len(whole.i2t)
    del whole  # two matrices, where there are two stages
    pairs = [
      _numbers(e, rank(part), {k: v[part[1], part[0]] for k, v in graded.items()}, published)
      for part in metrics.split_folds(n_images, owner, e.folds)
    ]
    ours, fold_theirs = zip(*pairs, strict=True)
    name = lambda values: {f"folds{e.folds}_{k}": v for k, v in values.items()}
    out |= name(metrics.average(ours))
    if published:
      theirs |= name(metrics.average(fold_theirs, published=True))
  return out | {f"published_{k}": v for k, v in theirs.items()}


def _numbers(
  e: Any,
  ranked: metrics.Ranked,
  graded: Mapping[str, np.ndarray],
  published: bool,
  summarise: Callable[[np.ndarray, np.ndarray], dict[str, float]] = metrics.summarise,
) -> tuple[dict[str, float], dict[str, float]]:
  """Numbers of a ranking by config.eval, and the published program's: none unless `published`."""
  if e.score_dtype != "float32":
    i2t = ranked.i2t.astype(e.score_dtype)
    one = ranked.t2i is ranked.i2t
    ranked = ranked._replace(i2t=i2t, t2i=i2t if one else ranked.t2i.astype(e.score_dtype))
  ours = metrics.summarise_ranked(ranked, summarise)
  theirs = metrics.summarise_published(ranked) if published else {}
  for method, values in graded.items():
    gains = ndcg.ndcg(ranked.i2t, values.T), ndcg.ndcg(ranked.t2i.T, values)
    ours |= ndcg.means(method, *gains)
    if published:
      theirs |= ndcg.means(method, *gains, published=True)
  return ours, theirs


def _coco(
  e: Any, split: records.Split, scores: np.ndarray, caption_image: np.ndarray
) -> dict[str, float]:
  """ECCV Caption and CxC beside the rest; the 5K numbers keep their plain names."""
  ids = [(r.image_id, r.caption_ids) for r in split]
  captions = [c for _, own in ids for c in own]
  folder = epath.Path(e.eccv_dir).expanduser()
  out = metrics.coco_protocol(scores, [i for i, _ in ids], captions, caption_image, folder)
  plain = {k.removeprefix("coco_5k_"): v for k, v in out.items() if k[:8] == "coco_5k_"}
  return plain | {k: v for k, v in out.items() if k[:8] != "coco_5k_"}
