"""Worker process of the multi-process tests in test_hosts.py.

Usage: python hosts_worker.py JOB.json INDEX. The job has an address, a process count and a list of
runs, which one group of processes executes in order, because starting processes costs more than a
toy run. A run has a name, a system of tiny.py, config changes and injected faults: "hit" is a list
of [process, moment, what], e.g. [1, "train", "SIGTERM"], where a moment is a place in the program.
Each process writes the result of a run to NAME.INDEX.json. A ProcessError ends only the run.
"""

import json
import os
import pathlib
import signal
import sys

import float64  # noqa: F401 (before all others)
import jax
import numpy as np
import programs
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.evaluation import retrieval
from xmodal_jax.runtime import cli, logs, setup, workdir
from xmodal_jax.training import loop

JOB, INDEX = json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2])
FOLDER = pathlib.Path(sys.argv[1]).parent
STEP = 5  # training step at which a fault is injected
UNDO = []


def happen(what: str) -> None:
  if what == "raise":
    raise OSError("the disk of this machine is gone")
  os.kill(os.getpid(), getattr(signal, what))


def patch(owner, name: str, make) -> None:
  """Replaces an attribute by make(original) until the end of the run."""
  original = getattr(owner, name)
  UNDO.append(lambda: setattr(owner, name, original))
  setattr(owner, name, make(original))


def before(what: str, call: int = 1):
  """A `make` for `patch`: injects a fault before the given call of a function."""

  def make(original):
    calls = []

    def hit(*args, **kw):
      calls.append(1)
      if len(calls) == call:
        happen(what)
      return original(*args, **kw)

    return hit

  return make


def arm(moment: str, what: str, step: int = STEP) -> None:
  """Injects the fault `what` into this process at a place in the program."""
  if moment == "barrier":  # while the others wait for this process
    happen(what)
  elif moment == "compile":  # between the tracing of the first step and its compilation

    def make(original):
      def train_step(*args):
        step = original(*args)

        def hit(state, batch):
          lowered = step.lower(state, batch)
          if UNDO:
            happen(what)
            UNDO.pop()()
          del lowered
          return step(state, batch)

        return hit

      return train_step

    patch(setup.Built, "train_step", make)
  elif moment == "train":  # between training steps
    patch(logs.Clock, "tick", before(what, step))
  elif moment == "eval":  # before images and texts are encoded
    patch(retrieval.Evaluator, "encode", before(what))
  elif moment == "save":  # while checkpoint files are being written

    def make(original):
      def save(*args, **kw):
        out = original(*args, **kw)
        if len(UNDO) == 1:
          UNDO.pop()()
          happen(what)
        return out

      return save

    patch(checkpointer.Checkpoints, "save", make)
  else:
    raise ValueError(moment)


def one(run: dict) -> dict:
  if "order" in run:
    return rows(run["order"], run["shape"])
  differ = run.get("differ", {}).get(str(INDEX), {})
  config = getattr(tiny, run["system"])(run["data"], **run.get("changes", {}) | differ)
  folder = FOLDER / run["name"]
  for process, *rest in run.get("hit", []):
    if process == INDEX:
      arm(*rest)
  if run.get("check"):
    workdir.check_processes(config_lib.flatten(config), str(folder), "train")
  if barrier := run.get("barrier"):
    if barrier["missing"] != INDEX:
      processes.barrier("test", barrier["seconds"])
    return {}
  mode = dict(train=loop.train, eval=retrieval.evaluate)
  results = mode[run.get("mode", "train")](config, str(folder))
  while UNDO:
    UNDO.pop()()
  return dict(results=results and results["test"], steps=sorted(checkpoints_of(folder)))


def rows(order: list[int], shape: list[int]) -> dict:
  """This process's batch rows for a mesh of devices in this order, and the global batch."""
  mesh = jax.sharding.Mesh(np.array(jax.devices())[order].reshape(shape), sharding.AXES)
  to, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
  own = sharding.local_rows(to, 8)
  batch = sharding.put_batch({"x": own.astype(np.float32)}, to)["x"]
  joined = jax.jit(lambda x: x + 0, out_shardings=whole)(batch)
  return dict(rows=own.tolist(), batch=np.asarray(joined).tolist())


def checkpoints_of(folder: pathlib.Path) -> list[int]:
  where = folder / "checkpoints"
  return [int(p.name) for p in where.iterdir() if p.name.isdigit()] if where.exists() else []


def main() -> None:
  processes.initialize(JOB["address"], JOB["count"], INDEX)
  programs.install()
  with processes.exit_together(cli.message), tiny.toy_registered():
    logs.setup()
    for run in JOB["runs"]:
      try:
        found = one(run)
      except processes.ProcessError as e:
        found = dict(error=f"ProcessError: {e}")
      (FOLDER / f"{run['name']}.{INDEX}.json").write_text(json.dumps(found))


main()
