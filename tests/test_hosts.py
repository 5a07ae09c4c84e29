"""Multi-process runs: real processes on loopback with gloo collectives, at toy size.

Starting a process costs more than a toy run, so one group of processes executes many runs in
order, and the tests check their results.
"""

import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import programs
import pytest
import tiny
from test_train import lines

from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.data.preparing import shapes
from xmodal_jax.distributed import processes as processes_lib
from xmodal_jax.distributed import sharding
from xmodal_jax.runtime import setup
from xmodal_jax.training import loop

WORKER = pathlib.Path(__file__).parent / "hosts_worker.py"
SYSTEMS = ("config", "team", "zerovl", "tgdt", "hat")  # as tiny.py calls them
CHANGES = dict(
  optim__lr=1e-3, total="20 steps", eval__every="10 steps", checkpoint__every="8 steps"
)
# The same steps without evaluations.
SHORT = CHANGES | dict(checkpoint__every="2 steps", eval__every="0 steps", eval__test=False)
# Several processes sum over the same devices in another order.
ATOL = 1e-5


# Process 1 of 2 gets SIGTERM at each of these places.
MOMENTS = ("compile", "train", "eval", "save")
STOPPED = dict.fromkeys(MOMENTS, SHORT) | dict(eval=SHORT | dict(eval__every="2 steps"))

# (device order, mesh shape, batch rows of each process for a batch of 8). Process 0 has devices 0
# and 1, process 1 has 2 and 3.
MESHES = (
  ([0, 1, 2, 3], (4, 1, 1), ([0, 1, 2, 3], [4, 5, 6, 7])),
  ([0, 2, 1, 3], (2, 2, 1), ([0, 1, 4, 5], [2, 3, 6, 7])),  # as on a slice, see sharding.local_rows
  (
    [0, 2, 1, 3],
    (2, 1, 2),
    ([0, 1, 2, 3, 4, 5, 6, 7],) * 2,
  ),  # the processes differ only along "model"
  ([0, 1, 2, 3], (2, 1, 2), ([0, 1, 2, 3], [4, 5, 6, 7])),
)


class End(NamedTuple):
  code: int
  log: str
  seconds: float  # after the start of the group


