"""The moving average of the parameters: update, sharding, checkpoints, resuming, evaluation."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from xmodal_jax.checkpoints import checkpointer, restore
from xmodal_jax.evaluation import retrieval
from xmodal_jax.optim import factory, train_state, transforms
from xmodal_jax.runtime import initial_state, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.training import loop


def test_average_of_the_updated_parameters():
  """The average is of the parameters after all transformations; the reference is in numpy."""
  tx = factory.make_optimizer(
    tiny.optim(ema=0.9, ema_schedule="constant", weight_decay=0.0, bounds=(("w", -0.25, 1.0),)),
    lambda step: 0.1,
    params := {"w": jnp.zeros(3)},
  )
  state, want, grads = tx.init(params), np.zeros(3), {"w": jnp.array([1.0, -1.0, 0.0])}
  for _ in range(4):
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    want = 0.9 * want + 0.1 * np.asarray(params["w"])
  np.testing.assert_allclose(params["w"], [-0.25, 0.4, 0.0], atol=1e-5)
  whole = train_state.TrainState(jnp.int32(4), params, {}, state)
  shown = transforms.averaged(whole)
  np.testing.assert_allclose(shown.params["w"], want, rtol=1e-6)
  back = transforms.averaged(shown)
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, back, whole))
  again = transforms.restart_average(state, params, {})[-1].average["w"]
  np.testing.assert_array_equal(again, params["w"])
  assert again is not params["w"]


def averages_of(path, decay, stats=None, **settings):
  """Averages after each step of parameters `path` [N], and of statistics `stats` [N]."""
  stats = jnp.zeros(len(path)) if stats is None else stats
  tx = transforms.average(decay, stats={"s": stats[0]}, **settings)

  def step(carry, new):
    p, state = carry
    _, state = tx.update({"p": new[0] - p["p"]}, state, p, stats={"s": new[1]})
    return ({"p": new[0]}, state), (state.average["p"], state.stats["s"])

  def run(path, stats):
    first = {"p": path[0]}
    state = transforms.restart_average(tx.init(first), first, {"s": stats[0]})
    return jax.lax.scan(step, (first, state), (path[1:], stats[1:]))[1]

  return jax.jit(run)(path, stats)


@pytest.mark.parametrize("steps", [10, 100, 10_000])
def test_growing_average_forgets_where_it_began(steps):
  """Also in a run that is much shorter than 1 / (1 - decay) steps; the delay is a tenth of it."""
  initial = jnp.float32(np.arange(steps + 1) == 0)
  share, _ = averages_of(initial, 0.9999)
  assert abs(share[-1]) < 1e-4
  delay = steps - averages_of(jnp.arange(steps + 1.0), 0.9999)[0][-1]
  assert 0.05 * steps < delay < 0.11 * steps
  constant, _ = averages_of(initial, 0.9999, schedule="constant")
  np.testing.assert_allclose(constant[-1], 0.9999**steps, rtol=1e-4)


def test_growing_average_reaches_its_decay():
  """Afterwards it is the average with a constant decay."""
  path = jnp.asarray(np.random.default_rng(0).normal(size=200), jnp.float32)
  ours = np.asarray(averages_of(path, 0.5)[0])
  np.testing.assert_allclose(ours[8:], (ours[7:-1] + path[9:]) / 2, atol=1e-6)
  np.testing.assert_allclose(ours[0], path[1], rtol=1e-6)


@pytest.mark.parametrize("schedule", transforms.AVERAGES)
def test_statistics_are_averaged_as_the_parameters(schedule):
  """Else a layer with averaged weights is normalised by the statistics of other weights."""
  steps, decay = 300, 0.99
  weights = 1 + jnp.arange(steps + 1.0) ** 0.5  # y = weight * x, with x of mean 1
  averages, means = averages_of(weights, decay, stats=weights, schedule=schedule)
  np.testing.assert_allclose(averages, means, rtol=1e-6)
  assert weights[-1] - averages[-1] > 0.3


def test_no_average():
  tx = factory.make_optimizer(tiny.optim(), lambda step: 0.1, params := {"w": jnp.zeros(3)})
  state = train_state.TrainState(jnp.int32(0), params, {}, tx.init(params))
  assert transforms.averaged(state) is state
  assert transforms.averaged(evaluated := state.replace(opt_state=None)) is evaluated
  with pytest.raises(ValueError, match=r"optim\.ema_schedule is 'plain'; there are growing"):
    transforms.average(0.9, "plain")
  for decay in (1.0, -0.1, 2):
    with pytest.raises(ValueError, match=r"optim\.ema is .*; a decay is above 0 and below 1"):
      factory.make_optimizer(tiny.optim(ema=decay), lambda step: 0.1, params)


def test_average_is_sharded_as_the_parameters():
  mesh = (("data", 2), ("fsdp", 2), ("model", 2))
  c = tiny.config("unused", optim__ema=0.9, mesh=mesh)
  built = setup.build(c)
  shardings = built.state_shardings(built.optimizer(c.optim, lambda step: 0.1))
  assert restore.flat(shardings.opt_state[-1].average) == restore.flat(built.params_shardings)


@pytest.fixture(scope="module")
def averaged_run(tiny_data, tmp_path_factory):
  """(config, workdir, results) of six steps, each with a checkpoint."""
  c = tiny.config(tiny_data, total="6 steps", optim__ema=0.5, eval__every="3 steps")
  c.checkpoint.every, c.checkpoint.keep = "1 steps", 10
  workdir = tmp_path_factory.mktemp("averaged") / "run"
  return c, workdir, loop.train(c, workdir)


def checkpoints_of(workdir):
  return checkpointer.Checkpoints(workdir, keep=10, metric="rsum", read_only=True)


def saved_state(c, workdir, step) -> train_state.TrainState:
  built = setup.build(c)
  tx = built.optimizer(c.optim, lambda step: 0.1)
  shapes = jax.eval_shape(lambda: step_lib.init_state(built.init_model, tx))
  want = checkpointer.abstract_state(shapes, built.state_shardings(tx))
  return checkpoints_of(workdir).restore(step, want)


def saved(c, workdir, step) -> tuple[dict, dict]:
  """(averaged parameters, parameters) of a checkpoint."""
  state = saved_state(c, workdir, step)
  return restore.flat(state.params), restore.flat(transforms.averaged(state).params)


@pytest.mark.full
def test_readers_of_a_workdir_get_the_average(averaged_run):
  """The evaluation used the same parameters."""
  c, workdir, results = averaged_run
  (before, _), (average, raw) = (saved(c, workdir, step) for step in (5, 6))
  for path, value in average.items():
    want = 0.4 * before[path] + 0.6 * raw[path]  # 6 / 15 after five steps
    np.testing.assert_allclose(value, want, atol=1e-6, err_msg=path)
  kernel = "image/blocks/q/kernel"
  assert abs(average[kernel] - raw[kernel]).max() > 1e-3
  built, best = setup.build(c), checkpoints_of(workdir).best()
  params, _, info = restore.load(str(workdir), "clip", built.params, built.stats)
  assert info["step"] == best
  want, _ = saved(c, workdir, best)
  np.testing.assert_array_equal(restore.flat(params)[kernel], want[kernel])
  again = c.copy_and_resolve_references()
  assert retrieval.evaluate(again, workdir)["test"] == results["test"]


@pytest.mark.full
def test_resumed_run_continues_from_the_parameters(averaged_run, tmp_path):
  c, straight, _ = averaged_run
  shutil.copytree(straight, tmp_path / "run")
  for step in (4, 5, 6):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
  loop.train(c, tmp_path / "run")
  for ours, theirs in zip(saved(c, tmp_path / "run", 6), saved(c, straight, 6), strict=True):
    for path, value in theirs.items():
      np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.mark.slow
def test_running_statistics_of_a_run_are_averaged(tiny_data, tmp_path):
  """A checkpoint's model has averaged statistics, and a resumed run continues from the raw ones."""
  changes = dict(eval__test=False, eval__every="0 steps", checkpoint__every="1 steps")
  c = tiny.config(tiny_data, total="3 steps", optim__ema=0.999, **changes)
  c.model.image = dict(kind="resnet", size=32, width=8, depths=(1, 1, 1, 1))
  c.checkpoint.keep = 10
  loop.train(c, tmp_path / "run")
  states = [saved_state(c, tmp_path / "run", step) for step in (1, 2, 3)]
  averages = [restore.flat(s.stats) for s in states]
  raw = [restore.flat(transforms.averaged(s).stats) for s in states]
  for path, first in raw[0].items():
    np.testing.assert_allclose(averages[0][path], first, rtol=1e-5, err_msg=path)
    want = first + (raw[1][path] - first) * 9 / 11
    np.testing.assert_allclose(averages[1][path], want, rtol=1e-5, atol=1e-6, err_msg=path)
    assert abs(averages[2][path] - raw[2][path]).max() > 1e-4, path
  for step in (2, 3):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
  loop.train(c, tmp_path / "run")
  again = saved_state(c, tmp_path / "run", 3)
  jax.tree.map(np.testing.assert_array_equal, again, states[2])


def test_average_starts_from_the_towers_of_files(tiny_data, monkeypatch):
  """The towers replace the parameters that the optimizer was initialized with."""
  c = tiny.config(tiny_data, optim__ema=0.5, init_image="a file")
  built = setup.build(c)
  path = "image/blocks/q/kernel"
  found = {path: np.full((2, 32, 32), 3, np.float32)}
  monkeypatch.setattr(restore, "load_tower", lambda *args: found)
  tx = built.optimizer(c.optim, lambda step: 0.1)
  new = lambda: step_lib.init_state(built.init_model, tx)
  state = initial_state.with_towers(
    initial_state.Sources.from_config(c),
    built,
    jax.jit(new, out_shardings=built.state_shardings(tx))(),
  )
  average = restore.flat(state.opt_state[-1].average)[path]
  assert (average == 3).all() and average.sharding == restore.flat(built.params_shardings)[path]
