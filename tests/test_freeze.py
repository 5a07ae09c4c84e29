"""Frozen parameters with everything that could change them, or what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from xmodal_jax.models.towers import resnet
from xmodal_jax.optim import factory
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

FROZEN = 2


def test_held_batch_norm_computes_as_in_evaluation():
  x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 2, 2, 3)), jnp.float32)

  @jax.jit
  def run(x, held, mean, var):
    norm = resnet.BatchNorm(3)
    norm.mean[...], norm.var[...], norm.held = mean, var, nnx.data(held)
    y = norm(x, True)
    return y, norm.mean[...], norm.var[...], norm(x, False)

  start = jnp.float32([1, 2, 3]), jnp.float32([4, 5, 6])
  y, mean, var, evaluated = run(x, True, *start)
  np.testing.assert_array_equal((mean, var), start)
  np.testing.assert_allclose(y, evaluated, atol=1e-6)
  y, mean, var, _ = run(x, False, *start)
  assert (mean != start[0]).all() and (var != start[1]).all()
  np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)


@pytest.mark.full
def test_frozen_tower_with_batch_norm_computes_the_same():
  """Its evaluated embeddings are equal to the bit, and training sees the same embeddings."""
  config = tiny.config("unused", optim__freeze=(("^image/", f"{FROZEN} steps"),))
  config.model.image = dict(kind="resnet", size=32, width=4, depths=(2, 1, 1, 1))
  built, rng = setup.build(config, jax.devices()[:1]), np.random.default_rng(0)
  tx = built.optimizer(config.optim, lambda step: 0.01)
  step = built.train_step(
    tx,
    jax.random.key(0),
    built.state_shardings(tx),
    lambda step: 0.01,
    built.first_steps(config.optim),
  )
  batch = dict(
    image=jnp.asarray(rng.integers(0, 256, (16, 32, 32, 3)), jnp.uint8),
    text_ids=jnp.asarray(rng.integers(0, 714, (16, 24)), jnp.int32),
    image_id=jnp.arange(16),
  )
  embed = jax.jit(
    lambda state: nnx.merge(built.graphdef, state.params, state.stats).encode_image(batch)["embed"]
  )
  state = jax.jit(lambda: step_lib.init_state(built.init_model, tx))()
  start = jax.device_get((state.params["image"], state.stats))
  before, text = embed(state), np.asarray(state.params["text"]["proj"]["kernel"])
  for _ in range(FROZEN):
    state, _ = step(state, batch)
  jax.tree.map(np.testing.assert_array_equal, (state.params["image"], state.stats), start)
  np.testing.assert_array_equal(embed(state), before)
  assert abs(np.asarray(state.params["text"]["proj"]["kernel"]) - text).max() > 1e-3

  def in_training(state):
    model = nnx.merge(built.graphdef, state.params, state.stats)
    step_lib._hold_statistics(model, built.first_steps(config.optim), jnp.int32(0))
    return model.encode_image(batch, jax.random.key(1))["embed"]

  np.testing.assert_allclose(jax.jit(in_training)(state), before, atol=1e-6)
  state, _ = step(state, batch)
  for moved in (state.params["image"]["stem"]["conv1"]["kernel"], state.stats):
    assert all(jax.tree.leaves(jax.tree.map(lambda a: bool((a != 0).any()), moved)))
  changed = jax.tree.map(lambda a, b: abs(np.asarray(a) - b).max(), state.stats, start[1])
  assert min(jax.tree.leaves(changed)) > 0


def test_frozen_parameters_are_neither_bounded_nor_rounded():
  params = {"a": {"kernel": jnp.float32([2.1])}, "b": {"scale": jnp.float32([7.3])}}
  zero = jax.tree.map(jnp.zeros_like, params)
  settings = tiny.optim(
    freeze=(("a|b", "2 steps"),),
    bounds=(("^b/", 0.0, 4.6),),
    round_to="float16",
    round_paths=("kernel$",),
  )
  tx = factory.make_optimizer(settings, lambda step: 0.1, params)
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(3):
    updates, state = update(zero, state, params, step=jnp.int32(step))
    new = optax.apply_updates(params, updates)
    if step < 2:
      jax.tree.map(np.testing.assert_array_equal, new, params)
  assert new["b"]["scale"] == np.float32(4.6) and new["a"]["kernel"] != params["a"]["kernel"]
