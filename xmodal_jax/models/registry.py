"""Systems by name: the modules of their models and of their conversion rules."""

import importlib
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from xmodal_jax.errors import ConfigError


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
  if name not in SYSTEMS:
    raise ConfigError(f"model.system is {name!r}; there are {', '.join(SYSTEMS)}")
  return SYSTEMS[name]


def system_module(name: str) -> types.ModuleType:
  """The model module of a system: `build` and `preset`."""
  return importlib.import_module(entry(name).model)


# Keys that towers and systems share: counts from 1, shares below 1, numbers above 0.
_COUNTS = (
  "depth", "depths", "width", "heads", "size", "patch", "window", "embed", "mlp", "mlp_ratio",
  "vocab", "context", "features", "unroll", "groups", "negatives",
)  # fmt: skip
_SHARES = ("dropout", "attention_dropout", "drop_path", "smoothing")
_POSITIVE = ("temperature", "sharpness", "scale")


def faults(model: Mapping[str, Any], prefix: str = "model.") -> list[str]:
  """Values of a model section that no system takes, one line for each: "model.KEY is VALUE: ...".

  What only the system knows, it says when it is built.
  """
  out = []
  if prefix == "model." and model.get("system") not in SYSTEMS:
    out.append(f"model.system is {model.get('system')!r}: expected one of {', '.join(SYSTEMS)}")
  width, heads = model.get("width"), model.get("heads")
  if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
    out.append(f"{prefix}heads is {heads}: expected a number that divides {prefix}width={width}")
  for name, value in model.items():
    if isinstance(value, Mapping):
      out += faults(value, f"{prefix}{name}.")
    elif wrong := _fault(name, value):
      out.append(f"{prefix}{name} is {value!r}: expected {wrong}")
  return out


def _fault(name: str, value: Any) -> str:
  """What is expected instead of the value of a key with this last name; "" if nothing is."""
  is_number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
  each = value if isinstance(value, tuple | list) else (value,)
  if name in _COUNTS and not all(isinstance(v, int) and is_number(v) and v > 0 for v in each):
    return "a whole number from 1"
  if name in _SHARES and not (is_number(value) and 0 <= value < 1):
    return "a number from 0 below 1"
  if name in _POSITIVE and not (is_number(value) and value > 0):
    return "a number above 0"
  if name in ("mean", "std") and not (len(each) == 3 and all(map(is_number, each))):
    return "three numbers"
  if name == "remat" and value and not hasattr(jax.checkpoint_policies, str(value)):
    return "'' or a policy of jax.checkpoint_policies, such as 'nothing_saveable'"
  if isinstance(value, float) and not math.isfinite(value):
    return "a finite number"
  return ""
