"""Writes datasets of many source shards, one output shard from each, locally or with Apache Beam.

`builder.write_dataset` writes one sequence of images. Here source shards are independent of each
other, so any number of workers can write them. The dataset has the same format; captions are in the
order of the records, and no positions are stored.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from xmodal_jax.data import tfrecord
from xmodal_jax.data.preparing import builder, publish
from xmodal_jax.data.preparing import summary as summary_lib
from xmodal_jax.data.progress import Progress
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.errors import listed

# (path of a source shard, counter of left out pairs by reason) -> examples with caption ids and
# without positions. Must be picklable: a function of a module or a partial of one.
Reader = Callable[[str, collections.Counter], Iterator[builder.Example]]


@dataclasses.dataclass(frozen=True)
class Job:
  """One source shard. number: its index in its split."""

  split: str
  number: int
  source: str


@dataclasses.dataclass(frozen=True)
class Beam:
  """runner: the name of an Apache Beam runner. options: its flags."""

  runner: str
  options: Sequence[str] = ()


def write_dataset(
  out_dir: epath.PathLike,
  name: str,
  version: str,
  sources: Mapping[str, Sequence[str]],
  read: Reader,
  *,
  description: str,
  origin: Mapping[str, Any],
  beam: Beam | None = None,
  overwrite: bool = False,
) -> epath.Path:
  """Writes a dataset and returns its folder, out_dir/name/version, like `builder.write_dataset`.

  Args:
    sources: split -> paths of its source shards, in the order of the output shards; a source
      without any usable image gives no output shard.
    read: reads one source shard.
    origin: JSON for source.json, to which the counts of each source are added.
    beam: None: write one shard after another in this process. The output is the same.

  Raises:
    DatasetError: for sources that cannot be read; nothing is published then.
    OutputExistsError: if the dataset exists and `overwrite` is false.
  """
  final = publish.dataset_dir(out_dir, name, version)
  with publish.publishing(final, sources, overwrite) as folder:
    spec = builder.features(positions=False)
    jobs = [Job(s, i, p) for s, paths in sources.items() for i, p in enumerate(paths)]
    where = {"folder": os.fspath(folder), "fields": frozenset(spec), "read": read}
    if beam is None:
      seconds = _run_here(functools.partial(write_shard, **where), jobs)
    else:
      _run_beam(functools.partial(_write_shard_or_say_why, **where), jobs, beam)
      seconds = {}
    reports = _reports(folder, jobs)
    kept = _number(folder, final, jobs, reports)
    summary = {split: _summary(split, jobs, reports) for split in sources}
    builder.write_metadata(folder, final, kept, description, spec, {**origin, "inputs": summary})
  rows = {k: builder.row(v, seconds.get(k), summary[k]["left_out"]) for k, v in kept.items()}
  logging.info("%s", summary_lib.table(rows))
  return final


def write_shard(job: Job, *, folder: str, fields: frozenset[str], read: Reader) -> dict[str, Any]:
  """Writes the shard of one source into `folder`, then its index and a report, which it returns.

  Files are written atomically, and all runs write the same bytes: it may be repeated, or run twice
  at the same time.
  """
  path, left_out = _shard(folder, job), collections.Counter()
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    examples = (builder.checked(e, fields, job.split) for e in read(job.source, left_out))
    index = builder.write_records(temporary, examples)
    if len(index):
      temporary.replace(path)
      tfrecord.write_atomic(tfrecord.index_path(path), index.to_bytes())
  finally:
    temporary.unlink(missing_ok=True)
  report = {**dataclasses.asdict(builder.ShardCounts.of(index)), "left_out": dict(left_out)}
  tfrecord.write_atomic(_report(path), json.dumps(report).encode())
  return report


def _write_shard_or_say_why(job: Job, **where) -> None:
  """`write_shard`, with a DatasetError written as the report: retries would not help."""
  try:
    write_shard(job, **where)
  except DatasetError as e:
    report = _report(_shard(where["folder"], job))
    tfrecord.write_atomic(report, json.dumps({"error": str(e)}).encode())


def _shard(folder: epath.PathLike, job: Job) -> epath.Path:
  """Path of a job's shard before the shards are numbered."""
  return epath.Path(folder) / builder.shard_name(f"{job.split}.tfrecord", job.number, 0)


def _report(shard: epath.Path) -> epath.Path:
  return shard.with_name(shard.name + ".report.json")


def _run_here(task: Callable[[Job], dict], jobs: Sequence[Job]) -> dict[str, float]:
  """Returns the seconds of each split."""
  seconds: collections.Counter = collections.Counter()
  with Progress("writing", "shards", len(jobs)) as progress:
    for job in jobs:
      start = time.monotonic()
      task(job)
      seconds[job.split] += time.monotonic() - start
      progress.add()
  return seconds


