"""Locates the golden vectors: $XMODAL_GOLDEN, else the full set beside the project, else ours."""

import functools
import json
import os
import pathlib

import numpy as np
import pytest

_HERE = pathlib.Path(__file__).parent


@functools.cache
def root(system: str) -> pathlib.Path:
  """The folder with the manifest.json of `system`.

  $XMODAL_GOLDEN names that folder or the one above it. Skips where only other systems are found;
  raises FileNotFoundError where the variable names a folder without any manifest.
  """
  named = os.environ.get("XMODAL_GOLDEN")
  shared = pathlib.Path(os.environ.get("XMODAL_SHARED", _HERE.parents[1] / "shared"))
  places = [pathlib.Path(named)] if named else [shared / "golden", _HERE / "golden"]
  for place in places:
    for folder in (place / system, place):
      file = folder / "manifest.json"
      if file.exists() and json.loads(file.read_text())["system"].lower() == system.lower():
        return folder
  if named and not any(places[0].glob("**/manifest.json")):
    raise FileNotFoundError(f"XMODAL_GOLDEN={named}: no manifest.json in it or one folder below")
  pytest.skip(
    f"no golden vectors of {system!r} in {[str(p) for p in places]}", allow_module_level=True
  )


@functools.cache
def manifest(system: str) -> dict:
  return json.loads((root(system) / "manifest.json").read_text())


def path(system: str, *parts: str) -> pathlib.Path:
  """A file of the set. Skips where it is absent: sets may leave files out."""
  file = root(system).joinpath(*parts)
  if not file.exists():
    reason = f"{'/'.join(parts)} is not in the golden set {root(system)}"
    pytest.skip(reason, allow_module_level=True)
  return file


def find(system: str, pattern: str) -> list[pathlib.Path]:
  """The files of the set that match a glob pattern, sorted; skips where there is none."""
  files = sorted(root(system).glob(pattern))
  if not files:
    reason = f"no {pattern} in the golden set {root(system)}"
    pytest.skip(reason, allow_module_level=True)
  return files


class Arrays(dict):
  """Arrays of a file. One that is absent skips the test if $XMODAL_GOLDEN names the set."""

  def __missing__(self, name: str):
    if os.environ.get("XMODAL_GOLDEN"):
      pytest.skip(f"array {name!r} is not in this golden set")
    raise KeyError(name)


@functools.cache
def arrays(system: str, *parts: str) -> Arrays:
  with np.load(path(system, *parts)) as f:
    return Arrays(f)