def start(
  folder: pathlib.Path,
  runs: list[dict],
  count: int,
  devices: int,
  limit: float = 600,
  double: bool = False,
) -> list[End]:
  """Starts a group of processes and waits for them; kills those that remain after `limit` s.

  double: in float64, see float64.py.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  folder.mkdir(exist_ok=True)
  file = folder / f"job.{count}.json"
  file.write_text(json.dumps(dict(address=address, count=count, runs=runs)))
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_ENABLE_X64": str(int(double)),
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "XLA_FLAGS": programs.XLA_FLAGS,
    "PYTHONPATH": str(WORKER.parents[1]),
  }
  logs = [folder / f"log.{count}.{i}" for i in range(count)]
  processes, begin = [], time.monotonic()
  try:
    for i, path in enumerate(logs):
      with path.open("w") as log:
        command = [sys.executable, WORKER, file, str(i)]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    ends: list[float | None] = [None] * count
    while None in ends and time.monotonic() - begin < limit:
      time.sleep(0.05)
      for i, process in enumerate(processes):
        if ends[i] is None and process.poll() is not None:
          ends[i] = time.monotonic() - begin
  finally:
    for process in processes:
      process.kill()
      process.wait()
  texts = [path.read_text() for path in logs]
  assert None not in ends, f"a process hangs:\n{texts[ends.index(None)][-3000:]}"
  codes = [p.returncode for p in processes]
  return [End(*e) for e in zip(codes, texts, ends, strict=True)]


def found(folder: pathlib.Path, name: str, count: int = 2) -> list[dict]:
  """The result that each process wrote at the end of a run."""
  return [json.loads((folder / f"{name}.{i}.json").read_text()) for i in range(count)]


def params(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  return restore.flat(model_files.load_model(folder / "checkpoints" / str(step))["params"])


def assert_same_run(folder, straight: pathlib.Path, step: int, kind: str | None = None) -> None:
  """Compares metrics, all or those of a kind, and parameters of two runs."""
  ours, theirs = lines(folder, kind), lines(straight, kind)
  assert [(r["step"], r["kind"]) for r in ours] == [(r["step"], r["kind"]) for r in theirs]
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for key in a.keys() - {"kind"}:
      np.testing.assert_allclose(a[key], b[key], rtol=ATOL, atol=ATOL, err_msg=f"{key} of {a}")
  want = params(straight, step)
  for key, value in params(folder, step).items():
    if key.endswith("k/bias"):  # zero gradient in exact arithmetic; AdamW amplifies rounding
      continue
    np.testing.assert_allclose(value, want[key], rtol=0, atol=ATOL, err_msg=key)


def straight(config, folder: pathlib.Path, devices: int) -> dict:
  """The same run in this process."""
  with pytest.MonkeyPatch.context() as patch:
    built = functools.partial(setup.build, devices=jax.devices()[:devices])
    patch.setattr(loop.setup, "build", built)
    return loop.train(config, folder)


@pytest.fixture(scope="module", autouse=True)
def toy():
  """What processes do with each other does not depend on the model: most tests use the toy."""
  with tiny.toy_registered():
    yield


@pytest.fixture(scope="module")
def run_of_one(toy, tiny_data, tmp_path_factory):
  """system -> (folder, results): what all of them are compared with."""

  @functools.cache
  def run(system: str = "toy"):
    folder = tmp_path_factory.mktemp("one")
    return folder, straight(getattr(tiny, system)(tiny_data, **CHANGES), folder, 4)

  return run


@pytest.fixture(scope="module")
def runs_of_two(tiny_data, tmp_path_factory):
  """(folder, ends) of all runs of one group of two processes with two devices each."""
  folder = tmp_path_factory.mktemp("two")
  base = dict(system="toy", data=tiny_data)
  other_data = shapes.write(tmp_path_factory.mktemp("other"), sizes=tiny.SIZES, seed=1)
  runs = [
    dict(base, name="straight", changes=CHANGES, check=True),
    dict(base, name="straight", changes=CHANGES, mode="eval"),
    *(dict(base, name=m, changes=STOPPED[m], hit=[[1, m, "SIGTERM"]]) for m in MOMENTS),
    dict(base, name="config", changes=SHORT, differ={"1": {"optim__lr": 0.5}}, check=True),
    dict(base, name="data", changes=SHORT, differ={"1": {"data__dir": str(other_data)}}),
    *(dict(name=f"rows.{i}", order=o, shape=s) for i, (o, s, _) in enumerate(MESHES)),
    dict(base, name="barrier", barrier={"seconds": 1, "missing": 1}),
    dict(base, name="raise", hit=[[1, "barrier", "raise"]]),  # last, because it ends the group
  ]
  return folder, start(folder, runs, count=2, devices=2)


def test_two_processes_are_one(runs_of_two, run_of_one):
  (folder, _), (one, results) = runs_of_two, run_of_one()
  assert_same_run(folder / "straight", one, 20)
  for found_by in found(folder, "straight"):  # from --mode eval on the best checkpoint
    assert found_by["results"] == pytest.approx(results["test"], abs=ATOL)
  assert not list(folder.glob("straight/*.tmp"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_is_asked_to_stop_and_all_do(runs_of_two, moment):
  folder, _ = runs_of_two
  ours, others = found(folder, moment)
  assert ours == others and ours["results"] is None
  stopped = max(ours["steps"])
  at = dict(compile=0, train=5, eval=2, save=2)[moment]
  assert at <= stopped <= at + 2
  rows = lines(folder / moment)
  assert rows[-1]["step"] == stopped
  # An interrupted evaluation is repeated on resume.
  pending = checkpointer.Checkpoints(folder / moment, keep=2, metric="rsum", read_only=True)
  assert pending.meta(stopped)["pending"] == (moment == "eval")


def test_what_differs_is_named_in_every_process(runs_of_two):
  folder, _ = runs_of_two
  for one in found(folder, "config"):
    assert one["error"] == (
      "ProcessError: the processes differ in command, code and packages:\n"
      "  config.optim.lr: 0.001 in process 0, 0.5 in process 1"
    )
  for one in found(folder, "data"):
    assert "differ in data:\n  split 'train': " in one["error"] and " in process 1" in one["error"]


def test_a_barrier_names_itself_and_who_is_missing(runs_of_two):
  folder, _ = runs_of_two
  here, _ = found(folder, "barrier")
  assert here["error"] == "ProcessError: barrier 'test': process 1 of 2 did not arrive within 1 s"


@pytest.mark.full
@pytest.mark.parametrize("system", ["toy", pytest.param("config", marks=pytest.mark.slow)])
def test_killed_and_resumed_by_four_then_two_then_one(system, tiny_data, run_of_one, tmp_path):
  run = dict(system=system, data=tiny_data, name="run", changes=SHORT)
  ends = start(tmp_path, [dict(run, hit=[[3, "train", "SIGKILL"]])], 4, 1)
  assert ends[3].code == -signal.SIGKILL
  for end in ends[:3]:
    assert end.code not in (0, None) and end.seconds - ends[3].seconds < 60
    assert "process 3" in end.log, end.log[-3000:]
  ends = start(tmp_path, [dict(run, hit=[[0, "train", "SIGTERM", 2]])], 2, 2)
  assert [e.code for e in ends] == [0, 0], ends[0].log[-3000:]
  # The process died while step 4 was being saved; the checkpoint of step 2 is complete.
  assert re.search("resuming from step [24]", ends[0].log)
  assert found(tmp_path, "run")[0]["results"] is None
  straight(getattr(tiny, system)(tiny_data, **SHORT), tmp_path / "run", 4)
  assert_same_run(tmp_path / "run", run_of_one(system)[0], 20, "train")


def test_one_fails_and_tells(runs_of_two):
  """Process 1 raises while process 0 waits for it at a barrier."""
  _, ends = runs_of_two
  assert [e.code for e in ends] == [1, 1], ends[0].log[-3000:] + ends[1].log[-3000:]
  assert "process 1 of 2 failed: OSError: the disk of this machine is gone" in ends[0].log
  assert "process 1 of 2 failed: the disk of this machine is gone" in ends[1].log
  assert "Traceback" not in ends[1].log


@pytest.mark.full
def test_the_first_is_killed(tiny_data, tmp_path):
  """The coordinator is killed while the other process waits at a barrier."""
  run = dict(system="toy", data=tiny_data, name="run", hit=[[0, "barrier", "SIGKILL"]])
  killed, other = start(tmp_path, [run], 2, 1)
  assert killed.code == -signal.SIGKILL and other.code not in (0, None)
  assert other.seconds - killed.seconds < 60
  assert "coordinat" in other.log


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 4), (4, 2)])
def test_every_system_by_several_processes(tiny_data, tmp_path, count, devices):
  """In float64, because in float32 AdamW (and HAT even without it) amplifies rounding."""
  runs = [dict(system=s, data=tiny_data, name=s, changes=CHANGES) for s in SYSTEMS]
  mesh = (("data", 2), ("fsdp", 2), ("model", 2))
  runs.append(dict(runs[0], name="meshed", changes=CHANGES | dict(mesh=mesh)))
  one = tmp_path / "one"
  for folder, shape in ((tmp_path, (count, devices)), (one, (1, 8))):
    ends = start(folder, runs, *shape, limit=3000, double=True)
    assert [e.code for e in ends] == [0] * len(ends), ends[0].log[-3000:]
  for name in (run["name"] for run in runs):
    assert_same_run(tmp_path / name, one / name, 20)
    (alone,) = found(one, name, 1)
    for each in found(tmp_path, name, count):
      assert each["results"] == pytest.approx(alone["results"], abs=ATOL)


@pytest.mark.parametrize("i", range(len(MESHES)))
def test_rows_follow_the_mesh(runs_of_two, i):
  folder, _ = runs_of_two
  for one, rows in zip(found(folder, f"rows.{i}"), MESHES[i][2], strict=True):
    assert one == dict(rows=rows, batch=list(range(8)))


def test_a_batch_that_does_not_divide():
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 1, 2), sharding.AXES)
  with pytest.raises(ValueError, match="9 rows does not divide into 4"):
    sharding.local_rows(sharding.batch_sharding(mesh), 9)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(coordinator="localhost:1"), "all three"),
    (dict(count=2), "--process_count=2"),
  ],
)
def test_half_an_address(given, message):
  with pytest.raises(ValueError, match=message):
    processes_lib.initialize(**given)


def test_one_process_needs_nobody():
  processes_lib.initialize()
  processes_lib.barrier("alone")
  processes_lib.check_equal("alone", 1)
  assert (
    processes_lib.all_gather("alone", (1, "a")) == [[1, "a"]]
    and processes_lib.broadcast("alone", 2) == 2
  )
  answers = iter([False, True, False])
  vote = processes_lib.ConsensusFlag(lambda: next(answers))
  assert [vote() for _ in range(4)] == [False, True, True, True]
