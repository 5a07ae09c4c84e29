"""From ranked scores to the numbers that config.eval asks for. `options` is config.eval."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import mix, records
from xmodal_jax.errors import ConfigError, UserError
from xmodal_jax.evaluation import coco, metrics, ndcg

# Rows and columns of the score matrix: all of them, or those of one fold.
Part = tuple[slice, slice | np.ndarray]
WHOLE: Part = (slice(None), slice(None))

# (scores [I, T], caption_image [T]) -> {name: number}
Summarise = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def check(options: Any) -> list[str]:
  """The relevance methods of config.eval.ndcg. Raises ConfigError for unknown values."""
  names = [name.strip() for name in options.ndcg.split(",")] if options.ndcg else []
  unknown = [name for name in names if name not in ndcg.METHODS]
  if unknown or len(set(names)) < len(names):
    raise ConfigError(
      f"config.eval.ndcg is {options.ndcg!r}: expected a comma-separated list of different names "
      f"out of {', '.join(ndcg.METHODS)}"
    )
  if options.protocol not in ("right", "original"):
    raise ConfigError(
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
      if not ndcg.prefers_own(out[method], split.captions_per_record):
        logging.warning(
          "%s: captions are no more relevant to their own image than to the next one; is this file "
          "of split %r, in its order?", path, name,
        )  # fmt: skip
  return out


def report(
  options: Any,
  split: records.Split,
  rank: Callable[[Part], metrics.Ranked],
  graded: Mapping[str, np.ndarray],
  *,
  is_test: bool,
  published: bool = False,
  image_id: np.ndarray | None = None,
) -> dict[str, float]:
  """The metrics that config.eval asks for.

  Args:
    rank: ranks the whole split, or one fold by itself.
    graded: from `grades`.
    is_test: ECCV Caption, CxC and folds are reported on the test split only.
    published: adds published_*, the numbers as TGDT's program computes them.
    image_id: int [I], the positions in the split of the images that were scored; None: all.

  Raises:
    UserError: NDCG or ECCV Caption of a split of which some images could not be read.
  """
  whole = rank(WHOLE)
  if is_test and options.eccv_dir and len(whole.i2t) < len(split):
    raise UserError(_needs_all("eccv_dir: ECCV Caption", len(split), len(whole.i2t)))
  if any(v.shape != whole.i2t.T.shape for v in graded.values()):
    raise UserError(_needs_all("ndcg: NDCG", len(split), len(whole.i2t)))
  eccv = _coco_summary(options.eccv_dir, split) if options.eccv_dir and is_test else None
  numbers = functools.partial(_numbers, options.score_dtype, published=published)
  ours, theirs = numbers(whole, graded, summarise=eccv or metrics.summarise)
  owner = whole.caption_image
  del whole  # with two stages these are two matrices
  found: dict[int, Any] = {}  # by number of folds
  for prefix, count in fold_counts(options).items() if is_test else ():
    if count not in found:
      found[count] = [
        numbers(rank((i, t)), {k: v[t, i] for k, v in graded.items()})
        for i, t in metrics.split_folds(len(split), owner, count, image_id)
      ]
    our_folds, their_folds = zip(*found[count], strict=True)
    ours |= _prefixed(prefix, metrics.average(our_folds))
    if published:
      theirs |= _prefixed(prefix, metrics.average(their_folds, published=True))
  return ours | _prefixed("published_", theirs)


def names(options: Any, *, is_test: bool, two_stages: bool) -> list[str]:
  """The names in a report of a split, without those that the files of config.eval.eccv_dir give."""
  published = options.protocol == "original"
  one = np.zeros(1, int)
  plain = [*metrics.summarise_ranks(one, one)]
  plain += [name for method in check(options) for name in ndcg.means(method, one, one)]
  out = [f"{p}{k}" for p in ("", *(fold_counts(options) if is_test else ())) for k in plain]
  first = [f"first_{k}" for k in out] if two_stages else []
  chosen = ["stage_mix"] if two_stages and options.stage_mixes else []
  return out + [f"published_{k}" for k in out if published] + chosen + first


def best_of(
  mixes: Sequence[float], report: Callable[[float], dict[str, float]], metric: str
) -> tuple[float, dict[str, float]]:
  """(weight, its numbers) of the weight with the best `metric`; of equal ones the first.

  report: weight -> numbers. Raises ConfigError if they do not have the metric.
  """
  reports = {mix: report(mix) for mix in mixes}
  known = reports[mixes[0]]
  if metric not in known:
    raise ConfigError(
      f"config.eval.stage_mixes is chosen by config.eval.metric, which is {metric!r}; the second "
      f"stage has {', '.join(known)}"
    )
  best = max(mixes, key=lambda mix: reports[mix][metric])
  tried = ", ".join(f"{mix:g}: {numbers[metric]:.2f}" for mix, numbers in reports.items())
  logging.info("stage_mix %g has the best %s (%s)", best, metric, tried)
  return best, reports[best]


def fold_counts(options: Any) -> dict[str, int]:
  """Prefix of the numbers -> number of folds that they are averaged over, on the test split."""
  folds = {f"folds{options.folds}_": options.folds} if options.folds else {}
  return folds | ({"coco_1k_": coco.FOLDS} if options.eccv_dir else {})


def _needs_all(what: str, images: int, scored: int) -> str:
  return (
    f"config.eval.{what} needs every image of the split, and {images - scored} of {images} could "
    "not be read: mend the dataset, or leave this measure out"
  )


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
  # The integers of a second stage (`rerank.promote`) are no scores, and float16 would tie them.
  if score_dtype != "float32" and ranked.shortlists is None:
    scores = ranked.i2t.astype(score_dtype)
    ranked = ranked._replace(i2t=scores, t2i=scores)
  ours = metrics.summarise_ranked(ranked, summarise)
  theirs = metrics.summarise_published(ranked) if published else {}
  for method, values in graded.items():
    gains = ndcg.ndcg(ranked.i2t, values.T), ndcg.ndcg(ranked.t2i.T, values)
    ours |= ndcg.means(method, *gains)
    if published:
      theirs |= ndcg.means(method, *gains, published=True)
  return ours, theirs


def _coco_summary(eccv_dir: str, split: records.Split) -> Summarise:
  """`coco.coco_protocol` of a split; the numbers of the 5K test keep their plain names."""
  image_ids, caption_ids = [], []
  for record in split:
    image_ids.append(record.image_id)
    caption_ids.extend(record.caption_ids)
  folder = epath.Path(eccv_dir).expanduser()

  def summarise(scores: np.ndarray, caption_image: np.ndarray) -> dict[str, float]:
    out = coco.coco_protocol(scores, image_ids, caption_ids, caption_image, folder)
    return {k.removeprefix("coco_5k_"): v for k, v in out.items()}

  return summarise
