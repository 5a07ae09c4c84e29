"""LAMB: the groups of its norms, with stacked and fused parameters, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.distributed import sharding
from xmodal_jax.interop import conversion, tables
from xmodal_jax.interop.rules import Rule, linear, split
from xmodal_jax.models import registry
from xmodal_jax.optim import factory, schedules, transforms

DEPTH, DIM = 3, 8
RULES = [
  Rule("blocks.{layer}.in_proj", tuple(f"blocks/{x}/kernel" for x in "qkv"), split(3, linear)),
  Rule("blocks.{layer}.in_bias", tuple(f"blocks/{x}/bias" for x in "qkv"), split(3)),
  Rule("blocks.{layer}.fc", "blocks/wi/kernel", linear),
  Rule("blocks.{layer}.gate", "blocks/gate"),
  Rule("table", "table"),
  Rule("scale", "scale"),
]
NO_BIAS = ((r"bias$", 0.0), (".*", 1.0))
FROZEN = (r"q/kernel$", 0.0)


def draw(seed: int) -> dict:
  """Parameters whose layers differ in magnitude by powers of 10, with a stacked scalar."""
  rng = np.random.default_rng(seed)
  array = lambda *shape: rng.normal(size=shape).astype(np.float32)
  sizes = 10.0 ** np.arange(DEPTH, dtype=np.float32)
  stack = lambda *shape: array(DEPTH, *shape) * sizes.reshape(-1, *[1] * len(shape))
  blocks = {x: {"kernel": stack(DIM, DIM), "bias": stack(DIM)} for x in "qkv"}
  blocks["q"]["kernel"] *= 5
  blocks |= {"wi": {"kernel": stack(DIM, 2 * DIM)}, "gate": stack()}
  return {"blocks": blocks, "table": array(16, DIM), "scale": array()}


def make(params, rules=RULES, lr=0.1, **changes):
  c = config_lib.base().optim.to_dict()
  c |= dict(name="lamb", b1=0.9, b2=0.999, weight_decay=0.01, decay=((".*", 1.0),)) | changes
  return factory.make_optimizer(
    c, optax.constant_schedule(lr), params, conversion.tensors_of(rules, params)
  )


def run(tx, params, steps=4):
  """Parameters after `steps` updates, with gradients that depend on the parameters."""
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(steps):
    grads = jax.tree.map(lambda g, p: g * (1 + 0.1 * p), draw(10 + step), params)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return jax.device_get(params)


def reference(steps=4, *, lr=0.1, clip=1.0, decay=lambda name: 0.01, mult=lambda name: 1.0):
  """The original's loop over tensors, in float64: spec of TEAM, 4.1."""
  tensors = lambda tree: {
    k: np.array(v, np.float64)
    for k, v in conversion.arrays(conversion.to_torch(restore.flat(tree), RULES))
  }
  p = tensors(draw(0))
  m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
  for t in range(1, steps + 1):
    g = {k: x * (1 + 0.1 * p[k]) for k, x in tensors(draw(9 + t)).items()}
    n = np.sqrt(sum((x**2).sum() for x in g.values()))
    for k in p:
      grad = g[k] / (n / clip if n > clip else 1.0)
      m[k] = 0.9 * m[k] + 0.1 * grad
      v[k] = 0.999 * v[k] + 0.001 * grad**2
      u = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-6) + decay(k) * p[k]
      norms = np.linalg.norm(p[k]), np.linalg.norm(u)
      ratio = norms[0] / norms[1] if decay(k) and all(norms) else 1.0
      p[k] = p[k] - lr * mult(k) * ratio * u
  return p


def as_torch(params):
  return dict(conversion.arrays(conversion.to_torch(restore.flat(params), RULES)))


def compare(ours, theirs, tolerance):
  """Errors relative to the largest entry of each array: rounding is worse where terms cancel."""
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    error = np.abs(np.asarray(ours[key]) - value).max()
    assert error <= tolerance * np.abs(value).max(), (key, error)


