"""Durations and learning rate schedules from the `optim` section of a config."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

Schedule = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class RunLength:
  """The length of a run: what durations and schedules are measured against."""

  samples: int  # training samples per epoch
  batch_size: int
  total: str  # e.g. "5 epochs"
  # Steps per epoch where several data sets each leave a part batch; None: samples // batch_size.
  epoch_steps: int | None = None

  @property
  def steps_per_epoch(self) -> int:
    return self.samples // self.batch_size if self.epoch_steps is None else self.epoch_steps

  @property
  def total_steps(self) -> int:
    return duration_to_steps(self.total, self.steps_per_epoch)


def duration_to_steps(duration: str, steps_per_epoch: int) -> int:
  """ "500 steps" -> 500; "2.5 epochs" -> 2.5 * steps_per_epoch, rounded. Raises ValueError."""
  m = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(steps?|epochs?)\s*", duration)
  if not m:
    raise ValueError(f"duration {duration!r}: expected e.g. '500 steps' or '5 epochs'")
  number = float(m[1])
  return round(number * steps_per_epoch if m[2].startswith("epoch") else number)


WARMUP_FROM = ("zero", "first", "second")
SCHEDULES = ("cosine", "linear", "constant", "step", "milestones", "clip_itm")


def make_schedule(config: Mapping[str, Any], run: RunLength) -> Schedule:
  """Learning rate as a function of the 0-based step; `schedule(step, xp=np)` is the float64 form.

  A linear warm-up, see config.optim.warmup_from, times
  cosine:     half a cosine from the end of the warm-up down to `end` * lr at the end of the run;
              `cycles` of it where that is not 0.5.
  linear:     a line likewise.
  constant:   lr.
  step:       lr * step_factor ** (step // step_every), counted from step 0.
  milestones: lr * step_factor for each of `milestones` that is past, counted from step 0.
  clip_itm:   the staircase of CLIP_ITM: the cosine is followed in captions, not in batches, so that
              the position jumps by an epoch of captions at each epoch and hardly moves inside one.
  """
  lr, warmup = config["lr"], _warmup(config["warmup"], run)
  end, name, total = config["end"], config["schedule"], run.total_steps
  per_epoch, samples = run.steps_per_epoch, run.samples
  if name not in SCHEDULES:
    raise ValueError(f"optim.schedule is {name!r}; there are {', '.join(SCHEDULES)}")
  if config["warmup_from"] not in WARMUP_FROM:
    choices = ", ".join(WARMUP_FROM)
    raise ValueError(f"optim.warmup_from is {config['warmup_from']!r}; there are {choices}")
  offset = WARMUP_FROM.index(config["warmup_from"])
  factor = config["step_factor"]
  every = duration_to_steps(config["step_every"], per_epoch)
  if name == "step" and every < 1:
    raise ValueError(f"optim.step_every={config['step_every']!r} are {every} steps")
  milestones = [duration_to_steps(m, per_epoch) for m in config["milestones"]]
  if name == "milestones" and not milestones:
    raise ValueError("optim.milestones is empty; name durations such as '10 epochs'")

  def schedule(step, xp=jnp):
    s, t = step, total
    if name == "clip_itm":
      s = samples * (step // per_epoch) + step % per_epoch
      t = samples * duration_to_steps(run.total, 1)
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
  """Steps of a duration that may also be a share of the run, "2.5 %", rounded down."""
  if duration.strip().endswith("%"):
    try:
      return int(run.total_steps * float(duration.strip()[:-1]) / 100)
    except ValueError:
      pass
  return duration_to_steps(duration, run.steps_per_epoch)
