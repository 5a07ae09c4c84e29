"""Finds the state dict in the object tree of a file: entries that wrap it, prefixes of names."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from xmodal_jax.interop.torch_files.names import Name, Placeholder
from xmodal_jax.interop.torch_files.tensor import FileFormatError, TensorRef

# Entries that wrap a state dict; where several do, the first of these is taken.
WRAPPERS = (
  "state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params",
  "model_weights", "teacher", "student", "model_ema", "state_dict_ema", "ema_state_dict",
  "model_ema_state_dict", "params_ema", "ema",
)  # fmt: skip
# Prefixes that are stripped where all names have them, in any number and order.
_SHARED = (
  "module.", "_orig_mod.", "model.", "clip.", "clip_model.", "net.", "network.", "ema_model.",
  "teacher.", "student.",
)  # fmt: skip
# Parts that torch.compile, FSDP and DeepSpeed put into names, stripped wherever they stand.
_INSERTED = re.compile(
  r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils, beside names that share a prefix
_ARCHIVE_SCALARS = ("input_resolution", "context_length", "vocab_size")
_MAX_WRAPPERS, _MAX_PREFIXES = 4, 8
_MAX_NAMES, _MAX_NAME_CHARACTERS = 100_000, 1 << 24  # of the modules of an archive


def is_array(value: Any) -> bool:
  """Whether a value is an array that can be read; arrays of objects, dates, records cannot."""
  return isinstance(value, TensorRef) and value.storage is not None


def entries(value: Any) -> Mapping | None:
  """The entries of a dict, also of an object of a subclass of dict; None for other values."""
  if isinstance(value, Placeholder) and value.items:
    return value.items
  return value if isinstance(value, Mapping) else None


class Found:
  """The arrays of a tree by name, and what led to them."""

  def __init__(self, tree: Any):
    self.tree = tree
    self.arrays: dict[str, TensorRef] = {}
    self.wrapper: list[str] = []
    self.extras: dict[Any, Any] = {}
    self.notes: list[str] = []

  def enter(self, key: str) -> None:
    beside = entries(self.tree)
    self.wrapper.append(key)
    self.extras |= {k: v for k, v in beside.items() if k != key}
    self.tree = beside[key]


def find(tree: Any, key: str | None = None, prefix: str | None = None) -> Found:
  """The state dict in a tree.

  key: the entry to take, "a/b" for an entry of an entry; without it, entries are entered by their
  names in WRAPPERS. prefix: take the names that begin with it, and strip it; without it, prefixes
  are stripped that all names share. Raises FileFormatError, which lists what there is.
  """
  found = Found(tree)
  for part in key.split("/") if key else ():
    inside = entries(found.tree)
    if inside is None or part not in inside:
      raise FileFormatError(f"no entry {part!r} (--key {key}): {_contents(found.tree)}")
    found.enter(part)
  _enter_wrappers(found)
  inside = entries(found.tree)
  arrays = {k: v for k, v in (inside or {}).items() if type(k) is str and is_array(v)}
  if not arrays:
    raise FileFormatError(_no_arrays(found.tree))
  if passed := {k: v for k, v in inside.items() if k not in arrays}:
    found.extras |= passed
    found.notes.append(f"passed over what is no array: {_list(passed)}")
  found.arrays = _strip_prefix(arrays, prefix, found) if prefix else _strip(arrays, found)
  return found


def _enter_wrappers(found: Found) -> None:
  while True:
    inside = entries(found.tree)
    fit = [k for k in WRAPPERS if inside and _leads_to_arrays(inside.get(k), set())]
    if not fit:
      return
    if len(found.wrapper) >= _MAX_WRAPPERS:
      raise FileFormatError(f"weights are wrapped more than {_MAX_WRAPPERS} times")
    beside = [k for k in inside if type(k) is str and k != fit[0] and _holds_arrays(inside[k])]
    loose = sum(map(is_array, inside.values()))
    if beside or loose:
      also = ", ".join(f"{k[:60]!r}" for k in beside[:10]) or f"{loose} arrays outside of it"
      found.notes.append(
        f"took the entry {fit[0]!r}; beside it: {also} (tools/convert.py --key NAME takes another)"
      )
    found.enter(fit[0])


def _holds_arrays(value: Any) -> bool:
  inside = entries(value)
  return inside is not None and any(type(k) is str and is_array(v) for k, v in inside.items())


def _leads_to_arrays(value: Any, seen: set[int]) -> bool:
  """Whether a dict holds arrays, or an entry of WRAPPERS in it does. seen: visited dicts."""
  inside = entries(value)
  if inside is None or id(inside) in seen or len(seen) > 64:
    return False
  seen.add(id(inside))
  return _holds_arrays(value) or any(_leads_to_arrays(inside.get(k), seen) for k in WRAPPERS)


def _strip_prefix(arrays: dict, prefix: str, found: Found) -> dict[str, TensorRef]:
  """The arrays under a prefix that was asked for."""
  prefix = prefix if prefix.endswith(".") else f"{prefix}."
  inside = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
  if not inside:
    raise FileFormatError(f"no name begins with {prefix!r} (--prefix); names: {_list(arrays)}")
  if len(inside) < len(arrays):
    rest = [k for k in arrays if not k.startswith(prefix)]
    found.notes.append(f"left out {len(rest)} arrays without the prefix {prefix!r}: {_some(rest)}")
  found.wrapper.append(prefix)
  return inside


def _strip(arrays: dict, found: Found) -> dict[str, TensorRef]:
  """The arrays without prefixes that all names share, and without parts that wrappers inserted."""
  counters = {k: v for k, v in arrays.items() if k in _COUNTERS}
  names = {k: k for k in arrays if k not in counters}  # in the file -> stripped
  for _ in range(_MAX_PREFIXES):
    prefix = next((p for p in _SHARED if names and all(map(_starts(p), names.values()))), None)
    if prefix is None:
      break
    found.wrapper.append(prefix)
    names = {k: name.removeprefix(prefix) for k, name in names.items()}
  if counters and any(w.endswith(".") for w in found.wrapper):
    found.extras |= counters
    found.notes.append(f"passed over counters of an average: {', '.join(counters)}")
  else:
    names |= {k: k for k in counters}
  inserted = {k: _INSERTED.sub("", name) for k, name in names.items()}
  if changed := sorted(k for k in names if names[k] != inserted[k]):
    found.notes.append(f"stripped wrappers inside of {len(changed)} names, such as {changed[0]!r}")
  out = {name: arrays[k] for k, name in inserted.items()}
  if len(out) < len(inserted):
    raise FileFormatError("two names are the same without the parts that wrappers inserted")
  return out


def _starts(prefix: str):
  return lambda name: name.startswith(prefix) and len(name) > len(prefix)


# --- messages -----------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
  """The type of a value in words: torch.nn.Linear, int, ..."""
  if isinstance(value, Placeholder | Name):
    return value.name[:80]
  if isinstance(value, TensorRef):
    return repr(value) if is_array(value) else f"array of {value.dtype}"
  return type(value).__name__


def _some(names: list) -> str:
  return ", ".join(str(n)[:60] for n in names[:10]) + (", ..." if len(names) > 10 else "")


def _list(items: Mapping) -> str:
  return _some([f"{str(k)[:60]} ({kind_of(v)})" for k, v in items.items()])


def _contents(tree: Any) -> str:
  inside = entries(tree)
  return f"the file contains a {kind_of(tree)}" if inside is None else f"there are {_list(inside)}"


def _is_module(value: Any) -> bool:
  return (
    isinstance(value, Placeholder)
    and isinstance(value.state, dict)
    and ("_modules" in value.state or "_parameters" in value.state)
  )


def _no_arrays(tree: Any) -> str:
  inside = entries(tree)
  for value in (tree, *(inside or {}).values()):
    if _is_module(value):
      return (
        f"contains a whole pickled module, {value.name[:200]}, whose code we do not run: load it "
        "where that code is installed, and save model.state_dict()"
      )
  if inside is None:
    return f"contains a {kind_of(tree)}, expected a dict of arrays"
  if not inside:
    return "no state dict: it is empty"
  below = [k for k, v in inside.items() if type(k) is str and _leads_to_arrays(v, set())]
  advice = f"; choose one with --key of tools/convert.py: {_some(below)}" if below else ""
  return f"no state dict: {len(inside)} entries are not arrays: {_list(inside)}{advice}"


# --- TorchScript --------------------------------------------------------------------------------


def walk_modules(root: Placeholder) -> tuple[dict[str, TensorRef], dict[str, int]]:
  """({dotted name: tensor} of a tree of modules, numbers of CLIP's archives among them)."""
  out, todo, characters = {}, [("", root, 0)], 0
  while todo:
    name, node, depth = todo.pop()
    if isinstance(node, TensorRef):
      out[name] = node
    elif isinstance(node, Placeholder) and isinstance(node.state, dict):
      prefix = f"{name}." if name else ""
      children = [
        (f"{prefix}{k}", v, depth + 1)
        for k, v in node.state.items()
        if isinstance(v, TensorRef | Placeholder)
      ]
      todo += reversed(children)
      characters += sum(len(child) for child, *_ in children)
      many = len(todo) + len(out) > _MAX_NAMES or characters > _MAX_NAME_CHARACTERS
      if depth > 64 or many:
        raise FileFormatError("a TorchScript archive whose modules contain each other")
  scalars = {}
  for name in _ARCHIVE_SCALARS:
    if name in out and out[name].dtype == np.int64 and out[name].shape == ():
      scalars[name] = int(out.pop(name).read())
  return out, scalars
