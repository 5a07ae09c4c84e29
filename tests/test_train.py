"""The training loop: resuming, meshes, compilation, transfers, and errors."""

import functools
import json
import logging
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.data import inputs
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import retrieval
from xmodal_jax.models import tgdt
from xmodal_jax.optim import schedules, train_state
from xmodal_jax.runtime import preemption, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.training import loop

TIMINGS = ("examples_per_second", "mfu", "hfu")


def lines(folder: pathlib.Path, kind: str | None = None) -> list[dict]:
  """Lines of metrics.jsonl, all or of one kind, without timings."""
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  rows = [r for r in rows if kind in (None, r["kind"])]
  return [{k: v for k, v in r.items() if k not in TIMINGS} for r in rows]


def test_run_writes_its_workdir(tiny_data, tmp_path):
  c = tiny.config(tiny_data)
  c.profile.first_step, c.profile.steps = 3, 2
  results = loop.train(c, tmp_path)
  rows = lines(tmp_path, "train")
  assert [r["step"] for r in rows] == list(range(1, 11))
  assert rows[-1]["loss"] < rows[0]["loss"]
  assert [r["step"] for r in lines(tmp_path, "val")] == [5, 10]
  saved = json.loads((tmp_path / "results.json").read_text())
  assert saved["test"] == results["test"] and saved["protocol"]["images"] == tiny.SIZES["test"]
  assert json.loads((tmp_path / "config.json").read_text())["config"]["optim.lr"] == 1e-2
  assert list(tmp_path.glob("events.out.tfevents*"))
  assert list(tmp_path.glob("plugins/profile/*/*"))
  # The latest two, and the best by RSUM of those that were evaluated.
  steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  best = max(lines(tmp_path, "val"), key=lambda r: (r["rsum"], r["step"]))["step"]
  assert steps == {9, 10, best}
  assert results["checkpoint"]["step"] == best
  assert retrieval.evaluate(tiny.config(tiny_data), tmp_path)["test"] == results["test"]


def test_rerun_changes_nothing(tiny_data, tmp_path, caplog):
  c = tiny.config(tiny_data, total="4 steps", eval__every="2 steps")
  first = loop.train(c, tmp_path)
  before = lines(tmp_path)
  assert loop.train(c, tmp_path)["test"] == first["test"]
  assert lines(tmp_path) == before
  # With the last checkpoint damaged, it resumes from the one before, with bitwise the same result.
  model = model_files.load_model(tmp_path / "checkpoints" / "4")
  files = [p for p in (tmp_path / "checkpoints" / "4").rglob("*") if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with caplog.at_level(logging.INFO):
    assert loop.train(c, tmp_path)["test"] == first["test"]
  name = path.relative_to(tmp_path / "checkpoints" / "4")
  assert f"checkpoint of step 4 is damaged and not used: {name} " in caplog.text
  assert "resuming from step 3" in caplog.text and lines(tmp_path) == before
  again = model_files.load_model(tmp_path / "checkpoints" / "4")
  jax.tree.map(np.testing.assert_array_equal, again, model)


@pytest.mark.full
def test_resume_on_another_mesh(tiny_data, tmp_path):
  """Six steps on one mesh and four on another equal ten on one, to rounding."""
  changes = dict(eval__test=False, eval__every="0 steps")
  loop.train(tiny.config(tiny_data, **changes), tmp_path / "straight")
  moved = tmp_path / "moved"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preemption, "Preemption", lambda: StopAfter(moved, 6))
    assert loop.train(tiny.config(tiny_data, **changes), moved) is None
  assert [r["step"] for r in lines(moved)] == list(range(1, 7))
  mesh = (("data", 2), ("fsdp", 2), ("model", 2))
  loop.train(tiny.config(tiny_data, mesh=mesh, **changes), moved)
  ours, theirs = (lines(f, "train") for f in (moved, tmp_path / "straight"))
  assert ours[:6] == theirs[:6]
  loss = lambda rows: [r["loss"] for r in rows]
  np.testing.assert_allclose(loss(ours), loss(theirs), rtol=0, atol=1e-5)


def test_rows_of_the_same_image_are_logged(caplog):
  with caplog.at_level(logging.INFO):
    loop._log_same_image([0.0, 0.0], 256)
    assert not caplog.text
    loop._log_same_image([19.0, 20.0], 256)
  assert (
    "on average over 2 logged batches, 19.5 of 256 rows show the image of another" in caplog.text
  )


