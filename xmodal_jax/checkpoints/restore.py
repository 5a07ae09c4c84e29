"""config.init: parameters from a converted directory, a workdir, or a PyTorch file."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx, traverse_util

from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.distributed import sharding
from xmodal_jax.interop import conversion, tables, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.interop.local import local_copy

# Nested dicts <-> {"image/blocks/q/kernel": leaf}.
flat = functools.partial(traverse_util.flatten_dict, sep="/")
nested = functools.partial(traverse_util.unflatten_dict, sep="/")


def load(
  source: str,
  system: str,
  params: nnx.State,
  stats: nnx.State,
  model: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Reads `source` into parameters like the abstract states `params` and `stats`.

  Returns (params, stats, info): nested dicts of host arrays, float32, and where they came from.
  Position tables of another resolution are resized as the system does it. Raises CheckpointError
  for a file of another system or size, listing every key that does not fit. model: config.model,
  which then has to agree with a converted directory about pixel statistics.
  """
  want = flat(nnx.to_pure_dict(params)) | flat(nnx.to_pure_dict(stats))
  path = epath.Path(source).expanduser()
  if not path.exists():
    raise checkpointer.CheckpointError(
      f"config.init: {path} does not exist; expected a converted directory, a workdir or a file"
    )
  if path.is_dir():
    have, info = _read_directory(path, system, model or {})
  else:
    have, info = _read_file(path, system, want)
  module = tables.rule_table(system)
  have = _resize(path, module, have, want)
  _check(path, have, want)
  logging.info("parameters from %s (%s)", path, info["kind"])
  have = {k: np.asarray(v, np.float32) for k, v in have.items()}
  names = flat(nnx.to_pure_dict(params)).keys()
  return (
    nested({k: have[k] for k in names}),
    nested({k: v for k, v in have.items() if k not in names}),
    info,
  )


def load_tower(
  source: str, side: str, system: str, params: nnx.State, half: bool = False
) -> dict[str, np.ndarray]:
  """Reads a public file of one tower ("image" or "text") into {path: float32 array}.

  The system's TOWERS say which files those are. What of the tower the file does not have (a new
  projection) is left out. half: matrices and their biases are rounded to float16, as CLIP's own
  files hold them. Raises CheckpointError, ConversionError, FileFormatError.
  """
  path = epath.Path(source).expanduser()
  if not path.is_file():
    raise checkpointer.CheckpointError(f"config.init_{side}: {path} is not a file")
  module = tables.rule_table(system)
  rules = getattr(module, "TOWERS", {}).get(side)
  if rules is None:
    raise checkpointer.CheckpointError(
      f"config.init_{side}: {system} starts from whole checkpoints; use config.init"
    )
  want = flat(nnx.to_pure_dict(params))
  covered = {
    p
    for step in conversion.plan(rules, {k: tuple(v.shape) for k, v in want.items()}).values()
    for p in step.paths
  }
  want = {k: v for k, v in want.items() if k in covered}
  with local_copy(path) as local:
    state, _ = torch_files.state_dict(local)
    try:
      leaves, report = conversion.to_jax(state, rules, want, check_shapes=False)
    except conversion.ConversionError as e:
      what = tables.describe_keys(state)
      e.args = (f"config.init_{side}: {path}, {what}, is not the {side} tower of {system}: {e}",)
      raise
  logging.info("%s tower from %s, %d keys not used", side, path, len(report.dropped))
  leaves = _resize(path, module, leaves, want)
  _check(path, leaves, want)
  rounds = re.compile("|".join(module.HALF_PATHS)).search if half else lambda _: False
  return {
    k: np.asarray(v.astype(np.float16) if rounds(k) else v, np.float32) for k, v in leaves.items()
  }


def _read_directory(
  path: epath.Path, system: str, model: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  if (path / "meta.json").exists():
    meta = meta_lib.read_meta(path)
    if meta["system"] != system:
      raise checkpointer.CheckpointError(
        f"{path} holds a {meta['system']} model, but config.model.system is {system}"
      )
    for key in ("mean", "std"):
      have = meta["config"].get(key)
      if have is not None and key in model and list(have) != list(model[key]):
        raise checkpointer.CheckpointError(
          f"{path} was trained with pixels of {key} {have}, config.model.{key} is "
          f"{list(model[key])}: choose the config of {meta['variant'] or 'that model'}, or set it"
        )
    tree = checkpointer.load_model(path)
    info = dict(kind="converted directory", source=meta["source"], sha256=meta["sha256"])
  elif (path / "checkpoints").is_dir():
    checkpoints = checkpointer.Checkpoints(path, keep=1, metric="", read_only=True)

    def check(step, meta):
      if meta["system"] != system:
        raise checkpointer.CheckpointError(
          f"{path} holds a {meta['system']} model, but config.model.system is {system}"
        )

    found = checkpoints.restore_best(check=check)
    if found is None:
      raise checkpointer.CheckpointError(f"{path}/checkpoints is empty: nothing to start from")
    step, _, tree = found
    info = dict(kind="checkpoint", source=str(path), step=step)
  else:
    raise checkpointer.CheckpointError(
      f"{path}: expected meta.json (a converted directory) or checkpoints/ (a workdir) in it"
    )
  return flat(tree["params"]) | flat(tree.get("stats") or {}), info


def _read_file(
  path: epath.Path, system: str, want: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  with local_copy(path) as local:
    state, file_info = torch_files.state_dict(local)
    module = tables.rule_table(system)
    module.infer_config({k: v.shape for k, v in state.items()})  # refuses other systems by name
    # The file's own shapes: tables of another resolution are resized afterwards.
    leaves, _ = conversion.to_jax(state, module.RULES, want, check_shapes=False)
    sha256 = torch_files.sha256(local)
  return leaves, dict(kind=file_info["format"], source=path.name, sha256=sha256)


def _resize(path, module, have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, Any]:
  """Tables of another resolution, as the system adapts them; all else as it is."""
  try:
    return {k: module.resize(k, v, want[k].shape) if k in want else v for k, v in have.items()}
  except ValueError as e:
    raise checkpointer.CheckpointError(f"{path}: {e}") from None


def _check(path: epath.Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
  problems = [f"missing {k} {want[k].shape}" for k in sorted(want.keys() - have.keys())]
  problems += [f"unknown {k} {have[k].shape}" for k in sorted(have.keys() - want.keys())]
  problems += [
    f"{k}: {tuple(have[k].shape)} in the file, {want[k].shape} in config.model"
    for k in sorted(have.keys() & want.keys())
    if tuple(have[k].shape) != tuple(want[k].shape)
  ]
  if problems:
    shown = "\n  ".join(problems[:20])
    more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
    raise checkpointer.CheckpointError(
      f"{path} does not fit config.model (another variant or size?):\n  {shown}{more}"
    )


def put(tree: Any, shardings: Any) -> Any:
  """Host arrays -> device arrays, an explicit transfer."""
  return jax.tree.map(sharding.place, tree, shardings)
