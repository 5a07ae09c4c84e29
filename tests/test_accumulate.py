"""config.accumulate: the exact gradient of the whole batch, for every system, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.extend import core

from xmodal_jax.distributed import sharding
from xmodal_jax.models import base, layers, registry
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

BATCH = 64
DATA = (("data", -1),)
SYSTEMS = {"clip": tiny.config, "team": tiny.team, "zerovl": tiny.zerovl, "tgdt": tiny.tgdt}
SYSTEMS |= {"hat": tiny.hat}


def test_every_system_is_tested():
  assert SYSTEMS.keys() == registry.SYSTEMS.keys()


def without_dropout(section) -> None:
  """Sets all dropout rates of a model config to 0, in place."""
  for key, value in section.items():
    if hasattr(value, "items"):
      without_dropout(value)
    elif "drop" in key:
      section[key] = 0.0


def batch(config, size: int = BATCH) -> dict:
  """A random batch for a tiny config, on the host."""
  rng = np.random.default_rng(0)
  length = 12
  lengths = rng.integers(3, length + 1, size)
  out = {
    "text_ids": rng.integers(1, 200, (size, length)).astype(np.int32),
    "text_mask": np.arange(length) < lengths[:, None],
    "image_id": rng.integers(0, size - 2, size).astype(np.int32),
  }
  if n := config.data.regions:
    width = config.model.image.features
    out["regions"] = rng.standard_normal((size, n, width)).astype(np.float32)
    out["boxes"] = rng.random((size, n, 4)).astype(np.float32)
    return out | {"region_mask": np.arange(n) < rng.integers(1, n + 1, size)[:, None]}
  side = config.model.image.size
  return out | {"image": rng.integers(0, 256, (size, side, side, 3), np.uint8)}


@functools.cache
def gradients(
  name: str, accumulate: int, devices: int, dropout: bool = False, loss_chunk: int = 0, mesh=DATA
):
  """(loss, metrics, gradients as one dict of arrays)."""
  changes = dict(accumulate=accumulate, loss_chunk=loss_chunk)
  config = SYSTEMS[name]("unused", batch_size=BATCH, **changes)
  if name == "hat":  # two stages instead of four: half of the compilation
    config.model.image.update(depths=(1, 1), heads=(1, 2))
    config.model.levels = ((1, 1), (0, 0))
  if not dropout:
    without_dropout(config.model)
  config.mesh = mesh
  built = setup.build(config, jax.devices()[:devices])
  init = lambda: nnx.to_pure_dict(step_lib.split(built.init_model())[1])
  params = jax.jit(init, out_shardings=built.params_shardings)()

  @jax.jit
  def run(params, b):
    loss_fn = lambda params: nnx.merge(built.graphdef, params, {}).loss(b, jax.random.key(3))
    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  with jax.default_matmul_precision("highest"):
    out = run(params, sharding.put_batch(batch(config), built.batch_sharding))
  return jax.device_get(out)


def assert_same(ours, want, tolerance: float) -> None:
  (loss, metrics), grads = ours
  (want_loss, want_metrics), want_grads = want
  np.testing.assert_allclose(loss, want_loss, rtol=tolerance)
  for key, value in want_metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=tolerance, atol=1e-6, err_msg=key)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(want_grads))

  def close(path, a, b):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3 * largest), err_msg=str(path)
    )

  jax.tree_util.tree_map_with_path(close, grads, want_grads)


MESH = (("data", 2), ("fsdp", 2), ("model", 2))
# HAT's normalised attention over the hardest negatives amplifies float32 rounding errors.
TOLERANCE = {"hat": 3e-5}


@pytest.mark.parametrize("name", SYSTEMS)
def test_everything_on_is_the_plain_program(name):
  """A mesh of three axes, the batch in parts and the loss in tiles, against one device."""
  ours = gradients(name, 2, 8, loss_chunk=4, mesh=MESH)
  assert_same(ours, gradients(name, 1, 1), TOLERANCE.get(name, 1e-5))


GRID = [(2, 8), (2, 1), (4, 1), (8, 1), (1, 8), (4, 8), (8, 8)]
QUICK = ("clip", "zerovl")


@pytest.mark.full
@pytest.mark.parametrize(
  ("name", "accumulate", "devices"),
  [
    pytest.param(name, *x, marks=[] if x == GRID[0] and name in QUICK else pytest.mark.slow)
    for name in SYSTEMS
    for x in GRID
  ],
)
def test_gradient_equals_whole_batch(name, accumulate, devices):
  ours = gradients(name, accumulate, devices)
  assert_same(ours, gradients(name, 1, 1), TOLERANCE.get(name, 1e-5))


class Noisy(base.System):
  """One weight matrix followed by dropout, shared by both sides."""

  def __init__(self, weight):
    self.weight = nnx.Param(weight)

  def encode(self, batch, key):
    return {"embed": layers.dropout(batch["x"] @ self.weight[...], 0.5, key)}

  encode_image = encode_text = encode

  def objective(self, images, texts, batch, key):
    return jax.nn.logsumexp(images["embed"] @ texts["embed"].T), {}


def test_dropout_is_the_same_in_both_passes():
  """The gradient equals that of encoding the parts in a loop, with their keys and without remat."""
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((12, 5), (5, 4)))
  n, key = 3, jax.random.key(1)

  def ours(weight):
    model = Noisy(weight)
    model.accumulate = n
    return model.loss({"x": x}, key)[0]

  def plain(weight):
    model = Noisy(weight)
    _, *keys, _ = jax.random.split(key, 4)
    sides = []
    for k in keys:
      parts = [
        model.encode({"x": x[j::n]}, part)["embed"] for j, part in enumerate(jax.random.split(k, n))
      ]
      sides.append({"embed": jnp.stack(parts, 1).reshape(12, -1)})
    return model.objective(*sides, None, None)[0]

  for f in (lambda f: f(weight), lambda f: jax.grad(f)(weight)):
    np.testing.assert_allclose(f(ours), f(plain), rtol=1e-5)
  without = Noisy(weight).encode({"x": x}, None)["embed"]
  assert not np.allclose(ours(weight), jax.nn.logsumexp(without @ without.T), rtol=1e-2)


def temporaries(name: str, accumulate: int, size: int) -> int:
  """Temporary bytes of the compiled gradient of the loss."""
  config = SYSTEMS[name]("unused", batch_size=size, accumulate=accumulate)
  config.mesh = (("data", -1),)
  built = setup.build(config, jax.devices()[:1])
  params = nnx.to_pure_dict(built.params)
  b = {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in batch(config, 8).items()}

  def loss(params, b):
    return nnx.merge(built.graphdef, params, {}).loss(b, jax.random.key(0))[0]

  return jax.jit(jax.grad(loss)).lower(params, b).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.full
def test_memory_is_that_of_one_part():
  """Four parts of a batch need little more memory than one part alone."""
  whole, parts = temporaries("zerovl", 1, 128), temporaries("zerovl", 4, 128)
  part = temporaries("zerovl", 1, 32)
  assert parts < 1.5 * part < 0.6 * whole


def permuted(jaxpr, times: int = 1) -> int:
  """Elements that a device sends with ppermute, over all iterations of its loops."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "ppermute":
      total += times * sum(v.aval.size for v in eqn.outvars)
    inner = times * eqn.params.get("length", 1)
    total += sum(permuted(sub, inner) for sub in core.jaxprs_in_params(eqn.params))
  return total