class StopAfter:
  """Replaces Preemption: requests a stop once metrics.jsonl has `count` lines."""

  def __init__(self, folder: pathlib.Path, count: int):
    self.folder, self.count = folder, count

  def __call__(self) -> bool:
    return (self.folder / "metrics.jsonl").exists() and len(lines(self.folder)) >= self.count


@pytest.mark.full
def test_interrupted_evaluation_is_done_on_resume(tiny_data, tmp_path):
  c = tiny.config(tiny_data, total="6 steps", eval__test=False)
  stopped, straight = tmp_path / "stopped", tmp_path / "straight"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preemption, "Preemption", lambda: StopAfter(stopped, 5))
    assert loop.train(c, stopped) is None
  # Only training metrics: the evaluation of step 5 was interrupted.
  assert [(r["step"], r["kind"]) for r in lines(stopped)] == [(i, "train") for i in range(1, 6)]
  loop.train(c, stopped)
  loop.train(c, straight)
  assert lines(stopped) == lines(straight)
  read = lambda f: checkpointer.Checkpoints(f, keep=2, metric="rsum", read_only=True)
  assert read(stopped).metrics(5) == read(straight).metrics(5) != None  # noqa: E711
  assert read(stopped).best() == read(straight).best()


def test_evaluated_splits_are_checked_first(tiny_data, tmp_path):
  with pytest.raises(ValueError, match=r"eval\.folds is 5, but split 'test' has 12 images"):
    loop.train(tiny.config(tiny_data, eval__folds=5), tmp_path)
  with pytest.raises(ValueError, match=r"eval\.eccv_dir is set, but split 'test' has 12 images"):
    loop.train(tiny.config(tiny_data, eval__eccv_dir="none"), tmp_path / "coco")
  with pytest.raises(ValueError, match="no split 'dev'"):
    loop.train(tiny.config(tiny_data, data__val="dev"), tmp_path / "other")


def test_nothing_to_train(tiny_data, tmp_path):
  with pytest.raises(ValueError, match=r"48 samples in batches of config\.batch_size=64"):
    loop.train(tiny.config(tiny_data, batch_size=64, total="5 epochs"), tmp_path)


class Compilations(logging.Handler):
  """Records the names of programs that JAX logs as compiled."""

  def __init__(self):
    super().__init__()
    self.names = []

  def emit(self, record):
    message = record.getMessage()
    if message.startswith("Compiling"):
      self.names.append(message.split()[1])


def test_no_recompilation_and_no_implicit_transfer(tiny_data):
  config = tiny.config(tiny_data)
  built, read = setup.build(config), inputs.from_config(config)
  schedule = schedules.make_schedule(
    config.optim, schedules.RunLength(48, config.batch_size, config.total)
  )
  tx = built.optimizer(config.optim, schedule)
  shardings = built.state_shardings(tx)
  state = jax.jit(lambda: step_lib.init_state(built.init_model, tx), out_shardings=shardings)()
  rng = jax.device_put(jax.random.key(0), built.replicated)
  step = step_lib.make_train_step(built.graphdef, tx, rng, shardings, schedule)
  evaluator = retrieval.from_config(config, read, built)
  rows = sharding.batch_sharding(built.mesh)
  stream = read.train(0)
  state, _ = step(state, sharding.put_batch(next(stream), rows))
  evaluator(state, "val")
  handler = Compilations()
  logger = logging.getLogger("jax")
  logger.addHandler(handler)
  try:
    with jax.log_compiles(True), jax.transfer_guard("disallow"):
      for _ in range(3):
        state, metrics = step(state, sharding.put_batch(next(stream), rows))
        jax.device_get(metrics)
      evaluator(state, "val")
      evaluator(state, "test")
    assert not handler.names
    with jax.log_compiles(True):  # the handler does record compilations
      jax.jit(lambda x: x * 3.14159)(jnp.ones(3))
    assert handler.names
  finally:
    logger.removeHandler(handler)


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tiny_data, tmp_path):
  c = tiny.config(tiny_data, total="40 steps", optim__lr=1e18, optim__warmup="0 steps", log_every=2)
  c.optim.schedule, c.checkpoint.every, c.eval.every = "constant", "1 steps", "0 steps"
  with pytest.raises(step_lib.NonFiniteLossError, match=r"first bad step is one of \d+\.\.\d+"):
    loop.train(c, tmp_path)
  checkpoints = checkpointer.Checkpoints(tmp_path, keep=2, metric="rsum", read_only=True)
  model = model_files.load_model(tmp_path / "checkpoints" / str(checkpoints.latest()))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(model["params"]))


