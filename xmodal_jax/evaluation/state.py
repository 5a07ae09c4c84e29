"""The parameters that are evaluated, and where they came from."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from xmodal_jax.checkpoints import checkpointer, restore
from xmodal_jax.optim.train_state import TrainState
from xmodal_jax.runtime import setup


def load_state(built: setup.Built, source: str) -> tuple[TrainState, dict[str, Any]]:
  """Parameters of a file, a converted directory or a workdir on the devices; see `restore.load`.

  Returns a TrainState without step and opt_state, and its provenance: kind, source and sha256.
  Raises CheckpointError.
  """
  params, stats, info = restore.load(
    source, built.system_name, built.params, built.stats, built.facts, built.init_change
  )
  if "sha256" not in info:  # a workdir, which may reach the same step again with other parameters
    info = dict(info) | {"sha256": _digest({"params": params, "stats": stats})}
  params = restore.put(params, built.params_shardings)
  stats = restore.put(stats, built.stats_shardings)
  return TrainState(step=None, params=params, stats=stats, opt_state=None), info


def choose(init: str, workdir: epath.Path, init_given: bool) -> str:
  """What is evaluated: `workdir`, of which the best checkpoint is used, or config.init.

  The workdir comes first if it has a checkpoint: config.init is then what its run started from.
  init_given: config.init was set on the command line, and comes first.
  """
  if not init or not init_given:
    checkpoints = checkpointer.Checkpoints(workdir, keep=1, metric="", read_only=True)
    with contextlib.closing(checkpoints):
      trained = checkpoints.best() is not None
    if trained or not init:
      if init:
        logging.info(
          "evaluating the best checkpoint of %s, and not config.init=%s, which the run started "
          "from: give --config.init to evaluate that", workdir, init,
        )  # fmt: skip
      return str(workdir)
  return init


def describe(source: Mapping[str, Any]) -> str:
  """One line about a provenance, from `load_state`, for titles of tables."""
  step = f" of step {source['step']}" if "step" in source else ""
  return f"{source['kind']}{step}: {source['source']}"


def files_digest(checkpoints: checkpointer.Checkpoints, step: int) -> str:
  """sha256 of the digests of the files that hold the model of a checkpoint."""
  files = checkpoints.folders.files(step)
  model = {name: file for name, file in files.items() if name.startswith("model/")}
  return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _digest(tree: Mapping[str, Any]) -> str:
  """sha256 of the names and bytes of host arrays in nested dicts."""
  digest = hashlib.sha256()
  for path, leaf in sorted(restore.flat(tree).items()):
    digest.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()
