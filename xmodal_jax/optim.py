"""Durations, schedules, masks and optax chains from the `optim` section of a config.

Masks and multipliers are ordered (regex, value) lists over paths such as `image/blocks/q/kernel`:
the first match wins and a path without a match is an error.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xmodal_jax import convert

Schedule = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Run:
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
    return steps(self.total, self.steps_per_epoch)


def steps(duration: str, steps_per_epoch: int) -> int:
  """ "500 steps" -> 500; "2.5 epochs" -> 2.5 * steps_per_epoch, rounded. Raises ValueError."""
  m = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(steps?|epochs?)\s*", duration)
  if not m:
    raise ValueError(f"duration {duration!r}: expected e.g. '500 steps' or '5 epochs'")
  number = float(m[1])
  return round(number * steps_per_epoch if m[2].startswith("epoch") else number)


WARMUP_FROM = ("zero", "first", "second")
SCHEDULES = ("cosine", "linear", "constant", "step", "milestones", "clip_itm")


def make_schedule(config: Mapping[str, Any], run: Run) -> Schedule:
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
  every = steps(config["step_every"], per_epoch)
  if name == "step" and every < 1:
    raise ValueError(f"optim.step_every={config['step_every']!r} are {every} steps")
  milestones = [steps(m, per_epoch) for m in config["milestones"]]
  if name == "milestones" and not milestones:
    raise ValueError("optim.milestones is empty; name durations such as '10 epochs'")

  def schedule(step, xp=jnp):
    s, t = step, total
    if name == "clip_itm":
      s = samples * (step // per_epoch) + step % per_epoch
      t = samples * steps(run.total, 1)
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


def _warmup(duration: str, run: Run) -> int:
  """Steps of a duration that may also be a share of the run, "2.5 %", rounded down."""
  if duration.strip().endswith("%"):
    try:
      return int(run.total_steps * float(duration.strip()[:-1]) / 100)
    except ValueError:
      pass
  return steps(duration, run.steps_per_epoch)


def path_of(key_path: tuple[Any, ...]) -> str:
  """A jax key path of nested dicts -> "image/blocks/q/kernel"."""
  return "/".join(str(k.key) for k in key_path)


def first_match(what: str, rules: Sequence[tuple[str, float]], path: str) -> float:
  """Value of the first rule whose regex is found in `path`. Raises ValueError without one."""
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  raise ValueError(
    f"{what}: no rule matches parameter {path}; end the list with ('.*', value) to say what the "
    "rest gets"
  )


def per_param(what: str, rules: Sequence[tuple[str, float]], params: Any) -> Any:
  """Nested dict like `params` of the value of the first rule that matches each path."""
  return jax.tree_util.tree_map_with_path(
    lambda p, _: float(first_match(what, rules, path_of(p))), params
  )


def add_decay(weights: Any) -> optax.GradientTransformation:
  """Adds weight * parameter, weight per parameter: decoupled weight decay."""
  return optax.stateless(lambda u, p: jax.tree.map(lambda u, p, w: u + w * p, u, p, weights))


def scale_per_param(factors: Any) -> optax.GradientTransformation:
  return optax.stateless(lambda u, _: jax.tree.map(lambda u, f: u * f, u, factors))


class LarsState(NamedTuple):
  count: jax.Array  # int32 [], updates made
  momentum: optax.Updates  # like the parameters


def lars(
  schedule: Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  eta: float = 0.001,
  eps: float = 1e-8,
  dampening: float = 0.0,
  nesterov: bool = False,
  adapted: Any = None,
) -> optax.GradientTransformation:
  """LARS (You et al., 2017) as ZeroVL's linear probe has it: a whole optimizer, not a scaling.

  The step of a tensor p with gradient g is d = rate * ratio * (g + weight_decay * p), with
  ratio = eta |p| / (|g| + weight_decay |p| + eps), or 1 where either norm is 0. The learning rate
  is inside of d, so that the momentum remembers steps and not gradients: where the rate falls, what
  was gathered at the higher one stays as large as it was. The first step begins the momentum, later
  ones enter by 1 - dampening. adapted: nested dict like the parameters of bools, which tensors have
  a ratio; None: all.
  """

  def init(params):
    return LarsState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params=None):
    if params is None:
      raise ValueError("lars needs the parameters: call update(grads, state, params)")
    rate, norm = schedule(state.count), lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    on = adapted if adapted is not None else jax.tree.map(lambda _: True, params)

    def step(p, g, on):
      of_p, of_g = norm(p), norm(g)
      ratio = eta * of_p / (of_g + weight_decay * of_p + eps)
      ratio = jnp.where((of_p > 0) & (of_g > 0) & on, ratio, 1)
      return (g + weight_decay * p) * ratio * rate

    steps = jax.tree.map(step, params, grads, on)
    if not momentum:
      return jax.tree.map(jnp.negative, steps), LarsState(state.count + 1, state.momentum)
    share = jnp.where(state.count > 0, 1 - dampening, 1)
    kept = jax.tree.map(lambda m, d: momentum * m + share * d, state.momentum, steps)
    ahead = lambda m, d: -(d + momentum * m) if nesterov else -m
    return jax.tree.map(ahead, kept, steps), LarsState(state.count + 1, kept)

  return optax.GradientTransformation(init, update)


def scale_by_trust_ratio(
  groups: Sequence[tuple[Sequence[str], bool]],
) -> optax.GradientTransformation:
  """Multiplies updates by |parameter| / |update|: LAMB's step relative to what it changes.

  groups: (paths, stacked). Both norms are taken over all arrays of a group together; where
  stacked, for each index of the first axis apart. The ratio is 1 where either norm is 0, and for
  arrays that are in no group.
  """

  def update(updates, params):
    leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
    updates = {path_of(k): x for k, x in leaves}
    params = {path_of(k): x for k, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    for paths, stacked in groups:
      square = lambda x: jnp.sum(jnp.square(x), axis=tuple(range(stacked, x.ndim)))
      norm = lambda arrays: jnp.sqrt(sum(square(arrays[path]) for path in paths))  # [] or [N]
      of_param, of_update = norm(params), norm(updates)
      both = (of_param > 0) & (of_update > 0)
      ratio = jnp.where(both, of_param / jnp.where(both, of_update, 1), 1)
      for path in paths:
        x = updates[path]
        updates[path] = x * ratio.reshape(ratio.shape + (1,) * (x.ndim - ratio.ndim))
    return jax.tree.unflatten(tree, updates.values())

  return optax.stateless(update)


def scale_by_adam_from(
  starts: Any, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """optax.scale_by_adam where each parameter begins at a step of its own, moments and counts alike.

  starts: nested dict of ints like the parameters. Before its start a parameter's update is 0, and
  what its gradient is does not matter.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(), zeros())

  def update(grads, state, params=None):
    del params
    held = lambda g, start: jnp.where(state.count >= start, g, 0)
    grads = jax.tree.map(held, grads, starts)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)

    def one(m, v, start):
      taken = jnp.maximum(state.count + 1 - start, 1).astype(jnp.float32)
      return (m / (1 - b1**taken)) / (jnp.sqrt(v / (1 - b2**taken)) + eps)

    return jax.tree.map(one, mu, nu, starts), optax.ScaleByAdamState(state.count + 1, mu, nu)

  return optax.GradientTransformation(init, update)


