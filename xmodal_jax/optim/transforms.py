"""Gradient transformations that optax lacks: LARS, LAMB's trust ratio, freezing, bounds, EMA.

p is a parameter, u its update, g its gradient, |.| the Euclidean norm.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.optim.schedules import Schedule

# A jax key path of nested dicts -> "image/blocks/q/kernel".
path_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def add_decay(weights: Any) -> optax.GradientTransformation:
  """Decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101): u + weight * p.

  weights: nested dict of floats like the parameters; optax.add_decayed_weights has only a mask.
  """
  return optax.stateless(lambda u, p: jax.tree.map(lambda u, p, w: u + w * p, u, p, weights))


def scale_per_param(factors: Any) -> optax.GradientTransformation:
  """factor * u. factors: nested dict of floats like the parameters."""
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
  """LARS (You et al., 2017, arXiv:1708.03888) as in ZeroVL's linear probe: a complete optimizer.

    ratio = eta |p| / (|g| + weight_decay |p| + eps), or 1 if |p| or |g| is 0
    d     = rate * ratio * (g + weight_decay * p)
    m     = d at the first step, then momentum * m + (1 - dampening) * d
    u     = -m, or -(d + momentum * m) with nesterov

  The learning rate is inside d, so the momentum accumulates steps, not gradients: a lower rate does
  not shrink the steps that are already in it. optax.lars multiplies by the rate outside.

  adapted: nested dict of bools like the parameters, which of them have a ratio; None: all.
  """

  def init(params):
    return LarsState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params=None):
    if params is None:
      raise ValueError("lars needs the parameters: call update(grads, state, params)")
    rate = schedule(state.count)
    on = adapted if adapted is not None else jax.tree.map(lambda _: True, params)

    def step(p, g, on):
      p_norm, g_norm = _norm(p), _norm(g)
      ratio = eta * p_norm / (g_norm + weight_decay * p_norm + eps)
      ratio = jnp.where((p_norm > 0) & (g_norm > 0) & on, ratio, 1)
      return (g + weight_decay * p) * ratio * rate

    steps = jax.tree.map(step, params, grads, on)
    if not momentum:
      return jax.tree.map(jnp.negative, steps), LarsState(state.count + 1, state.momentum)
    share = jnp.where(state.count > 0, 1 - dampening, 1)
    moments = jax.tree.map(lambda m, d: momentum * m + share * d, state.momentum, steps)
    if nesterov:
      updates = jax.tree.map(lambda m, d: -(d + momentum * m), moments, steps)
    else:
      updates = jax.tree.map(jnp.negative, moments)
    return updates, LarsState(state.count + 1, moments)

  return optax.GradientTransformation(init, update)


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def scale_by_trust_ratio(
  groups: Sequence[tuple[Sequence[str], bool]],
) -> optax.GradientTransformation:
  """LAMB's trust ratio (You et al., 2020, arXiv:1904.00962): u * |p| / |u|.

  groups: (paths, stacked). Both norms are over all arrays of a group together; if stacked,
  separately for each index of the first axis. The ratio is 1 if either norm is 0, and for arrays in
  no group.

    scale_by_trust_ratio([(("blocks/q/kernel", "blocks/k/kernel", "blocks/v/kernel"), True)])
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
  """optax.scale_by_adam (Kingma and Ba, 2015, arXiv:1412.6980) with a first step per parameter.

    u = (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps), n = count + 1 - start

  starts: nested dict of ints like the parameters. Before its start a parameter's gradient is
  ignored: its moments and its update are 0.
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
  """Sets updates to 0 before each parameter's first step. starts: see `scale_by_adam_from`."""

  def update(updates, state, params=None):
    del params
    kept = jax.tree.map(lambda u, start: jnp.where(state.count >= start, u, 0), updates, starts)
    return kept, optax.ScaleByScheduleState(state.count + 1)

  init = lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
  return optax.GradientTransformation(init, update)


