"""TEAM: sampled negatives, their exchange, same-image masks, dropout, parity across meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import contrastive, hard_negatives
from xmodal_jax.losses.pairwise import exchange
from xmodal_jax.models import base, layers, team
from xmodal_jax.models.layers import attention as attention_lib
from xmodal_jax.models.layers import token_matching
from xmodal_jax.models.towers import bert
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib


def test_sampling_is_in_proportion_and_without_replacement():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((5, 9)) * 2, jnp.float32)
  same = jnp.asarray(rng.random((5, 9)) < 0.3).at[:, 0].set(True).at[:, 5].set(False)
  draw = jax.jit(lambda key: hard_negatives.sample_negatives(logits, same, 2, key))
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = jax.vmap(draw)(keys)
  assert drawn.found.all() and not np.asarray(same)[np.arange(5)[:, None], drawn.index].any()
  assert (drawn.index[..., 0] != drawn.index[..., 1]).all()
  p = np.where(same, 0, np.exp(logits))
  p /= p.sum(1, keepdims=True)
  for q in range(5):
    first = np.bincount(np.asarray(drawn.index[:, q, 0]), minlength=9) / len(keys)
    np.testing.assert_allclose(first, p[q], atol=4 * np.sqrt(0.25 / len(keys)))
    # The second draw is in proportion to the softmax over the remaining candidates.
    second = np.bincount(np.asarray(drawn.index[:, q, 1]), minlength=9) / len(keys)
    left = sum(p[q, i] * np.where(np.arange(9) == i, 0, p[q]) / (1 - p[q, i]) for i in range(9))
    np.testing.assert_allclose(second, left, atol=4 * np.sqrt(0.25 / len(keys)))


def test_rows_without_candidates():
  same = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 0]], bool)
  draw = jax.jit(lambda key: hard_negatives.sample_negatives(jnp.zeros((3, 3)), same, 2, key))
  drawn = draw(jax.random.key(0))
  np.testing.assert_array_equal(drawn.found, [[False, False], [True, False], [True, True]])
  np.testing.assert_array_equal(drawn.index[0], [0, 0])  # itself
  positive = jnp.array([[0.1], [0.2], [0.3]])
  negative = jnp.array([[[9.0], [9.0]], [[0.5], [9.0]], [[0.1], [0.2]]])

  def loss(positive, negative):
    return hard_negatives.matching_loss(positive, negative, drawn.found, jnp.float32(2.0)).sum()

  one = lambda p, *n: np.log(np.exp(2 * (np.array([p, *n]) - p)).sum())
  want = (0 + one(0.2, 0.5) + one(0.3, 0.1, 0.2)) / 3
  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(positive, negative)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert all(np.isfinite(g).all() for g in gradients)
  assert not gradients[1][0].any() and not gradients[1][1, 1].any()


@pytest.mark.parametrize("same_image", contrastive.SAME_IMAGE)
def test_same_image_in_the_contrastive_loss(same_image):
  rng = np.random.default_rng(1)
  i, t = (base.l2_normalize(jnp.asarray(rng.standard_normal((6, 4)))) for _ in range(2))
  ids = np.array([0, 1, 0, 2, 1, 0])
  loss, _ = contrastive.infonce(i, t, jnp.float32(5.0), jnp.asarray(ids), same_image)
  logits = 5 * np.asarray(i, np.float64) @ np.asarray(t, np.float64).T
  total = 0.0
  for s in (logits, logits.T):
    for b in range(6):
      others = []
      for j in range(6):
        if j == b or ids[j] != ids[b] or same_image == "keep":
          others.append(s[b, j])
        elif same_image == "zero":
          others.append(0.0)
      total += np.log(np.exp(others).sum()) - s[b, b]
  np.testing.assert_allclose(loss, total / 12, rtol=1e-5)


def rows_of(devices, fsdp=1):
  mesh = sharding.make_mesh((("data", -1), ("fsdp", fsdp)), jax.devices()[:devices])
  return sharding.batch_sharding(mesh)


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 1), (8, 1), (8, 4)])
def test_exchange_is_plain_indexing(devices, fsdp):
  rows, rng = rows_of(devices, fsdp), np.random.default_rng(2)
  x = rng.standard_normal((16, 3, 5)).astype(np.float32)
  index = rng.integers(0, 16, (16, 2)).astype(np.int32)
  index[:8] = 3  # one row that half of the batch needs
  weight = rng.standard_normal((16, 2, 3, 5)).astype(np.float32)

  def loss(x, index, weight, rows):
    y = exchange.take_rows(x, index, rows)
    return (y * weight).sum(), y

  grad = jax.value_and_grad(loss, has_aux=True)
  (_, plain), plain_grad = jax.jit(functools.partial(grad, rows=None))(x, index, weight)
  put = lambda a: jax.device_put(a, rows)
  (_, ring), ring_grad = jax.jit(functools.partial(grad, rows=rows))(
    put(x), put(index), put(weight)
  )
  np.testing.assert_array_equal(ring, plain)
  np.testing.assert_allclose(ring_grad, plain_grad, rtol=1e-6, atol=1e-6)
  # Boolean arrays, one-dimensional arrays, and many rows per query.
  take = jax.jit(lambda x, index: exchange.take_rows(x, index, rows))
  mask = take(put(x[:, 0] > 0), put(index))
  np.testing.assert_array_equal(mask, (x[:, 0] > 0)[index])
  many = np.repeat(index, 20, axis=1)
  np.testing.assert_array_equal(take(put(x), put(many)), x[many])
  np.testing.assert_array_equal(take(put(x[:, 0, 0]), put(many)), x[many, 0, 0])


def temporaries(devices, plain, local=4, length=64, width=256):
  """Bytes of temporaries per device of value and gradient of an exchange."""
  rows = rows_of(devices)
  of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  x = of(local * devices, length, width)
  index = of(local * devices, 1, dtype=jnp.int32)

  def loss(x, index):
    return (exchange.take_rows(x, index, None if plain else rows) ** 2).sum()

  step = jax.jit(jax.grad(loss), out_shardings=rows)
  return step.lower(x, index).compile().memory_analysis().temp_size_in_bytes


def test_exchange_needs_the_memory_of_the_local_batch():
  ring = [temporaries(n, plain=False) for n in (2, 4, 8)]
  plain = [temporaries(n, plain=True) for n in (2, 4, 8)]
  assert max(ring) < 1.01 * min(ring)
  assert plain[2] - plain[1] > 1.8 * (plain[1] - plain[0]) > 0
  assert ring[2] < plain[2] / 2


@pytest.fixture(scope="module")
def small():
  """config.model of a toy TEAM."""
  return tiny.team("unused", model__negatives=2).model.to_dict()


def build_team(config, rows=None, **changes):
  model = team.build(config | changes, rngs=nnx.Rngs(0))
  model.batch_sharding = rows
  return step_lib.split(model)


def batch(size, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, 12, size)
  return {
    "image": rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
    "text_ids": rng.integers(0, 30522, (size, 12)).astype(np.int32),
    "text_mask": np.arange(12) < lengths[:, None],
    "image_id": (np.arange(size) // 2).astype(np.int32),
  }


@pytest.mark.full
def test_eight_devices_equal_one(small):
  """Loss, every metric and every gradient, dropout and the sampled negatives included."""
  results = []
  for rows in (rows_of(1), rows_of(8, fsdp=2)):
    graphdef, params, _ = build_team(small, rows)
    params = jax.device_put(nnx.to_pure_dict(params), NamedSharding(rows.mesh, P()))

    @jax.jit
    def run(params, b, graphdef=graphdef):
      loss = lambda p: nnx.merge(graphdef, p, {}).loss(b, jax.random.key(1))
      return jax.value_and_grad(loss, has_aux=True)(params)

    results.append(jax.device_get(run(params, jax.device_put(batch(16), rows))))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.full
def test_bfloat16_computes_the_same_in_few_digits(small):
  b = batch(4)
  results = []
  for dtype in (jnp.float32, jnp.bfloat16):
    model = team.build(small, dtype=dtype, rngs=nnx.Rngs(0))

    @jax.jit
    def run(model, b):
      images, texts = model.encode_image(b), model.encode_text(b)
      return images, texts, model.rerank(images, jax.tree.map(lambda x: x[:, None], texts))

    images, texts, scores = run(model, b)
    assert images["tokens"].dtype == texts["tokens"].dtype == dtype
    assert images["embed"].dtype == texts["embed"].dtype == scores.dtype == jnp.float32
    results.append((images["embed"], texts["embed"], scores))
  for plain, half in zip(*results, strict=True):
    assert 0 < abs(plain - half).max() < 0.05


def align_temporaries(config, devices, plain, local=4):
  rows = rows_of(devices)
  graphdef, params, _ = build_team(config, None if plain else rows)
  of = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
    (local * devices, *shape), dtype, sharding=rows
  )
  whole = NamedSharding(rows.mesh, P())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
  params = jax.tree.map(place, nnx.to_pure_dict(params))
  images = {"embed": of((16,)), "tokens": of((257, 32))}
  texts = {"embed": of((16,)), "tokens": of((30, 32)), "mask": of((30,), jnp.bool_)}
  b = {"image_id": of((), jnp.int32)}

  def loss(params, images, texts, b):
    model = nnx.merge(graphdef, params, {})
    return model.objective(images, texts, b, jax.random.key(0))[0]

  step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))
  return step.lower(params, images, texts, b).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.full
def test_objective_does_not_grow_with_the_devices(small):
  """At 4 pairs per device: the whole matching loss, gradients to all tokens included."""
  config = small | {"negatives": 1, "matching": small["matching"] | {"depth": 1, "dropout": 0.0}}
  ring = [align_temporaries(config, n, plain=False) for n in (2, 8)]
  plain = [align_temporaries(config, n, plain=True) for n in (2, 8)]
  assert ring[1] < 1.02 * ring[0]
  assert plain[1] - plain[0] > 10 * abs(ring[1] - ring[0])


def test_texts_of_an_image_together_or_alone():
  module = token_matching.TokenMatching(dim=32, depth=3, heads=4, embed=8, rngs=nnx.Rngs(0))
  keys = jax.random.split(jax.random.key(0), 3)
  images = jax.random.normal(keys[0], (2, 10, 32))
  texts = jax.random.normal(keys[1], (2, 5, 7, 32))
  mask = jnp.arange(7) < jax.random.randint(keys[2], (2, 5, 1), 1, 8)
  run = jax.jit(lambda module, *args: module(*args))
  scores = run(module, images, texts, mask)
  assert scores.shape == (2, 5, 3) and abs(scores).max() <= 1
  for m in range(5):
    one = run(module, images, texts[:, m : m + 1], mask[:, m : m + 1])
    np.testing.assert_allclose(scores[:, m : m + 1], one, atol=1e-6)
  # The values of padding tokens have no effect.
  other = jnp.where(mask[..., None], texts, 9.0)
  np.testing.assert_allclose(run(module, images, other, mask), scores, atol=1e-6)
  traced = jax.jit(lambda module: module.trace(images, texts, mask))(module)
  np.testing.assert_allclose(traced["attention"].sum(-1), 1, atol=1e-5)
  mean = (traced["agreement"] * mask).sum(-1) / mask.sum(-1)
  np.testing.assert_allclose(jnp.moveaxis(mean, 0, -1), scores, atol=1e-6)


def test_dropout_needs_a_key_and_differs_by_it():
  model = bert.Bert(vocab=50, width=16, depth=2, heads=2, mlp=32, context=8, rngs=nnx.Rngs(0))
  text = functools.partial(jax.jit(lambda model, *args: model(*args)), model)
  ids, mask = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)
  np.testing.assert_array_equal(text(ids, mask), text(ids, mask))
  a, b = (text(ids, mask, jax.random.key(k)) for k in (0, 1))
  assert abs(a - b).max() > 1e-3 and abs(a - text(ids, mask)).max() > 1e-3
  drop = jax.jit(jax.vmap(lambda k: layers.dropout(jnp.ones(100), 0.3, k)))
  dropped = drop(jax.random.split(jax.random.key(0), 400))
  np.testing.assert_allclose(np.mean(dropped), 1, atol=0.01)


def test_attention_of_masked_keys():
  q, k, v = (jax.random.normal(key, (2, 5, 2, 4)) for key in jax.random.split(jax.random.key(1), 3))
  mask = jnp.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
  plain = attention_lib._attention_einsum(q, k, v, mask)
  np.testing.assert_allclose(attention_lib._attention_fused(q, k, v, mask), plain, atol=1e-5)
  np.testing.assert_allclose(layers.dot_product_attention(q, k, v, mask=mask), plain, atol=1e-6)
  np.testing.assert_allclose(plain[1], jnp.broadcast_to(v[1, :1], v[1].shape), atol=1e-6)


def test_wrong_options_are_named(small):
  with pytest.raises(ValueError, match=r"model\.same_image is 'none'; there are keep, zero"):
    build_team(small, same_image="none")
  with pytest.raises(ValueError, match=r"model\.image\.kind is 'vgg'; there are clip, timm, deit"):
    build_team(small, image=small["image"] | {"kind": "vgg"})
  with pytest.raises(ValueError, match=r"set model\.project_text"):
    build_team(small, project_text=False)
  with pytest.raises(ValueError, match="team has no variant 'vit_b32'"):
    team.preset("vit_b32")


def test_scales_stop_learning_beyond_their_bound(small):
  graphdef, params, _ = build_team(small)
  params = nnx.to_pure_dict(params) | {"logit_scale": jnp.float32(5.0)}
  scale = lambda p: nnx.merge(graphdef, p, {}).scales()[0]
  assert scale(params) == 100
  assert jax.grad(scale)(params)["logit_scale"] == 0


def test_built_for_a_mesh_knows_its_rows():
  config = tiny.team("unused")
  built = setup.build(config)
  assert nnx.merge(
    built.graphdef, built.params, built.stats
  ).batch_sharding == sharding.batch_sharding(built.mesh)
