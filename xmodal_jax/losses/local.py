"""Local alignment scores: image-text scores from all pairs of their tokens, computed in chunks.

a[i, t, r, w] is the dot product of token r of image i and token w of text t. The pooling modes are
those of TERAN (Messina et al., 2021, section 3.3). TGDT uses MrSw: the best region of each word,
summed over words.

    scores = local_scores(regions, region_mask, words, word_mask)  # [I, R, D], [T, W, D] -> [I, T]
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from xmodal_jax.errors import ConfigError
from xmodal_jax.losses.einsum import exact_einsum

MODES = ("MrSw", "MwSr", "symm", "sum", "mean", "MrAVGw", "scan-sentences")

# Bytes of `a` computed at a time: fits a CPU's cache, and large enough for a GPU's kernels.
CHUNK_BYTES = 2**23
# The same for `_packed_scores`: texts whose words are packed together, words scored at a time.
TEXTS, WORDS = 512, 128


def local_scores(
  images: Float[ArrayLike, "i r d"],
  image_mask: Bool[ArrayLike, "i r"],
  texts: Float[ArrayLike, "t w d"],
  text_mask: Bool[ArrayLike, "t w"],
  mode: str = "MrSw",
  *,
  image_zero: Bool[ArrayLike, " i"] | None = None,
  text_zero: Bool[ArrayLike, " t"] | None = None,
  chunk: int = 0,
) -> Float[Array, "i t"]:
  """float32 scores of all image-text pairs.

  Args:
    images, texts: tokens.
    image_mask, text_mask: which tokens are valid. An image or text without one scores 0.
    mode: one of MODES.
    image_zero, text_zero: whether a maximum over the tokens of this image (text) also includes a 0,
      to reproduce models whose padding takes part in the maximum.
    chunk: texts scored at a time; 0 chooses a size. Memory is [I, R, WORDS] for MrSw and MrAVGw,
      whose work is proportional to the number of valid words, and [I, chunk, R, W] for the others.

  The backward pass recomputes each chunk. Raises ConfigError for an unknown mode.
  """
  if mode not in MODES:
    raise ConfigError(f"alignment mode {mode!r}; expected one of {', '.join(MODES)}")
  count = len(texts)
  image_zero = jnp.zeros(len(images), bool) if image_zero is None else image_zero
  text_zero = jnp.zeros(count, bool) if text_zero is None else text_zero
  if mode in ("MrSw", "MrAVGw"):
    score, size = _packed_scores, TEXTS
  else:
    score = jax.checkpoint(dense_scores, prevent_cse=False, static_argnums=6)
    size = CHUNK_BYTES // max(4 * len(images) * images.shape[1] * texts.shape[1], 1)
  size = min(chunk or max(size, 1), count)
  chunks = -(-count // size)

  def split(x):
    padded = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(chunks, size, *x.shape[1:])

  def score_chunk(chunk_of_texts):
    return score(images, image_mask, image_zero, *chunk_of_texts, mode)

  scores = jax.lax.map(score_chunk, tuple(map(split, (texts, text_mask, text_zero))))
  return jnp.moveaxis(scores, 0, 1).reshape(len(images), -1)[:, :count]  # from [chunks, I, size]


def _packed_scores(
  images: Float[ArrayLike, "i r d"],
  image_mask: Bool[ArrayLike, "i r"],
  image_zero: Bool[ArrayLike, " i"],
  texts: Float[ArrayLike, "t w d"],
  text_mask: Bool[ArrayLike, "t w"],
  text_zero: Bool[ArrayLike, " t"],
  mode: str,
) -> Float[Array, "i t"]:
  """`dense_scores` for modes that sum over words: packs the valid words, WORDS at a time.

  Shapes are static, with as many steps as texts without padding need; steps without a valid word
  are skipped at run time.
  """
  del text_zero  # these modes take no maximum over words
  count, width, _ = texts.shape
  words = min(WORDS, count * width)
  steps = -(-count * width // words)
  # Unused slots get an index out of range, which belongs to no text.
  (place,) = jnp.nonzero(text_mask.reshape(-1), size=steps * words, fill_value=count * width)
  place = place.reshape(steps, words)
  tokens = texts.reshape(count * width, -1)
  packed = tokens.at[place].get(
    mode="fill", fill_value=0, indices_are_sorted=True
  )  # [steps, words, D]

  def step_scores(tokens, place):
    a = exact_einsum("ird,wd->irw", images, tokens)
    best = _masked_max(a, image_mask[:, :, None], image_zero[:, None], 1)  # [I, words]
    # A matrix product, because scatter-add has no fixed order of summation on a GPU.
    text_of_word = jax.nn.one_hot(place // width, count)
    return jnp.dot(best, text_of_word, precision="highest")  # [I, T]

  def zeros(tokens, place):
    return jnp.zeros((len(images), count), jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step_scores_if_any(tokens, place):
    return jax.lax.cond(place[0] < count * width, step_scores, zeros, tokens, place)

  def accumulate(scores, step):
    return scores + step_scores_if_any(*step), None

  scores, _ = jax.lax.scan(accumulate, zeros(packed, place), (packed, place))
  return scores / jnp.maximum(text_mask.sum(-1), 1) if mode == "MrAVGw" else scores


def dense_scores(
  images: Float[ArrayLike, "i r d"],
  image_mask: Bool[ArrayLike, "i r"],
  image_zero: Bool[ArrayLike, " i"],
  texts: Float[ArrayLike, "t w d"],
  text_mask: Bool[ArrayLike, "t w"],
  text_zero: Bool[ArrayLike, " t"],
  mode: str = "MrSw",
) -> Float[Array, "i t"]:
  """`local_scores` of all texts at once, [I, T, R, W] in memory."""
  a = exact_einsum("ird,twd->itrw", images, texts)
  if mode == "scan-sentences":
    return _scan_sentences(a, images, image_mask, texts, text_mask)
  valid = image_mask[:, None, :, None] & text_mask[:, None]  # [I, T, R, W]
  if mode in ("sum", "mean"):
    # The mean is over the padded rectangle, as in TERAN's code.
    return jnp.where(valid, a, 0).sum((2, 3)) / (a.shape[2] * a.shape[3] if mode == "mean" else 1)
  score = 0.0
  if mode != "MwSr":
    best = _masked_max(a, image_mask[:, None, :, None], image_zero[:, None, None], 2)  # [I, T, W]
    score += jnp.where(text_mask, best, 0).sum(-1)
  if mode in ("MwSr", "symm"):
    best = _masked_max(a, text_mask[:, None], text_zero[:, None], 3)  # [I, T, R]
    score += jnp.where(image_mask[:, None], best, 0).sum(-1)
  if mode == "MrAVGw":
    score = score / jnp.maximum(text_mask.sum(-1), 1)
  return score


def _masked_max(a: Array, mask: ArrayLike, zero: ArrayLike, axis: int) -> Array:
  """Maximum over the valid entries of an axis, and 0 where `zero`; 0 if none is valid."""
  best = jnp.where(mask, a, -jnp.inf).max(axis)
  return jnp.where(jnp.isinf(best), 0, jnp.where(zero, jnp.maximum(best, 0), best))


def _scan_sentences(
  a: Array, images: ArrayLike, image_mask: ArrayLike, texts: ArrayLike, text_mask: ArrayLike
) -> Array:
  """Cosine of each region and the words it attends to, summed over regions (SCAN, Lee et al.,
  2018, image-text attention)."""
  valid = image_mask[:, None, :, None] & text_mask[:, None]  # [I, T, R, W]
  weight = jnp.where(valid, jax.nn.relu(a), 0)
  square = (weight * weight).sum(2, keepdims=True)  # over regions
  weight = weight / jnp.sqrt(jnp.maximum(square, 1e-24))
  weight = jax.nn.softmax(jnp.where(valid, weight, -1e30), axis=-1)
  attended = exact_einsum("itrw,twd->itrd", weight, texts)
  dot = (attended * images[:, None]).sum(-1)  # [I, T, R]
  norm = lambda x: jnp.sqrt(jnp.maximum((x.astype(jnp.float32) ** 2).sum(-1), 1e-16))
  cosine = dot / (norm(attended) * norm(images)[:, None])
  valid = image_mask[:, None] & text_mask.any(-1)[:, None]  # [I, T, R]
  return jnp.where(valid, cosine, 0).sum(-1)


def aligned_scores(
  images: Float[ArrayLike, "g r d"],
  image_mask: Bool[ArrayLike, "g r"],
  texts: Float[ArrayLike, "g m w d"],
  text_mask: Bool[ArrayLike, "g m w"],
  image_zero: Bool[ArrayLike, " g"],
) -> Float[Array, "g m"]:
  """MrSw scores of M texts for each of G images; for reranking."""
  a = exact_einsum("grd,gmwd->gmrw", images, texts)
  best = _masked_max(a, image_mask[:, None, :, None], image_zero[:, None, None], 2)
  return jnp.where(text_mask, best, 0).sum(-1)
