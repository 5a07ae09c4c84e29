"""Contrastive losses over all pairs of a batch."""

import jax
import jax.numpy as jnp

Array = jax.Array


SAME_IMAGE = ("keep", "zero", "exclude")


def off_diagonal_same(image_id: Array) -> Array:
  """image_id int [B] -> bool [B, B]: pairs of different rows that show the same picture."""
  return (image_id[:, None] == image_id) & ~jnp.eye(len(image_id), dtype=bool)


def infonce(
  images: Array,
  texts: Array,
  scale: Array,
  image_id: Array | None = None,
  same_image: str = "keep",
) -> tuple[Array, dict[str, Array]]:
  """Symmetric InfoNCE (Radford et al., 2021, figure 3): mean of both cross entropies.

  images, texts float32 [B, E], unit rows, row i of one belongs to row i of the other; scale [].
  same_image says what a pair of different rows with one image_id [B] is: "keep", a negative like
  every other; "exclude", nothing; "zero", TEAM's way, a negative of logit 0 (Xie et al., 2022).
  Returns (loss [], {loss_i2t, loss_t2i, accuracy_i2t, accuracy_t2i}).
  """
  # Full precision: at a scale of 100 a bfloat16 product is off by several tenths.
  logits = scale * jnp.dot(images, texts.T, precision="highest")  # [B, B]
  if same_image != "keep":
    other = {"zero": 0.0, "exclude": -jnp.inf}[same_image]
    logits = jnp.where(off_diagonal_same(image_id), other, logits)
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
