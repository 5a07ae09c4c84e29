"""config.loss_chunk: every system's loss, metrics and gradients are those without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_accumulate import BATCH, SYSTEMS, assert_same, batch, gradients, without_dropout

from xmodal_jax.runtime import setup

HAT = {"hat": 3e-5}  # tolerance as in test_accumulate
SMALL = 16


@functools.cache
def objective(name: str, devices: int, loss_chunk: int):
  """(loss, metrics), gradients of parameters and features of `objective` on random numbers."""
  config = SYSTEMS[name]("unused", batch_size=SMALL, loss_chunk=loss_chunk)
  without_dropout(config.model)
  config.mesh = (("data", -1),)
  built = setup.build(config, jax.devices()[:devices])
  rng = np.random.default_rng(0)

  def filled(x):
    if x.dtype == bool:
      return rng.random(x.shape) < 0.7
    y = rng.standard_normal(x.shape).astype(x.dtype)
    return y / float(np.sqrt(x.shape[-1])) if x.ndim else y + 2

  b, key = jax.tree.map(jnp.asarray, batch(config, SMALL)), jax.random.key(3)
  merge = lambda params: nnx.merge(built.graphdef, params, {})
  params = nnx.to_pure_dict(built.params)

  def encode(params):
    model = merge(params)
    prepared = model.prepare(b, key)
    return model.encode_image(prepared, key), model.encode_text(prepared, key)

  params, features = jax.tree.map(filled, (params, jax.eval_shape(encode, params)))
  floats = lambda x: {k: v for k, v in x.items() if v.dtype == np.float32}

  @jax.jit
  def run(params, moving, features, b):
    def loss_fn(params, moving):
      model = merge(params)
      sides = (side | part for side, part in zip(features, moving, strict=True))
      return model.objective(*sides, model.prepare(b, key), key)

    return jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, moving)

  rows = jax.device_put((tuple(map(floats, features)), features, b), built.system.batch_sharding)
  with jax.default_matmul_precision("highest"):
    return jax.device_get(run(params, *rows))


@pytest.mark.full
@pytest.mark.parametrize("name", SYSTEMS)
def test_objective_in_a_ring(name):
  """Eight devices with two tiles each against one device without tiles; the same negatives."""
  (loss, metrics), (of_params, of_features) = objective(name, 8, 1)
  want, (want_params, want_features) = objective(name, 1, 0)
  assert jnp.isfinite(loss) and any(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(want_features))
  tolerance = HAT.get(name, 1e-5)
  assert_same(((loss, metrics), of_params), (want, want_params), tolerance)
  assert_same(((loss, metrics), of_features), (want, want_features), tolerance)


@pytest.mark.full
@pytest.mark.parametrize(
  "name", [n if n == "clip" else pytest.param(n, marks=pytest.mark.slow) for n in SYSTEMS]
)
def test_ring_trains_the_same(name):
  """The gradients of a whole train step, towers included."""
  assert_same(gradients(name, 1, 8, loss_chunk=4), gradients(name, 1, 1), HAT.get(name, 1e-5))


def test_tiles_that_do_not_divide_the_batch():
  config = tiny.config("unused", batch_size=BATCH, loss_chunk=3)
  with pytest.raises(ValueError, match=r"loss_chunk is 3.*config\.batch_size=64 over 8"):
    setup.build(config, jax.devices())
  config.loss_chunk = 4
  system = setup.build(config, jax.devices()).system
  assert system.ring.chunk == 4 and system.ring.batch_sharding == system.batch_sharding
