"""config.json of a workdir, written when a run starts and compared when it is resumed."""

import hashlib
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from xmodal_jax import __version__
from xmodal_jax import config as config_lib
from xmodal_jax.distributed import processes
from xmodal_jax.errors import UserError
from xmodal_jax.runtime import metric_writers

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy", "pillow")

# Config keys that may change when a workdir is resumed: where and how it runs, not what it
# computes. A section stands for all keys in it.
MAY_CHANGE_ON_RESUME = (
  "mesh", "rules", "min_shard", "loss_chunk", "log_every", "profile", "checkpoint",
  "data.dir", "data.eval_dir", "data.threads",
  "data.max_bad_fraction", "data.eval_max_bad_fraction", "data.max_pixels",
  "eval.batch_size", "eval.block", "eval.rerank_block",
  "eval.cache", "eval.eccv_dir", "eval.folds", "eval.ndcg", "eval.relevance_dir", "eval.protocol",
  "classify",
)  # fmt: skip

_VISIBLE_SECONDS = 30.0  # within which every process must see a file that process 0 wrote


class WorkdirError(UserError):
  """A workdir that was made by another config, or that not all processes share."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested config -> {dotted key: value}, with tuples as lists, as json reads them back.

  >>> flatten({"optim": {"lr": 0.1, "decay": (("kernel$", 1.0),)}})
  {'optim.lr': 0.1, 'optim.decay': [['kernel$', 1.0]]}
  """
  out: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict) and len(value):
      out |= flatten(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = _as_lists(value)
  return out


def _as_lists(value: Any) -> Any:
  return [_as_lists(v) for v in value] if isinstance(value, tuple | list) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """What keeps a workdir of the flat config `old` from being resumed with `new`.

  Returns a line "key: old value -> new value" for every key that differs and is not one of
  MAY_CHANGE_ON_RESUME.
  """
  # The order in which tiles of pairs are summed depends on loss_chunk.
  fixed = ("loss_chunk",) if new.get("reproducible") else ()

  def may_change(key: str) -> bool:
    sections = (key == k or key.startswith(f"{k}.") for k in MAY_CHANGE_ON_RESUME)
    return key not in fixed and any(sections)

  # Keys that were added after the workdir was made had the effect of their default.
  added = json_like(flatten(config_lib.base())) | {"model.same_image": "keep"}
  old = {k: v for k, v in added.items() if k in new} | dict(old)
  missing = "(absent)"
  return [
    f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
    for key in sorted(old.keys() | new.keys())
    if not may_change(key) and old.get(key, missing) != new.get(key, missing)
  ]


def absolute(workdir: epath.PathLike) -> epath.Path:
  """The absolute path of a workdir, which Orbax and TensorBoard need, with ~ expanded."""
  workdir = epath.Path(workdir).expanduser()
  return workdir if "://" in str(workdir) else workdir.resolve()


def claim(workdir: epath.PathLike, flat_config: Mapping[str, Any]) -> epath.Path:
  """Creates the workdir and its config.json, or checks that it was made by the same config.

  flat_config: from `flatten`. Returns the absolute path. Raises WorkdirError, listing the keys that
  differ, or if this process does not see the config.json that process 0 wrote.
  """
  workdir = absolute(workdir)
  path = workdir / "config.json"
  if jax.process_index() == 0 and not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    devices = dict(kind=jax.devices()[0].device_kind, count=jax.device_count())
    content = dict(config=flat_config, versions=versions(), devices=devices)
    metric_writers.write_json(path, content)
  processes.barrier("claim of the workdir")
  changed = difference(json.loads(_read_when_visible(path))["config"], json_like(flat_config))
  if changed:
    listing = "\n  ".join(changed)
    raise WorkdirError(
      f"{workdir} was made by another config, which differs in\n  {listing}\n"
      "Use the config it was made with, or a new --workdir"
    )
  return workdir


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