def hold(starts: Any) -> optax.GradientTransformation:
  """Updates of 0 before each parameter's start; see `scale_by_adam_from`."""

  def update(updates, state, params=None):
    del params
    kept = jax.tree.map(lambda u, start: jnp.where(state.count >= start, u, 0), updates, starts)
    return kept, optax.ScaleByScheduleState(state.count + 1)

  init = lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
  return optax.GradientTransformation(init, update)


def trust_groups(
  trust: str, decay: Any, params: Any, rules: Sequence[convert.Entry]
) -> list[tuple[tuple[str, ...], bool]]:
  """Groups for `scale_by_trust_ratio`, for parameters like `params` with the torch table `rules`.

  trust: see config.optim.trust. decay: nested dict of weight decays; "original" has no ratio
  without one (use_nvlamb is off), and raises ValueError where it differs inside of one tensor.
  """
  shapes = {path_of(k): x.shape for k, x in jax.tree_util.tree_flatten_with_path(params)[0]}
  groups = convert.tensors(rules, shapes)
  if trust == "optax":
    return [((path,), stacked) for paths, stacked in groups for path in paths]
  if trust != "original":
    raise ValueError(f"optim.trust is {trust!r}; there are optax, original")
  decay = {path_of(k): w for k, w in jax.tree_util.tree_flatten_with_path(decay)[0]}
  for paths, _ in groups:
    if len({decay[path] for path in paths}) > 1:
      raise ValueError(
        f"optim.decay differs between {', '.join(paths)}, which are one tensor with "
        "optim.trust='original': give them the same"
      )
  return [(paths, stacked) for paths, stacked in groups if decay[paths[0]]]


def adjust(fn: Callable[[str, jax.Array], jax.Array]) -> optax.GradientTransformation:
  """Makes the updated parameter fn(path, p + u); last of a chain."""

  def one(path, u, p):
    new = p + u
    to = fn(path_of(path), new)
    return u if to is new else to - p

  return optax.stateless(lambda u, p: jax.tree_util.tree_map_with_path(one, u, p))


def bound(bounds: Sequence[tuple[str, float, float]]) -> optax.GradientTransformation:
  """Keeps every parameter whose path matches (regex, low, high) inside [low, high]."""

  def fn(path, x):
    for pattern, low, high in bounds:
      if re.search(pattern, path):
        return jnp.clip(x, low, high)
    return x

  return adjust(fn)


def round_trip(dtype: str, patterns: Sequence[str]) -> optax.GradientTransformation:
  """Rounds parameters whose path matches to `dtype` after every update: no float32 master copy."""
  regex = re.compile("|".join(patterns))
  fn = lambda path, x: x.astype(dtype).astype(x.dtype) if regex.search(path) else x
  return adjust(fn)


