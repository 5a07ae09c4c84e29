"""What a run writes down: metrics.jsonl, TensorBoard, the progress line, json files."""

import contextlib
import json
import logging as py_logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from etils import epath


class JsonlWriter:
  """metrics.jsonl: one json object per line with its step, in order, flushed line by line.

  On a resumed run the lines after the restored step are dropped, because they will come again.
  """

  def __init__(self, workdir: epath.PathLike):
    self.path = epath.Path(workdir) / "metrics.jsonl"

  def resume(self, step: int, *, drop: str | None = None) -> None:
    """Keeps lines up to and with `step`; of the step itself not the test, nor those of `drop`."""
    if jax.process_index() != 0 or not self.path.exists():
      return
    lines = [line for line in self.path.read_text().splitlines() if _complete(line)]
    keep = []
    for line in lines:
      row = json.loads(line)
      if row["step"] < step or (row["step"] == step and row["kind"] not in ("test", drop)):
        keep.append(line + "\n")
    temporary = self.path.parent / "metrics.jsonl.tmp"
    temporary.write_text("".join(keep))
    temporary.replace(self.path)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    row = {"step": step, "kind": kind} | {k: _plain(v) for k, v in values.items()}
    with self.path.open("a") as f:
      f.write(json.dumps(row) + "\n")


def _complete(line: str) -> bool:
  # A run killed while writing leaves at most one partial line.
  try:
    return isinstance(json.loads(line), dict)
  except json.JSONDecodeError:
    return False


def _plain(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic | np.ndarray) else value


class Writer:
  """Scalars of a run to metrics.jsonl and TensorBoard; silent on other processes than the first."""

  def __init__(self, workdir: epath.PathLike):
    self.active = jax.process_index() == 0
    self.jsonl = JsonlWriter(workdir)
    self.board = metric_writers.create_default_writer(
      workdir, just_logging=not self.active, asynchronous=True
    )

  def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """kind: "train", "val" or "test"; values: scalars by name."""
    if not self.active:
      return
    self.jsonl.write(step, kind, values)
    numbers = {f"{kind}/{k}": v for k, v in values.items() if not isinstance(v, str)}
    self.board.write_scalars(step, numbers)

  def close(self) -> None:
    self.board.flush()
    self.board.close()


class Clock:
  """Time that training takes, without evaluations, saves and the first steps of a process."""

  def __init__(self, skip_steps: int = 2):
    self.skip, self.start, self.steps = skip_steps, None, 0

  def tick(self) -> None:
    """Once after every step is dispatched."""
    if self.skip:
      self.skip -= 1
    elif self.start is None:
      self.start = time.monotonic()
    else:
      self.steps += 1

  def lap(self) -> float | None:
    """Seconds per step since the last lap; None where there was no full step."""
    seconds = (time.monotonic() - self.start) / self.steps if self.steps else None
    self.start, self.steps = None, 0
    return seconds

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    yield
    self.start, self.steps = None, 0


def progress_line(
  step: int, total: int, loss: float, batch_size: int, seconds: float | None, mfu: float | None
) -> str:
  """ "step 120/600  loss 3.21  52.1 examples/s/device  MFU 41.0%  ETA 3m12s"."""
  parts = [f"step {step}/{total}", f"loss {loss:.4f}"]
  if seconds:
    parts.append(f"{batch_size / seconds / jax.device_count():.1f} examples/s/device")
    if mfu is not None:
      parts.append(f"MFU {100 * mfu:.1f}%")
    minutes, rest = divmod(round((total - step) * seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"ETA {hours}h{minutes:02d}m" if hours else f"ETA {minutes}m{rest:02d}s")
  return "  ".join(parts)


def write_json(path: epath.PathLike, value: Any) -> None:
  """Atomically: a reader sees the old file or the new one."""
  if jax.process_index() != 0:
    return
  path = epath.Path(path)
  temporary = path.parent / (path.name + ".tmp")
  temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
  temporary.replace(path)


_CHATTY = ("orbax", "tensorflow_datasets", "logging_writer.py", "jax/_src")


class _Quiet(py_logging.Filter):
  """Drops informational lines of libraries; their warnings pass."""

  def filter(self, record: py_logging.LogRecord) -> bool:
    if "Requested `tracked_metric`" in record.getMessage():
      return False  # said of every checkpoint between two evaluations
    return record.levelno > py_logging.INFO or not any(c in record.pathname for c in _CHATTY)


def setup() -> None:
  """absl logging at INFO on the first process, warnings elsewhere."""
  logging.use_absl_handler()
  logging.get_absl_handler().addFilter(_Quiet())
  logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
