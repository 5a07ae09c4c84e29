"""Runs a compiled training step on the devices of this machine: what estimates are held against."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np
from compiling import programs as programs_lib

from xmodal_jax.distributed import sharding
from xmodal_jax.runtime import step as step_lib

WARMUP = 3  # steps before those that are timed


@dataclasses.dataclass(frozen=True)
class Measured:
  """seconds: of a step, the mean of those that ran one after another; memory: bytes of a device at
  its peak, None where the platform keeps no count (CPU); loss: of the last step."""

  seconds: float
  memory: int | None
  loss: float


def measure(programs: programs_lib.Programs, compiled: Any, steps: int) -> Measured:
  """compiled: programs.lower["train"]() compiled. Fresh parameters, the same noise in every step.

  Raises FloatingPointError where the loss is not finite: what is timed would be another work.
  """
  init = lambda: step_lib.init_state(programs.built.init_model, programs.tx)
  state = jax.jit(init, out_shardings=programs.shardings)()
  batch = noise(programs.training[1], programs.config.model.text.vocab)
  batch = sharding.put_batch(batch, programs.built.batch_sharding)
  for _ in range(WARMUP):
    state, metrics = compiled(state, batch)
  jax.block_until_ready(state)
  start = time.perf_counter()
  for _ in range(steps):
    state, metrics = compiled(state, batch)
  jax.block_until_ready(state)
  seconds = (time.perf_counter() - start) / steps
  loss = float(metrics["loss"])
  if not math.isfinite(loss):
    raise FloatingPointError(f"the loss is {loss} after {WARMUP + steps} steps of noise")
  stats = [d.memory_stats() or {} for d in programs.built.mesh.local_devices]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return Measured(seconds, max(peaks, default=None), loss)


def noise(fields: programs_lib.Arrays, vocab: int) -> dict[str, np.ndarray]:
  """A batch of these shapes: distinct images, no padding."""
  rng = np.random.default_rng(0)

  def make(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
    if x.dtype == bool:
      return np.ones(x.shape, bool)
    if np.issubdtype(x.dtype, np.floating):
      return rng.random(x.shape, np.float32).astype(x.dtype)
    if name.endswith("_id"):
      return np.arange(x.shape[0], dtype=x.dtype)
    return rng.integers(0, 256 if x.dtype == np.uint8 else vocab, x.shape, x.dtype)

  return {k: make(k, x) for k, x in fields.items()}
