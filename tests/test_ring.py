"""Blockwise losses, on one device and in a ring of eight, against the full score matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import contrastive, cross_attention, hard_negatives, local, triplet
from xmodal_jax.losses.pairwise import ring, statistics
from xmodal_jax.losses.pairwise.ring import Ring

B, E, R, W = 16, 6, 4, 5


@functools.cache
def rows_of(devices: int, fsdp: int = 1, model: int = 1):
  axes = (("data", -1), ("fsdp", fsdp), ("model", model))
  return sharding.batch_sharding(sharding.make_mesh(axes, jax.devices()[:devices]))


# Without a sharding, with one tile for all pairs, with rows sharded over two mesh axes, and with a
# mesh axis that does not shard rows and tiles smaller than a device's rows.
RINGS = {
  "one device": lambda: Ring(4, None),
  "one tile": lambda: Ring(64, rows_of(1)),
  "eight": lambda: Ring(1, rows_of(8, fsdp=2)),
  "four by two": lambda: Ring(2, rows_of(8, model=2)),
}


@functools.cache
def features() -> dict[str, np.ndarray]:
  """Unit vectors and tokens of pairs. Three rows share an image id, two of them the features."""
  rng = np.random.default_rng(0)
  unit = lambda *shape: _unit(rng.standard_normal(shape).astype(np.float32))
  out = {
    "images": unit(B, E),
    "texts": unit(B, E),
    "regions": unit(B, R, E),
    "words": unit(B, W, E),
  }
  for name in ("images", "regions"):
    out[name][9] = out[name][2]
  ids = np.arange(B, dtype=np.int32)
  ids[[5, 9]] = 2
  counts = lambda most: np.arange(most) < rng.integers(1, most + 1, B)[:, None]
  return out | {"ids": ids, "region_mask": counts(R), "word_mask": counts(W)}


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def local_score(images, texts):
  (regions, region_mask), (words, word_mask) = images, texts
  return 10 * local.local_scores(regions, region_mask, words, word_mask)


def attended_score(images, texts):
  (regions, _), (words, word_mask) = images, texts
  return cross_attention.attended_scores(regions, words, word_mask, chunk=2)


def _infonce(same_image):
  def loss(x, how):
    return contrastive.infonce(x["images"], x["texts"], x["scale"], x["ids"], same_image, how)

  return loss


def _nce(mix=1.0, **options):
  def loss(x, how):
    tau = 1 / x["scale"]
    both = contrastive.bidirectional_nce(
      x["images"], x["texts"], tau, mix=mix, ring=how, image_id=x["ids"], **options
    )
    return sum(loss for loss, _ in both), [metrics for _, metrics in both]

  return loss


def _sigmoid(same_image):
  def loss(x, how):
    sides = x["images"], x["texts"]
    return contrastive.sigmoid(*sides, x["scale"], x["bias"], how, x["ids"], same_image)

  return loss


def _hinges(reduce, score=None):
  def loss(x, how):
    if score is None:
      return triplet.triplet_loss(triplet.cosine, x["images"], x["texts"], 0.2, reduce, how)
    sides = (x["regions"], x["region_mask"]), (x["words"], x["word_mask"])
    return triplet.triplet_loss(score, *sides, 0.2, reduce, how)

  return loss


def _hinges_exclude(x, how):
  sides, score = contrastive.mask_same_image(
    triplet.dot, x["images"], x["texts"], x["ids"], "exclude"
  )
  return triplet.triplet_loss(score, *sides, 0.2, "sum", how)


def _intra(x, how):
  return triplet.intra_modal_consistency(triplet.dot, x["images"], x["texts"], 0.3, how), {}


LOSSES = {f"infonce_{same}": _infonce(same) for same in contrastive.SAME_IMAGE}
LOSSES |= {
  "sigmoid": _sigmoid("keep"),
  "sigmoid_exclude": _sigmoid("exclude"),
  "nce": _nce(),
  "nce_mixed": _nce(mix=0.3, block=8, smoothing=0.1),
  "nce_groups": _nce(mix=0.3, groups=4, smoothing=0.1),
  # Rows 2 and 5 show one image and are each other's partners.
  "nce_exclude": _nce(mix=0.3, block=8, smoothing=0.1, same_image="exclude", mixed=True),
  "hinges_exclude": _hinges_exclude,
  "nce_still": _nce(gather_gradient=False),
  "intra": _intra,
  "hinges_local": _hinges("max", local_score),
  "hinges_attended": _hinges("max", attended_score),
}
LOSSES |= {f"hinges_{reduce}": _hinges(reduce) for reduce in triplet.REDUCTIONS}


def run(name: str, how: Ring | None):
  """((loss, metrics), gradients of all floats)."""
  arrays = features() | {"scale": np.float32(8), "bias": np.float32(-3)}
  floats = {k: v for k, v in arrays.items() if v.dtype == np.float32}
  rest = {k: v for k, v in arrays.items() if k not in floats}
  if how is not None and how.batch_sharding is not None:
    put = lambda x: jax.device_put(x, how.batch_sharding) if x.ndim else x
    floats, rest = jax.tree.map(put, (floats, rest))
  loss = lambda floats, rest: LOSSES[name](floats | rest, how)
  with jax.default_matmul_precision("highest"):
    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(floats, rest))


plain = functools.cache(lambda name: run(name, None))


MORE = ("infonce_exclude", "nce_groups", "hinges_mean")


@pytest.mark.parametrize(
  ("name", "how"),
  [
    pytest.param(name, how, marks=[] if how == "eight" else [pytest.mark.full])
    for name in LOSSES
    for how in RINGS
    if how == "eight" or name in MORE
  ],
)
def test_ring_is_the_plain_form(name, how):
  """Loss, every metric, and every gradient."""
  (value, metrics), grads = run(name, RINGS[how]())
  (want, want_metrics), want_grads = plain(name)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, want_metrics
  )
  assert max(np.abs(g).max() for g in want_grads.values()) > 1e-3
  for key, g in want_grads.items():
    atol = 1e-5 * max(np.abs(g).max(), 1e-2)
    np.testing.assert_allclose(grads[key], g, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("how", RINGS)
@pytest.mark.parametrize("n", [1, 3])
def test_sampled_negatives_are_the_same(n, how):
  x, keys = features(), jax.random.split(jax.random.key(3))
  draw = lambda how: jax.jit(
    lambda v, t, same: hard_negatives.sample_both(v, t, jnp.float32(5), same, n, keys, how)
  )(x["images"], x["texts"], x["ids"])
  jax.tree.map(np.testing.assert_array_equal, draw(RINGS[how]()), draw(None))


def test_more_negatives_than_rows():
  """Missing negatives are marked as not found, also with tiles smaller than n."""
  x, keys = features(), jax.random.split(jax.random.key(3))
  same = jnp.arange(4, dtype=jnp.int32) // 2
  pair, scale = (x["images"][:4], x["texts"][:4]), jnp.float32(5)
  drawn = hard_negatives.sample_both(*pair, scale, same, 3, keys, Ring(1))
  assert all(side.found.sum(1).tolist() == [2] * 4 for side in drawn)
  assert all((side.index[:, 2] == jnp.arange(4)).all() for side in drawn)
  jax.tree.map(
    np.testing.assert_array_equal, drawn, hard_negatives.sample_both(*pair, scale, same, 3, keys)
  )


def test_noise_is_gumbels_and_of_the_pair_alone():
  words = jax.random.bits(jax.random.key(0), (2,), jnp.uint32)
  noise = np.asarray(hard_negatives.gumbel_noise(words, jnp.arange(300), jnp.arange(400)))
  part = hard_negatives.gumbel_noise(words, jnp.arange(100, 200), jnp.arange(7, 9))
  np.testing.assert_allclose(noise[100:200, 7:9], part, rtol=1e-6)
  other = hard_negatives.gumbel_noise(words + 1, jnp.arange(300), jnp.arange(400))
  assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02
  # P(noise < x) = exp(-exp(-x)), and values repeat no more often than 32 bits allow.
  levels = np.array([-1.5, -0.5, 0.5, 2.0, 5.0])
  share = (noise.ravel()[:, None] < levels).mean(0)
  np.testing.assert_allclose(share, np.exp(-np.exp(-levels)), atol=4 * np.sqrt(0.25 / noise.size))
  assert np.isfinite(noise).all() and len(np.unique(noise)) > 0.98 * noise.size


@pytest.mark.parametrize("how", ["one device", "eight"])
def test_collapsed_model_is_not_accurate(how):
  same = jnp.asarray(_unit(np.ones((B, E), np.float32)))
  how = RINGS[how]()
  for loss in (
    lambda x: contrastive.infonce(x, x, jnp.float32(7), ring=how),
    lambda x: triplet.triplet_loss(triplet.dot, x, x, ring=how),
  ):
    _, metrics = jax.jit(loss)(same)
    assert metrics["accuracy_i2t"] == metrics["accuracy_t2i"] == 0


def test_rows_that_tiles_do_not_divide():
  x = features()
  loss = lambda chunk, rows: contrastive.infonce(
    x["images"], x["texts"], jnp.float32(7), ring=Ring(chunk, rows)
  )
  with pytest.raises(ValueError, match=r"loss_chunk is 3.*config\.batch_size=16 over 1"):
    loss(3, None)
  with pytest.raises(ValueError, match=r"loss_chunk is 2.*config\.batch_size=16 over 3"):
    loss(2, rows_of(3))


def temporaries(devices: int, local_rows: int, chunk: int, width: int = 64) -> int:
  rows = rows_of(devices)
  shape = jax.ShapeDtypeStruct((devices * local_rows, width), jnp.float32, sharding=rows)
  how = Ring(chunk, rows) if chunk else None
  loss = lambda a, b: contrastive.infonce(a, b, jnp.float32(7), ring=how)[0]
  step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=rows)
  return step.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_the_rows_and_a_tile():
  """Temporaries do not grow with the devices, and grow linearly with a device's rows."""
  four, eight = (temporaries(n, 2048, 64) for n in (4, 8))
  assert eight < 1.02 * four
  rows, tile = 4 * 2048 * 64, 4 * 64 * 64
  assert eight < 4 * rows + 16 * tile
  assert temporaries(8, 4096, 64) < 2.1 * eight
  assert temporaries(8, 2048, 0) > 100 * eight


def test_the_smaller_side_rotates():
  """Statistics keep their sides when the left side rotates because it is smaller."""
  x, how = features(), RINGS["eight"]()
  score = lambda shared, left, right, i, j: left[:, :E] @ right[:, :E].T
  wide = jnp.pad(x["texts"], ((0, 0), (0, 9)))
  of = dict(
    left_stats={"best": statistics.MaxNegative()}, right_stats={"log": statistics.LogSumExp()}
  )
  left, right = jax.jit(lambda a, b: ring.reduce(score, a, b, how, **of))(x["images"], wide)
  s = x["images"] @ x["texts"].T
  np.testing.assert_allclose(right["log"], np.log(np.exp(s).sum(0)), rtol=1e-5)
  np.fill_diagonal(s, -np.inf)
  np.testing.assert_allclose(left["best"], s.max(1), rtol=1e-5)
