"""results.json of a workdir: what was measured, of which parameters, and how."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from xmodal_jax.runtime import metric_writers
from xmodal_jax.runtime import workdir as workdir_lib

NAME = "results.json"


def write(
  workdir: epath.Path,
  report: Mapping[str, float],
  *,
  protocol: Mapping[str, Any],
  dataset: str,
  fingerprint: str,
  source: Mapping[str, Any],
  run: bool = False,
) -> dict[str, Any]:
  """Writes what was measured, as results.json or beside it, and returns the file's content.

  results.json of a workdir belongs to its run. It is replaced by results of the same parameters,
  task and data only. Others are written as results-SOURCE-DIGEST.json, the digest being of these
  three; without a run, the first results in a folder are results.json.

  Args:
    workdir: absolute. report: the numbers by name.
    protocol: how they were computed, and of what.
    dataset, fingerprint: name and content hash of the evaluated split.
    source: where the parameters came from.
    run: the run of this workdir writes. Results of something else that are in its way are renamed.
  """
  content = dict(
    test=dict(report),
    protocol=dict(protocol),
    data=dict(name=dataset, fingerprint=fingerprint),
    checkpoint=dict(source),
    versions=workdir_lib.versions(),
  )
  if jax.process_index() == 0:
    path = _path(workdir, content, run)
    metric_writers.write_json(path, content)
    logging.info("results: %s", path)
  return content


def dataset_name(data: Mapping[str, Any]) -> str:
  """The dataset whose test split is evaluated, from the `data` section of a config."""
  return str(data["eval_dir"] or data["dir"]) or data["tfds"]


def _path(workdir: epath.Path, content: Mapping[str, Any], run: bool) -> epath.Path:
  """Where to write; makes room for the results of the run."""
  path = workdir / NAME
  own_name = workdir / _own_name(workdir, content)
  if not path.exists():
    of_run = run or not (workdir / "checkpoints").exists() or _is_of_run(workdir, content)
    return path if of_run else own_name
  try:
    existing = json.loads(path.read_text())
    other_name = _own_name(workdir, existing)
  except (ValueError, LookupError, TypeError, AttributeError):  # not written by this package
    other_name = "results-unknown.json"
  if workdir / other_name == own_name:
    return path
  if not run:
    return own_name
  path.rename(workdir / other_name)
  logging.warning("%s is of something else than this run: renamed to %s", path, other_name)
  return path


def _is_of_run(workdir: epath.Path, content: Mapping[str, Any]) -> bool:
  """Whether these are results of retrieval by a checkpoint of the workdir."""
  source = content["checkpoint"]
  if source.get("kind") != "checkpoint" or "task" in content["protocol"]:
    return False
  return workdir_lib.absolute(source["source"]) == workdir


def _own_name(workdir: epath.Path, content: Mapping[str, Any]) -> str:
  """The name that results have of their own: equal for the same parameters, task and data."""
  source, protocol = dict(content["checkpoint"]), content["protocol"]
  name = _short_name(source)
  if source.get("kind") == "checkpoint" and workdir_lib.absolute(source["source"]) == workdir:
    source = "the best checkpoint of this workdir"
  same = [source, protocol.get("task"), protocol["split"], content["data"]["fingerprint"]]
  text = json.dumps(same, sort_keys=True, default=str)
  return f"results-{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def _short_name(source: Mapping[str, Any]) -> str:
  """A short file name for a source."""
  last = str(source.get("source") or source["kind"]).rstrip("/").rsplit("/", 1)[-1]
  return re.sub(r"[^\w.-]+", "_", last)[:60]
