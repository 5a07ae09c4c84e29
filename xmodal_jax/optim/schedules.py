"""Durations and learning rate schedules from the `optim` section of a config."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from absl import logging

from xmodal_jax.errors import ConfigError, check_choice

Schedule = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class RunLength:
  """The length of a run, which durations and schedules refer to.

  >>> RunLength(samples=1000, batch_size=96, total="30 epochs").total_steps
  300
  """

  samples: int  # training samples per epoch
  batch_size: int
  total: str  # e.g. "5 epochs"
  # Steps per epoch of a mix of datasets, each of which drops its last partial batch. None:
  # samples // batch_size.
  epoch_steps: int | None = None

  @property
  def steps_per_epoch(self) -> int:
    return self.samples // self.batch_size if self.epoch_steps is None else self.epoch_steps

  @property
  def total_steps(self) -> int:
    return duration_to_steps(self.total, self.steps_per_epoch)


_DURATION = re.compile(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(steps?|epochs?|%)\s*")


def is_duration(text: Any, share: bool = False) -> bool:
  """Whether `duration_to_steps` reads this; share: or a share of the run, "2.5 %"."""
  m = _DURATION.fullmatch(text) if isinstance(text, str) else None
  return m is not None and math.isfinite(float(m[1])) and (share or m[2] != "%")


def duration_to_steps(duration: str, steps_per_epoch: int) -> int:
  """The number of steps of a duration in steps or epochs, rounded. Raises ConfigError.

  Only a number of 0 is no step: what is shorter than one step is one step.

  >>> duration_to_steps("500 steps", 10), duration_to_steps("2.5 epochs", 10)
  (500, 25)
  >>> duration_to_steps("0.01 epochs", 10), duration_to_steps("0 epochs", 10)
  (1, 0)
  """
  if not is_duration(duration):
    raise ConfigError(f"duration {duration!r}: expected e.g. '500 steps' or '5 epochs'")
  m = _DURATION.fullmatch(duration)
  steps = float(m[1]) * (steps_per_epoch if m[2].startswith("epoch") else 1)
  return max(round(steps), 1) if steps else 0


WARMUP_FROM = ("zero", "first", "second")
SCHEDULES = ("cosine", "linear", "constant", "step", "milestones", "clip_itm")


def make_schedule(config: Mapping[str, Any], run: RunLength) -> Schedule:
  """Learning rate as a function of the 0-based step, from the `optim` section of a config.

  The rate is lr * warm-up * decay. The linear warm-up is min((step + offset) / warmup, 1) with
  offset 0, 1 or 2 for config.optim.warmup_from "zero", "first" or "second". Let p be the share of
  the steps after the warm-up that are done, 0 to 1. The decay of each schedule is

    cosine:     end + (1 - end) * (1 + cos(2 pi * cycles * p)) / 2; half a cosine for cycles=0.5
    linear:     end + (1 - end) * (1 - p)
    constant:   1
    step:       step_factor ** (step // step_every), counted from step 0
    milestones: step_factor ** (number of milestones that are past), counted from step 0
    clip_itm:   the cosine of CLIP_ITM, whose position is samples * epoch + step in the epoch: its
                run length is in captions while its step counts batches, which makes a staircase

  `schedule(step, xp=np)` computes in float64 on the host. Raises ConfigError for a wrong section.

    schedule = make_schedule(config.optim, RunLength(samples, config.batch_size, config.total))
    float(schedule(100))
  """
  lr, warmup = config["lr"], _warmup(config["warmup"], run)
  end, name, total = config["end"], config["schedule"], run.total_steps
  per_epoch, samples = run.steps_per_epoch, run.samples
  check_choice("config.optim.schedule", name, SCHEDULES)
  check_choice("config.optim.warmup_from", config["warmup_from"], WARMUP_FROM)
  offset = WARMUP_FROM.index(config["warmup_from"])
  factor = config["step_factor"]
  every = duration_to_steps(config["step_every"], per_epoch)
  if name == "step" and every < 1:
    raise ConfigError(
      f"config.optim.step_every={config['step_every']!r} is {every} steps; expected at least one"
    )
  milestones = [duration_to_steps(m, per_epoch) for m in config["milestones"]]
  if name == "milestones" and not milestones:
    raise ConfigError("config.optim.milestones is empty; name durations such as '10 epochs'")

  def schedule(step, xp=jnp):
    s, t = step, total
    if name == "clip_itm":
      s = samples * (step // per_epoch) + step % per_epoch
      t = samples * total / per_epoch
    warm = xp.minimum((s + offset) / warmup, 1) if warmup else 1.0
    progress = xp.maximum(s - warmup, 0) / max(t - warmup, 1)
    if name == "constant":
      rest = 1.0
    elif name == "step":
      rest = factor ** (step // every)
    elif name == "milestones":
      rest = factor ** sum(xp.where(step >= m, 1, 0) for m in milestones)
    elif name == "linear":
      rest = end + (1 - end) * xp.maximum(1 - progress, 0)
    else:
      rest = end + (1 - end) * 0.5 * (1 + xp.cos(2 * xp.pi * config["cycles"] * progress))
    return lr * warm * rest

  return schedule


def _warmup(duration: str, run: RunLength) -> int:
  """Steps of a duration, which may also be a share of the run: "2.5 %", rounded down to one."""
  if is_duration(duration, share=True) and duration.strip().endswith("%"):
    steps = run.total_steps * float(duration.strip()[:-1]) / 100
    return max(int(steps), 1) if steps else 0
  return duration_to_steps(duration, run.steps_per_epoch)


def unreached(config: Mapping[str, Any], run: RunLength) -> list[str]:
  """What a run is too short for: a warm-up without an end, a decay that does not begin.

  config: the `optim` section. Returns a sentence with the numbers for each.
  """
  total, steps, out = run.total_steps, f"the run has {run.total_steps} steps", []
  warmup = _warmup(config["warmup"], run)
  share = (total - 1 + WARMUP_FROM.index(config["warmup_from"])) / max(warmup, 1)
  if warmup and share < 1:
    decays = config["schedule"] in ("cosine", "linear", "clip_itm")
    out.append(
      f"the warm-up {config['warmup']!r} has {warmup} steps and {steps}: the learning rate reaches "
      f"{share:.2g} of {config['lr']:g}{' and never decays' if decays else ''}. A share of the "
      "run, such as '5 %', fits any length"
    )
  every = duration_to_steps(config["step_every"], run.steps_per_epoch)
  if config["schedule"] == "step" and every >= total:
    out.append(f"step_every={config['step_every']!r} is {every} steps and {steps}: no decay")
  if config["schedule"] == "milestones":
    ends = {m: duration_to_steps(m, run.steps_per_epoch) for m in config["milestones"]}
    if late := [f"{m!r} (step {n})" for m, n in ends.items() if n >= total]:
      out.append(f"{steps}: the milestones {', '.join(late)} are not reached")
  return out


def warn_of_unreached(config: Mapping[str, Any], run: RunLength, section: str = "optim") -> None:
  """Logs the sentences of `unreached`, which are no errors: a first try may well be short."""
  for line in unreached(config, run):
    logging.warning("config.%s: %s", section, line)
