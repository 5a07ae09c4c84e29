"""The parameters that are evaluated, and where they came from."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from xmodal_jax.checkpoints import restore
from xmodal_jax.optim.train_state import TrainState
from xmodal_jax.runtime import setup


def load_state(built: setup.Built, source: str) -> tuple[TrainState, dict[str, Any]]:
  """Parameters of a file, a converted directory or a workdir on the devices; see `restore.load`.

  Returns a TrainState without step and opt_state, and its provenance: kind, source and sha256.
  Raises CheckpointError.
  """
  params, stats, info = restore.load(
    source, built.system_name, built.params, built.stats, built.model_config
  )
  if "sha256" not in info:  # a workdir, which may reach the same step again with other parameters
    info = dict(info) | {"sha256": _digest({"params": params, "stats": stats})}
  params = restore.put(params, built.params_shardings)
  stats = restore.put(stats, built.stats_shardings)
  return TrainState(step=None, params=params, stats=stats, opt_state=None), info


def _digest(tree: Mapping[str, Any]) -> str:
  """sha256 of the names and bytes of host arrays in nested dicts."""
  digest = hashlib.sha256()
  for path, leaf in sorted(restore.flat(tree).items()):
    digest.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()
