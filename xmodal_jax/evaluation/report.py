"""From ranked scores to the numbers that config.eval asks for. `options` is config.eval."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import mix, records
from xmodal_jax.evaluation import coco, metrics, ndcg

# Rows and columns of the score matrix: all of them, or those of one fold.
Part = tuple[slice, slice | np.ndarray]
WHOLE: Part = (slice(None), slice(None))

# (scores [I, T], caption_image [T]) -> {name: number}
Summarise = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def check(options: Any) -> list[str]:
  """The relevance methods of config.eval.ndcg. Raises ValueError for unknown names or protocol."""
  names = [name.strip() for name in options.ndcg.split(",")] if options.ndcg else []
  unknown = [name for name in names if name not in ndcg.METHODS]
  if unknown or len(set(names)) < len(names):
    raise ValueError(
      f"config.eval.ndcg is {options.ndcg!r}: expected a comma-separated list of different names "
      f"out of {', '.join(ndcg.METHODS)}"
    )
  if options.protocol not in ("right", "original"):
    raise ValueError(
      f'config.eval.protocol is {options.protocol!r}: expected "right" or "original"'
    )
  return names


def grades(
  options: Any, split: records.Split | mix.Joined, compute: bool = True
) -> dict[str, np.ndarray]:
  """Relevances float32 [T, I] of a split for each method of config.eval.ndcg.

  They are read from config.eval.relevance_dir. ROUGE-L is computed where there is no file, and
  cached in the folder `relevances` of `inputs.data_home`.

  Args:
    compute: False only reads the files there are, and leaves out what would have to be computed.

  Raises:
    ValueError: a file does not fit the split. FileNotFoundError: there is no file.
  """
  out, name = {}, _split_name(split)
  folder = epath.Path(options.relevance_dir or ".").expanduser()
  for method in check(options):
    path = ndcg.find(folder, name, method) if options.relevance_dir else None
    if path is None and method != "rougeL":
      raise FileNotFoundError(
        f"config.eval.ndcg names {method}, but config.eval.relevance_dir "
        f"{str(options.relevance_dir)!r} has no *-{name}-{method}.npy, and {method} cannot be "
        "computed here: use the distributed files, or remove it from config.eval.ndcg"
      )
    shape = int(split.captions_per_record.sum()), len(split)
    if path is None:
      path = _rouge_l_file(split, name, shape, compute)
    if path is not None:
      out[method] = ndcg.read(path, *shape)
  return out


def report(
  options: Any,
  split: records.Split,
  rank: Callable[[Part], metrics.Ranked],
  graded: Mapping[str, np.ndarray],
  *,
  is_test: bool,
  published: bool = False,
) -> dict[str, float]:
  """The metrics that config.eval asks for.

  Args:
    rank: ranks the whole split, or one fold by itself.
    graded: from `grades`.
    is_test: ECCV Caption, CxC and folds are reported on the test split only.
    published: adds published_*, the numbers as TGDT's program computes them.
  """
  whole = rank(WHOLE)
  wrong = [v.shape for v in graded.values() if v.shape != whole.i2t.T.shape]
  if wrong:
    raise ValueError(
      f"config.eval.ndcg: relevances {wrong[0]} for {whole.i2t.T.shape} captions and images; "
      "NDCG needs every image of the split, and some could not be read"
    )
  eccv = options.eccv_dir and is_test
  summarise = functools.partial(_coco, options.eccv_dir, split) if eccv else metrics.summarise
  dtype = options.score_dtype
  ours, theirs = _numbers(dtype, whole, graded, published, summarise)
  if options.folds and is_test and not eccv:
    n_images, owner = len(whole.i2t), whole.caption_image
    del whole  # with two stages these are two matrices
    pairs = [
      _numbers(dtype, rank((i, t)), {k: v[t, i] for k, v in graded.items()}, published)
      for i, t in metrics.split_folds(n_images, owner, options.folds)
    ]
    our_folds, their_folds = zip(*pairs, strict=True)
    prefix = f"folds{options.folds}_"
    ours |= _prefixed(prefix, metrics.average(our_folds))
    if published:
      theirs |= _prefixed(prefix, metrics.average(their_folds, published=True))
  return ours | _prefixed("published_", theirs)


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
  return {f"{prefix}{k}": v for k, v in values.items()}


def _split_name(split: records.Split | mix.Joined) -> str:
  """The name of the split; of its parts, which share it, if it is joined from several datasets."""
  return split.parts[0].name if isinstance(split, mix.Joined) else split.name


def _rouge_l_file(
  split: records.Split | mix.Joined, name: str, shape: tuple[int, int], compute: bool
) -> epath.Path | None:
  """The cached ROUGE-L relevances [T, I] of a split, computed first unless `compute` is False."""
  size = "x".join(map(str, shape))  # the fingerprint leaves out how many captions are used
  folder = inputs_lib.data_home() / "relevances"
  path = folder / f"{split.fingerprint[:16]}_{size}-{name}-rougeL.npy"
  if not path.exists():
    if not compute:
      return None
    start = time.monotonic()
    ndcg.write(path, ndcg.rouge_l_rows([record.captions for record in split]))
    logging.info("ROUGE-L of %s in %.0f s: %s", size, time.monotonic() - start, path)
  return path


def _numbers(
  score_dtype: str,
  ranked: metrics.Ranked,
  graded: Mapping[str, np.ndarray],
  published: bool,
  summarise: Summarise = metrics.summarise,
) -> tuple[dict[str, float], dict[str, float]]:
  """(our numbers of a ranking, those of TGDT's program; the latter empty unless `published`)."""
  if score_dtype != "float32":
    i2t = ranked.i2t.astype(score_dtype)
    one_stage = ranked.t2i is ranked.i2t
    t2i = i2t if one_stage else ranked.t2i.astype(score_dtype)
    ranked = ranked._replace(i2t=i2t, t2i=t2i)
  ours = metrics.summarise_ranked(ranked, summarise)
  theirs = metrics.summarise_published(ranked) if published else {}
  for method, values in graded.items():
    gains = ndcg.ndcg(ranked.i2t, values.T), ndcg.ndcg(ranked.t2i.T, values)
    ours |= ndcg.means(method, *gains)
    if published:
      theirs |= ndcg.means(method, *gains, published=True)
  return ours, theirs


def _coco(
  eccv_dir: str, split: records.Split, scores: np.ndarray, caption_image: np.ndarray
) -> dict[str, float]:
  """`coco.coco_protocol`; the numbers of the 5K test keep their plain names."""
  image_ids, caption_ids = [], []
  for record in split:
    image_ids.append(record.image_id)
    caption_ids.extend(record.caption_ids)
  folder = epath.Path(eccv_dir).expanduser()
  out = coco.coco_protocol(scores, image_ids, caption_ids, caption_image, folder)
  plain = {k.removeprefix("coco_5k_"): v for k, v in out.items() if k.startswith("coco_5k_")}
  return plain | {k: v for k, v in out.items() if not k.startswith("coco_5k_")}
