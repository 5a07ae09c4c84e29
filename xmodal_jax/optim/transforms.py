"""Gradient transformations that optax lacks: LARS, LAMB's trust ratio, freezing, bounds, EMA."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xmodal_jax.optim.schedules import Schedule

# A jax key path of nested dicts -> "image/blocks/q/kernel".
path_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


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
