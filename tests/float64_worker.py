"""Compares the gradients of the reproducible and of the plain train step in float64.

`JAX_ENABLE_X64=1 python float64_worker.py SYSTEM` prints the largest relative difference: per
parameter array, relative to its largest entry. Fails if the metrics differ.
"""

import sys

import float64  # noqa: F401 (must be the first import)
import jax
import numpy as np
import reproducible_worker
import test_accumulate


def first_step(name: str, plain: bool):
  """(0.1 * gradient, which is AdamW's first moment after one step, metrics)."""
  config = reproducible_worker.config(name)
  test_accumulate.without_dropout(config.model)
  state, metrics = reproducible_worker.run(config, 1, jax.devices()[:1], plain=plain)
  return jax.device_get(state.opt_state[1].mu), metrics[0]


if __name__ == "__main__":
  (ours, metrics), (theirs, want) = (first_step(sys.argv[1], plain) for plain in (False, True))
  assert {x.dtype for x in jax.tree.leaves(ours)} == {np.dtype("float64")}
  for key, value in want.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-10, atol=1e-12, err_msg=key)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))

  def relative_difference(a, b):
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest)

  print(max(jax.tree.leaves(jax.tree.map(relative_difference, ours, theirs))))
