"""Multinomial logistic regression to convergence, by L-BFGS on features that fit on the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
Params = dict[str, Array]

TOLERANCE = 1e-5  # of the largest entry of the gradient; float32 resolves no much smaller one
_STALLED = 3  # steps in a row that may bring nothing
_COARSE, _FINE = range(-6, 7, 2), 1 / 8  # of the search, in powers of ten


def logits(params: Params, features: Array) -> Array:
  """kernel [D, C], bias [C], features [B, D] -> float32 [B, C]."""
  return jnp.dot(features, params["kernel"], precision="highest") + params["bias"]


def objective(
  params: Params,
  features: Array,
  label: Array,
  weight: Array,
  l2: Array | float,
  centred: Callable[[Array], Array] = lambda x: x,
) -> Array:
  """(sum of weight * cross entropy + l2 / 2 * |kernel|^2) / sum of weight -> [].

  features [S, B, D], label int [S, B], weight [S, B]: 0 for rows that do not count. Logits of one
  block are alive at a time. centred: what is done to the features [B, D] of a block first.
  """

  def block(total, part):
    x, y, w = part
    out = logits(params, centred(x))
    losses = optax.softmax_cross_entropy_with_integer_labels(out, jnp.maximum(y, 0))
    return total + (w * losses).sum(), None

  block = jax.checkpoint(block, prevent_cse=False)
  total, _ = jax.lax.scan(block, jnp.float32(0), (features, label, weight))
  return (total + l2 / 2 * jnp.square(params["kernel"]).sum()) / weight.sum()


def make_fit(classes: int, max_steps: int, out: Any) -> Callable[..., tuple[Params, dict]]:
  """jitted (features, label, weight, l2) of `objective` -> (its minimum from zeros, facts).

  facts: steps, loss, and gradient: its largest entry at the end, per unit of features whose mean is
  0 and deviation 1; above TOLERANCE where max_steps were not enough.
  """
  tx = optax.lbfgs(memory_size=10)

  def fit(features, label, weight, l2):
    # In place of x the regression sees (x - mean) / scale: the biases, which are free, take up the
    # one, the strength the other. The minimum is the same, and much nearer: what a tower makes of
    # two pictures has most of its length in common.
    total, mean = weight.sum(), jnp.einsum("sb,sbd->d", weight, features) / weight.sum()
    block = lambda part: (part[0] * jnp.square(part[1] - mean).mean(-1)).sum()
    scale = jnp.sqrt(jax.lax.map(block, (weight, features)).sum() / total)
    scale = jnp.where(scale > 0, scale, 1)
    centred = lambda x: (x - mean) / scale
    f = functools.partial(
      objective, features=features, label=label, weight=weight, l2=l2 / scale**2, centred=centred
    )
    value_and_grad = optax.value_and_grad_from_state(f)

    def step(carry):
      params, state, count, stalled = carry
      value, grad = value_and_grad(params, state=state)
      updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=f)
      moved = optax.tree_utils.tree_get(state, "value") < value
      return (
        optax.apply_updates(params, updates),
        state,
        count + 1,
        jnp.where(moved, 0, stalled + 1),
      )

    def largest(state):
      grad = optax.tree_utils.tree_get(state, "grad")
      return jnp.max(jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(grad)]))

    def more(carry):
      _, state, count, stalled = carry
      going = (largest(state) > TOLERANCE) & (stalled < _STALLED)
      return (count < max_steps) & ((count == 0) | going)

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    params = {"kernel": zeros(features.shape[-1], classes), "bias": zeros(classes)}
    params, state, count, _ = jax.lax.while_loop(more, step, (params, tx.init(params), 0, 0))
    value = optax.tree_utils.tree_get(state, "value")
    kernel = params["kernel"] / scale
    params = {"kernel": kernel, "bias": params["bias"] - jnp.dot(mean, kernel, precision="highest")}
    return params, {"steps": count, "loss": value, "gradient": largest(state)}

  return jax.jit(fit, out_shardings=out)


def search(score: Callable[[float], float]) -> float:
  """The l2 with the highest score, between 1e-6 and 1e6; of equal ones the largest.

  As for CLIP (Radford et al., 2021, A.3): seven strengths two decades apart, then both neighbours
  of the best at half the distance, down to an eighth of a decade. 15 scores, not 97.
  """
  scores = {float(e): score(10.0**e) for e in _COARSE}
  best = lambda: max(scores, key=lambda e: (scores[e], e))
  width = (_COARSE[1] - _COARSE[0]) / 2
  while width >= _FINE:
    centre = best()
    for e in (centre - width, centre + width):
      if _COARSE[0] <= e <= _COARSE[-1] and e not in scores:
        scores[e] = score(10.0**e)
    width /= 2
  return 10.0 ** best()


def held_out(count: int, share: float, permute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """bool [count]: which rows the strength is chosen on; a share of them, at least one."""
  chosen = np.zeros(count, bool)
  chosen[permute(np.arange(max(1, round(share * count))))] = True
  return chosen
