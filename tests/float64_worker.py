"""The gradients of the reproducible step and of the other, in float64.

`JAX_ENABLE_X64=1 python float64_worker.py NAME` prints the largest difference within
a parameter, as a share of its largest number; metrics have to be the same.
"""

import sys

import float64  # noqa: F401 (before all others)
import jax
import numpy as np
import reproducible_worker
import test_accumulate


def first_step(name: str, plain: bool):
  """(a tenth of the gradient, as AdamW's first step leaves it, and the metrics)."""
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
  share = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest)
  print(max(jax.tree.leaves(jax.tree.map(share, ours, theirs))))
