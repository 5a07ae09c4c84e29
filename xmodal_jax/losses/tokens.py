"""Token matching with sampled hard negatives (TEAM, Xie et al., 2022, section 3.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Negatives(NamedTuple):
  """For each of B queries n candidates: index int [B, n]; found bool [B, n], false where there
  were fewer than n, and index then names the query's own row."""

  index: Array
  found: Array


def sample_negatives(logits: Array, same: Array, n: int, key: Array) -> Negatives:
  """Draws n negatives per query without replacement, in proportion to the softmax of its logits.

  logits float32 [Q, C]; same bool [Q, C]: candidates that are no negatives, the positive among
  them. By the Gumbel top-k trick (Kool et al., 2019): in the log domain no probability underflows.
  """
  noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
  best, index = jax.lax.top_k(jnp.where(same, -jnp.inf, noisy), n)
  found = best > -jnp.inf
  return Negatives(jnp.where(found, index, jnp.arange(len(logits))[:, None]), found)


def matching_loss(positive: Array, negative: Array, found: Array, scale: Array) -> Array:
  """Cross entropy of the true pair among its sampled negatives, mean over rows.

  positive [B, K] and negative [B, n, K] scores after each of K blocks, found bool [B, n], scale []
  -> [K]. Negatives that were not found take no part; a row with none at all contributes 0.
  """
  wrong = jnp.where(found[..., None], scale * negative, -jnp.inf)
  logits = jnp.concatenate([scale * positive[:, None], wrong], axis=1)  # [B, 1 + n, K]
  return (jax.nn.logsumexp(logits, axis=1) - logits[:, 0]).mean(0)
