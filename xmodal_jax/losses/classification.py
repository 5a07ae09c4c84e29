"""Cross entropies over classes."""

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
  """logits [B, C], labels int [B] -> [], the mean. smoothing: share spread over all classes."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  return -((1 - smoothing) * own + smoothing * log_p.mean(-1)).mean()


def soft_cross_entropy(logits: Array, target: Array) -> Array:
  """logits, target [B, C] -> [], the mean; rows of target are weights of the classes."""
  return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()