def _run_beam(task: Callable[[Job], None], jobs: Sequence[Job], where: Beam) -> None:
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
  except ImportError as e:
    raise DatasetError(
      f"no Apache Beam ({e}), which --beam_runner needs; `pip install xmodal_jax[beam]`"
    ) from e
  # Beam's DirectRunner first tries a runner that it downloads, then falls back to FnApiRunner.
  local = where.runner.lower() in ("directrunner", "direct")
  with (
    _importable_in_children(),
    beam.Pipeline(
      runner=FnApiRunner() if local else where.runner, options=PipelineOptions([*where.options])
    ) as pipeline,
  ):
    # A worker processes one shard after another.
    _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(task)


@contextlib.contextmanager
def _importable_in_children() -> Iterator[None]:
  """Lets child processes import this package even if it is not installed."""
  root = pathlib.Path(importlib.util.find_spec("xmodal_jax").origin).parents[1]
  before = os.environ.get("PYTHONPATH")
  os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *([before] if before else [])])
  try:
    yield
  finally:
    if before is None:
      del os.environ["PYTHONPATH"]
    else:
      os.environ["PYTHONPATH"] = before


def _each(function: Callable, items: Iterable) -> list:
  with concurrent.futures.ThreadPoolExecutor(
    16
  ) as pool:  # threads hide the latency of remote folders
    return list(pool.map(function, items))


def _reports(folder: epath.Path, jobs: Sequence[Job]) -> list[dict]:
  """The report of each job. Raises DatasetError, naming the sources that could not be read."""

  def load(job: Job) -> dict:
    path = _report(_shard(folder, job))
    if not path.exists():
      return {"error": f"{job.source}: no worker has written its shard into {folder}; choose an "
              "--out that all workers can write to, like gs://"}  # fmt: skip
    return json.loads(path.read_text())

  reports = _each(load, jobs)
  errors = [r["error"] for r in reports if "error" in r]
  if len(errors) == 1:
    raise DatasetError(errors[0])
  if errors:
    raise DatasetError(f"{len(errors)} of {len(jobs)} source shards failed:{listed(errors)}")
  return reports


def _number(
  folder: epath.Path, final: epath.Path, jobs: Sequence[Job], reports: Sequence[dict]
) -> dict[str, list[builder.ShardCounts]]:
  """Gives the non-empty shards of each split their final names, and removes all other files."""
  kept: dict[str, list[builder.ShardCounts]] = {}
  files: dict[str, list[epath.Path]] = {}
  for job, report in zip(jobs, reports, strict=True):
    shards, paths = kept.setdefault(job.split, []), files.setdefault(job.split, [])
    if report["records"]:
      shards.append(builder.ShardCounts(*(report[k] for k in ("records", "captions", "bytes"))))
      paths.append(_shard(folder, job))
  moves: list[tuple[epath.Path, epath.Path]] = []
  for split, paths in files.items():
    if not paths:
      left_out: collections.Counter = collections.Counter()
      for job, report in zip(jobs, reports, strict=True):
        left_out.update(report["left_out"] if job.split == split else {})
      raise DatasetError(
        f"split {split!r} is empty: its sources have no image with a caption; left out: "
        f"{', '.join(f'{n} {reason}' for reason, n in sorted(left_out.items())) or 'nothing'}"
      )
    prefix = builder.shard_prefix(final, split)
    for i, path in enumerate(paths):
      new = folder / builder.shard_name(prefix, i, len(paths))
      moves += [(path, new), (tfrecord.index_path(path), tfrecord.index_path(new))]
  _each(_rename, moves)
  done = {new.name for _, new in moves}
  # Reports, and temporary files of killed workers.
  _each(_unlink, [path for path in folder.iterdir() if path.name not in done])
  return kept


def _rename(move: tuple[epath.Path, epath.Path]) -> None:
  old, new = move
  old.rename(new)


def _unlink(path: epath.Path) -> None:
  path.unlink(missing_ok=True)


def _summary(split: str, jobs: Sequence[Job], reports: Sequence[dict]) -> dict[str, Any]:
  """Counts of a split for source.json, which are also logged."""
  own = [(j, r) for j, r in zip(jobs, reports, strict=True) if j.split == split]
  left_out: collections.Counter = sum(
    (collections.Counter(r["left_out"]) for _, r in own), collections.Counter()
  )
  empty = sum(not r["records"] for _, r in own)
  text = "%s: %d images of %d shards (%d of them without any); left out: %s"
  images, reasons = sum(r["records"] for _, r in own), summary_lib.reasons(left_out)
  logging.info(text, split, images, len(own), empty, reasons)
  shards = [{"file": j.source, "records": r["records"], **r["left_out"]} for j, r in own]
  return {"left_out": dict(left_out), "empty_shards": empty, "shards": shards}
