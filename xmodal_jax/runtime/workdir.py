"""config.json of a workdir: the config of its run, and what was changed on purpose."""

import hashlib
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from xmodal_jax import __version__
from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import facts, manifest
from xmodal_jax.distributed import processes
from xmodal_jax.errors import UserError
from xmodal_jax.runtime import metric_writers

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy", "pillow")

# Config keys that may change when a workdir is resumed: where and how it runs, not what it
# computes. A section stands for all keys in it. `recipes` is what could be chosen.
MAY_CHANGE_ON_RESUME = (
  "mesh", "rules", "min_shard", "loss_chunk", "log_every", "profile", "checkpoint", "recipes",
  "data.dir", "data.eval_dir", "data.threads",
  "data.max_bad_fraction", "data.eval_max_bad_fraction", "data.max_pixels",
  "eval.batch_size", "eval.block", "eval.rerank_block",
  "eval.cache", "eval.eccv_dir", "eval.folds", "eval.ndcg", "eval.relevance_dir", "eval.protocol",
  "classify",
)  # fmt: skip

# Keys that --change does not take: the state of a step and its position in the data depend on them,
# and the init keys are not read again.
_FIXED = (
  "seed", "batch_size", "reproducible", "micro_shards",
  "init", "init_image", "init_text", "init_half", "init_optimizer", "init_change", "init_missing",
  "data.mix", "data.tfds", "data.tfds_captions", "data.train", "data.captions",
  "optim.name", "optim.freeze", "optim.ema",
)  # fmt: skip

_ABSENT = "(absent)"
_VISIBLE_SECONDS = 30.0  # within which every process must see a file that process 0 wrote


class WorkdirError(UserError):
  """A workdir that was made by another config, or that not all processes share."""


def _in(key: str, sections: Iterable[str]) -> bool:
  return any(key == s or key.startswith(f"{s}.") for s in sections)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """{key: (old value, new value)} of what keeps a workdir of the flat config `old` from being
  resumed with `new`: all keys that differ and are not among MAY_CHANGE_ON_RESUME.

  A key that `old` does not have is newer than the run: it had the default of `config.base` then. Of
  a key of the model, which has no default there, the new value is taken.
  """
  # The order in which tiles of pairs are summed depends on loss_chunk.
  fixed = ("loss_chunk",) if new.get("reproducible") else ()
  # Before model.same_image was a choice of all systems, the others kept such pairs.
  defaults = json_like(config_lib.flatten(config_lib.base())) | {"model.same_image": "keep"}
  defaults |= facts.defaults(new)
  old = {k: v for k, v in defaults.items() if k in new} | dict(old)
  expanded = lambda v: config_lib.expand_home(v) if isinstance(v, str) else v
  old = {key: expanded(value) for key, value in old.items()}
  added = [k for k in new.keys() - old.keys() if _in(k, ("model",))]
  if added:
    logging.warning("new keys, which the run did not have: %s", ", ".join(sorted(added)))
  return {
    key: (old.get(key, _ABSENT), new.get(key, _ABSENT))
    for key in sorted((old.keys() | new.keys()) - set(added))
    if (key in fixed or not _in(key, MAY_CHANGE_ON_RESUME))
    and old.get(key, _ABSENT) != new.get(key, _ABSENT)
  }


def absolute(workdir: epath.PathLike) -> epath.Path:
  """The absolute path: Orbax and TensorBoard take no other. `~` is expanded."""
  workdir = epath.Path(workdir).expanduser()
  return workdir if "://" in str(workdir) else workdir.resolve()