@pytest.mark.parametrize("clip", [1.0, 7.0])
def test_original_equals_a_loop_over_its_tensors(clip):
  tx = make(draw(0), trust="original", grad_clip=clip)
  compare(as_torch(run(tx, draw(0))), reference(clip=clip), 1e-5)


def test_original_without_decay_has_no_ratio_and_the_multiple_comes_last():
  lr_mult = ((r"^blocks/", 0.1), (".*", 1.0))
  tx = make(draw(0), trust="original", grad_clip=1.0, decay=NO_BIAS, lr_mult=lr_mult)
  want = reference(
    decay=lambda name: 0.0 if name.endswith("bias") else 0.01,
    mult=lambda name: 0.1 if name.startswith("blocks") else 1.0,
  )
  compare(as_torch(run(tx, draw(0))), want, 1e-5)


def test_groups_of_both_forms():
  shapes = {k: x.shape for k, x in restore.flat(draw(0)).items()}
  groups = dict(conversion.tensors(RULES, shapes))
  assert groups[tuple(f"blocks/{x}/kernel" for x in "qkv")] is True
  assert groups[("blocks/gate",)] is True and groups[("scale",)] is False
  assert sum(len(paths) for paths in groups) == len(shapes)
  with pytest.raises(conversion.ConversionError) as e:
    conversion.tensors(RULES[:-1], shapes)
  assert e.value.parameters_without_a_rule == ["scale []"]
  with pytest.raises(ValueError, match="blocks/q/kernel into more than one"):
    conversion.tensors([*RULES, Rule("blocks.{layer}.q", "blocks/q/kernel")], shapes)
  with pytest.raises(ValueError, match=r"differs between blocks/q/kernel, blocks/k/kernel"):
    make(draw(0), trust="original", decay=(FROZEN, (".*", 1.0)))
  with pytest.raises(ValueError, match="there are optax, original"):
    make(draw(0), trust="apex")


def unstacked(tree):
  """The parameters with one entry per layer of `blocks`."""
  layers = [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(DEPTH)]
  return {k: v for k, v in tree.items() if k != "blocks"} | {
    str(i): x for i, x in enumerate(layers)
  }


@pytest.mark.parametrize("decay", [pytest.param(((".*", 1.0),), marks=pytest.mark.full), NO_BIAS])
def test_optax_form_equals_optax_lamb_stacked_or_not(decay):
  params, grads = unstacked(draw(0)), [unstacked(draw(10 + i)) for i in range(3)]
  paths = restore.flat(params)
  tx = make(params, [Rule(path, path) for path in paths], decay=decay)
  masked = factory.per_param("decay", decay, params)
  mask = jax.tree.map(bool, masked)
  theirs = optax.lamb(0.1, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, mask=mask)
  layered = draw(0)
  stacked = make(layered, decay=decay)
  states = tx.init(params), theirs.init(params), stacked.init(layered)
  other = params
  for step, g in enumerate(grads):
    u, a = tx.update(g, states[0], params)
    w, b = theirs.update(g, states[1], other)
    s, c = stacked.update(draw(10 + step), states[2], layered)
    states = a, b, c
    compare(restore.flat(u), restore.flat(w), 5e-7)  # rounding of sums in another order
    params, other = optax.apply_updates(params, u), optax.apply_updates(other, w)
    layered = optax.apply_updates(layered, s)
  compare(restore.flat(unstacked(layered)), restore.flat(params), 1e-6)


def test_zero_tensors_take_the_plain_step():
  zero = {"a": jnp.zeros((2, 3)), "b": jnp.ones((2, 3))}
  tx = make(zero, [Rule("a.{layer}", "a"), Rule("b.{layer}", "b")], weight_decay=0.0)
  grads = {"a": jnp.ones((2, 3)), "b": jnp.array([[0.0] * 3, [1.0] * 3])}
  updates, _ = tx.update(grads, tx.init(zero), zero)
  np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-4)
  np.testing.assert_allclose(updates["b"], [[0.0] * 3, [-0.1] * 3], rtol=1e-4)


