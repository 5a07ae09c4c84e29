"""losses.local: chunked and packed scores against dense ones, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import local

TOLERANCE = 1e-5  # of scores of up to 10 words: float32 sums in another order
CASES = [(mode, chunk) for mode in local.MODES for chunk in (0, 5)]


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
  x = rng.standard_normal(shape, np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def inputs(images: int = 8, texts: int = 13) -> tuple[np.ndarray, ...]:
  """The arguments of `dense_scores`, with 6 regions, 10 words and width 16.

  One image and two texts have no valid token, one text has an invalid token in the middle, one has
  a single word, and the maxima of every other row include a 0.
  """
  rng = np.random.default_rng(0)
  regions, words = rng.integers(1, 7, images), rng.integers(1, 11, texts)
  regions[2] = words[0] = words[5] = 0
  words[6], words[7] = 10, 1
  image_mask, text_mask = np.arange(6) < regions[:, None], np.arange(10) < words[:, None]
  text_mask[6, 3] = False
  odd = lambda n: np.arange(n) % 2 > 0
  v, t = unit(rng, images, 6, 16), unit(rng, texts, 10, 16)
  return v, image_mask, odd(images), t, text_mask, odd(texts)


def with_gradient(f):
  """f(v, t) on `inputs`, and the gradient of a weighted sum of it."""
  v, _, _, t, _, _ = inputs()
  weight = np.random.default_rng(1).standard_normal((len(v), len(t))).astype(np.float32)

  def run(v, t):
    scores, back = jax.vjp(f, v, t)
    return scores, back(jnp.asarray(weight))

  return jax.tree.map(np.asarray, jax.jit(run)(v, t))


@functools.cache
def plain(mode: str):
  _, vm, vz, _, tm, tz = inputs()
  return with_gradient(lambda v, t: local.dense_scores(v, vm, vz, t, tm, tz, mode))


def chunked(mode: str, chunk: int):
  _, vm, vz, _, tm, tz = inputs()
  kw = dict(image_zero=vz, text_zero=tz, chunk=chunk)
  return with_gradient(lambda v, t: local.local_scores(v, vm, t, tm, mode, **kw))


def close(ours, want) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), ours, want)


@pytest.mark.parametrize("mode,chunk", CASES)
def test_plain(mode, chunk):
  ours = scores, (dv, dt) = chunked(mode, chunk)
  close(ours, plain(mode))
  _, image_mask, _, _, text_mask, _ = inputs()
  for x in (scores, dv, dt):
    assert np.abs(x).max() > 0.01
  for x in (scores[~image_mask.any(1)], scores[:, ~text_mask.any(1)]):
    np.testing.assert_array_equal(x, 0)
  for x, mask in ((dv, image_mask), (dt, text_mask)):
    np.testing.assert_array_equal(x[~mask], 0)


@pytest.mark.parametrize("side,mode", [("image", "MrSw"), ("text", "MwSr")])
def test_zero(side, mode):
  """Scores increase where a maximum also includes a 0, and do not change elsewhere."""
  v, vm, vz, t, tm, tz = inputs()
  seen = vz if side == "image" else tz
  f = jax.jit(lambda **zero: local.local_scores(v, vm, t, tm, mode, **zero))
  change = np.asarray(f(**{f"{side}_zero": seen}) - f(**{f"{side}_zero": np.zeros_like(seen)}))
  change = change if side == "image" else change.T
  assert change[seen].max() > 0.01 and change[seen].min() >= 0 and not change[~seen].any()


def test_by_hand():
  """MrSw of every pair in NumPy, from its definition."""
  v, vm, vz, t, tm, _ = inputs()
  want = np.zeros((len(v), len(t)))
  for i, j in np.ndindex(want.shape):
    for word in t[j][tm[j]]:
      dots = v[i][vm[i]] @ word
      want[i, j] += max([*dots, 0] if vz[i] or not len(dots) else dots)
  close(chunked("MrSw", 0)[0], want)


def test_words(monkeypatch):
  """Packed chunks that start and end inside of texts."""
  monkeypatch.setattr(local, "WORDS", 7)
  close(chunked("MrSw", 5), plain("MrSw"))


@pytest.mark.parametrize("mode", ["MrSw", "symm"])
def test_eight_devices(mode):
  """Rows over the devices, texts gathered; no device holds the pictures of another."""
  v, vm, vz, t, tm, tz = inputs(16, 24)
  weight = np.random.default_rng(2).standard_normal((16, 24)).astype(np.float32)
  mesh = sharding.make_mesh((("data", -1),))
  assert mesh.size == 8
  rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
  gather = lambda x: jax.lax.with_sharding_constraint(x, whole)

  def run(v, vm, vz, t, tm, tz, sharded=True):
    held = gather if sharded else lambda x: x

    def f(v, t):
      kw = dict(image_zero=vz, text_zero=held(tz), chunk=16)
      scores = local.local_scores(v, vm, held(t), held(tm), mode, **kw)
      return jax.lax.with_sharding_constraint(scores, rows) if sharded else scores

    scores, back = jax.vjp(f, v, t)
    return scores, back(jnp.asarray(weight))

  batch = v, vm, vz, t, tm, tz
  one = jax.jit(functools.partial(run, sharded=False))(*batch)
  compiled = jax.jit(run, out_shardings=rows).lower(*jax.device_put(batch, rows)).compile()
  close(compiled(*jax.device_put(batch, rows)), one)
  gathered = [x for x in compiled.as_text().splitlines() if " all-gather(" in x]
  assert gathered
  # Pictures are [16, 6, 16]; what is gathered are texts, [24, ...].
  assert not [x for x in gathered if "[16,6,16]" in x.partition(" all-gather(")[0]]


@pytest.mark.parametrize("mode,gradient", [("MrSw", False)] + [(m, True) for m in local.MODES])
def test_memory(mode, gradient):
  """Of 256 pairs all products of tokens would be 377 MB; no mode holds them, or near to that."""
  images, texts, regions, words, dim = 256, 256, 36, 40, 64
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  mask = lambda *s: jax.ShapeDtypeStruct(s, bool)
  total = lambda v, t, vm, tm: local.local_scores(v, vm, t, tm, mode).sum()
  f = jax.value_and_grad(total, (0, 1)) if gradient else total
  args = shape(images, regions, dim), shape(texts, words, dim)
  compiled = jax.jit(f).lower(*args, mask(images, regions), mask(texts, words)).compile()
  held = compiled.memory_analysis().temp_size_in_bytes
  pairs = 4 * images * texts * regions * words
  assert pairs > 377e6
  # SCAN's attention has several arrays of the size of the products.
  assert held < (pairs / 3 if mode == "scan-sentences" else 60e6)


def test_skips_padding():
  """The work follows the words that count: whatever lies beyond them is neither read nor scored."""
  v, vm, _, t, tm, _ = inputs()
  pad = lambda x, value: np.pad(
    x, [(0, 0), (0, 200)] + [(0, 0)] * (x.ndim - 2), constant_values=value
  )
  f = jax.jit(lambda t, tm: local.local_scores(v, vm, t, tm))
  wide = pad(t, np.nan), pad(tm, False)
  close(f(*wide), f(t, tm))
  # The products are in a branch, not in one of two results of which a step takes one.
  assert "conditional(" in f.lower(*wide).compile().as_text()
