"""Initial parameters from a converted directory, a workdir, or a PyTorch file: config.init,
config.init_image and config.init_text."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx, traverse_util

from xmodal_jax.checkpoints import checkpointer, model_files
from xmodal_jax.checkpoints.manifest import CheckpointError
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import naming
from xmodal_jax.interop import conversion, tables, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.interop.local import local_copy
from xmodal_jax.interop.torch_files import folders

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
  """Reads the parameters of a whole model, config.init, as float32 arrays on the host.

  source: a converted directory, a workdir (its best checkpoint), a file that torch.save or
  safetensors wrote, or a folder or index of such files. params, stats: the abstract states of the
  model. model: config.model, whose pixel statistics must be those of a converted directory.
  Position tables of another resolution are interpolated as the rule table of the system says.

  Returns (params, stats, info): nested dicts, and where the values came from. Raises
  CheckpointError or ConversionError for a source of another system or size, listing every key that
  does not fit.

    params, stats, _ = load("clip_vit_b32", "clip", built.params, built.stats, config.model)
    params = put(params, built.params_shardings)
  """
  want = flat(nnx.to_pure_dict(params)) | flat(nnx.to_pure_dict(stats))
  path = epath.Path(source).expanduser()
  if not path.exists():
    raise CheckpointError(
      f"config.init: {path} does not exist; expected a converted directory, a workdir or a file"
    )
  if path.is_file():
    have, info = _read_file(path, system, want)
  elif (path / "meta.json").exists():
    have, info = _read_converted(path, system, model or {})
  elif (path / "checkpoints").is_dir():
    have, info = _read_workdir(path, system)
  else:
    _check_folder(path, f"{path}: expected meta.json, checkpoints/ or PyTorch weights, but it")
    have, info = _read_file(path, system, want)
  have = _resize(path, tables.rule_table(system), have, want)
  _check_shapes(path, have, want)
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
  """Reads a public file of one tower into {path: float32 array}: config.init_image, init_text.

  side: "image" or "text". The TOWERS of the system's rule table say which files are known. Paths
  that the file does not have (a new projection) are left out. half: the parameters in HALF_PATHS
  are rounded to float16, as in CLIP's own files. Raises CheckpointError, ConversionError,
  FileFormatError.
  """
  path = epath.Path(source).expanduser()
  if not path.exists():
    raise CheckpointError(f"config.init_{side}: {path} does not exist")
  if path.is_dir():
    _check_folder(path, f"config.init_{side}: {path}")
  table = tables.rule_table(system)
  rules = getattr(table, "TOWERS", {}).get(side)
  if rules is None:
    raise CheckpointError(
      f"config.init_{side}: {system} starts from whole checkpoints; use config.init"
    )
  want = flat(nnx.to_pure_dict(params))
  placements = conversion.plan(rules, {k: tuple(v.shape) for k, v in want.items()})
  covered = {p for place in placements.values() for p in place.paths}
  want = {k: v for k, v in want.items() if k in covered}
  with local_copy(path) as local:
    state, file_info = torch_files.state_dict(local)
    _log_notes(path, file_info)
    try:
      leaves, report = conversion.to_jax(state, rules, want, check_shapes=False)
    except conversion.ConversionError as e:
      what = tables.describe_keys(state)
      e.args = (f"config.init_{side}: {path}, {what}, is not the {side} tower of {system}: {e}",)
      raise
  logging.info("%s tower from %s, %d keys not used", side, path, len(report.dropped))
  leaves = _resize(path, table, leaves, want)
  _check_shapes(path, leaves, want)
  if half:
    rounded = re.compile("|".join(table.HALF_PATHS))
    leaves = {k: v.astype(np.float16) if rounded.search(k) else v for k, v in leaves.items()}
  return {k: np.asarray(v, np.float32) for k, v in leaves.items()}


Leaves = dict[str, Any]  # path -> array
Info = dict[str, Any]  # where they came from: kind, source, and sha256 or step


def _read_converted(path: epath.Path, system: str, model: Mapping[str, Any]) -> tuple[Leaves, Info]:
  meta = meta_lib.read_meta(path)
  _check_system(path, meta["system"], system)
  for key in ("mean", "std"):
    have = meta["config"].get(key)
    if have is not None and key in model and list(have) != list(model[key]):
      raise CheckpointError(
        f"{path} was trained with pixels of {key} {have}, config.model.{key} is "
        f"{list(model[key])}: choose the config of {meta['variant'] or 'that model'}, or set it"
      )
  info = dict(kind="converted directory", source=meta["source"], sha256=meta["sha256"])
  return _leaves(model_files.load_model(path)), info


def _read_workdir(path: epath.Path, system: str) -> tuple[Leaves, Info]:
  def check(step, meta):
    del step
    _check_system(path, meta["system"], system)

  checkpoints = checkpointer.Checkpoints(path, keep=1, metric="", read_only=True)
  found = checkpoints.restore_best(check=check)
  if found is None:
    raise CheckpointError(f"{path}/checkpoints is empty: nothing to start from")
  step, _, tree = found
  return _leaves(tree), dict(kind="checkpoint", source=str(path), step=step)


def _check_folder(path: epath.Path, message: str) -> None:
  """Raises CheckpointError unless the folder has weights of PyTorch; its message goes on there."""
  try:
    folders.choose([p.name for p in path.iterdir()])
  except torch_files.FileFormatError as e:
    raise CheckpointError(f"{message} {e}") from None


def _check_system(path: epath.Path, have: str, system: str) -> None:
  if have != system:
    raise CheckpointError(f"{path} holds a {have} model, but config.model.system is {system}")


def _leaves(tree: Mapping[str, Any]) -> Leaves:
  return flat(tree["params"]) | flat(tree.get("stats") or {})


def _read_file(path: epath.Path, system: str, want: Mapping[str, Any]) -> tuple[Leaves, Info]:
  table = tables.rule_table(system)
  with local_copy(path) as local, naming(path):
    state, file_info = torch_files.state_dict(local)
    _log_notes(path, file_info)
    table.infer_config({k: v.shape for k, v in state.items()})  # raises for another system
    # Tables of another resolution are resized afterwards.
    leaves, _ = conversion.to_jax(state, table.RULES, want, check_shapes=False)
    sha256 = torch_files.sha256(local)
  return leaves, dict(kind=file_info["format"], source=path.name, sha256=sha256)


def _log_notes(path: epath.Path, info: torch_files.FileInfo) -> None:
  for note in info["notes"]:
    logging.warning("%s: %s", path, note)


def _resize(
  path: epath.Path, table: tables.RuleTable, have: Leaves, want: Mapping[str, Any]
) -> Leaves:
  """The arrays with position tables of the shapes that `want` has."""
  try:
    return {k: table.resize(k, v, want[k].shape) if k in want else v for k, v in have.items()}
  except ValueError as e:
    raise CheckpointError(f"{path}: {e}") from None


def _check_shapes(path: epath.Path, have: Leaves, want: Mapping[str, Any]) -> None:
  """Raises CheckpointError, which lists the paths and shapes that differ."""
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
    raise CheckpointError(
      f"{path} does not fit config.model (another variant or size?):\n  {shown}{more}"
    )


def put(tree: Any, shardings: Any) -> Any:
  """Host arrays -> device arrays with these shardings, by an explicit transfer."""
  return jax.tree.map(sharding.place, tree, shardings)
