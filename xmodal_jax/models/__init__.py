"""Towers and systems. This table is the only place that names the systems."""

import importlib
import types

SYSTEMS = {"clip": "xmodal_jax.models.clip_itm"}


def system_module(name: str) -> types.ModuleType:
  """The module of a system: `build`, `preset`, `RULES`, `infer_config`."""
  if name not in SYSTEMS:
    raise ValueError(f"model.system is {name!r}; there are {', '.join(SYSTEMS)}")
  return importlib.import_module(SYSTEMS[name])
