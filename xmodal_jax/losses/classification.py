"""Cross entropy over classes."""

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[ArrayLike, "b c"], labels: Int[ArrayLike, " b"], smoothing: float = 0.0
) -> Float[Array, ""]:
  """Mean over the batch. smoothing: share of the target spread uniformly over all classes."""
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
  return optax.softmax_cross_entropy(logits, targets).mean()
