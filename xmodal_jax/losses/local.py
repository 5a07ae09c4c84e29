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
TEXTS, WORDS = 512, 128  # the same for `_packed`: texts packed together, words scored at a time


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
  chunk: so many texts at a time; 0: as many as suit. MrSw and MrAVGw hold [I, R, WORDS] at a time
  and work in proportion to the words that count; the others hold [I, chunk, R, W]. The gradient is
  that of `plain`, with all pairs of tokens computed again for it.
  """
  if mode not in MODES:
    raise ValueError(f"alignment mode {mode!r}; there are {', '.join(MODES)}")
  count = len(texts)
  zero = lambda given, n: jnp.zeros(n, bool) if given is None else given
  image_zero, text_zero = zero(image_zero, len(images)), zero(text_zero, count)
  if mode in ("MrSw", "MrAVGw"):
    score, size = _packed, TEXTS
  else:
    score = jax.checkpoint(plain, prevent_cse=False, static_argnums=6)
    size = CHUNK_BYTES // max(4 * len(images) * images.shape[1] * texts.shape[1], 1)
  size = min(chunk or max(size, 1), count)
  parts = -(-count // size)
  cut = lambda x: jnp.pad(x, [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(
    parts, size, *x.shape[1:]
  )
  one = lambda part: score(images, image_mask, image_zero, *part, mode)
  scores = jax.lax.map(one, tuple(map(cut, (texts, text_mask, text_zero))))  # [parts, I, size]
  return jnp.moveaxis(scores, 0, 1).reshape(len(images), -1)[:, :count]


def _packed(
  images: Array,
  image_mask: Array,
  image_zero: Array,
  texts: Array,
  text_mask: Array,
  text_zero: Array,
  mode: str,
) -> Array:
  """`plain` for modes that add up words: those that count side by side, WORDS at a time.

  Shapes are static, as many steps as for texts without padding; those without a word are skipped.
  """
  del text_zero  # of maxima over words
  count, width, _ = texts.shape
  words = min(WORDS, count * width)
  parts = -(-count * width // words)
  # Past the last word that counts: an index out of range, of a text that does not exist.
  (place,) = jnp.nonzero(text_mask.reshape(-1), size=parts * words, fill_value=count * width)
  place = place.reshape(parts, words)
  tokens = texts.reshape(count * width, -1)
  rows = tokens.at[place].get(
    mode="fill", fill_value=0, indices_are_sorted=True
  )  # [parts, words, D]

  def some(rows: Array, place: Array) -> Array:
    a = jnp.einsum("ird,wd->irw", images, rows, preferred_element_type=jnp.float32)
    best = _best(a, image_mask[:, :, None], image_zero[:, None], 1)  # [I, words]
    # A product, because adding to columns by index has no fixed order on a GPU.
    owner = jax.nn.one_hot(place // width, count)
    return jnp.dot(best, owner, precision="highest")  # [I, T]

  none = lambda rows, place: jnp.zeros((len(images), count), jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def add(rows: Array, place: Array) -> Array:
    return jax.lax.cond(place[0] < count * width, some, none, rows, place)

  start = none(rows, place)
  scores, _ = jax.lax.scan(lambda s, part: (s + add(*part), None), start, (rows, place))
  return scores / jnp.maximum(text_mask.sum(-1), 1) if mode == "MrAVGw" else scores


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
  counts = image_mask[:, None] & text_mask.any(-1)[:, None]  # [I, T, R]
  return jnp.where(counts, cosine, 0).sum(-1)


def aligned_scores(
  images: Array, image_mask: Array, texts: Array, text_mask: Array, image_zero: Array
) -> Array:
  """MrSw of M texts for each of G pictures: images [G, R, D], texts [G, M, W, D] -> [G, M]."""
  a = jnp.einsum("grd,gmwd->gmrw", images, texts, preferred_element_type=jnp.float32)
  best = _best(a, image_mask[:, None, :, None], image_zero[:, None, None], 2)
  return jnp.where(text_mask, best, 0).sum(-1)
