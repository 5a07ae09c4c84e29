"""What a workdir says about itself: config.json when it starts, results.json when it is done."""

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
from xmodal_jax.distributed import processes
from xmodal_jax.runtime import logs
from xmodal_jax.runtime import workdir as workdir_lib

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy", "pillow")

# What may differ when a workdir is resumed: where and how it runs, not what it computes.
FREE = (
  "mesh", "rules", "min_shard", "loss_chunk", "log_every", "profile", "checkpoint",
  "data.dir", "data.eval_dir", "data.threads",
  "eval.batch_size", "eval.block", "eval.rerank_block",
  "eval.cache", "eval.eccv_dir", "eval.folds", "eval.ndcg", "eval.relevance_dir", "eval.protocol",
  "classify",
)  # fmt: skip


_VISIBLE = 30.0  # seconds until a file must be seen by all processes


class WorkdirError(ValueError):
  """A workdir that another config made."""


def _versions() -> dict[str, str]:
  out = {"xmodal_jax": __version__}
  for name in _PACKAGES:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = "absent"
  return out


def claim(workdir: epath.PathLike, config: Any) -> epath.Path:
  """Makes the folder and writes config.json, or checks that it is of the same config.

  Raises WorkdirError listing the keys that differ, of which those in config.FREE may, and where a
  process does not see what another one wrote.
  """
  workdir = epath.Path(workdir).expanduser()
  # Orbax and TensorBoard take absolute paths only.
  workdir = workdir if "://" in str(workdir) else workdir.resolve()
  flat = workdir_lib.flatten(config)
  path = workdir / "config.json"
  if jax.process_index() == 0 and not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    devices = dict(kind=jax.devices()[0].device_kind, count=jax.device_count())
    logs.write_json(path, dict(config=flat, versions=_versions(), devices=devices))
  processes.barrier("claim of the workdir")
  changed = workdir_lib.difference(json.loads(_seen(path))["config"], json_like(flat))
  if changed:
    listing = "\n  ".join(changed)
    raise WorkdirError(
      f"{workdir} was made by another config; it differs in\n  {listing}\n"
      "Use the config it was made with, or a new --workdir"
    )
  return workdir


def _seen(path: epath.Path) -> str:
  """What process 0 wrote; network file systems may show it to others some seconds later."""
  end = time.monotonic() + _VISIBLE
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


def check_processes(config: Any, workdir: str, mode: str) -> None:
  """Raises ProcessError where processes of a run differ in their command, code or packages."""
  facts = {f"config.{k}": v for k, v in json_like(workdir_lib.flatten(config)).items()}
  facts |= {"--workdir": str(workdir), "--mode": mode, "xmodal_jax sources": _sources()}
  facts |= {f"{k} version": v for k, v in _versions().items()}
  processes.check_equal("command, code and packages", facts)


def _sources() -> str:
  """sha256, abbreviated, of the package's source files."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def json_like(value: Any) -> Any:
  """What json gives back for `value`."""
  return json.loads(json.dumps(value, default=str))


def write_results(
  workdir: epath.Path,
  config: Any,
  inputs: Any,
  report: Mapping[str, float],
  source: Mapping,
  protocol: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """results.json: numbers, protocol, data set fingerprint, where the parameters came from.

  protocol: how the numbers came about, where they are not those of retrieval.
  """
  split = inputs.split("test")
  e = config.eval
  retrieval = dict(
    split=config.data.test,
    images=len(split),
    captions=int(split.captions_per_record.sum()),
    folds=e.folds,
    score_dtype=e.score_dtype,
    eccv_caption=bool(e.eccv_dir),
    ndcg=e.ndcg,
    published=e.protocol == "original",
    ties="lower index first",
  )
  results = dict(
    test=dict(report),
    protocol=dict(protocol or retrieval),
    data=dict(
      name=str(config.data.eval_dir or config.data.dir) or config.data.tfds,
      fingerprint=split.fingerprint,
    ),
    checkpoint=dict(source),
    versions=_versions(),
  )
  logs.write_json(workdir / "results.json", results)
  return results


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested config -> {dotted key: value}, tuples as lists, as json would give it back."""
  out: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict) and len(value):
      out |= flatten(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = _listed(value)
  return out


def _listed(value: Any) -> Any:
  return [_listed(v) for v in value] if isinstance(value, tuple | list) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Lines "key: old -> new" for what differs between two flat configs and is not in FREE."""
  # Tiles of pairs are added up in their order.
  bound = ("loss_chunk",) if new.get("reproducible") else ()
  free = lambda key: key not in bound and any(key == f or key.startswith(f + ".") for f in FREE)
  missing = "(absent)"
  return [
    f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
    for key in sorted(old.keys() | new.keys())
    if not free(key) and old.get(key, missing) != new.get(key, missing)
  ]
