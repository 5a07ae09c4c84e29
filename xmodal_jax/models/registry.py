"""Systems by name: the modules of their models and of their conversion rules."""

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
  """Adds a system from outside of the package; `model` and `interop` are importable modules.

  Raises ValueError if the name is registered with other modules.
  """
  entry = Entry(model, interop)
  if SYSTEMS.setdefault(name, entry) != entry:
    raise ValueError(f"system {name!r} is already registered as {SYSTEMS[name]}")


def entry(name: str) -> Entry:
  """The modules of a system. Raises ValueError for an unknown name, listing the known ones."""
  if name not in SYSTEMS:
    raise ValueError(f"model.system is {name!r}; there are {', '.join(SYSTEMS)}")
  return SYSTEMS[name]


def system_module(name: str) -> types.ModuleType:
  """The model module of a system: `build` and `preset`."""
  return importlib.import_module(entry(name).model)