@pytest.mark.full
def test_negatives_are_fetched_once():
  """TEAM's sampled negatives are fetched once, outside of the rematerialised parts."""

  def moved(accumulate):
    config = tiny.team("unused", batch_size=BATCH, accumulate=accumulate)
    built = setup.build(config)
    b = jax.tree.map(jnp.asarray, batch(config))

    def loss(params):
      return nnx.merge(built.graphdef, params, {}).loss(b, jax.random.key(0))[0]

    return permuted(jax.make_jaxpr(jax.grad(loss))(nnx.to_pure_dict(built.params)).jaxpr)

  assert 0 < moved(2) <= moved(1)


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    (dict(accumulate=3), "accumulate is 3: config.batch_size=64 does not divide"),
    (dict(accumulate=0), "accumulate is 0"),
    (dict(accumulate=2, batch_size=8), "on each of 8 devices"),
  ],
)
def test_accumulate_must_divide_the_batch(changes, error):
  config = tiny.config("unused", **dict(batch_size=BATCH) | changes)
  with pytest.raises(ValueError, match=error):
    setup.build(config)


def test_batch_norm_is_an_error():
  config = tiny.config("unused", batch_size=BATCH, accumulate=2)
  with config.unlocked():
    config.model.image = dict(kind="resnet", size=32, width=8, depths=(1, 1, 1, 1))
  with pytest.raises(ValueError, match="accumulate is 2, but this model has BatchNorm"):
    setup.build(config)
