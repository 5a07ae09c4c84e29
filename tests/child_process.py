"""Child processes that import the project."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def environment(**changes: str) -> dict[str, str]:
  """os.environ with the project importable, installed or not, and with the changes."""
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  return {**os.environ, "PYTHONPATH": path, **changes}
