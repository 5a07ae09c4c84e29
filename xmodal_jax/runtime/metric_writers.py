"""Files that a run writes its numbers to: metrics.jsonl, TensorBoard events, json files."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from clu import metric_writers
from etils import epath

JSONL = "metrics.jsonl"


def read_rows(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """The rows of a workdir's metrics.jsonl, without a line that a killed process left incomplete."""
  lines = (epath.Path(workdir) / JSONL).read_text().splitlines()
  return [json.loads(line) for line in lines if _is_complete(line)]


def _is_kept(at: int, kind: str, step: int, drop: str | None) -> bool:
  """Whether values of a kind at step `at` stay when a run resumes at `step`."""
  return at < step or (at == step and kind not in ("test", drop))


def _resume_events(workdir: epath.Path, is_kept: Callable[[int, str], bool]) -> None:
  """Removes the scalars (step, kind) that are not kept from TensorBoard's files."""
  import tensorflow as tf

  for path in sorted(workdir.glob("events.out.tfevents.*")):
    records, changed = [], False
    try:
      for record in tf.compat.v1.io.tf_record_iterator(os.fspath(path)):
        event = tf.compat.v1.Event.FromString(record)
        kept = [v for v in event.summary.value if is_kept(event.step, v.tag.split("/")[0])]
        if len(kept) < len(event.summary.value):
          changed = True
          if not kept:
            continue
          del event.summary.value[:]
          event.summary.value.extend(kept)
          record = event.SerializeToString()
        records.append(record)
    except tf.errors.DataLossError:  # the last record of a killed process
      changed = True
    if changed:
      temporary = path.parent / "resumed_events.tmp"
      with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
        for record in records:
          writer.write(record)
      temporary.replace(path)


class JsonlWriter:
  """metrics.jsonl: one json object per line with its step and kind, in order of the steps."""

  def __init__(self, workdir: epath.PathLike):
    self.path = epath.Path(workdir) / JSONL

  def resume(self, step: int, *, drop: str | None = None) -> None:
    """See `Writer.resume`."""
    if jax.process_index() != 0 or not self.path.exists():
      return
    keep = [
      json.dumps(row) + "\n"
      for row in read_rows(self.path.parent)
      if _is_kept(row["step"], row["kind"], step, drop)
    ]
    temporary = self.path.parent / f"{JSONL}.tmp"
    temporary.write_text("".join(keep))
    temporary.replace(self.path)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    row = {"step": step, "kind": kind} | {k: _to_python(v) for k, v in values.items()}
    with self.path.open("a") as f:
      f.write(json.dumps(row) + "\n")


def _is_complete(line: str) -> bool:
  # A process killed while writing leaves one partial line at most.
  try:
    return isinstance(json.loads(line), dict)
  except json.JSONDecodeError:
    return False


def _to_python(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic | np.ndarray) else value


class Writer:
  """Writes scalars to metrics.jsonl and TensorBoard; only process 0 writes."""

  def __init__(self, workdir: epath.PathLike):
    self.workdir, self.active = epath.Path(workdir), jax.process_index() == 0
    self.jsonl = JsonlWriter(workdir)

  @functools.cached_property
  def board(self) -> metric_writers.MetricWriter:
    return metric_writers.create_default_writer(self.workdir, asynchronous=True)

  def resume(self, step: int, *, drop: str | None = None) -> None:
    """Before the first `scalars`: removes what a run resumed at `step` writes again.

    Those are all values of later steps, and of `step` itself the kinds "test" and `drop`.
    """
    self.jsonl.resume(step, drop=drop)
    if self.active:
      _resume_events(self.workdir, lambda *of: _is_kept(*of, step, drop))

  def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """kind: "train", "val" or "test"; values: scalars by name. TensorBoard omits strings."""
    if not self.active:
      return
    self.jsonl.write(step, kind, values)
    numbers = {f"{kind}/{k}": v for k, v in values.items() if not isinstance(v, str)}
    self.board.write_scalars(step, numbers)

  def close(self) -> None:
    if "board" in self.__dict__:
      self.board.flush()
      self.board.close()


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a json file atomically; only process 0 writes."""
  if jax.process_index() != 0:
    return
  path = epath.Path(path)
  temporary = path.parent / (path.name + ".tmp")
  temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
  temporary.replace(path)
