"""Scores of pictures and texts by attention between their tokens.

The similarity of SCAN (Lee et al., 2018, section 3.2) as HAT uses it. Each token of one side asks,
the tokens of the other answer: weights a are a softmax over the answers, the attended vector is
t = sum_w a_w c_w, and the score is the mean over askers v of cos(v, t). With raw dot products
d_w = v . c_w and the answers' Gram matrix G, v . t = sum_w a_w d_w and |t|^2 = a' G a, so that no
vector of a pair has to be made: of all pairs only the weights exist, chunk by chunk. A cosine does
not change with the length of t, so a need not sum to 1, and the softmax's exponentials do. Where a
question has more answers than a token has numbers, |t|^2 is that of t itself, then the less work.

Everything of a pair has the order [T, W, I, R]: the products of tokens come out like it, the Gram
matrix of a text goes into another product as it is, and the long axis is the one that lies close.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from xmodal_jax.distributed import sharding

Array = jax.Array

DIRECTIONS = ("i2t", "t2i", "both")

# Bytes of weights held at a time: on CPU about what its cache holds, of some pictures and some
# texts; elsewhere of all pictures of a device, enough to keep it busy. But never of fewer than
# LEAST_WORDS words: of a single text, a matrix product was half as fast.
CPU_BYTES, ACCELERATOR_BYTES = 2**21, 2**27
LEAST_WORDS = 256
# A chunk of texts, which are ordered by length, is cut to one of these shares of their width.
WIDTHS = (0.5, 0.75, 1.0)


def attended_scores(
  images: Array,
  texts: Array,
  text_mask: Array,
  sharpness: float = 9.0,
  direction: str = "i2t",
  chunk: int = 0,
  batch_sharding: NamedSharding | None = None,
) -> Array:
  """Scores of all pairs: images [I, R, D], texts [T, W, D], text_mask bool [T, W] -> [I, T].

  direction: "i2t", image tokens ask; "t2i", words ask; "both", the sum of the two. sharpness: the
  inverse temperature of the softmax. chunk: so many texts at a time; 0: what suits
  the devices, those of this process or of `rows`, which is how images are sharded. The gradient is
  exact, with every chunk computed again for it.
  """
  if direction not in DIRECTIONS:
    raise ValueError(f"direction {direction!r}; there are {', '.join(DIRECTIONS)}")
  texts, text_mask = jnp.asarray(texts), jnp.asarray(text_mask)
  count, words = text_mask.shape
  # Of a device: inside of what each does for itself, its own pictures are all there are.
  alone = batch_sharding is None or bool(jax.sharding.get_abstract_mesh().manual_axes)
  devices = 1 if alone else sharding.batch_mesh_axes(batch_sharding)[1]
  local = len(images) // (devices if len(images) % devices == 0 else 1)
  platform = (
    batch_sharding.mesh.devices.flat[0].platform
    if batch_sharding is not None
    else jax.default_backend()
  )
  limit = CPU_BYTES if platform == "cpu" else ACCELERATOR_BYTES
  of_pair = 4 * images.shape[1] * words  # bytes of its weights
  size = min(chunk or max(limit // max(of_pair * local, 1), -(-LEAST_WORDS // words)), count)
  fit = max(limit // max(of_pair * size, 1), 1) if platform == "cpu" else local
  tiles = next(n for n in range(1, local + 1) if local % n == 0 and local // n <= fit)
  parts = -(-count // size)
  length = (text_mask * jnp.arange(1, words + 1)).max(1)  # up to the last word that counts
  order = jnp.argsort(length)
  cut = lambda x: jnp.pad(x[order], [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(
    parts, size, *x.shape[1:]
  )
  score = functools.partial(_all_pairs, sharpness=sharpness, direction=direction)
  if parts == tiles == 1:
    return score(images, _made_once(images, direction), texts, text_mask).T
  widths = sorted({-(-int(words * share) // 8) * 8 for share in WIDTHS})
  widths = [w for w in widths if 0 < w < words] + [words]
  branches = [
    jax.checkpoint(lambda i, p, t, m, w=w: score(i, p, t[:, :w], m[:, :w]), prevent_cse=False)
    for w in widths
  ]
  # Tile j has the pictures j, j + tiles, ...: each device goes on with pictures of its own.
  held = jax.tree.map(
    lambda x: x.reshape(-1, tiles, *x.shape[1:]).swapaxes(0, 1),
    (images, _made_once(images, direction)),
  )

  def part(x):
    # Of texts that fill up the last chunk no word counts, which no formula here minds.
    texts, mask, length = x
    narrowest = (length.max() > jnp.array(widths)).sum()
    return jax.lax.map(lambda i: jax.lax.switch(narrowest, branches, *i, texts, mask), held)

  scores = jax.lax.map(
    part, (cut(texts), cut(text_mask), cut(length))
  )  # [parts, tiles, size, I / tiles]
  scores = scores.transpose(3, 1, 0, 2).reshape(len(images), -1)
  return scores[:, jnp.argsort(order)]


def _made_once(images: Array, direction: str) -> tuple[Array, Array | None]:
  """Norms [I, R] of pictures [I, R, D]; the Gram matrices [I, R, R] of those that answer, None
  where attended vectors are the less work."""
  gram = direction != "i2t" and images.shape[-2] <= images.shape[-1]
  return _norm(images), _product("ird,isd->irs", images, images) if gram else None


def _all_pairs(
  images: Array,
  made: tuple[Array, Array | None],
  texts: Array,
  mask: Array,
  *,
  sharpness: float,
  direction: str,
) -> Array:
  """-> float32 [T, I]."""
  norm, gram = made
  dots = _product("twd,ird->twir", texts, images)
  score = 0.0
  if direction != "t2i":
    score += _regions_ask(dots, norm, texts, mask, sharpness)
  if direction != "i2t":
    score += _words_ask(dots, gram, images, texts, mask, sharpness)
  return score


def aligned_scores(
  images: Array, texts: Array, text_mask: Array, sharpness: float = 9.0, direction: str = "i2t"
) -> Array:
  """M texts for each of G pictures: [G, R, D], [G, M, W, D], bool [G, M, W] -> float32 [G, M]."""

  def one(image, texts, mask):
    made = _made_once(image[None], direction)
    kw = dict(sharpness=sharpness, direction=direction)
    return _all_pairs(image[None], made, texts, mask, **kw)[:, 0]

  return jax.vmap(one)(images, texts, text_mask)


def _regions_ask(dots: Array, norm: Array, texts: Array, mask: Array, sharpness: float) -> Array:
  """dots [T, W, I, R] -> [T, I]."""
  counts = mask[:, :, None, None]
  weights = _exponentials(dots, sharpness, over=3)  # of each word over the regions
  weights = jnp.where(counts, weights, 0)
  answered = _product("twu,twir->tuir", _product("twd,tud->twu", texts, texts), weights)
  length = norm * _root((answered * weights).sum(1))  # [T, I, R]
  return _cosine((weights * dots).sum(1), length, weights.sum(1)).mean(-1)


def _words_ask(
  dots: Array, gram: Array | None, images: Array, texts: Array, mask: Array, sharpness: float
) -> Array:
  """dots [T, W, I, R] -> [T, I]."""
  counts = mask[:, :, None]
  dots = jnp.where(counts[..., None], dots, 0)
  weights = _exponentials(dots, sharpness, over=1)  # of each region over the words
  if gram is None:
    square = jnp.square(_product("twir,ird->itwd", weights, images)).sum(-1).transpose(1, 2, 0)
  else:
    square = (_product("twir,irs->twis", weights, gram) * weights).sum(-1)  # [T, W, I]
  length = _norm(texts)[:, :, None] * _root(square)
  cosine = _cosine((weights * dots).sum(-1), length, weights.sum(-1))
  return jnp.where(counts, cosine, 0).sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]


def _exponentials(dots: Array, sharpness: float, over: int) -> Array:
  """Of the softmax of products brought to length 1 over an axis: at most 1, none of them 0."""
  a = jax.nn.leaky_relu(dots, 0.1)
  a = a / (_root((a * a).sum(over, keepdims=True)) + 1e-8)
  return jnp.exp(sharpness * (a - 1))


def _cosine(against: Array, length: Array, total: Array) -> Array:
  """against / length, whose bound is that of weights that sum to 1, and so times their `total`."""
  return against / jnp.maximum(length, 1e-8 * jnp.where(total > 0, total, 1))


def _product(formula: str, a: Array, b: Array) -> Array:
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _norm(tokens: Array) -> Array:
  return _root(jnp.square(tokens.astype(jnp.float32)).sum(-1))


def _root(square: Array) -> Array:
  """The root of what rounding may have made negative; without a gradient at 0."""
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