def adjust(
  fn: Callable[[str, jax.Array], jax.Array], starts: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Replaces the updated parameter p + u by fn(path, p + u); at the end of a chain.

  starts: see `scale_by_adam_from`. Before its start a parameter stays as it is; needs
  `update(updates, state, params, step=step)`.
  """

  def update(updates, state, params=None, *, step=None, **extra_args):
    del extra_args
    if starts is not None and step is None:
      raise ConfigError("parameters are frozen: call update(updates, state, params, step=step)")

    def one(path, u, p, start):
      new = p + u
      to = fn(path_of(path), new)
      if to is new:
        return u
      return jnp.where(step >= start, to - p, u) if start else to - p

    begin = starts if starts is not None else jax.tree.map(lambda _: 0, updates)
    return jax.tree_util.tree_map_with_path(one, updates, params, begin), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def bound(
  bounds: Sequence[tuple[str, float, float]], starts: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Clips updated parameters to [low, high]. bounds: (regex for the path, low, high).

  starts: see `adjust`.

    bound([("^logit_scale$", 0.0, 4.6052)])
  """

  def fn(path, x):
    for pattern, low, high in bounds:
      if re.search(pattern, path):
        return jnp.clip(x, low, high)
    return x

  return adjust(fn, starts)


def round_trip(
  dtype: str, patterns: Sequence[str], starts: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Rounds updated parameters to `dtype`, as if they had no float32 master copy.

  patterns: regular expressions for the paths. starts: see `adjust`.
  """
  regex = re.compile("|".join(patterns))

  def fn(path, x):
    return x.astype(dtype).astype(x.dtype) if regex.search(path) else x

  return adjust(fn, starts)


class AverageState(NamedTuple):
  average: optax.Params  # like the parameters
  stats: Any  # like the running statistics of a model with BatchNorm, else {}
  count: jax.Array  # int32 [], updates made


AVERAGES = ("growing", "constant")


def average(
  decay: float, schedule: str = "growing", stats: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Keeps an exponential moving average of the updated parameters; at the end of a chain.

    average = d * average + (1 - d) * (p + u)

  Updates are unchanged. With n updates made before, d of each schedule is

    growing:  0 for n = 0, then min(decay, (1 + n) / (10 + n)), as with `num_updates` in
              tf.train.ExponentialMovingAverage. The average forgets the initial parameters and
              follows with a delay of a tenth of the steps, until the decay is reached.
    constant: decay. The initial parameters keep a share of decay ** n.

  stats: running statistics of the model, arrays or shapes. They are averaged in the same way from
  `update(updates, state, params, stats=new_statistics)`: the averaged parameters have other
  activations than the parameters.
  """
  if not 0 < decay < 1:
    raise ConfigError(f"optim.ema is {decay}; a decay is above 0 and below 1, and 0.0 is none")
  check_choice("optim.ema_schedule", schedule, AVERAGES)

  def init(params):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stats or {})
    return start_average(params, zeros)

  def update(updates, state, params=None, *, stats=None, **extra_args):
    del extra_args
    new = optax.apply_updates(params, updates), stats or {}
    weight = 1 - decay
    if schedule == "growing":
      n = state.count.astype(jnp.float32)
      weight = jnp.where(n == 0, 1.0, jnp.maximum(9 / (10 + n), weight))
    # Equal to the formula above, with less rounding when the decay is close to 1.
    moved = jax.tree.map(lambda a, x: a + weight * (x - a), (state.average, state.stats), new)
    return updates, AverageState(*moved, state.count + 1)

  return optax.GradientTransformationExtraArgs(init, update)


def start_average(params: Any, stats: Any) -> AverageState:
  """The average of no updates."""
  # Copies: one buffer cannot be donated twice to a step.
  copies = jax.tree.map(lambda x: x.copy(), (params, stats))
  return AverageState(*copies, np.zeros([], np.int32))


def averaged(state: Any) -> Any:
  """Swaps the parameters and running statistics of a train state and their averages; its own
  inverse.

  Evaluation and checkpoints use the swapped state, so readers of a checkpoint get the average, and
  resuming swaps it back. A state without an average is returned unchanged.
  """
  held = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_average) if _is_average(x)]
  if not held:
    return state
  average, stats, _ = held[0]
  swap = lambda x: x._replace(average=state.params, stats=state.stats) if _is_average(x) else x
  opt_state = jax.tree.map(swap, state.opt_state, is_leaf=_is_average)
  return state.replace(params=average, stats=stats, opt_state=opt_state)


def restart_average(opt_state: Any, params: Any, stats: Any) -> Any:
  """The optimizer state with its average, if it has one, begun at these values."""
  one = lambda x: start_average(params, stats) if _is_average(x) else x
  return jax.tree.map(one, opt_state, is_leaf=_is_average)


def as_saved_before(opt_state: Any) -> Any:
  """The optimizer state as checkpoints had it whose average was of the parameters alone."""
  one = lambda x: {"average": x.average} if _is_average(x) else x
  return jax.tree.map(one, opt_state, is_leaf=_is_average)


def from_saved_before(want: Any, opt_state: Any, stats: Any) -> Any:
  """The optimizer state from one of `as_saved_before`, on the devices.

  want: abstract, with shardings. stats: the average's first. The decay of such an average was
  constant; a large count keeps it so.
  """

  def one(want, x):
    if not _is_average(want):
      return x
    count = sharding.place(np.int32(2**30), want.count.sharding)
    return AverageState(x["average"], jax.tree.map(lambda x: x.copy(), stats), count)

  return jax.tree.map(one, want, opt_state, is_leaf=_is_average)


def has_average(opt_state: Any) -> bool:
  return any(map(_is_average, jax.tree.leaves(opt_state, is_leaf=_is_average)))


def _is_average(x: Any) -> bool:
  return isinstance(x, AverageState)
