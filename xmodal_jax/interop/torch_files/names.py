"""Which globals of a pickle are data.

Nothing is imported: a global is a `Name`. A call is a lookup in the fixed table CALLS. Other names
that look like classes become a `Placeholder`, which records its arguments; the rest is refused.
"""

import re
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from xmodal_jax.interop.torch_files.tensor import (
  DTYPES,
  STORAGE_DTYPES,
  FileFormatError,
  Storage,
  TensorRef,
  UnsafeFileError,
  contiguous,
)


class Name:
  """A global of a pickle, by its dotted name; nothing is imported."""

  __slots__ = ("name",)

  def __init__(self, name: str):
    self.name = name

  def __eq__(self, other):
    return isinstance(other, Name) and other.name == self.name

  def __hash__(self):
    return hash(self.name)

  def __repr__(self):
    return f"Name({self.name!r})"


class Placeholder:
  """Stands for an object of the class `name`: constructor arguments, state and contents."""

  __slots__ = ("args", "elements", "items", "name", "state")

  def __init__(self, name: str, args: tuple = ()):
    self.name, self.args, self.state = name, args, None
    self.elements, self.items = [], {}  # of subclasses of list and dict

  def __repr__(self):
    return f"Placeholder({self.name!r})"


class _NumpyDtype:
  """A numpy.dtype whose byte order BUILD sets."""

  __slots__ = ("dtype",)

  def __init__(self, spec: str):
    if not re.fullmatch(r"[<>=|]?[?biufcOSU]\d{0,6}", spec):
      raise FileFormatError(f"numpy dtype {spec[:40]!r}")
    self.dtype = np.dtype(spec)


_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2
_NOT_DATA = sys.stdlib_module_names | {
  "__builtin__", "cPickle", "commands", "copy_reg", "exceptions", "popen2", "urllib2",
  "distutils", "pip", "pkg_resources", "setuptools",
}  # fmt: skip
# The only globals of the standard library that a file may refer to, as `Name` or `Placeholder`.
_STDLIB_DATA = {
  "argparse.Namespace", "types.SimpleNamespace", "decimal.Decimal", "fractions.Fraction",
  "uuid.UUID", "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
  "datetime.timezone", *(f"pathlib.{p}{q}" for p in ("", "Pure", "Posix", "Windows", "PurePosix",
  "PureWindows") for q in ("Path",)),
  *(f"builtins.{t}" for t in ("bool", "int", "float", "str", "bytes", "list", "tuple", "dict",
  "object", "range", "slice", "long", "unicode", "xrange")),
}  # fmt: skip
# Functions and lower-case classes whose calls become a Placeholder.
_RECORDED = {
  "torch.device", "torch.serialization._get_layout", "builtins.slice", "builtins.range",
  "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
  "datetime.timezone", "numpy.random._pickle.__randomstate_ctor",
  "numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__bit_generator_ctor",
  "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor",
  "torch._utils._rebuild_nested_tensor", "torch._utils._rebuild_meta_tensor_no_storage",
  "torch._utils._rebuild_wrapper_subclass",
}  # fmt: skip


def _like_a_class(name: str) -> bool:
  return name.startswith("__torch__.") or bool(re.match("_*[A-Z]", name.rpartition(".")[2]))


class Machine(Protocol):
  """The methods of the unpickler that calls use."""

  def key(self, value: Any) -> Any: ...

  def charge(self, n: int) -> None: ...


def find(module: str, name: str) -> Name:
  """The Name of a global. Raises UnsafeFileError for code of the standard library."""
  module = _OLD_NAMES.get(module, module)
  full = f"{module}.{name}"
  if len(full) > 1000 or not re.fullmatch(r"[\w.<>-]+", full):
    raise FileFormatError(f"a global with the name {full[:80]!r}")
  if module.partition(".")[0] in _NOT_DATA and full not in CALLS and full not in _STDLIB_DATA:
    raise UnsafeFileError(full)
  return Name(full)


def call(vm: Machine, function: Any, args: Any, new: bool = False) -> Any:
  """The result of REDUCE and similar opcodes. new: the opcode says that `function` is a class."""
  if not isinstance(function, Name) or type(args) is not tuple:
    raise FileFormatError(f"the pickle calls an object of type {type(function).__name__}")
  name = function.name
  if name in CALLS:
    return CALLS[name](vm, *args)
  if new or name in _RECORDED or _like_a_class(name):
    return Placeholder(name, args)
  raise UnsafeFileError(name)


def build(target: Any, state: Any) -> None:
  """BUILD: sets the state of an object that `call` returned."""
  if isinstance(target, Placeholder):
    target.state = state
  elif isinstance(target, TensorRef) and target.storage is None:
    _, shape, dtype, fortran, data = state
    target.dtype = dtype.dtype
    if not target.dtype.hasobject:
      data = bytes_of(data)
      stride = contiguous(shape[::-1])[::-1] if fortran else contiguous(shape)
      ref = TensorRef(Storage(data, 0, len(data)), 0, shape, stride, dtype.dtype)
      target.shape, target.stride, target.storage = ref.shape, ref.stride, ref.storage
  elif isinstance(target, _NumpyDtype):
    if state[2] is not None or state[3] is not None:
      raise FileFormatError("a structured numpy dtype")
    if state[1] in (">", "<"):
      target.dtype = target.dtype.newbyteorder(state[1])
  elif type(target) is not dict:  # a state dict's _metadata, versions of modules: ignored
    raise FileFormatError(f"state for an object of type {type(target).__name__}")