def test_changed_data(tiny_data, tmp_path):
  c = tiny.config(tiny_data, total="4 steps", eval__test=False)
  loop.train(c, tmp_path)
  c.data.train = "val+test"
  path = tmp_path / "config.json"
  path.write_text(path.read_text().replace('"data.train": "train"', '"data.train": "val+test"'))
  with pytest.raises(checkpointer.CheckpointError, match="training data changed"):
    loop.train(c, tmp_path)


FILL = """
import resource, sys
import jax
import jax.numpy as jnp
from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.optim import train_state

checkpoints = checkpointer.Checkpoints(sys.argv[1], keep=1, metric="rsum")
noise = jax.random.normal(jax.random.key(0), (100_000,))  # does not compress
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
state = train_state.TrainState(jnp.int32(2), {"w": noise}, {}, (jnp.zeros(3),))
checkpoints.save(2, state, {"pending": False})
checkpoints.wait()
"""


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path):
  checkpoints = checkpointer.Checkpoints(tmp_path, keep=1, metric="rsum")
  state = train_state.TrainState(jnp.int32(1), {"w": jnp.ones(100_000)}, {}, (jnp.zeros(3),))
  checkpoints.save(1, state, {"pending": False})
  checkpoints.close()
  # In a subprocess: Orbax's threads continue to write after a failed save, even after close.
  command = [sys.executable, "-c", FILL, tmp_path]
  out = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  assert out.returncode == 1
  assert "CheckpointError: could not write a checkpoint" in out.stderr
  assert "the latest is of step 1" in out.stderr
  again = checkpointer.Checkpoints(tmp_path, keep=1, metric="rsum")
  assert again.latest() == 1
  assert (again.restore_best()[2]["params"]["w"] == 1).all()


def test_init_from_workdir(tiny_data, tmp_path, caplog):
  c = tiny.config(tiny_data, total="4 steps", eval__test=False)
  loop.train(c, tmp_path / "a")
  built = setup.build(c)
  with caplog.at_level(logging.INFO):
    params, _, info = restore.load(
      str(tmp_path / "a"), "clip", built.params, built.stats, built.facts
    )
  assert info["step"] == 4
  assert "step 4, are taken. Its optimizer state, step, schedule and position" in caplog.text
  other = setup.build(tiny.config(tiny_data, model__text__heads=1, text__length=20))
  load = functools.partial(restore.load, str(tmp_path / "a"), "clip", other.params, other.stats)
  with pytest.raises(
    checkpointer.CheckpointError,
    match=r"model.text.heads: 2 there, 1 in this config\n +text.length: 24 there, 20 in this",
  ):
    load(other.facts)
  load(other.facts, ("model.text.heads", "text"))
  saved = model_files.load_model(tmp_path / "a" / "checkpoints" / "4")
  jax.tree.map(np.testing.assert_array_equal, params, saved["params"])
  # The same through a PyTorch file of the fine-tuned weights.
  tool = pathlib.Path(__file__).parents[1] / "tools" / "convert.py"
  command = [sys.executable, tool, "--system", "clip", "--to", "torch"]
  file = tmp_path / "a.pth"
  subprocess.run([*command, "--checkpoint", tmp_path / "a", "--out", file], check=True)
  again, _, info = restore.load(str(file), "clip", built.params, built.stats)
  assert info["kind"] == "zip"
  jax.tree.map(np.testing.assert_array_equal, again, params)
  c.model.embed = 24
  built = setup.build(c)
  with pytest.raises(
    checkpointer.CheckpointError, match=r"image/proj/kernel: \(32, 16\) in the file"
  ):
    restore.load(str(tmp_path / "a"), "clip", built.params, built.stats)


@pytest.mark.parametrize(
  ("changes", "warns"), [({}, False), (dict(stage="joint"), False), (dict(stage="upper"), True)]
)
def test_upper_stacks_over_a_random_network_warn(changes, warns):
  model = tiny.tgdt("unused").model
  model.update(changes)
  assert bool(tgdt.check_start(model.to_dict())) == warns
