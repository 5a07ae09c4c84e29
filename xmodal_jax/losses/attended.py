"""Scores of pictures and texts by attention between their tokens, without attended vectors.

The similarity of SCAN (Lee et al., 2018, section 3.2) as HAT uses it. Each token of one side asks,
the tokens of the other answer: weights a are a softmax over the answers, the attended vector is
t = sum_w a_w c_w, and the score is the mean over askers v of cos(v, t). With raw dot products
d_w = v . c_w and the answers' Gram matrix G, v . t = sum_w a_w d_w and |t|^2 = a' G a, so that no
vector of a pair has to be made: of all pairs only the weights exist, chunk by chunk.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

DIRECTIONS = ("i2t", "t2i", "both")

# Bytes of weights held at a time: on CPU what its cache holds (a gradient was 2.5 times as fast as
# with all at once), elsewhere enough to keep an accelerator busy.
CHUNK_BYTES = {"cpu": 2**21}
ACCELERATOR_CHUNK_BYTES = 2**27


def attended_scores(
  images: Array,
  texts: Array,
  text_mask: Array,
  sharpness: float = 9.0,
  direction: str = "i2t",
  chunk: int = 0,
) -> Array:
  """Scores of all pairs: images [I, R, D], texts [T, W, D], text_mask bool [T, W] -> [I, T].

  direction: "i2t", image tokens ask; "t2i", words ask; "both", the sum of the two. sharpness: the
  inverse temperature of the softmax. chunk: so many texts at a time; 0: as CHUNK_BYTES allows. The
  gradient is exact, with every chunk computed again for it.
  """
  if direction not in DIRECTIONS:
    raise ValueError(f"direction {direction!r}; there are {', '.join(DIRECTIONS)}")
  count = len(texts)
  pairs = 4 * len(images) * images.shape[1] * texts.shape[1]
  limit = CHUNK_BYTES.get(jax.default_backend(), ACCELERATOR_CHUNK_BYTES)
  size = min(chunk or max(limit // max(pairs, 1), 1), count)
  of_images = _Side(images) if direction != "i2t" else _Side(images, gram=False)
  score = functools.partial(_all_pairs, of_images, sharpness=sharpness, direction=direction)
  parts = -(-count // size)
  cut = lambda x: jnp.pad(x, [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(
    parts, size, *x.shape[1:]
  )
  if parts == 1:
    return score(texts, text_mask)
  # Of texts that fill up the last chunk no word counts, which no formula here minds.
  body = jax.checkpoint(lambda part: score(*part), prevent_cse=False)
  scores = jax.lax.map(body, (cut(texts), cut(text_mask)))  # [parts, I, size]
  return jnp.moveaxis(scores, 0, 1).reshape(len(images), -1)[:, :count]


class _Side:
  """Tokens [N, P, D] with their norms [N, P] and Gram matrices [N, P, P], in float32."""

  def __init__(self, tokens: Array, gram: bool = True):
    self.tokens = tokens
    square = jnp.square(tokens.astype(jnp.float32)).sum(-1)
    self.norm = _root(square)
    self.gram = _product("...pd,...qd->...pq", tokens, tokens) if gram else None


def _all_pairs(images: _Side, texts: Array, mask: Array, *, sharpness, direction) -> Array:
  words = _Side(texts, gram=direction != "t2i")
  dots = _product("ird,twd->itrw", images.tokens, texts)
  words_mask = mask[None, :, None, :]  # [1, T, 1, W]
  score = 0.0
  if direction != "t2i":
    score += _regions_ask(dots, images.norm[:, None], words.gram[None], words_mask, sharpness)
  if direction != "i2t":
    score += _words_ask(dots, words.norm[None], images.gram[:, None], words_mask, sharpness)
  return score


def aligned_scores(
  images: Array, texts: Array, text_mask: Array, sharpness: float = 9.0, direction: str = "i2t"
) -> Array:
  """M texts for each of G pictures: [G, R, D], [G, M, W, D], bool [G, M, W] -> float32 [G, M]."""
  regions, words = _Side(images, gram=direction != "i2t"), _Side(texts, gram=direction != "t2i")
  dots = _product("grd,gmwd->gmrw", images, texts)
  mask = text_mask[:, :, None, :]
  score = 0.0
  if direction != "t2i":
    score += _regions_ask(dots, regions.norm[:, None], words.gram, mask, sharpness)
  if direction != "i2t":
    score += _words_ask(dots, words.norm, regions.gram[:, None], mask, sharpness)
  return score


def _regions_ask(dots: Array, norm: Array, gram: Array, mask: Array, sharpness: float) -> Array:
  """dots [N, M, R, W], norm [N or 1, M or 1, R] of regions, gram [.., W, W] of words -> [N, M]."""
  a = jnp.where(mask, jax.nn.leaky_relu(dots, 0.1), 0)
  a = a / (_root((a * a).sum(-2, keepdims=True)) + 1e-8)  # each word over the regions
  # Not -inf: where no word counts, the weights are even and no NaN.
  weights = jax.nn.softmax(jnp.where(mask, sharpness * a, -1e30), axis=-1)
  weights = jnp.where(mask, weights, 0)
  against = (weights * dots).sum(-1)  # [N, M, R]
  square = (_product("...rw,...wu->...ru", weights, gram) * weights).sum(-1)
  return (against / jnp.maximum(norm * _root(square), 1e-8)).mean(-1)


def _words_ask(dots: Array, norm: Array, gram: Array, mask: Array, sharpness: float) -> Array:
  """dots [N, M, R, W], norm [.., W] of words, gram [.., R, R] of regions -> [N, M]."""
  a = jnp.where(mask, jax.nn.leaky_relu(dots, 0.1), 0)
  a = a / (_root((a * a).sum(-1, keepdims=True)) + 1e-8)  # each region over the words
  weights = jax.nn.softmax(sharpness * a, axis=-2)  # over the regions
  against = (weights * dots).sum(-2)  # [N, M, W]
  square = (_product("...rs,...sw->...rw", gram, weights) * weights).sum(-2)
  cosine = against / jnp.maximum(norm * _root(square), 1e-8)
  count = mask[..., 0, :].sum(-1)
  return jnp.where(mask[..., 0, :], cosine, 0).sum(-1) / jnp.maximum(count, 1)


def _product(formula: str, a: Array, b: Array) -> Array:
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _root(square: Array) -> Array:
  """The root of what rounding may have made negative; without a gradient at 0."""
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
