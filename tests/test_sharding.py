"""Meshes: sharding of parameters, equal results on every mesh, and no unneeded collectives."""

import functools
import logging
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_accumulate import SYSTEMS, assert_same, batch, gradients

from xmodal_jax.checkpoints import restore
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

AXES = ("data", "fsdp", "model")
STEPS = 3


def with_mesh(name: str, sizes: tuple[int, int, int]):
  """A tiny config whose widths are powers of two and whose sequence lengths are not: 11 words, 5
  patches or regions. A large eps keeps Adam from amplifying gradients that are only rounding."""
  config = SYSTEMS[name]("unused", batch_size=16, optim__lr=1e-3, optim__eps=1e-2)
  config.mesh = tuple(zip(AXES, sizes, strict=True))
  with config.unlocked():
    text = config.model.text
    text.vocab, text.width, text.heads, text.context = 256, 32, 2, 16
    if "mlp" in text:
      text.mlp = 64
    if name == "tgdt":
      config.model.image.features, config.model.image.heads, config.data.regions = 32, 2, 5
  return config


def fields(config) -> dict:
  return {k: v[:, :11] if k.startswith("text_") else v for k, v in batch(config, 16).items()}


@functools.cache
def run(name: str, sizes: tuple[int, int, int]):
  """(losses of a few steps, parameters, the compiled program's text, the sharded state)."""
  config = with_mesh(name, sizes)
  built = setup.build(config, jax.devices()[: math.prod(sizes)])
  schedule = schedules.make_schedule(config.optim, schedules.RunLength(48, 16, config.total))
  tx = built.optimizer(config.optim, schedule)
  shardings = built.state_shardings(tx)
  state = jax.jit(lambda: step_lib.init_state(built.init_model, tx), out_shardings=shardings)()
  step = step_lib.make_train_step(built.graphdef, tx, jax.random.key(0), shardings, schedule)
  rows = sharding.put_batch(fields(config), sharding.batch_sharding(built.mesh))
  program = step.lower(state, rows).compile()
  losses = []
  for _ in range(STEPS):
    state, metrics = program(state, rows)
    losses.append(float(metrics["loss"]))
  return losses, restore.flat(jax.device_get(state.params)), program.as_text(), state


FULL = [("clip", (1, 1, 8))]
MESHES = [("clip", (2, 2, 2))]
MESHES += [pytest.param(*x, marks=pytest.mark.full) for x in FULL]
SLOW = [("clip", (1, 4, 2)), ("clip", (8, 1, 1))]
SLOW += [(name, (2, 2, 2)) for name in SYSTEMS.keys() - {"clip"}]
MESHES += [pytest.param(*x, marks=pytest.mark.slow) for x in sorted(SLOW)]


@pytest.mark.parametrize(("name", "sizes"), MESHES)
def test_every_mesh_is_one_device(name, sizes):
  """Three training steps, with dropout."""
  losses, params, *_ = run(name, sizes)
  want_losses, want, *_ = run(name, (1, 1, 1))
  np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
  assert params.keys() == want.keys()
  for path, value in want.items():
    np.testing.assert_allclose(params[path], value, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(SYSTEMS.keys() - {"clip", "team"}))
def test_gradient_on_a_mesh_is_that_of_one_device(name):
  """The other systems by gradients only; other tests share the compiled reference."""
  mesh = tuple((axis, 2) for axis in AXES)
  tolerance = {"hat": 3e-5}.get(name, 1e-5)  # as in test_accumulate
  assert_same(gradients(name, 1, 8, mesh=mesh), gradients(name, 1, 1), tolerance)


COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(.*op_name=\"([^\"]*)\""
)


def moved(text: str) -> list[tuple[str, list[int], str]]:
  """(kind, sizes of the results, op_name) of the collectives that move arrays unreduced."""
  size = lambda dims: math.prod(map(int, dims.split(",")))
  found = (COLLECTIVE.search(line) for line in text.splitlines())
  return [
    (m[2], [size(dims) for dims in re.findall(r"\[(\d[\d,]*)\]", m[1].split("{")[0])], m[3])
    for m in found
    if m
  ]


