"""The loop that trains the classifier by LARS: steps, logs, evaluations and checkpoints."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.evaluation.probe import lars
from xmodal_jax.evaluation.probe.classifier import Scorer
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import logs, metric_writers
from xmodal_jax.runtime import step as step_lib

TrainState = train_state.TrainState


@dataclasses.dataclass(frozen=True)
class Periods:
  """Steps between logs, evaluations and checkpoints; 0: only at the last step, `total`."""

  log: int
  evaluate: int
  save: int
  total: int

  def next_step(self, step: int) -> int:
    """The first step after `step` at which something is due."""
    periods = (self.log, self.evaluate, self.save)
    return min([self.total, *((step // n + 1) * n for n in periods if n > 0)])

  def is_due(self, period: int, step: int) -> bool:
    return step == self.total or (period > 0 and step % period == 0)


def first_state(
  new: Callable[[], TrainState],
  checkpoints: checkpointer.Checkpoints,
  meta: Mapping[str, Any],
  replicated: jax.sharding.Sharding,
) -> tuple[TrainState, int]:
  """(state, its step): of the latest checkpoint, or new.

  Raises CheckpointError if `meta` says that data or model are not those of the checkpoint.
  """

  def check(step, saved):
    for key, what in (("fingerprint", "training data"), ("source", "model")):
      if saved[key] != meta[key]:
        raise checkpointer.CheckpointError(
          f"the {what} changed since step {step}: {saved[key]} then, {meta[key]} now. Use the "
          "same, or a new --workdir"
        )

  shapes = jax.eval_shape(new)
  want = checkpointer.abstract_state(shapes, jax.tree.map(lambda _: replicated, shapes))
  if (found := checkpoints.restore_latest(want, check)) is None:
    return jax.jit(new, out_shardings=replicated)(), 0
  step, _, state = found
  logging.info("resuming from step %d", step)
  return state, step


def train(
  steps: lars.CachedSteps | lars.StreamedSteps,
  state: TrainState,
  step: int,
  periods: Periods,
  *,
  scorer: Scorer,
  checkpoints: checkpointer.Checkpoints,
  meta: Mapping[str, Any],
  writer: metric_writers.Writer,
  stop: Callable[[], bool],
) -> tuple[TrainState, int]:
  """Trains from `step` to periods.total, or until `stop` returns True -> (state, its step).

  The returned state is saved. Raises NonFiniteLossError.
  """
  batch_size = steps.run.batch_size
  while step < periods.total:
    before, start = step, time.monotonic()
    state, step, metrics = steps(state, step, periods.next_step(step))
    metrics = _finite(jax.device_get(metrics), before, step)  # the only wait for the devices
    if periods.is_due(periods.log, step):
      seconds = (time.monotonic() - start) / (step - before)
      writer.scalars(step, "train", metrics | {"examples_per_second": batch_size / seconds})
      line = logs.progress_line(step, periods.total, metrics["loss"], batch_size, seconds, None)
      logging.info("%s  top-1 %.2f", line, metrics["top1"])
    report = None
    if periods.is_due(periods.evaluate, step):
      report = scorer(state.params)
      writer.scalars(step, "val", report)
      logging.info("step %d: val top-1 %.2f, top-5 %.2f", step, report["top1"], report["top5"])
    stopped = stop()
    if stopped or periods.is_due(periods.save, step):
      checkpoints.save(step, state, meta, report)
    if stopped:
      break
  checkpoints.wait()
  return state, step


def _finite(metrics: Mapping[str, np.ndarray], before: int, step: int) -> dict[str, float]:
  """metrics as floats. Raises NonFiniteLossError."""
  out = {k: float(v) for k, v in metrics.items()}
  if not (np.isfinite(out["loss"]) and np.isfinite(out["grad_norm"])):
    raise step_lib.NonFiniteLossError(
      f"the classifier's loss or gradient is not finite at one of steps {before + 1}..{step}: "
      "lower config.probe.lr"
    )
  return out