@pytest.mark.parametrize("trust", [pytest.param("optax", marks=pytest.mark.full), "original"])
def test_eight_devices_equal_one(trust):
  params = draw(0)
  tx = make(params, trust=trust, grad_clip=1.0)
  mesh = sharding.make_mesh((("data", 2), ("fsdp", 2), ("model", 2)))
  axes = lambda path, x: ("embed", "mlp")[-x.ndim :] if x.ndim else ()
  rules = {"embed": "fsdp", "mlp": "model"}
  place = jax.tree_util.tree_map_with_path(
    lambda k, x: jax.NamedSharding(
      mesh, sharding.partition_spec(axes(k, x), x.shape, mesh, rules, 1)
    ),
    params,
  )
  opt_place = sharding.opt_shardings(tx, params, place, mesh)
  put = lambda x, s: jax.tree.map(jax.device_put, x, s)
  start = put(params, place)
  state = put(tx.init(params), opt_place)
  moments = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
  assert moments.mu["blocks"]["wi"]["kernel"].sharding.spec == P(None, "fsdp", "model")
  update = jax.jit(tx.update, out_shardings=(place, opt_place))
  updates, state = update(put(draw(1), place), state, start)
  want, _ = tx.update(draw(1), tx.init(params), params)
  compare(restore.flat(jax.device_get(updates)), restore.flat(want), 1e-5)
  assert updates["blocks"]["wi"]["kernel"].sharding.spec == P(None, "fsdp", "model")


@pytest.mark.parametrize("variant", ["vit_b32", "rn50", "tiny"])
def test_rules_and_axes_agree_on_what_is_stacked(variant):
  """Axes without a name in the metadata are layer axes, which the rules must agree with."""
  from xmodal_jax.runtime import setup

  config = config_lib.base()
  module = registry.system_module("clip")
  config.model.update(module.preset(variant))
  built = setup.build(config)
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    built.params, is_leaf=lambda v: hasattr(v, "get_metadata")
  )
  variables = {transforms.path_of(k): v for k, v in leaves}
  groups = conversion.tensors(
    tables.rule_table("clip").RULES, {k: v.shape for k, v in variables.items()}
  )
  for paths, stacked in groups:
    for path in paths:
      named = len(variables[path].get_metadata().get("axes", ()))
      assert len(variables[path].shape) - named == stacked, path
  config.optim.name = "lamb"
  for trust in ("optax", "original"):
    config.optim.trust = trust
    decay = config.optim.decay if trust == "optax" else ((".*", 1.0),)
    config.optim.decay = decay
    built.state_shardings(built.optimizer(config.optim, optax.constant_schedule(0.1)))


def test_one_update_compiles_without_a_loop_over_layers():
  """The number of operations does not depend on the number of layers."""

  def count(depth):
    params = {"w": jnp.zeros((depth, 4, 4))}
    tx = make(params, [Rule("w.{layer}", "w")], trust="original")
    return len(jax.make_jaxpr(tx.update)(params, tx.init(params), params).eqns)

  assert count(2) == count(50)


def test_step_schedule():
  run = schedules.RunLength(samples=1000, batch_size=96, total="30 epochs")  # 10 steps in an epoch
  c = tiny.optim(lr=0.5, warmup="5 steps", end=0.0, schedule="step", step_every="2.5 epochs")
  schedule = schedules.make_schedule(c | dict(step_factor=0.1), run)
  steps = np.array([0, 4, 5, 24, 25, 49, 50, 299])
  want = 0.5 * np.array([0.2, 1, 1, 1, 0.1, 0.1, 0.01, 1e-11])
  np.testing.assert_allclose(schedule(steps, np), want, rtol=1e-12)
  np.testing.assert_allclose(jax.jit(schedule)(steps), want, rtol=1e-5)
  assert float(jax.jit(schedule)(25)) == pytest.approx(0.05)
  with pytest.raises(ValueError, match=r"optim\.step_every='0 epochs' is 0 steps"):
    schedules.make_schedule(c | dict(step_every="0 epochs", step_factor=0.1), run)
