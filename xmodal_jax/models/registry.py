"""Systems by name: the modules of their models and of their conversion rules."""

import importlib
import types
from typing import NamedTuple

from xmodal_jax.errors import ConfigError, check_choice


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

  Raises ConfigError if the name is registered with other modules.
  """
  entry = Entry(model, interop)
  if SYSTEMS.setdefault(name, entry) != entry:
    raise ConfigError(f"system {name!r} is already registered as {SYSTEMS[name]}")


def entry(name: str) -> Entry:
  """The modules of a system. Raises ConfigError for an unknown name, listing the known ones."""
  check_choice("model.system", name, SYSTEMS)
  return SYSTEMS[name]


def system_module(name: str) -> types.ModuleType:
  """The model module of a system: `build` and `preset`."""
  return importlib.import_module(entry(name).model)
