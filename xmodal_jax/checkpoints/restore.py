"""Initial parameters from a converted directory, a workdir, or a PyTorch file: config.init,
config.init_image and config.init_text."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx, traverse_util

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer, model_files
from xmodal_jax.checkpoints import facts as facts_lib
from xmodal_jax.checkpoints.manifest import CheckpointError
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError, listed, naming
from xmodal_jax.interop import beside, conversion, tables, torch_files
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
  facts: facts_lib.Facts | None = None,
  may_change: Sequence[str] = (),
  may_miss: str = "",
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Reads the parameters of a whole model, config.init, as float32 arrays on the host.

  source: a converted directory, a workdir (its best checkpoint), a file that torch.save or
  safetensors wrote, or a folder or index of such files. params, stats: the abstract states of the
  model. facts: of this config, which must be those of the source, except for keys in may_change
  (config.init_change); None: not compared. may_miss: regex of paths that the source need not have
  (config.init_missing); "": none. Position tables of another resolution are interpolated as the
  rule table of the system says.

  Returns (params, stats, info): nested dicts, without the paths that are missing, and where the
  values came from. Raises
  CheckpointError or ConversionError for a source of another system or size, listing every key that
  does not fit.

    params, stats, _ = load("clip_vit_b32", "clip", built.params, built.stats, built.facts)
    params = put(params, built.params_shardings)
  """
  want = flat(nnx.to_pure_dict(params)) | flat(nnx.to_pure_dict(stats))
  path = epath.Path(source).expanduser()
  if not path.exists():
    raise CheckpointError(
      f"config.init: {path} does not exist; expected a converted directory, a workdir or a file"
    )
  check = functools.partial(facts_lib.check, want=facts or {}, may_change=may_change)
  if path.is_file():
    have, info = _read_file(path, system, want, facts or {}, check, may_miss)
  elif (path / "meta.json").exists():
    have, info = _read_converted(path, system, check, may_miss)
  elif (path / "checkpoints").is_dir():
    have, info = _read_workdir(path, system, check)
  else:
    _check_folder(path, f"{path}: expected meta.json, checkpoints/ or PyTorch weights, but it")
    have, info = _read_file(path, system, want, facts or {}, check, may_miss)
  have = _resize(path, tables.rule_table(system), have, want)
  absent = {k for k in want.keys() - have.keys() if _matches(may_miss, k)}
  _check_shapes(path, have, {k: v for k, v in want.items() if k not in absent})
  logging.info("parameters from %s (%s)", path, info["kind"])
  if absent:
    logging.warning("%s does not have, so initial values: %s", path, ", ".join(sorted(absent)))
  have = {k: np.asarray(v, np.float32) for k, v in have.items()}
  names = flat(nnx.to_pure_dict(params)).keys()
  return (
    nested({k: v for k, v in have.items() if k in names}),
    nested({k: v for k, v in have.items() if k not in names}),
    info,
  )


def _matches(regex: str, path: str) -> bool:
  return bool(regex) and re.search(regex, path) is not None