def check(
  workdir: epath.Path, flat_config: Mapping[str, Any], change: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
  """The keys that the run resumes with other values than the workdir's config.json has.

  workdir: from `absolute`. flat_config: from `config.flatten`. change: keys, or sections of keys,
  that may differ. A workdir in which no step was saved may be started again with any config. Raises
  WorkdirError, listing the keys, for all others, and for a key in `change` that does not exist.
  """
  values = processes.broadcast("config", _check(workdir, flat_config, list(change)))
  if isinstance(values, str):
    raise WorkdirError(values)
  return {key: tuple(both) for key, both in values.items()}


def _check(
  workdir: epath.Path, flat_config: Mapping[str, Any], change: list[str]
) -> dict[str, tuple[Any, Any]] | str:
  """In process 0: the changes, or the text of the error."""
  if jax.process_index() != 0:
    return {}
  path, new = workdir / "config.json", json_like(flat_config)
  old = _read_config(path) if path.exists() else None
  if isinstance(old, str):
    return old
  known = new.keys() | (old or {}).keys()
  if unknown := [k for k in change if not any(_in(name, [k]) for name in known)]:
    return f"--change {','.join(unknown)}: there is no such key in the config"
  found = {} if old is None else difference(old, new)
  if not found:
    return {}
  listing = "\n  ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in found.items())
  if not _holds_steps(workdir / "checkpoints"):
    logging.warning(
      "no step was saved in %s: it starts again with another config, which differs in\n  %s",
      workdir,
      listing,
    )
    return {}
  fixed = [k for k in found if _in(k, _FIXED)]
  refused = [k for k in found if not _in(k, change)]
  if not fixed and not refused:
    return found
  text = f"{workdir} was made by another config, which differs in\n  {listing}\n"
  if fixed:
    return text + (
      f"Of a run that has steps, {', '.join(fixed)} cannot be changed: use the config it was made "
      "with, or a new --workdir"
    )
  return text + (
    "Use the config it was made with, or a new --workdir. To go on from the last step with these "
    f"changes, add --change={','.join(found)}"
  )


def _read_config(path: epath.Path) -> dict[str, Any] | str:
  """The flat config of a config.json, or the text of an error."""
  try:
    return dict(json.loads(path.read_text())["config"])
  except (ValueError, TypeError, KeyError):
    return f"{path} is not a config.json of a run: put back the one it was made with"


def _holds_steps(directory: epath.Path) -> bool:
  folders = manifest.StepFolders(directory, read_only=True)
  return folders.ever_complete() or bool(folders.damaged() or folders.complete_steps())


def record(
  workdir: epath.Path,
  flat_config: Mapping[str, Any],
  step: int,
  changed: Mapping[str, tuple[Any, Any]],
) -> None:
  """Writes config.json, once a run can begin, and in it each change with its step.

  changed: from `check`. Raises WorkdirError if this process does not see what process 0 wrote.
  """
  path = workdir / "config.json"
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    devices = dict(kind=jax.devices()[0].device_kind, count=jax.device_count())
    about = dict(versions=versions(), devices=devices)
    if not path.exists() or not _holds_steps(workdir / "checkpoints"):
      metric_writers.write_json(path, dict(config=flat_config, **about))
    elif changed:
      content = json.loads(path.read_text()) | dict(config=flat_config)
      entry = dict(step=step, changed={k: list(v) for k, v in changed.items()}, **about)
      content["changes"] = [*content.get("changes", []), entry]
      metric_writers.write_json(path, content)
      for key, (old, new) in changed.items():
        logging.info("from step %d on, %s is %r instead of %r", step, key, new, old)
  processes.barrier("config.json")
  _read_when_visible(path)


def _read_when_visible(path: epath.Path) -> str:
  """Text of a file that process 0 wrote; network file systems may show it seconds later."""
  end = time.monotonic() + _VISIBLE_SECONDS
  while True:
    try:
      return path.read_text()
    except FileNotFoundError:
      if time.monotonic() > end:
        raise WorkdirError(
          f"process {jax.process_index()} does not see {path}, which process 0 wrote: --workdir "
          "must be on a file system that all machines share, or gs://"
        ) from None
      time.sleep(0.5)


def check_processes(flat_config: Mapping[str, Any], workdir: str, mode: str) -> None:
  """Raises ProcessError if the processes of a run differ in their command, code or packages."""
  facts = {f"config.{k}": v for k, v in json_like(flat_config).items()}
  facts |= {"--workdir": str(workdir), "--mode": mode, "xmodal_jax sources": _source_digest()}
  facts |= {f"{k} version": v for k, v in versions().items()}
  processes.check_equal("command, code and packages", facts)


def versions() -> dict[str, str]:
  """Of this package and of those that results depend on."""
  out = {"xmodal_jax": __version__}
  for name in _PACKAGES:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = "absent"
  return out


def _source_digest() -> str:
  """The first 16 digits of the sha256 of the package's source files."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def json_like(value: Any) -> Any:
  """`value` after a round trip through json: tuples as lists, other objects as strings."""
  return json.loads(json.dumps(value, default=str))
