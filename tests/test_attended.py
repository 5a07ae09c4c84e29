"""losses.cross_attention: the chunked forms against the definition, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import cross_attention

TOLERANCE = 1e-5  # of cosines and of gradients below 1: float32 sums in another order
# (token width, chunk). Width 16 uses Gram matrices; width 4, less than the number of tokens,
# attended vectors.
FORMS = [(16, 0), (16, 5), (4, 5)]
CASES = [(direction, *form) for direction in cross_attention.DIRECTIONS for form in FORMS]
SHARPNESS = 7.0


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def inputs(width: int = 16, images: int = 8, texts: int = 13) -> tuple[np.ndarray, ...]:
  """Images with 9 regions, texts with 7 words, and the texts' mask.

  Two texts have no valid word, one has a single word, one has an invalid word in the middle.
  """
  rng = np.random.default_rng(0)
  count = rng.integers(1, 8, texts)
  count[0] = count[5] = 0
  count[6], count[7] = 7, 1
  mask = np.arange(7) < count[:, None]
  mask[6, 3] = False
  topics = rng.standard_normal((5, width), np.float32)
  # Tokens scatter around a few topics, so that attention weights differ.
  tokens = lambda *shape: (
    topics[rng.integers(5, size=shape)] + 0.5 * rng.standard_normal((*shape, width), np.float32)
  )
  return tokens(images, 9), tokens(texts, 7), mask


def plain(v, t, mask, direction: str, sharpness: float = SHARPNESS):
  """The definition, with attended vectors: [I, R, D], [T, W, D], [T, W] -> [I, T]."""
  weight = mask[None, :, None]  # [1, T, 1, W]
  dots = jnp.einsum("ird,twd->itrw", v, t)
  dots = jnp.where(weight, jnp.where(dots < 0, 0.1 * dots, dots), 0)
  cosine = lambda x, y: (x * y).sum(-1) / jnp.maximum(length(x) * length(y), 1e-8)
  score = 0.0
  if direction in ("i2t", "both"):
    a = jnp.exp(sharpness * dots / (length(dots, 2) + 1e-8)) * weight
    a /= jnp.maximum(a.sum(3, keepdims=True), 1e-30)
    found = jnp.einsum("itrw,twd->itrd", a, t)
    score += cosine(v[:, None], found).mean(2)
  if direction in ("t2i", "both"):
    a = jnp.exp(sharpness * dots / (length(dots, 3) + 1e-8))
    a /= a.sum(2, keepdims=True)
    found = jnp.einsum("itrw,ird->itwd", a, v)
    score += (cosine(t[None], found) * mask).sum(2) / jnp.maximum(mask.sum(1), 1)
  return score


def length(x, axis: int | None = None):
  """Norms, kept as axes where one is named; the gradient of a zero vector's is 0."""
  square = (x * x).sum(-1 if axis is None else axis, keepdims=axis is not None)
  return jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)


def with_gradient(f, width: int = 16):
  """f(v, t, mask) on `inputs`, and the gradient of a weighted sum of it."""
  v, t, mask = inputs(width)
  weight = np.random.default_rng(1).standard_normal((len(v), len(t))).astype(np.float32)

  def run(v, t):
    scores, back = jax.vjp(lambda v, t: f(v, t, mask), v, t)
    return scores, back(jnp.asarray(weight))

  return jax.tree.map(np.asarray, jax.jit(run)(v, t))


@functools.cache
def defined(direction: str, width: int):
  return with_gradient(functools.partial(plain, direction=direction), width)


def close(ours, want) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), ours, want)


@pytest.mark.parametrize("direction,width,chunk", CASES)
def test_plain(direction, width, chunk):
  kw = dict(sharpness=SHARPNESS, direction=direction, chunk=chunk)
  ours = scores, (dv, dt) = with_gradient(
    functools.partial(cross_attention.attended_scores, **kw), width
  )
  close(ours, defined(direction, width))
  _, _, mask = inputs(width)
  for x in (scores, dv, dt):
    assert np.abs(x).max() > 0.05
  np.testing.assert_array_equal(scores[:, ~mask.any(1)], 0)
  np.testing.assert_array_equal(dt[~mask], 0)


