"""The console log of a run: its setup, the clock, the progress line."""

import contextlib
import logging as py_logging
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

# Libraries whose informational messages are dropped, by a part of their source path.
_QUIET = ("orbax", "tensorflow_datasets", "logging_writer.py", "jax/_src")


class Clock:
  """Seconds per train step, without evaluations, saves and a process's first steps (compilation).

  Time is measured between moments at which the devices have finished all steps, since a step is
  dispatched long before it is computed.

  ```
  clock = Clock()
  for step in range(1, total + 1):
    state, metrics = train_step(state, batch)
    clock.tick(metrics)
    if step % log_every == 0:
      jax.block_until_ready(metrics)
      seconds_per_step = clock.lap()
    if step % save_every == 0:
      jax.block_until_ready(metrics)
      with clock.paused():
        save(state)
  ```
  """

  def __init__(self, skip_steps: int = 2):
    self.skip, self.start = skip_steps, None
    self.seconds, self.steps = 0.0, 0  # since the last lap; seconds without those since `start`

  def tick(self, metrics: Any) -> None:
    """Call it after every step is dispatched. metrics: waited for at the last skipped step."""
    if self.start is not None:
      self.steps += 1
      return
    self.skip -= 1
    if self.skip <= 0:
      jax.block_until_ready(metrics)
      self.start = time.monotonic()

  def lap(self) -> float | None:
    """Seconds per step since the last lap; None if no step was measured. The devices are idle."""
    self._stop()
    seconds = self.seconds / self.steps if self.steps else None
    self.seconds, self.steps = 0.0, 0
    return seconds

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time of this block, which starts with idle devices."""
    self._stop()
    yield
    if self.start is not None:
      self.start = time.monotonic()

  def _stop(self) -> None:
    if self.start is not None:
      now = time.monotonic()
      self.seconds, self.start = self.seconds + now - self.start, now


def progress_line(
  step: int,
  total: int,
  loss: float,
  batch_size: int,
  seconds: float | None,
  mfu: float | None = None,
  hfu: float | None = None,
) -> str:
  """ "step 120/600  loss 3.2101  52.1 examples/s/device  MFU 41.0% (HFU 50.0%)  ETA 3m12s".

  seconds: per step; None leaves out speed and ETA. mfu, hfu: utilisation of the devices from 0 to 1
  by the model's FLOPs, and by all that are computed; see runtime.flops.
  """
  parts = [f"step {step}/{total}", f"loss {loss:.4f}"]
  if seconds:
    parts.append(f"{batch_size / seconds / jax.device_count():.1f} examples/s/device")
    if mfu is not None:
      parts.append(f"MFU {100 * mfu:.1f}%" + ("" if hfu is None else f" (HFU {100 * hfu:.1f}%)"))
    minutes, rest = divmod(round((total - step) * seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"ETA {hours}h{minutes:02d}m" if hours else f"ETA {minutes}m{rest:02d}s")
  return "  ".join(parts)


class _QuietLibraries(py_logging.Filter):
  """Drops informational messages of libraries; their warnings pass."""

  def filter(self, record: py_logging.LogRecord) -> bool:
    if "Requested `tracked_metric`" in record.getMessage():
      return False  # logged for every checkpoint without an evaluation
    return record.levelno > py_logging.INFO or not any(part in record.pathname for part in _QUIET)


def setup() -> None:
  """absl logging at INFO in process 0, at WARNING in the others."""
  logging.use_absl_handler()
  logging.get_absl_handler().addFilter(_QuietLibraries())
  logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
