"""config.reproducible: bitwise equal on any topology, and equal to the plain step to rounding."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import programs
import pytest
import reproducible_worker as worker
import test_accumulate
import test_train
import tiny

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer, model_files
from xmodal_jax.data import inputs
from xmodal_jax.distributed import sharding
from xmodal_jax.runtime import preemption, setup, workdir
from xmodal_jax.training import loop

SYSTEMS = test_accumulate.SYSTEMS
WITH_DROPOUT = ("zerovl",)  # one system only: dropout's random bits are slow to compile
FULL = ("clip",)  # the other systems are slow tests


@pytest.fixture(autouse=True)
def fusion_emitters():
  with programs.fusion_emitters():
    yield


def config(name: str, dropout: bool, **changes):
  c = worker.config(name, **changes)
  if not dropout:
    test_accumulate.without_dropout(c.model)
  return c


@functools.cache
def digest_after(name: str, devices: int, steps: int = 3) -> str:
  c = config(name, name in WITH_DROPOUT)
  return worker.digest(*worker.run(c, steps, jax.devices()[:devices]))


def systems(full: tuple[str, ...], without: tuple[str, ...] = ()) -> list:
  """Test parameters: all systems except `without`; those not in `full` are marked slow."""
  names = [n for n in SYSTEMS if n not in without]
  return [n if n in full else pytest.param(n, marks=pytest.mark.slow) for n in names]


@functools.cache
def toy_digest(devices: int) -> str:
  return worker.digest(*worker.toy(5, jax.devices()[:devices]))


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.full) for n in (2, 4)), 8])
def test_every_number_of_devices(devices):
  assert toy_digest(devices) == toy_digest(1)


@pytest.mark.parametrize(
  ("processes", "devices"),
  [pytest.param(2, 2, marks=pytest.mark.full), pytest.param(4, 1, marks=pytest.mark.slow)],
)
def test_processes_equal_one_process(processes, devices):
  assert start(processes, devices, 5, "toy") == {"toy": toy_digest(1)}


@pytest.mark.full
@pytest.mark.parametrize("name", systems(FULL))
def test_eight_devices_equal_one_bitwise(name):
  """Parameters, moments and metrics are compared; ZeroVL has mixup and dropout."""
  assert digest_after(name, 8) == digest_after(name, 1)


@pytest.mark.full
@pytest.mark.parametrize("name", systems(("clip",), without=("hat",)))
def test_gradient_equals_plain_step(name):
  tolerance = 1e-5
  one_step = lambda plain: worker.run(config(name, False), 1, jax.devices()[:1], plain=plain)
  (ours, our_metrics), (theirs, metrics) = jax.device_get((one_step(False), one_step(True)))
  for key, value in metrics[0].items():
    np.testing.assert_allclose(our_metrics[0][key], value, rtol=tolerance, atol=1e-6, err_msg=key)
  ours, theirs = (s.opt_state[1].mu for s in (ours, theirs))  # 0.1 * gradient
  largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))

  def close(path, a, b):
    atol = tolerance * max(np.abs(b).max(), 1e-3 * largest)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))

  jax.tree_util.tree_map_with_path(close, ours, theirs)


@pytest.mark.slow
def test_gradient_of_hat_equals_plain_step():
  """In float64: HAT amplifies rounding errors some thousand times, to above 1e-5 in float32."""
  tool = pathlib.Path(worker.__file__).with_name("float64_worker.py")
  env = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, tool, "hat"]
  done = subprocess.run(
    command, stdout=subprocess.PIPE, text=True, check=True, env=env, cwd=tool.parent
  )
  assert float(done.stdout.splitlines()[-1]) < 1e-10


def start(processes: int, devices: int, steps: int, *names: str) -> dict[str, str]:
  """Digests of tiny runs with dropout, in a group of processes with `devices` devices each."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  tool = pathlib.Path(worker.__file__)
  command = [sys.executable, tool, address, str(processes)]
  rest = [str(devices), str(steps), *names]
  env = os.environ | {"XLA_FLAGS": programs.NO_LLVM_PASSES}  # see fusion_emitters
  running = [
    subprocess.Popen(
      [*command, str(i), *rest], stdout=subprocess.PIPE, text=True, cwd=tool.parent, env=env
    )
    for i in range(processes)
  ]
  try:
    out = [p.communicate(timeout=3000)[0] for p in running]
  finally:
    for p in running:
      p.kill()
  assert [p.returncode for p in running] == [0] * processes
  return json.loads(out[0].splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_topology(name):
  """{1, 2, 4, 8} devices in {1, 2, 4} processes, with dropout."""
  topologies = [(p, d // p) for d in (1, 2, 4, 8) for p in (1, 2, 4) if p <= d]
  found = {f"{p} x {d}": start(p, d, 5, name)[name] for p, d in topologies}
  assert len(set(found.values())) == 1, found


@pytest.mark.full
def test_resume_on_another_number_of_devices(tiny_data, tmp_path, monkeypatch):
  """Two steps on eight devices and two more on one equal four on two devices, bitwise."""
  changes = dict(eval__test=False, eval__every="0 steps", total="4 steps", reproducible=True)
  make = sharding.make_mesh

  def run(folder: str, devices: int, stop_after: int = 4):
    folder = tmp_path / folder
    chosen = jax.devices()[:devices]
    monkeypatch.setattr(sharding, "make_mesh", lambda axes, _=None: make(axes, chosen))
    monkeypatch.setattr(preemption, "Preemption", lambda: test_train.StopAfter(folder, stop_after))
    loop.train(tiny.config(tiny_data, **changes), folder)
    read = checkpointer.Checkpoints(folder, keep=2, metric="rsum", read_only=True)
    step = read.latest()
    return step, worker.digest(model_files.load_model(folder / "checkpoints" / str(step))), folder

  assert run("moved", 8, stop_after=2)[0] == 2
  step, moved, folder = run("moved", 1)
  assert (step, moved) == run("straight", 2)[:2] and step == 4
  ours, theirs = (test_train.lines(f, "train") for f in (folder, tmp_path / "straight"))
  assert ours == theirs


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    (dict(mesh=(("data", 2), ("fsdp", 2), ("model", 2))), r"mesh has fsdp=2, model=2"),
    (dict(micro_shards=6), "micro_shards is 6: set it to a power of two"),
    (dict(micro_shards=0), "micro_shards is 0"),
    (dict(micro_shards=32), "32, which does not divide config.batch_size=16"),
    (dict(micro_shards=4), "micro_shards=4 cannot be divided among 8 devices"),
    (dict(accumulate=2), "ignores config.accumulate=2: set it to 1"),
  ],
)
def test_config_errors(changes, error):
  with pytest.raises(ValueError, match=error):
    setup.build(tiny.config("unused", reproducible=True, **changes))


def test_batch_norm_is_an_error():
  c = tiny.config("unused", reproducible=True)
  with c.unlocked():
    c.model.image = dict(kind="resnet", size=32, width=8, depths=(1, 1, 1, 1))
  with pytest.raises(ValueError, match="reproducible is set, but this model has BatchNorm"):
    setup.build(c)


def test_loss_chunk_is_fixed_on_resume():
  flat = lambda **changes: config_lib.flatten(tiny.config("unused", **changes))
  for reproducible, expected in ((False, {}), (True, {"loss_chunk": (0, 8)})):
    old, new = (flat(reproducible=reproducible, loss_chunk=n) for n in (0, 8))
    assert workdir.difference(old, new) == expected


def test_bounds_on_bad_records_may_change_on_resume():
  """So that a photograph of a test split cannot cost the evaluation of a finished run."""
  old, changed = tiny.config("unused"), tiny.config("unused")
  changed.data.max_pixels = 100
  changed.data.max_bad_fraction = changed.data.eval_max_bad_fraction = 0.1
  assert workdir.difference(config_lib.flatten(old), config_lib.flatten(changed)) == {}
  assert inputs.from_config(changed).max_pixels == 100
