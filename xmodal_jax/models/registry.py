"""The systems by name. This table is the only place that names them."""

import importlib
import types
from typing import NamedTuple


class Entry(NamedTuple):
  """Modules of a system: its model (`build`, `preset`) and its rule table for PyTorch files."""

  model: str
  interop: str


SYSTEMS: dict[str, Entry] = {
  name: Entry(f"xmodal_jax.models.{name}", f"xmodal_jax.interop.{name}")
  for name in ("clip", "zerovl", "team", "tgdt", "hat")
}


def register(name: str, *, model: str, interop: str) -> None:
  """Adds a system from outside of the package; both are names of importable modules.

  Raises ValueError for a name that is taken by other modules.
  """
  entry = Entry(model, interop)
  if SYSTEMS.setdefault(name, entry) != entry:
    raise ValueError(f"system {name!r} is already registered as {SYSTEMS[name]}")


def entry(name: str) -> Entry:
  """Raises ValueError, listing the names that exist."""
  if name not in SYSTEMS:
    raise ValueError(f"model.system is {name!r}; there are {', '.join(SYSTEMS)}")
  return SYSTEMS[name]


def system_module(name: str) -> types.ModuleType:
  """The model module of a system: `build` and `preset`."""
  return importlib.import_module(entry(name).model)
