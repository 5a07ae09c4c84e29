"""Where the golden vectors are: $XMODAL_GOLDEN, else the full set beside the project, else ours."""

import functools
import json
import os
import pathlib

import numpy as np
import pytest

_HERE = pathlib.Path(__file__).parent


@functools.cache
def root(system: str) -> pathlib.Path:
  """The folder with `system`'s manifest.json. $XMODAL_GOLDEN may name it or the folder above."""
  named = os.environ.get("XMODAL_GOLDEN")
  shared = pathlib.Path(os.environ.get("XMODAL_SHARED", _HERE.parents[1] / "shared"))
  places = [pathlib.Path(named)] if named else [shared / "golden", _HERE / "golden"]
  for place in places:
    for folder in (place / system, place):
      path = folder / "manifest.json"
      if path.exists() and json.loads(path.read_text())["system"].lower() == system.lower():
        return folder
  if named:
    raise FileNotFoundError(f"XMODAL_GOLDEN={named}: no manifest.json of system {system!r} in it")
  pytest.skip(
    f"no golden vectors of {system!r} in {[str(p) for p in places]}", allow_module_level=True
  )


@functools.cache
def manifest(system: str) -> dict:
  return json.loads((root(system) / "manifest.json").read_text())


def path(system: str, *parts: str) -> pathlib.Path:
  """A file of the set. The copy carried by the project leaves some large files out: then a skip."""
  file = root(system).joinpath(*parts)
  if not file.exists():
    if root(system).is_relative_to(_HERE):
      reason = f"{file.name} is not in the carried golden set; run with XMODAL_GOLDEN"
      pytest.skip(reason, allow_module_level=True)
    raise FileNotFoundError(file)
  return file


@functools.cache
def arrays(system: str, *parts: str) -> dict[str, np.ndarray]:
  with np.load(path(system, *parts)) as f:
    return dict(f)
