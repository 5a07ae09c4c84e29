"""Dictionary keys of a pickle: checked, so that hashing and comparing them stays cheap.

Python's hashes of numbers and tuples can be predicted: a file could contain many keys with one
hash, and each insertion would compare all of them. Hashes of text are random in each process.
"""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from xmodal_jax.interop.torch_files.names import Name, NumpyDtype, Placeholder
from xmodal_jax.interop.torch_files.tensor import FileFormatError, Storage, TensorRef

_DISTINCT = (1 << 61) - 1  # integers below it have hashes of their own (sys.hash_info.modulus)
_SAME_HASH = 16  # keys of one hash; by chance there are two
_DEPTH = 32  # of tuples in tuples
_BY_IDENTITY = (Placeholder, TensorRef, NumpyDtype, Storage, np.dtype)


class Keys:
  """Checks the keys of all dictionaries and sets of one pickle.

  charge(n) counts n units of work against the budget of the pickle.
  """

  def __init__(self, charge: Callable[[int], None]):
    self.charge = charge
    self.seen: set[str] = set()
    self.same_hash: collections.Counter[int] = collections.Counter()

  def check(self, value: Any) -> Any:
    """The key to store, usually `value`: NumPy scalars become Python's, sets a Placeholder.

    Raises FileFormatError for values that cannot be keys, and for too many keys of one hash.
    """
    kind = type(value)
    if kind is str or kind is bytes:
      self.charge(len(value) >> 6)  # an equal key is compared to the last character
      return value
    if value is None or kind is bool or kind is Name or (kind is int and abs(value) < _DISTINCT):
      return value
    if isinstance(value, np.generic):
      return self.check(float(value) if isinstance(value, np.longdouble) else value.item())
    if isinstance(value, _BY_IDENTITY):
      return value
    text = self._text(value, 0)
    if text is None:
      return Placeholder(f"builtins.{kind.__name__}", (value,))
    if text not in self.seen:
      self.seen.add(text)
      self.same_hash[hash(value)] += 1
      if self.same_hash[hash(value)] > _SAME_HASH:
        raise FileFormatError(f"more than {_SAME_HASH} dictionary keys with the same hash")
    return value

  def _text(self, value: Any, depth: int) -> str | None:
    """A text that only equal keys share; None for keys that contain sets."""
    kind = type(value)
    if kind is str:
      text = f"{len(value)}:{value}"
    elif kind is bytes:
      text = value.hex()
    elif kind is int:
      text = f"{value:x}"
    elif kind is tuple:
      if depth > _DEPTH:
        raise FileFormatError(f"a dictionary key of tuples nested more than {_DEPTH} deep")
      self.charge(1 + len(value))
      parts = [self._text(v, depth + 1) for v in value]
      return None if None in parts else f"({','.join(parts)})"
    elif kind is Name:
      text = value.name
    elif value is None or kind in (bool, float, complex):
      text = repr(value)
    elif isinstance(value, np.generic):
      text = f"{value.dtype}:{value.tobytes().hex()}"
    elif kind is frozenset:
      return None
    elif isinstance(value, _BY_IDENTITY):
      text = str(id(value))
    else:
      raise FileFormatError(f"a dictionary key of type {kind.__name__}")
    self.charge(len(text) >> 3)
    return f"{kind.__name__} {text}"
