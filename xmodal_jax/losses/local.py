"""Scores of pictures and texts from all pairs of their tokens, without holding all those pairs.

a[i, t, r, w] is the dot product of token r of picture i and token w of text t. The modes are of
TERAN (Messina et al., 2021, section 3.3); TGDT uses MrSw: for each word the best region.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

MODES = ("MrSw", "MwSr", "symm", "sum", "mean", "MrAVGw", "scan-sentences")

CHUNK_BYTES = 2**23  # of a held at a time: what a CPU's cache and a GPU's kernels work well on


def local_scores(
  images: Array,
  image_mask: Array,
  texts: Array,
  text_mask: Array,
  mode: str = "MrSw",
  *,
  image_zero: Array | None = None,
  text_zero: Array | None = None,
  chunk: int = 0,
) -> Array:
  """Scores of all pairs: images [I, R, D], texts [T, W, D] -> float32 [I, T].

  image_mask bool [I, R], text_mask bool [T, W]: the tokens that count. image_zero bool [I], and
  text_zero bool [T]: whether a maximum over the tokens of this picture (text) also sees a 0, as
  where an original's padding took part in it. A picture or text without a token scores 0.
  chunk: so many texts at a time, [I, chunk, R, W] in memory; 0: as CHUNK_BYTES allows. The gradient
  is that of `plain`, with every chunk computed again for it.
  """
  if mode not in MODES:
    raise ValueError(f"alignment mode {mode!r}; there are {', '.join(MODES)}")
  count = len(texts)
  pairs = 4 * len(images) * images.shape[1] * texts.shape[1]
  size = min(chunk or max(CHUNK_BYTES // max(pairs, 1), 1), count)
  zero = lambda given, n: jnp.zeros(n, bool) if given is None else given
  image_zero, text_zero = zero(image_zero, len(images)), zero(text_zero, count)
  score = functools.partial(plain, images, image_mask, image_zero, mode=mode)
  parts = -(-count // size)
  if parts == 1:
    return score(texts, text_mask, text_zero)
  cut = lambda x: jnp.pad(x, [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(
    parts, size, *x.shape[1:]
  )
  body = jax.checkpoint(lambda part: score(*part), prevent_cse=False)
  scores = jax.lax.map(body, tuple(map(cut, (texts, text_mask, text_zero))))  # [parts, I, size]
  return jnp.moveaxis(scores, 0, 1).reshape(len(images), -1)[:, :count]


def plain(
  images: Array,
  image_mask: Array,
  image_zero: Array,
  texts: Array,
  text_mask: Array,
  text_zero: Array,
  mode: str = "MrSw",
) -> Array:
  """`local_scores` of all texts at once."""
  a = jnp.einsum("ird,twd->itrw", images, texts, preferred_element_type=jnp.float32)
  if mode == "scan-sentences":
    return _scan_sentences(a, images, image_mask, texts, text_mask)
  both = image_mask[:, None, :, None] & text_mask[:, None]  # [I, T, R, W]
  if mode in ("sum", "mean"):
    # The mean is over the padded rectangle, as in the original.
    return jnp.where(both, a, 0).sum((2, 3)) / (a.shape[2] * a.shape[3] if mode == "mean" else 1)
  score = 0.0
  if mode != "MwSr":
    best = _best(a, image_mask[:, None, :, None], image_zero[:, None, None], 2)  # [I, T, W]
    score += jnp.where(text_mask, best, 0).sum(-1)
  if mode in ("MwSr", "symm"):
    best = _best(a, text_mask[:, None], text_zero[:, None], 3)  # [I, T, R]
    score += jnp.where(image_mask[:, None], best, 0).sum(-1)
  if mode == "MrAVGw":
    score = score / jnp.maximum(text_mask.sum(-1), 1)
  return score


def _best(a: Array, mask: Array, zero: Array, axis: int) -> Array:
  """Maximum over an axis of what the mask lets count, and of 0 where `zero`; 0 of nothing."""
  best = jnp.where(mask, a, -jnp.inf).max(axis)
  return jnp.where(jnp.isinf(best), 0, jnp.where(zero, jnp.maximum(best, 0), best))


def _scan_sentences(
  a: Array, images: Array, image_mask: Array, texts: Array, text_mask: Array
) -> Array:
  """Every region with the words it attends to (SCAN, Lee et al., 2018, text-image attention)."""
  both = image_mask[:, None, :, None] & text_mask[:, None]
  weight = jnp.where(both, jax.nn.relu(a), 0)
  square = (weight * weight).sum(2, keepdims=True)  # over regions
  weight = weight / jnp.sqrt(jnp.maximum(square, 1e-24))
  weight = jax.nn.softmax(jnp.where(both, weight, -1e30), axis=-1)
  attended = jnp.einsum("itrw,twd->itrd", weight, texts, preferred_element_type=jnp.float32)
  dot = (attended * images[:, None]).sum(-1)  # [I, T, R]
  norm = lambda x: jnp.sqrt(jnp.maximum((x.astype(jnp.float32) ** 2).sum(-1), 1e-16))
  cosine = dot / (norm(attended) * norm(images)[:, None])
  return jnp.where(image_mask[:, None], cosine, 0).sum(-1)


def aligned_scores(
  images: Array, image_mask: Array, texts: Array, text_mask: Array, image_zero: Array
) -> Array:
  """MrSw of M texts for each of G pictures: images [G, R, D], texts [G, M, W, D] -> [G, M]."""
  a = jnp.einsum("grd,gmwd->gmrw", images, texts, preferred_element_type=jnp.float32)
  best = _best(a, image_mask[:, None, :, None], image_zero[:, None, None], 2)
  return jnp.where(text_mask, best, 0).sum(-1)
