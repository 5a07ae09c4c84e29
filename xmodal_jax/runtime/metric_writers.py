"""Files that a run writes its numbers to: metrics.jsonl, TensorBoard events, json files."""

import json
from collections.abc import Mapping
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


class JsonlWriter:
  """metrics.jsonl: one json object per line with its step and kind, in order of the steps."""

  def __init__(self, workdir: epath.PathLike):
    self.path = epath.Path(workdir) / JSONL

  def resume(self, step: int, *, drop: str | None = None) -> None:
    """Removes the lines that a run resumed at `step` writes again.

    Those are all lines of later steps, and of `step` itself the kinds "test" and `drop`.
    """
    if jax.process_index() != 0 or not self.path.exists():
      return
    keep = [
      json.dumps(row) + "\n"
      for row in read_rows(self.path.parent)
      if row["step"] < step or (row["step"] == step and row["kind"] not in ("test", drop))
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
    self.active = jax.process_index() == 0
    self.jsonl = JsonlWriter(workdir)
    self.board = metric_writers.create_default_writer(
      workdir, just_logging=not self.active, asynchronous=True
    )

  def scalars(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """kind: "train", "val" or "test"; values: scalars by name. TensorBoard omits strings."""
    if not self.active:
      return
    self.jsonl.write(step, kind, values)
    numbers = {f"{kind}/{k}": v for k, v in values.items() if not isinstance(v, str)}
    self.board.write_scalars(step, numbers)

  def close(self) -> None:
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
