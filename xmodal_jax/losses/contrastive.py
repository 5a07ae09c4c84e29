"""Contrastive losses over all pairs of a batch."""

import jax
import jax.numpy as jnp

Array = jax.Array


def infonce(images: Array, texts: Array, scale: Array) -> tuple[Array, dict[str, Array]]:
  """Symmetric InfoNCE (Radford et al., 2021, figure 3): mean of both cross entropies.

  images, texts float32 [B, E], unit rows, row i of one belongs to row i of the other; scale [].
  Every other pair is a negative, captions of the same picture included.
  Returns (loss [], {loss_i2t, loss_t2i, accuracy_i2t, accuracy_t2i}).
  """
  # Full precision: at a scale of 100 a bfloat16 product is off by several tenths.
  logits = scale * jnp.dot(images, texts.T, precision="highest")  # [B, B]
  positive = jnp.diagonal(logits)
  i2t = (jax.nn.logsumexp(logits, axis=1) - positive).mean()
  t2i = (jax.nn.logsumexp(logits, axis=0) - positive).mean()
  metrics = {
    "loss_i2t": i2t,
    "loss_t2i": t2i,
    # Better than all others: a collapsed model, where all are equal, is not accurate.
    "accuracy_i2t": ((logits >= positive[:, None]).sum(1) == 1).mean(),
    "accuracy_t2i": ((logits >= positive).sum(0) == 1).mean(),
  }
  return (i2t + t2i) / 2, metrics