def load_tower(
  source: str,
  side: str,
  system: str,
  params: nnx.State,
  half: bool = False,
  facts: facts_lib.Facts | None = None,
  may_change: Sequence[str] = (),
) -> dict[str, np.ndarray]:
  """Reads a public file of one tower into {path: float32 array}: config.init_image, init_text.

  side: "image" or "text". The TOWERS of the system's rule table say which files are known. Paths
  that the file does not have (a new projection) are left out. half: the parameters in HALF_PATHS
  are rounded to float16, as in CLIP's own files. facts, may_change: see `load`. Raises ConfigError,
  CheckpointError, ConversionError, FileFormatError.
  """
  path = epath.Path(source).expanduser()
  if not path.exists():
    raise CheckpointError(f"config.init_{side}: {path} does not exist")
  if path.is_dir():
    _check_folder(path, f"config.init_{side}: {path}")
  table = tables.rule_table(system)
  towers = getattr(table, "TOWERS", {})
  tower_rules = towers.get(side)
  if tower_rules is None:
    other = "".join(f" or config.init_{name}" for name in towers)
    raise ConfigError(
      f"config.init_{side}: no public file of one {side} tower is known for {system}; use "
      f"config.init with a file of the whole model{other}"
    )
  want = flat(nnx.to_pure_dict(params))
  placements = conversion.plan(tower_rules, {k: tuple(v.shape) for k, v in want.items()})
  covered = {p for place in placements.values() for p in place.paths}
  want = {k: v for k, v in want.items() if k in covered}
  with local_copy(path) as local:
    state, file_info = torch_files.state_dict(local)
    _log_notes(path, file_info)
    try:
      leaves, report = conversion.to_jax(state, tower_rules, want, check_shapes=False)
    except conversion.ConversionError as e:
      what = tables.describe_keys(state)
      e.args = (f"config.init_{side}: {path}, {what}, is not the {side} tower of {system}: {e}",)
      raise
  if facts:
    check = functools.partial(facts_lib.check, want=facts, may_change=may_change)
    _check_file(path, table, _tower_sizes(side, leaves), facts, check, side)
  logging.info("%s tower from %s, %d keys not used", side, path, len(report.dropped))
  leaves = _resize(path, table, leaves, want)
  _check_shapes(path, leaves, want)
  if half:
    rounded = re.compile("|".join(getattr(table, "HALF_PATHS", ())) or "(?!)")
    if not any(map(rounded.search, leaves)):
      raise ConfigError(
        f"config.init_half: {path} has no parameters that CLIP's files have in float16; set it to "
        "False"
      )
    leaves = {k: v.astype(np.float16) if rounded.search(k) else v for k, v in leaves.items()}
  return {k: np.asarray(v, np.float32) for k, v in leaves.items()}


Check = Callable[..., None]  # facts.check with the facts of this config
Leaves = dict[str, Any]  # path -> array
Info = dict[str, Any]  # where they came from: kind, source, and sha256 or step


def _read_converted(
  path: epath.Path, system: str, check: Check, may_miss: str
) -> tuple[Leaves, Info]:
  meta = meta_lib.read_meta(path)
  _check_system(path, meta["system"], system)
  recorded, assumed = facts_lib.of_converted(meta)
  doubt = f"The conversion assumed {assumed}; convert again to say otherwise. " if assumed else ""
  variant = meta.get("variant")
  check(f"{path} ({variant})" if variant else str(path), recorded, doubt=doubt)
  if assumed:
    logging.warning("%s: its conversion assumed %s", path, assumed)
  if (missing := meta.get("missing")) and not may_miss:
    more = " ..." if len(missing) > 3 else ""
    raise CheckpointError(
      f"config.init: {path} was converted with --allow-missing and lacks {len(missing)} tensors "
      f"({', '.join(missing[:3])}{more}). It can be converted back, and training can start from it "
      "with --config.init_missing=REGEX of the parameters to initialise"
    )
  info = dict(kind="converted directory", source=meta["source"], sha256=meta["sha256"])
  return _leaves(model_files.load_model(path)), info


def _read_workdir(path: epath.Path, system: str, check: Check) -> tuple[Leaves, Info]:
  config = path / "config.json"

  def check_source(step, meta):
    del step
    _check_system(path, meta["system"], system)
    have = facts_lib.of(json.loads(config.read_text())["config"]) if config.exists() else {}
    check(str(path), have)

  checkpoints = checkpointer.Checkpoints(path, keep=1, metric="", read_only=True)
  found = checkpoints.restore_best(check=check_source)
  if found is None:
    raise CheckpointError(f"{path}/checkpoints is empty: nothing to start from")
  step, _, tree = found
  logging.info(
    "%s: the parameters of its best checkpoint, step %d, are taken. Its optimizer state, step, "
    "schedule and position in the data are not",
    path,
    step,
  )
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


