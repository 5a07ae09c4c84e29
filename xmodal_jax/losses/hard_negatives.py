"""Sampled hard negatives and the matching loss over them (TEAM, Xie et al., 2022, section 3.3)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from xmodal_jax.losses.pairwise import ring as ring_lib
from xmodal_jax.losses.pairwise import statistics
from xmodal_jax.losses.pairwise.ring import Ring


class Negatives(NamedTuple):
  """n negatives of each of B queries.

  index: int [B, n], rows of the candidates. found: bool [B, n], False where a query has fewer than
  n negatives; index is then the query's own row.
  """

  index: Array
  found: Array


def sample_negatives(
  logits: Float[ArrayLike, "q c"], excluded: Bool[ArrayLike, "q c"], n: int, key: Key[Array, ""]
) -> Negatives:
  """Draws n negatives per query without replacement, in proportion to the softmax of its logits.

  excluded: candidates that are not negatives of a query, its positive among them. Uses the Gumbel
  top-k trick (Kool et al., 2019): in the log domain no probability underflows.
  """
  noisy = logits + gumbel_noise(_key_words(key), *map(jnp.arange, logits.shape))
  return _to_negatives(*jax.lax.top_k(jnp.where(excluded, -jnp.inf, noisy), n))


def _to_negatives(best: Float[Array, "b n"], index: Int[Array, "b n"]) -> Negatives:
  found = best > -jnp.inf
  return Negatives(jnp.where(found, index, jnp.arange(len(index))[:, None]), found)


def _key_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
  """Two words derived from a key of any implementation."""
  return jax.random.bits(key, (2,), jnp.uint32)


def gumbel_noise(
  key_words: UInt32[Array, "2"], i: Int[Array, " q"], j: Int[Array, " c"]
) -> Float[Array, "q c"]:
  """Gumbel noise of the pairs (i, j), by Threefry (Salmon et al., 2011) with the pair as counter.

  The noise of a pair depends only on the pair and on key_words, not on the other pairs of the call,
  so tiles of any size sample the same negatives.
  """
  i, j = (x.astype(jnp.uint32) for x in jnp.broadcast_arrays(i[:, None], j[None]))
  bits, _ = threefry2x32_p.bind(*(jnp.broadcast_to(w, i.shape) for w in key_words), i, j)
  # In (0, 1), with all 32 bits near 0, where large noise comes from.
  u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
  return -jnp.log(-jnp.log1p(-u))


@dataclasses.dataclass(frozen=True)
class _TopKNoisy(statistics.Statistic):
  """The k candidates with the largest noisy scores. key_name: of the noise's words in `shared`."""

  k: int
  key_name: str

  def init(self, n):
    return jnp.full((n, self.k), -jnp.inf), jnp.full((n, self.k), statistics.NO_INDEX, jnp.int32)

  def update(self, state, scores, tile):
    noisy = scores + gumbel_noise(tile.shared[self.key_name], tile.i, tile.j)
    best, position = jax.lax.top_k(noisy, min(self.k, len(tile.j)))
    best = jnp.concatenate([state[0], best], axis=1)
    index = jnp.concatenate([state[1], tile.j[position]], axis=1)
    # Sorting by index too makes ties independent of the order of tiles.
    best, index = jax.lax.sort((-best, index), num_keys=2)
    return -best[:, : self.k], index[:, : self.k]


def sample_both(
  images: Float[ArrayLike, "b e"],
  texts: Float[ArrayLike, "b e"],
  scale: Float[ArrayLike, ""],
  image_id: Int[ArrayLike, " b"],
  n: int,
  keys: Key[Array, "2"],
  ring: Ring | None = None,
) -> tuple[Negatives, Negatives]:
  """Negative images of each text and negative texts of each image, without a gradient.

  Args:
    images, texts: float32 with unit rows.
    scale: inverse temperature of the sampling distribution.
    image_id: rows with equal ids are not negatives of each other.
    n: negatives per row.
    keys: for the draw of images and the draw of texts.
    ring: samples blockwise, with the same result.
  """
  images, texts, scale = jax.lax.stop_gradient((images, texts, scale))
  if ring is None:
    logits = scale * jnp.dot(images, texts.T, precision="highest")
    excluded = image_id[:, None] == image_id
    negative_images = sample_negatives(logits.T, excluded, n, keys[0])
    return negative_images, sample_negatives(logits, excluded, n, keys[1])

  def score(shared, left, right, i, j):
    logits = shared["scale"] * jnp.dot(left[0], right[0].T, precision="highest")
    return jnp.where(left[1][:, None] == right[1], -jnp.inf, logits)

  negative_texts, negative_images = ring_lib.reduce(
    score,
    (images, image_id),
    (texts, image_id),
    ring,
    left_stats={"sampled": _TopKNoisy(n, "text")},
    right_stats={"sampled": _TopKNoisy(n, "image")},
    shared={"scale": scale, "image": _key_words(keys[0]), "text": _key_words(keys[1])},
  )
  return _to_negatives(*negative_images["sampled"]), _to_negatives(*negative_texts["sampled"])


def matching_loss(
  positive: Float[ArrayLike, "b k"],
  negative: Float[ArrayLike, "b n k"],
  found: Bool[ArrayLike, "b n"],
  scale: Float[ArrayLike, ""],
) -> Float[Array, " k"]:
  """Cross entropy of the matching pair among its sampled negatives, mean over rows.

  positive, negative: scores after each of K blocks. Negatives that were not found are left out; a
  row without any contributes 0.
  """
  negative_logits = jnp.where(found[..., None], scale * negative, -jnp.inf)
  logits = jnp.concatenate([scale * positive[:, None], negative_logits], axis=1)  # [B, 1 + n, K]
  return (jax.nn.logsumexp(logits, axis=1) - logits[:, 0]).mean(0)
