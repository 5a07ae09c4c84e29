"""Image-text scores by cross-attention between their tokens, computed in chunks.

The similarity of SCAN (Lee et al., 2018, section 3) as HAT uses it. The tokens of one side are
queries v, those of the other side keys k_w. With softmax weights a_w over the keys, the attended
vector is t = sum_w a_w k_w, and the score is the mean over queries of cos(v, t).

The vectors t are never computed. With the products d_w = v . k_w and the keys' Gram matrix G,
v . t = sum_w a_w d_w and |t|^2 = a' G a, so only the weights of a chunk of pairs are in memory.
Where an image has more tokens than a token has dimensions, |t|^2 is computed from t instead, which
is less work. A cosine does not depend on the length of t, so the softmax is not normalised.

Arrays of pairs have the order [T, W, I, R]: the token products come out in this order, the Gram
matrix of a text multiplies it without a transpose, and the longest axis is the innermost.

    scores = attended_scores(regions, words, word_mask)  # [I, R, D], [T, W, D] -> [I, T]
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.losses.einsum import exact_einsum

DIRECTIONS = ("i2t", "t2i", "both")

# Bytes of attention weights in memory at a time. On a CPU about the size of its cache, for a tile
# of images and a chunk of texts; on an accelerator for all images of a device, enough to keep it
# busy. At least MIN_WORDS words: with a single text the matrix products were half as fast.
CPU_BYTES, ACCELERATOR_BYTES = 2**21, 2**27
MIN_WORDS = 256
# Texts are sorted by length, and each chunk is cut to one of these shares of the full width.
WIDTHS = (0.5, 0.75, 1.0)


def attended_scores(
  images: Float[ArrayLike, "i r d"],
  texts: Float[ArrayLike, "t w d"],
  text_mask: Bool[ArrayLike, "t w"],
  sharpness: float | Float[Array, ""] = 9.0,
  direction: str = "i2t",
  chunk: int = 0,
  batch_sharding: NamedSharding | None = None,
) -> Float[Array, "i t"]:
  """float32 scores of all image-text pairs.

  Args:
    images, texts: tokens.
    text_mask: which words are valid.
    sharpness: inverse temperature of the softmax.
    direction: "i2t", image tokens are the queries; "t2i", words are; "both", the sum of the two.
    chunk: texts scored at a time; 0 chooses a size for the devices.
    batch_sharding: how the images are sharded.

  The backward pass recomputes each chunk. Raises ConfigError for an unknown direction.
  """
  if direction not in DIRECTIONS:
    raise ConfigError(f"direction {direction!r}; expected one of {', '.join(DIRECTIONS)}")
  texts, text_mask = jnp.asarray(texts), jnp.asarray(text_mask)
  count, words = text_mask.shape
  size, chunks, tiles = _chunk_sizes(images, text_mask, chunk, batch_sharding)
  length = (text_mask * jnp.arange(1, words + 1)).max(1)  # up to the last valid word
  order = jnp.argsort(length)
  score = functools.partial(_score_pairs, sharpness=sharpness, direction=direction)
  image_terms = _image_terms(images, direction)
  if chunks == tiles == 1:
    return score(images, image_terms, texts, text_mask).T

  def split_texts(x):
    # The texts that fill up the last chunk have no valid word; their scores are cut off below.
    padded = jnp.pad(x[order], [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(chunks, size, *x.shape[1:])

  def split_images(x):
    # Tile j holds the images j, j + tiles, ..., so that each device scores its own images.
    return x.reshape(-1, tiles, *x.shape[1:]).swapaxes(0, 1)

  widths = _widths(words)
  branches = [_score_cut_to(width, score) for width in widths]
  image_tiles = jax.tree.map(split_images, (images, image_terms))

  def score_chunk(chunk_of_texts):
    texts, mask, length = chunk_of_texts
    narrowest = (length.max() > jnp.array(widths)).sum()
    return jax.lax.map(
      lambda tile: jax.lax.switch(narrowest, branches, *tile, texts, mask), image_tiles
    )

  split = tuple(map(split_texts, (texts, text_mask, length)))
  scores = jax.lax.map(score_chunk, split)  # [chunks, tiles, size, I / tiles]
  scores = scores.transpose(3, 1, 0, 2).reshape(len(images), -1)
  return scores[:, jnp.argsort(order)]


class _ChunkSizes(NamedTuple):
  size: int  # texts of a chunk
  chunks: int
  tiles: int  # that a device's images are split into


def _chunk_sizes(images, text_mask, chunk, batch_sharding) -> _ChunkSizes:
  count, words = text_mask.shape
  # Inside of a shard_map `images` are already those of one device.
  per_device = batch_sharding is None or bool(jax.sharding.get_abstract_mesh().manual_axes)
  devices = 1 if per_device else sharding.batch_mesh_axes(batch_sharding)[1]
  local = len(images) // (devices if len(images) % devices == 0 else 1)
  platform = jax.default_backend()
  if batch_sharding is not None:
    platform = batch_sharding.mesh.devices.flat[0].platform
  limit = CPU_BYTES if platform == "cpu" else ACCELERATOR_BYTES
  pair_bytes = 4 * images.shape[1] * words
  size = min(chunk or max(limit // max(pair_bytes * local, 1), -(-MIN_WORDS // words)), count)
  tile_limit = max(limit // max(pair_bytes * size, 1), 1) if platform == "cpu" else local
  tiles = next(n for n in range(1, local + 1) if local % n == 0 and local // n <= tile_limit)
  return _ChunkSizes(size, -(-count // size), tiles)


def _widths(words: int) -> list[int]:
  """The widths that a chunk of texts may be cut to: multiples of 8, and the full width."""
  widths = sorted({-(-int(words * share) // 8) * 8 for share in WIDTHS})
  return [w for w in widths if 0 < w < words] + [words]


def _score_cut_to(width: int, score: Callable[..., Array]) -> Callable[..., Array]:
  def cut(images, image_terms, texts, mask):
    return score(images, image_terms, texts[:, :width], mask[:, :width])

  return jax.checkpoint(cut, prevent_cse=False)


def _image_terms(images: ArrayLike, direction: str) -> tuple[Array, Array | None]:
  """What all texts share: norms [I, R] of the image tokens, and their Gram matrices [I, R, R].

  The Gram matrices are None if images are not the keys, or if attended vectors are less work.
  """
  gram = direction != "i2t" and images.shape[-2] <= images.shape[-1]
  return _norm(images), exact_einsum("ird,isd->irs", images, images) if gram else None


def _score_pairs(
  images: ArrayLike,
  image_terms: tuple[Array, Array | None],
  texts: Array,
  mask: Array,
  *,
  sharpness: float | Float[Array, ""],
  direction: str,
) -> Array:
  """float32 [T, I]."""
  norm, gram = image_terms
  dots = exact_einsum("twd,ird->twir", texts, images)
  score = 0.0
  if direction != "t2i":
    score += _image_query_scores(dots, norm, texts, mask, sharpness)
  if direction != "i2t":
    score += _text_query_scores(dots, gram, images, texts, mask, sharpness)
  return score


def aligned_scores(
  images: Float[ArrayLike, "g r d"],
  texts: Float[ArrayLike, "g m w d"],
  text_mask: Bool[ArrayLike, "g m w"],
  sharpness: float | Float[Array, ""] = 9.0,
  direction: str = "i2t",
) -> Float[Array, "g m"]:
  """float32 scores of M texts for each of G images; for reranking."""

  def score_one(image, texts, mask):
    terms = _image_terms(image[None], direction)
    options = dict(sharpness=sharpness, direction=direction)
    return _score_pairs(image[None], terms, texts, mask, **options)[:, 0]

  return jax.vmap(score_one)(images, texts, text_mask)


def _image_query_scores(
  dots: Array, norm: Array, texts: Array, mask: Array, sharpness: float | Float[Array, ""]
) -> Array:
  """Image tokens as queries, words as keys: dots [T, W, I, R] -> [T, I]."""
  valid = mask[:, :, None, None]
  weights = _softmax_exponentials(dots, sharpness, normalize_over=3)
  weights = jnp.where(valid, weights, 0)
  # Rows of a' G a, where G is the Gram matrix of the words.
  weighted = exact_einsum("twu,twir->tuir", exact_einsum("twd,tud->twu", texts, texts), weights)
  length = norm * _safe_sqrt((weighted * weights).sum(1))  # [T, I, R]
  return _cosine((weights * dots).sum(1), length, weights.sum(1)).mean(-1)


def _text_query_scores(
  dots: Array,
  gram: Array | None,
  images: ArrayLike,
  texts: Array,
  mask: Array,
  sharpness: float | Float[Array, ""],
) -> Array:
  """Words as queries, image tokens as keys: dots [T, W, I, R] -> [T, I]."""
  valid = mask[:, :, None]
  dots = jnp.where(valid[..., None], dots, 0)
  weights = _softmax_exponentials(dots, sharpness, normalize_over=1)
  if gram is None:
    square = jnp.square(exact_einsum("twir,ird->itwd", weights, images)).sum(-1).transpose(1, 2, 0)
  else:
    square = (exact_einsum("twir,irs->twis", weights, gram) * weights).sum(-1)  # [T, W, I]
  length = _norm(texts)[:, :, None] * _safe_sqrt(square)
  cosine = _cosine((weights * dots).sum(-1), length, weights.sum(-1))
  return jnp.where(valid, cosine, 0).sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]


def _softmax_exponentials(
  dots: Array, sharpness: float | Float[Array, ""], normalize_over: int
) -> Array:
  """Unnormalised softmax weights in (0, 1] of leaky ReLUs that are L2-normalised over the queries,
  the axis `normalize_over` (SCAN)."""
  a = jax.nn.leaky_relu(dots, 0.1)
  a = a / (_safe_sqrt((a * a).sum(normalize_over, keepdims=True)) + 1e-8)
  return jnp.exp(sharpness * (a - 1))


def _cosine(dot: Array, length: Array, total_weight: Array) -> Array:
  """dot / length; the lower bound of the length, 1e-8, is scaled to unnormalised weights."""
  return dot / jnp.maximum(length, 1e-8 * jnp.where(total_weight > 0, total_weight, 1))


def _norm(tokens: ArrayLike) -> Array:
  return _safe_sqrt(jnp.square(tokens.astype(jnp.float32)).sum(-1))


def _safe_sqrt(x: Array) -> Array:
  """Square root that is 0, with gradient 0, where rounding made x negative or x is 0."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