def _read_file(
  path: epath.Path,
  system: str,
  want: Mapping[str, Any],
  facts: facts_lib.Facts,
  check: Check,
  may_miss: str,
) -> tuple[Leaves, Info]:
  table = tables.rule_table(system)
  with local_copy(path) as local, naming(path):
    state, file_info = torch_files.state_dict(local)
    _log_notes(path, file_info)
    # Raises for another system.
    inferred = table.infer_config({k: v.shape for k, v in state.items()})
    _check_loss(path, inferred, want)
    if facts:
      _check_file(path, table, config_lib.flatten({"model": inferred}), facts, check)
    # Tables of another resolution are resized afterwards.
    leaves, report = conversion.to_jax(
      state,
      table.RULES,
      want,
      allow_missing=_names_of(table.RULES, want, may_miss),
      check_shapes=False,
    )
    sha256 = torch_files.sha256(local)
  if report.filled:
    logging.warning("%s: not in the file, so initial values: %s", path, ", ".join(report.filled))
  return leaves, dict(kind=file_info["format"], source=path.name, sha256=sha256)


def _names_of(rules: Sequence[Any], want: Mapping[str, Any], regex: str) -> str | None:
  """A regex of the torch keys whose paths all match `regex`."""
  placements = conversion.plan(rules, {k: tuple(v.shape) for k, v in want.items()})
  names = [n for n, p in placements.items() if all(_matches(regex, path) for path in p.paths)]
  return "|".join(map(re.escape, names)) or None


def _log_notes(path: epath.Path, info: torch_files.FileInfo) -> None:
  for note in info["notes"]:
    logging.warning("%s: %s", path, note)


def _check_loss(path: epath.Path, inferred: Mapping[str, Any], want: Mapping[str, Any]) -> None:
  if "loss" in inferred and "logit_bias" not in want:
    raise CheckpointError(
      f"config.init: {path} has the bias of the sigmoid loss, for which config.model has no place: "
      f"set config.model.loss to {inferred['loss']!r}"
    )


def _tower_sizes(side: str, leaves: Leaves) -> dict[str, int]:
  for path, x in leaves.items():
    if path.endswith("blocks/wi/kernel"):
      return {f"model.{side}.width": x.shape[1], f"model.{side}.mlp": x.shape[2]}
  return {}


def _check_file(
  path: epath.Path,
  table: tables.RuleTable,
  sizes: facts_lib.Facts,
  facts: facts_lib.Facts,
  check: Check,
  side: str = "",
) -> None:
  """Compares what a json beside a file says with this config, and logs what is only assumed.

  sizes: that the file shows, by keys of a config. side: of a file of one tower.
  """
  parser = getattr(table, f"parse_beside_{side}" if side else "parse_beside", None)
  found = beside.describe(path, parser, sizes)
  if found.facts:
    check(f"{path} ({found.name} beside it)", found.facts)
  assumed = {
    key: facts[f"model.{key}"]
    for key in getattr(table, "ASSUMED", ())
    if key.startswith(side) and f"model.{key}" in facts.keys() - found.facts.keys()
  }
  if assumed:
    hints = getattr(table, "ASSUMED_HINTS", {})
    line = beside.assumption(path.name, assumed, found, hints, flag="--config.model.")
    logging.warning("%s", line)


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
  missing = [f"missing {k} {want[k].shape}" for k in sorted(want.keys() - have.keys())]
  problems = missing[:]
  problems += [f"unknown {k} {have[k].shape}" for k in sorted(have.keys() - want.keys())]
  problems += [
    f"{k}: {tuple(have[k].shape)} in the file, {want[k].shape} in config.model"
    for k in sorted(have.keys() & want.keys())
    if tuple(have[k].shape) != tuple(want[k].shape)
  ]
  if problems:
    hint = "\nTo initialise parameters that are missing on purpose: --config.init_missing=REGEX"
    hint = hint if len(missing) == len(problems) else ""
    raise CheckpointError(
      f"{path} does not fit config.model (another variant or size?):{listed(problems, 20)}{hint}"
    )


def put(tree: Any, shardings: Any) -> Any:
  """Host arrays -> device arrays with these shardings, by an explicit transfer."""
  return jax.tree.map(sharding.place, tree, shardings)
