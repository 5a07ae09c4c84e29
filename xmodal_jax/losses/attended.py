"""Scores of pictures and texts by attention between their tokens.

The similarity of SCAN (Lee et al., 2018, section 3.2) as HAT uses it. Each token of one side asks,
the tokens of the other answer: weights a are a softmax over the answers, the attended vector is
t = sum_w a_w c_w, and the score is the mean over askers v of cos(v, t). With raw dot products
d_w = v . c_w and the answers' Gram matrix G, v . t = sum_w a_w d_w and |t|^2 = a' G a, so that no
vector of a pair has to be made: of all pairs only the weights exist, chunk by chunk. Where a
question has more answers than a token has numbers, |t|^2 is that of t itself, then the less work.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

DIRECTIONS = ("i2t", "t2i", "both")

# Bytes of weights held at a time: on CPU what its cache holds (a gradient was 2.5 times as fast as
# with all at once), elsewhere enough to keep an accelerator busy. But never those of one text
# alone: of 784 regions, two at a time were 1.3 to 1.7 times as fast, in value and in gradient.
CHUNK_BYTES = {"cpu": 2**21}
ACCELERATOR_CHUNK_BYTES = 2**27
LEAST = 2


def attended_scores(
  images: Array,
  texts: Array,
  text_mask: Array,
  sharpness: float = 9.0,
  direction: str = "i2t",
  chunk: int = 0,
  platform: str = "",
) -> Array:
  """Scores of all pairs: images [I, R, D], texts [T, W, D], text_mask bool [T, W] -> [I, T].

  direction: "i2t", image tokens ask; "t2i", words ask; "both", the sum of the two. sharpness: the
  inverse temperature of the softmax. chunk: so many texts at a time; 0: as CHUNK_BYTES allows,
  but LEAST sets of weights or more, for `platform`, or "" for that of this process's devices. The
  gradient is exact, with every chunk computed again for it.
  """
  if direction not in DIRECTIONS:
    raise ValueError(f"direction {direction!r}; there are {', '.join(DIRECTIONS)}")
  count = len(texts)
  sets = 2 if direction == "both" else 1  # of weights that a text has
  held = sets * 4 * len(images) * images.shape[1] * texts.shape[1]  # bytes of them
  limit = CHUNK_BYTES.get(platform or jax.default_backend(), ACCELERATOR_CHUNK_BYTES)
  size = min(chunk or max(limit // max(held, 1), LEAST // sets), count)
  regions = _Side(images[:, None], answers=direction != "i2t")
  score = functools.partial(_all_pairs, images, regions, sharpness=sharpness, direction=direction)
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
  """Tokens [..., P, D] with their norms [..., P] and, of answers, what squares are made from."""

  def __init__(self, tokens: Array, answers: bool):
    self.tokens = tokens
    self.norm = _root(jnp.square(tokens.astype(jnp.float32)).sum(-1))
    # Of more tokens than numbers in each, the Gram matrix is the larger and the dearer of the two.
    fits = tokens.shape[-2] <= tokens.shape[-1]
    self.gram = _product("...pd,...qd->...pq", tokens, tokens) if answers and fits else None

  def square(self, weights: Array, axis: int) -> Array:
    """|t|^2 of vectors attended with these weights over P, which is their `axis`, -1 or -2."""
    pa = "ap" if axis == -1 else "pa"
    if self.gram is None:
      return jnp.square(_product(f"...{pa},...pd->...ad", weights, self.tokens)).sum(-1)
    changed = _product(f"...{pa},...pq->...{pa.replace('p', 'q')}", weights, self.gram)
    return (changed * weights).sum(axis)


def _all_pairs(
  images: Array, regions: _Side, texts: Array, mask: Array, *, sharpness, direction
) -> Array:
  words = _Side(texts[None], answers=direction != "t2i")
  dots = _product("ird,twd->itrw", images, texts)
  return _score(dots, regions, words, mask[None, :, None], sharpness, direction)


def aligned_scores(
  images: Array, texts: Array, text_mask: Array, sharpness: float = 9.0, direction: str = "i2t"
) -> Array:
  """M texts for each of G pictures: [G, R, D], [G, M, W, D], bool [G, M, W] -> float32 [G, M]."""
  regions = _Side(images[:, None], answers=direction != "i2t")
  words = _Side(texts, answers=direction != "t2i")
  dots = _product("grd,gmwd->gmrw", images, texts)
  return _score(dots, regions, words, text_mask[:, :, None], sharpness, direction)


def _score(
  dots: Array, regions: _Side, words: _Side, mask: Array, sharpness: float, direction: str
) -> Array:
  """dots [N, M, R, W], mask bool [N or 1, M, 1, W] -> [N, M]."""
  score = 0.0
  if direction != "t2i":
    score += _regions_ask(dots, regions, words, mask, sharpness)
  if direction != "i2t":
    score += _words_ask(dots, regions, words, mask, sharpness)
  return score


def _regions_ask(dots: Array, regions: _Side, words: _Side, mask: Array, sharpness: float) -> Array:
  a = jnp.where(mask, jax.nn.leaky_relu(dots, 0.1), 0)
  a = a / (_root((a * a).sum(-2, keepdims=True)) + 1e-8)  # each word over the regions
  # Not -inf: where no word counts, the weights are even and no NaN.
  weights = jax.nn.softmax(jnp.where(mask, sharpness * a, -1e30), axis=-1)
  weights = jnp.where(mask, weights, 0)
  against = (weights * dots).sum(-1)  # [N, M, R]
  length = regions.norm * _root(words.square(weights, -1))
  return (against / jnp.maximum(length, 1e-8)).mean(-1)


def _words_ask(dots: Array, regions: _Side, words: _Side, mask: Array, sharpness: float) -> Array:
  a = jnp.where(mask, jax.nn.leaky_relu(dots, 0.1), 0)
  a = a / (_root((a * a).sum(-1, keepdims=True)) + 1e-8)  # each region over the words
  weights = jax.nn.softmax(sharpness * a, axis=-2)  # over the regions
  against = (weights * dots).sum(-2)  # [N, M, W]
  length = words.norm * _root(regions.square(weights, -2))
  cosine = against / jnp.maximum(length, 1e-8)
  count = mask[..., 0, :].sum(-1)
  return jnp.where(mask[..., 0, :], cosine, 0).sum(-1) / jnp.maximum(count, 1)


def _product(formula: str, a: Array, b: Array) -> Array:
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _root(square: Array) -> Array:
  """The root of what rounding may have made negative; without a gradient at 0."""
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