@pytest.mark.parametrize("direction", cross_attention.DIRECTIONS)
def test_no_words_at_all(direction):
  """A batch whose captions have no words: scores and gradients are 0, not NaN."""
  score = lambda v, t, mask: cross_attention.attended_scores(
    v, t, mask & False, direction=direction
  )
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), with_gradient(score))


@pytest.mark.parametrize("direction", cross_attention.DIRECTIONS)
def test_aligned(direction):
  """Scores and gradients of selected pairs, some repeated, equal those among all pairs."""
  v, t, mask = inputs()
  chosen = np.random.default_rng(2).integers(len(t), size=(len(v), 4))
  chosen[0, 0], chosen[1] = 0, chosen[1, 0]  # a text without words; one text four times
  weight = np.random.default_rng(3).standard_normal(chosen.shape).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=2)
  def run(v, t, aligned):
    def f(v, t):
      if aligned:
        return cross_attention.aligned_scores(v, t[chosen], mask[chosen], SHARPNESS, direction)
      scores = cross_attention.attended_scores(v, t, mask, SHARPNESS, direction, chunk=5)
      return jnp.take_along_axis(scores, jnp.asarray(chosen), 1)

    scores, back = jax.vjp(f, v, t)
    return scores, back(jnp.asarray(weight))

  ours = run(v, t, True)
  close(ours, run(v, t, False))
  assert np.abs(ours[0]).max() > 0.1


@pytest.mark.parametrize("direction", [pytest.param("i2t", marks=pytest.mark.full), "both"])
def test_eight_devices(direction, monkeypatch):
  """Texts are all-gathered, images are not."""
  monkeypatch.setattr(cross_attention, "CPU_BYTES", 1)  # a tile has one image of each device
  v, t, mask = inputs(16, 16, 24)
  weight = np.random.default_rng(4).standard_normal((16, 24)).astype(np.float32)
  mesh = sharding.make_mesh((("data", -1),))
  assert mesh.size == 8
  rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
  gather = lambda x: jax.lax.with_sharding_constraint(x, whole)

  def run(v, t, mask, sharded=True):
    held = gather if sharded else lambda x: x

    def f(v, t):
      kw = dict(chunk=16, batch_sharding=rows if sharded else None)
      scores = cross_attention.attended_scores(v, held(t), held(mask), SHARPNESS, direction, **kw)
      return jax.lax.with_sharding_constraint(scores, rows) if sharded else scores

    scores, back = jax.vjp(f, v, t)
    return scores, back(jnp.asarray(weight))

  batch = v, t, mask
  one = jax.jit(functools.partial(run, sharded=False))(*batch)
  placed = jax.device_put(batch, rows)
  compiled = jax.jit(run, out_shardings=rows).lower(*placed).compile()
  close(compiled(*placed), one)
  gathered = [x for x in compiled.as_text().splitlines() if " all-gather(" in x]
  assert gathered
  # Images are [16, 9, 16], texts [24, ...].
  assert not [x for x in gathered if "[16,9,16]" in x.partition(" all-gather(")[0]]


@pytest.mark.parametrize(
  "direction",
  [
    d if d == "both" else pytest.param(d, marks=pytest.mark.full)
    for d in cross_attention.DIRECTIONS
  ],
)
def test_memory(direction):
  """Neither value nor gradient stores the weights or the attended vectors of all pairs."""
  images, texts, regions, words, width = 32, 32, 784, 32, 64
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  total = lambda v, t, mask: cross_attention.attended_scores(v, t, mask, direction=direction).sum()
  args = shape(images, regions, width), shape(texts, words, width)
  mask = jax.ShapeDtypeStruct((texts, words), bool)
  compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*args, mask).compile()
  weights, vectors = (4 * images * texts * regions * n for n in (words, width))
  assert weights > 102e6 and vectors > 205e6
  held = compiled.memory_analysis().temp_size_in_bytes
  assert held < 60e6