@pytest.mark.parametrize("name", ["clip", pytest.param("team", marks=pytest.mark.full)])
def test_parameters_move_and_activations_do_not(name):
  """All-gathers are of layers and of the width of embedding tables, never of a vocabulary or of
  activations, whose sizes are multiples of a sequence length, 11 or 5. Sampled negatives move by
  ppermute, which is not counted."""
  *_, text, _ = run(name, (2, 2, 2))
  arrays = [a for a in moved(text) if "ppermute" not in a[2]]
  assert any(kind == "all-gather" and 32 * 64 in sizes for kind, sizes, _ in arrays)  # an MLP's
  activations = lambda n: (n % 11 == 0 and n > 11 * 32) or (n % 5 == 0 and n > 5 * 32)
  assert not [a for a in arrays if any(map(activations, a[1]))]
  assert not [a for a in arrays if max(a[1], default=0) >= 256 * 32]


def test_the_state_is_born_sharded():
  *_, state = run("clip", (2, 2, 2))
  kernel = state.params["image"]["blocks"]["wi"]["kernel"]
  assert kernel.sharding.spec == P(None, "fsdp", "model")
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  assert state.opt_state[0].mu["image"]["blocks"]["wi"]["kernel"].sharding == kernel.sharding
  assert state.params["text"]["token"]["embedding"].sharding.spec == P("model", "fsdp")


def spec_of(params: nnx.State, mesh, **kw) -> dict:
  rules = {"vocab": "model", "heads": "model", "mlp": "model", "embed": "fsdp"}
  places = sharding.param_shardings(params, mesh, rules | kw.pop("rules", {}), **kw)
  return {k: v.spec for k, v in restore.flat(places).items()}


def test_heads_are_not_cut_and_what_does_not_divide_is_listed_once(caplog):
  """Two heads on a "model" axis of four: attention is replicated, the MLP is sharded."""
  built = setup.build(with_mesh("clip", (1, 1, 1)), jax.devices()[:1])
  mesh = sharding.make_mesh((("data", 1), ("fsdp", 2), ("model", 4)))
  with caplog.at_level(logging.WARNING, logger="absl"):
    specs = spec_of(built.params, mesh, min_size=64)
  assert specs["text/blocks/q/kernel"] == P(None, "fsdp", None)
  assert specs["text/blocks/out/kernel"] == P(None, None, "fsdp")
  assert specs["text/blocks/wi/kernel"] == P(None, "fsdp", "model")
  (record,) = caplog.records
  (line,) = record.getMessage().splitlines()[1:]
  assert line.startswith("  heads=2 on model=4: image/blocks/k/bias, image/blocks/k/kernel, ")
  assert "text/blocks/v/kernel" in line and "wi" not in line


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_parameter_has_names_for_its_axes(name):
  """All dimensions but the stacked layers have names that the rules know."""
  config = SYSTEMS[name]("unused")
  built = setup.build(config, jax.devices()[:1])
  is_variable = lambda v: isinstance(v, nnx.Variable)
  known = {*config.rules, None}
  for path, v in jax.tree_util.tree_leaves_with_path(built.params, is_leaf=is_variable):
    axes, stacked = v.get_metadata()["axes"], any(k.key in ("blocks", "rest") for k in path)
    assert len(axes) == len(v.shape) - stacked and set(axes) <= known, (path, axes, v.shape)
    if v.ndim > 1 + stacked:
      assert any(axes), path


def test_mistakes_in_a_mesh():
  wrong = [(("data", 2), ("data", 4)), (("data", 4), ("tensor", 2)), ("data", 8), 8, None, ()]
  wrong += [(("fsdp", 8),), (("data", 0),), (("data", -2),), (("data", 8.0),), ("data", "fsdp")]
  wrong += [(("data", -1), ("fsdp", -1)), ((("data", 8),),), (("data", 8, 1),), "data"]
  for axes in wrong:
    with pytest.raises(ConfigError, match=r"^config\.mesh is .*: expected \(name, size\) pairs"):
      sharding.make_mesh(axes)
  with pytest.raises(ConfigError, match=r"'data', 3.* does not fit 8 devices: the product"):
    sharding.make_mesh((("data", 3),))
  mesh = sharding.make_mesh((("data", 8),))
  unnamed = nnx.state(nnx.Dict(a=nnx.Param(np.zeros((2, 2)))))
  with pytest.raises(ValueError, match=r"parameter a of shape \(2, 2\) has the axes None"):
    spec_of(unnamed, mesh)
  named = nnx.state(nnx.Dict(a=nnx.Param(np.zeros((2, 2)), axes=("embed", None))))
  assert spec_of(named, mesh, min_size=0) == {"a": P(None, None)}  # a mesh without that axis
  with pytest.raises(ValueError, match=r"{'embed': 'fsd'}; a rule names one of data, fsdp, model"):
    spec_of(named, mesh, rules={"embed": "fsd"})
