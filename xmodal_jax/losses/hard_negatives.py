"""Token matching with sampled hard negatives (TEAM, Xie et al., 2022, section 3.3)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from xmodal_jax.losses.pairwise import ring as ring_lib
from xmodal_jax.losses.pairwise.ring import Ring

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
  noisy = logits + noise(_words(key), *map(jnp.arange, logits.shape))
  return _negatives(*jax.lax.top_k(jnp.where(same, -jnp.inf, noisy), n))


def _negatives(best: Array, index: Array) -> Negatives:
  found = best > -jnp.inf
  return Negatives(jnp.where(found, index, jnp.arange(len(index))[:, None]), found)


def _words(key: Array) -> Array:
  """uint32 [2] of a key of any kind."""
  return jax.random.bits(key, (2,), jnp.uint32)


def noise(words: Array, i: Array, j: Array) -> Array:
  """Gumbel noise of pairs (i, j), int [Q] and [C] -> float32 [Q, C].

  A pair's depends on itself and the words of a key, uint32 [2], alone, not on which other pairs are
  computed with it: Threefry (Salmon et al., 2011) with the pair as the counter.
  """
  i, j = (x.astype(jnp.uint32) for x in jnp.broadcast_arrays(i[:, None], j[None]))
  bits, _ = threefry2x32_p.bind(*(jnp.broadcast_to(w, i.shape) for w in words), i, j)
  # In (0, 1), with all 32 bits near 0, where large noise comes from.
  u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
  return -jnp.log(-jnp.log1p(-u))


@dataclasses.dataclass(frozen=True)
class _Sampled(ring_lib.Statistic):
  """The n candidates whose noisy scores are largest; key: of the noise's words in `shared`."""

  n: int
  key: str

  def empty(self, n):
    return jnp.full((n, self.n), -jnp.inf), jnp.full((n, self.n), ring_lib.NOWHERE, jnp.int32)

  def fold(self, state, scores, tile):
    noisy = scores + noise(tile.shared[self.key], tile.i, tile.j)
    best, k = jax.lax.top_k(noisy, min(self.n, len(tile.j)))
    best = jnp.concatenate([state[0], best], axis=1)
    index = jnp.concatenate([state[1], tile.j[k]], axis=1)
    # Of equals the one with the lower index, in whatever order tiles come.
    best, index = jax.lax.sort((-best, index), num_keys=2)
    return -best[:, : self.n], index[:, : self.n]


def sample_both(
  images: Array,
  texts: Array,
  scale: Array,
  same: Array,
  n: int,
  keys: Array,
  ring: Ring | None = None,
) -> tuple[Negatives, Negatives]:
  """Negatives of both sides of a batch of pairs: pictures for each text, texts for each picture.

  images, texts float32 [B, E], unit rows; scale []; same int [B]: rows where it is equal are no
  negatives of each other. keys [2]: of the two draws. No gradient.
  """
  images, texts, scale = jax.lax.stop_gradient((images, texts, scale))
  if ring is None:
    logits = scale * jnp.dot(images, texts.T, precision="highest")
    excluded = same[:, None] == same
    draw = lambda logits, key: sample_negatives(logits, excluded, n, key)
    return draw(logits.T, keys[0]), draw(logits, keys[1])

  def score(shared, left, right, i, j):
    logits = shared["scale"] * jnp.dot(left[0], right[0].T, precision="highest")
    return jnp.where(left[1][:, None] == right[1], -jnp.inf, logits)

  wrong_texts, wrong_images = ring_lib.reduce(
    score,
    (images, same),
    (texts, same),
    ring,
    of_left={"drawn": _Sampled(n, "text")},
    of_right={"drawn": _Sampled(n, "image")},
    shared={"scale": scale, "image": _words(keys[0]), "text": _words(keys[1])},
  )
  return _negatives(*wrong_images["drawn"]), _negatives(*wrong_texts["drawn"])


def matching_loss(positive: Array, negative: Array, found: Array, scale: Array) -> Array:
  """Cross entropy of the true pair among its sampled negatives, mean over rows.

  positive [B, K] and negative [B, n, K] scores after each of K blocks, found bool [B, n], scale []
  -> [K]. Negatives that were not found take no part; a row with none at all contributes 0.
  """
  wrong = jnp.where(found[..., None], scale * negative, -jnp.inf)
  logits = jnp.concatenate([scale * positive[:, None], wrong], axis=1)  # [B, 1 + n, K]
  return (jax.nn.logsumexp(logits, axis=1) - logits[:, 0]).mean(0)