class AverageState(NamedTuple):
  average: optax.Params  # like the parameters


def average(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the updated parameters; last of a chain.

  It starts from the first parameters, so that it has no bias to correct.
  """
  if not 0 < decay < 1:
    raise ValueError(f"optim.ema is {decay}; a decay is above 0 and below 1, and 0.0 is none")

  def update(updates, state, params=None):
    new = optax.apply_updates(params, updates)
    # As a step towards them: near a decay of 1 the sum of two products would round more.
    moved = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, new)
    return updates, AverageState(moved)

  return optax.GradientTransformation(_first_average, update)


def _first_average(params: Any) -> AverageState:
  # Copies, because both are donated to the same step.
  return AverageState(jax.tree.map(lambda x: x.copy(), params))


def averaged(state: Any) -> Any:
  """A train state with its average in the place of the parameters, and these in the average's.

  The inverse is the same. What is evaluated is what this gives, and so is what is saved: readers of
  a checkpoint find the averaged parameters, and who goes on from it turns them back. A state
  without an average stays as it is.
  """
  held = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_average) if _is_average(x)]
  if not held:
    return state
  swap = lambda x: AverageState(state.params) if _is_average(x) else x
  opt_state = jax.tree.map(swap, state.opt_state, is_leaf=_is_average)
  return state.replace(params=held[0].average, opt_state=opt_state)


def restart_average(opt_state: Any, params: Any) -> Any:
  """The optimizer state whose average, where it has one, starts from these parameters."""
  one = lambda x: _first_average(params) if _is_average(x) else x
  return jax.tree.map(one, opt_state, is_leaf=_is_average)


def _is_average(x: Any) -> bool:
  return isinstance(x, AverageState)


def make_optimizer(
  config: Mapping[str, Any],
  schedule: Schedule,
  params: Any,
  rules: Sequence[convert.Entry] = (),
  steps_per_epoch: int = 0,
) -> optax.GradientTransformation:
  """The optax chain of the `optim` section, for parameters like `params` (shapes suffice).

  rules: the system's torch table, which says what LAMB takes norms of; adamw needs none.
  steps_per_epoch: of the run, which durations in `freeze` may count in.
  """
  if config["name"] not in ("adamw", "lamb"):
    raise ValueError(f"optim.name is {config['name']!r}; there are adamw, lamb")
  decay = per_param("optim.decay", config["decay"], params)
  decay = jax.tree.map(lambda m: m * config["weight_decay"], decay)
  adam, chain, frozen = (config["b1"], config["b2"], config["eps"]), [], []
  if config["freeze"]:
    rules_of = [(p, steps(d, steps_per_epoch)) for p, d in config["freeze"]] + [(".*", 0)]
    starts = jax.tree.map(int, per_param("optim.freeze", rules_of, params))
    chain.append(hold(starts))  # what is frozen has no part in the norm that is clipped
    frozen = [hold(starts)]  # nor does it decay
  if config["grad_clip"]:
    chain.append(optax.clip_by_global_norm(config["grad_clip"]))
  scale = scale_by_adam_from(starts, *adam) if frozen else optax.scale_by_adam(*adam)
  chain += [scale, add_decay(decay)]
  if config["name"] == "lamb":
    # The decay is inside of the ratio, multiples of the learning rate are outside.
    chain.append(scale_by_trust_ratio(trust_groups(config["trust"], decay, params, rules)))
  chain += [
    *frozen,
    scale_per_param(per_param("optim.lr_mult", config["lr_mult"], params)),
    optax.scale_by_learning_rate(schedule),
  ]
  if config["bounds"]:
    chain.append(bound(config["bounds"]))
  if config["round_to"]:
    chain.append(round_trip(config["round_to"], config["round_paths"]))
  if config["ema"]:
    chain.append(average(config["ema"]))
  return optax.chain(*chain)


def table(config: Mapping[str, Any], abstract: Any, shardings: Any) -> str:
  """One line per parameter: path, shape, logical axes, sharding, decay, lr multiple.

  abstract: nnx.State of variables with `axes` metadata; shardings: nested dict like it.
  """
  rows = [("parameter", "shape", "axes", "sharding", "decay", "lr")]
  is_variable = lambda v: hasattr(v, "get_metadata")
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_variable)
  shardings = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
  shardings = {path_of(k): v for k, v in shardings.items()}
  total = 0
  for key_path, v in leaves:
    path = path_of(key_path)
    total += int(np.prod(v.shape, dtype=np.int64))
    decay = config["weight_decay"] * first_match("optim.decay", config["decay"], path)
    rows.append(
      (
        path,
        "x".join(map(str, v.shape)) or "scalar",
        ",".join(a or "-" for a in v.get_metadata().get("axes", ())),
        ",".join(a or "-" for a in shardings[path].spec) or "replicated",
        f"{decay:g}",
        f"{first_match('optim.lr_mult', config['lr_mult'], path):g}",
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
  return "\n".join([*lines, f"{total:,} parameters"])
