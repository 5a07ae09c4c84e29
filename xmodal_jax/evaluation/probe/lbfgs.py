"""Multinomial logistic regression to convergence by L-BFGS, on features that fit on the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xmodal_jax.evaluation.probe.classifier import Params, logits

Array = jax.Array

TOLERANCE = 1e-5  # for the largest entry of the gradient; float32 cannot resolve much less
_STALLED = 3  # stops after so many consecutive steps that do not lower the loss
_COARSE, _FINE = range(-6, 7, 2), 1 / 8  # exponents of 10: the grid of the search, its last width


def objective(
  params: Params,
  features: Array,
  label: Array,
  weight: Array,
  l2: Array | float,
  normalise: Callable[[Array], Array] = lambda x: x,
) -> Array:
  """(sum of weight * cross entropy + l2 / 2 * |kernel|^2) / sum of weight -> [].

  features [S, B, D], label int [S, B], weight [S, B]: 0 for padding and held-out rows. Only the
  logits of one block [B, C] are in memory. normalise: applied to the features [B, D] of a block.
  """

  def add_block(total, block):
    x, y, w = block
    out = logits(params, normalise(x))
    losses = optax.softmax_cross_entropy_with_integer_labels(out, jnp.maximum(y, 0))
    return total + (w * losses).sum(), None

  add_block = jax.checkpoint(add_block, prevent_cse=False)
  total, _ = jax.lax.scan(add_block, jnp.float32(0), (features, label, weight))
  return (total + l2 / 2 * jnp.square(params["kernel"]).sum()) / weight.sum()


def make_fit(
  classes: int, max_steps: int, out_sharding: Any
) -> Callable[..., tuple[Params, dict[str, Array]]]:
  """jitted (features, label, weight, l2) of `objective` -> (the parameters at its minimum, facts).

  facts: steps; loss; gradient, its largest entry at the end for features of mean 0 and standard
  deviation 1, above TOLERANCE if max_steps were too few. Starts from zeros.
  """
  tx = optax.lbfgs(memory_size=10)

  def fit(features, label, weight, l2):
    # L-BFGS sees (x - mean) / scale. The minimum is the same: the bias, which has no penalty, takes
    # up the mean, and l2 the scale. It converges in far fewer steps, because the features of a
    # tower have a large common component.
    mean, scale = _moments(features, weight)
    loss = functools.partial(
      objective,
      features=features,
      label=label,
      weight=weight,
      l2=l2 / scale**2,
      normalise=lambda x: (x - mean) / scale,
    )
    width = features.shape[-1]
    params = {
      "kernel": jnp.zeros((width, classes), jnp.float32),
      "bias": jnp.zeros(classes, jnp.float32),
    }
    params, state, steps = _minimise(loss, params, tx, max_steps)
    kernel = params["kernel"] / scale
    bias = params["bias"] - jnp.dot(mean, kernel, precision="highest")
    value = optax.tree_utils.tree_get(state, "value")
    facts = {"steps": steps, "loss": value, "gradient": _largest_gradient(state)}
    return {"kernel": kernel, "bias": bias}, facts

  return jax.jit(fit, out_shardings=out_sharding)


def _moments(features: Array, weight: Array) -> tuple[Array, Array]:
  """Weighted mean [D], and the standard deviation [] over all entries, 1 if it is 0."""
  total = weight.sum()
  mean = jnp.einsum("sb,sbd->d", weight, features, precision="highest") / total

  def variance(block):
    w, x = block
    return (w * jnp.square(x - mean).mean(-1)).sum()

  scale = jnp.sqrt(jax.lax.map(variance, (weight, features)).sum() / total)
  return mean, jnp.where(scale > 0, scale, 1)


def _minimise(
  loss: Callable[[Params], Array],
  params: Params,
  tx: optax.GradientTransformationExtraArgs,
  max_steps: int,
) -> tuple[Params, Any, Array]:
  """(params, L-BFGS state, number of steps) when the gradient is small or the loss has stalled."""
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry):
    params, state, count, stalled = carry
    value, grad = value_and_grad(params, state=state)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    lower = optax.tree_utils.tree_get(state, "value") < value
    stalled = jnp.where(lower, 0, stalled + 1)
    return optax.apply_updates(params, updates), state, count + 1, stalled

  def not_done(carry):
    _, state, count, stalled = carry
    improving = (_largest_gradient(state) > TOLERANCE) & (stalled < _STALLED)
    return (count < max_steps) & ((count == 0) | improving)

  carry = jax.lax.while_loop(not_done, step, (params, tx.init(params), 0, 0))
  return carry[:3]


def _largest_gradient(state: Any) -> Array:
  grad = optax.tree_utils.tree_get(state, "grad")
  return jnp.max(jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(grad)]))


def search(score: Callable[[float], float]) -> float:
  """The l2 between 1e-6 and 1e6 with the highest score; ties go to the larger one.

  As for CLIP (Radford et al., 2021, A.3): seven values two decades apart, then both neighbours of
  the best at half the distance, down to an eighth of a decade. 15 evaluations instead of 97.
  """
  scores = {float(e): score(10.0**e) for e in _COARSE}

  def best() -> float:
    return max(scores, key=lambda e: (scores[e], e))

  width = (_COARSE[1] - _COARSE[0]) / 2
  while width >= _FINE:
    centre = best()
    for e in (centre - width, centre + width):
      if _COARSE[0] <= e <= _COARSE[-1] and e not in scores:
        scores[e] = score(10.0**e)
    width /= 2
  return 10.0 ** best()


def held_out(count: int, share: float, permute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """bool [count]: marks a random share of the rows, at least one, to choose l2 on.

  permute: a permutation of range(count), as a function of positions.
  """
  chosen = np.zeros(count, bool)
  chosen[permute(np.arange(max(1, round(share * count))))] = True
  return chosen