def _pairs(vm: Machine, *args) -> dict:
  """OrderedDict and Counter: a list of pairs in files of Python 2, else empty."""
  vm.charge(len(args[0]) if args else 0)
  pairs = args[0].items() if args and type(args[0]) is dict else (args[0] if args else ())
  return {vm.key(k): v for k, v in pairs}


def _tensor(vm, storage, offset, shape, stride, *_, dtype=None):
  raw, stored = storage  # from the reader's persistent id
  if type(raw) is not Storage:
    raise FileFormatError("a tensor without a storage")
  return TensorRef(raw, offset, shape, stride, dtype or stored)


def _tensor_v3(vm, storage, offset, shape, stride, grad, hooks, dtype, *_):
  return _tensor(vm, storage, offset, shape, stride, dtype=torch_dtype(dtype))


def _from_type(vm, function, cls, args, state):
  return call(vm, function, args)


def _first(vm, value, *_):
  return value


def _sequence(kind):
  def make(vm, values=(), *_):
    vm.charge(len(values))
    return kind(map(vm.key, values)) if kind in (set, frozenset) else kind(values)

  return make


def _bytes(vm, text, encoding="utf-8"):
  """Bytes in protocol 2, which writes them as text in latin-1."""
  if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8"):
    raise FileFormatError("_codecs.encode of something other than text")
  vm.charge(len(text))
  return text.encode(encoding)


def _bytearray(vm, value=b"", encoding="latin1"):
  return _bytes(vm, value, encoding) if type(value) is str else _first(vm, bytes_of(value))


def _numpy_scalar(vm, dtype, data):
  data = bytes_of(data)
  if dtype.dtype.hasobject or dtype.dtype.itemsize != len(data) or not data:
    raise FileFormatError(f"numpy scalar of {dtype.dtype} with {len(data)} bytes")
  return np.frombuffer(data, dtype.dtype)[0]


def _numpy_array(vm, cls, shape, kind):
  return TensorRef(None, 0, (), (), np.dtype("uint8"))  # BUILD sets the rest


def _reconstructor(vm, cls, base, state):
  return Placeholder(cls.name, (state,))


CALLS: dict[str, Callable] = {
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_tensor_v3": _tensor_v3,
  "torch._utils._rebuild_parameter": _first,
  "torch._utils._rebuild_parameter_with_state": _first,
  "torch._tensor._rebuild_from_type_v2": _from_type,
  "torch.nn.parameter.Parameter": _first,
  "torch.Size": _sequence(tuple),
  "torch.jit._pickle.restore_type_tag": _first,
  "collections.OrderedDict": _pairs,
  "collections.Counter": _pairs,
  "collections.defaultdict": lambda vm, *_: {},
  "collections.deque": _sequence(list),
  "builtins.set": _sequence(set),
  "builtins.frozenset": _sequence(frozenset),
  "builtins.complex": lambda vm, re, im: complex(float(re), float(im)),
  "builtins.bytearray": _bytearray,
  "copyreg.__newobj__": lambda vm, cls, *args: call(vm, cls, args, new=True),
  "copyreg._reconstructor": _reconstructor,
  "_codecs.encode": _bytes,
  "numpy.dtype": lambda vm, spec, *_: _NumpyDtype(spec),
}
for _core in ("numpy.core", "numpy._core"):
  CALLS[f"{_core}.multiarray.scalar"] = _numpy_scalar
  CALLS[f"{_core}.multiarray._reconstruct"] = _numpy_array
for _kind in ("int", "double", "bool", "tensor"):
  CALLS[f"torch.jit._pickle.build_{_kind}list"] = _first


def bytes_of(value: Any) -> bytes:
  """The bytes of a value, which may be text: a Python 2 `str` that is valid UTF-8."""
  if type(value) is str:
    return value.encode()
  if type(value) is not bytes:
    raise FileFormatError(f"{type(value).__name__} instead of bytes")
  return value


def torch_dtype(name: Name) -> np.dtype:
  """torch.float16 -> np.float16."""
  module, _, last = name.name.rpartition(".")
  if module != "torch" or last not in DTYPES:
    raise FileFormatError(f"tensor of type {name.name}")
  return DTYPES[last]


def storage_dtype(name: Any) -> np.dtype:
  """The dtype that a storage class stands for: torch.HalfStorage, torch.cuda.HalfStorage, ..."""
  if isinstance(name, Name) and name.name.startswith("torch."):
    last = name.name.rpartition(".")[2]
    if last.endswith("Storage") and last.removesuffix("Storage") in STORAGE_DTYPES:
      return STORAGE_DTYPES[last.removesuffix("Storage")]
  raise FileFormatError(f"storage of type {name!r:.80}")
