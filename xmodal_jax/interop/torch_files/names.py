"""Which globals of a pickle are data.

Nothing is imported: a global is a `Name`. A call is a lookup in the fixed table CALLS. Other names
that look like classes, and functions that only make data (RECORDED), become a `Placeholder`, which
records their arguments: objects beside the weights do not keep anybody from the weights. The rest
is refused by name.
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
  check_shape,
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


class NumpyDtype:
  """A numpy.dtype, whose byte order BUILD sets. dtype: None if arrays of it are not read (dates,
  records)."""

  __slots__ = ("dtype",)

  def __init__(self, spec: str):
    known = re.fullmatch(r"[<>=|]?[?biufcOSU]\d{0,6}", spec)
    self.dtype = np.dtype(spec) if known else None


_OLD_NAMES = {  # Python 2
  "__builtin__": "builtins", "exceptions": "builtins", "copy_reg": "copyreg",
}  # fmt: skip
_NOT_DATA = sys.stdlib_module_names | {
  "__builtin__", "cPickle", "commands", "copy_reg", "exceptions", "popen2", "urllib2",
  "distutils", "pip", "pkg_resources", "setuptools",
}  # fmt: skip
# Modules of the standard library whose classes and constants are data.
_DATA_MODULES = {
  "builtins", "collections", "collections.abc", "configparser", "dataclasses", "datetime",
  "decimal", "enum", "fractions", "inspect", "ipaddress", "logging", "numbers", "pathlib",
  "pathlib._local", "random", "re", "string", "typing", "uuid", "zoneinfo",
}  # fmt: skip
_RECORDED_STDLIB = {
  "array._array_reconstructor", "array.array", "builtins.range", "builtins.slice",
  "builtins.type", "builtins.xrange", "datetime.date", "datetime.datetime", "datetime.time",
  "datetime.timedelta", "datetime.timezone", "functools.partial", "inspect._empty",
  "itertools.count", "logging.getLogger", "operator.attrgetter", "operator.itemgetter",
  "re._compile", "time.struct_time", "types.GenericAlias", "types.UnionType", "uuid.UUID",
  "zoneinfo.ZoneInfo._unpickle",
  # typing.Optional[int] and int | None
  "_operator.getitem", "_operator.or_", "_functools.reduce", "builtins.reduce",
}  # fmt: skip
# The other globals of the standard library that a file may refer to.
_STDLIB_DATA = _RECORDED_STDLIB | {
  "argparse.Namespace", "types.SimpleNamespace", "types.NoneType", "types.MappingProxyType",
  *(f"builtins.{t}" for t in ("bool", "int", "float", "str", "bytes", "list", "tuple", "dict",
  "object", "long", "unicode", "memoryview")),
}  # fmt: skip
# Storages of quantised tensors, which become a Placeholder: sizes of their elements only.
_QUANTISED = {"QInt8": "int8", "QUInt8": "uint8", "QInt32": "int32"}
_QUANTISED |= {"QUInt4x2": "uint8", "QUInt2x4": "uint8"}
_STORAGES = STORAGE_DTYPES | {name: np.dtype(dtype) for name, dtype in _QUANTISED.items()}
# Functions and lower-case classes whose calls become a Placeholder.
_RECORDED = _RECORDED_STDLIB | {
  "torch.device", "torch.serialization._get_layout", "numpy.ma.core._mareconstruct",
  "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor",
  "torch._utils._rebuild_nested_tensor", "torch._utils._rebuild_meta_tensor_no_storage",
  "torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_wrapper_subclass",
}  # fmt: skip
_RECORDED_NUMPY = re.compile(
  r"numpy\.random\.\w+\.(__pyx_unpickle_\w+|__(randomstate|generator|bit_generator)_ctor)"
)


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
  data = module in _DATA_MODULES and re.fullmatch(r"_*[A-Z]\w*", name)
  known = data or full in CALLS or full in _STDLIB_DATA
  if not known and module.partition(".")[0] in _NOT_DATA:
    raise UnsafeFileError(full)
  return Name(full)


def call(vm: Machine, function: Any, args: Any, new: bool = False) -> Any:
  """The result of REDUCE and similar opcodes. new: the opcode says that `function` is a class."""
  if not isinstance(function, Name) or type(args) is not tuple:
    raise FileFormatError(f"the pickle calls an object of type {type(function).__name__}")
  name = function.name
  if name in CALLS:
    vm.charge(1 + len(args))
    return CALLS[name](vm, *args)
  if new or name in _RECORDED or _like_a_class(name) or _RECORDED_NUMPY.fullmatch(name):
    return Placeholder(name, args)
  raise UnsafeFileError(name)


def build(vm: Machine, target: Any, state: Any) -> None:
  """BUILD: sets the state of an object that `call` returned."""
  if isinstance(target, Placeholder):
    target.state = state
  elif isinstance(target, TensorRef) and target.storage is None:
    _, shape, dtype, fortran, data = state
    _set_array(vm, target, shape, dtype, fortran, data)
  elif isinstance(target, NumpyDtype):
    if state[2] is not None or state[3] is not None:
      target.dtype = None  # structured
    if target.dtype is not None and state[1] in (">", "<"):
      target.dtype = target.dtype.newbyteorder(state[1])
  elif type(target) is not dict:  # a state dict's _metadata, versions of modules: ignored
    raise FileFormatError(f"state for an object of type {type(target).__name__}")


def _set_array(
  vm: Machine, target: TensorRef, shape: Any, dtype: NumpyDtype, fortran: Any, data: Any
) -> None:
  """Makes `target` the array; without a storage, as it was, if arrays of the dtype are not read."""
  target.dtype = np.dtype(object) if dtype.dtype is None else dtype.dtype
  if target.dtype.hasobject:
    return
  data = bytes_of(vm, data)
  check_shape(shape)
  stride = contiguous(shape[::-1])[::-1] if fortran else contiguous(shape)
  ref = TensorRef(Storage(data, 0, len(data)), 0, shape, stride, target.dtype)
  target.shape, target.stride, target.storage = ref.shape, ref.stride, ref.storage


def _pairs(vm: Machine, *args) -> dict:
  """OrderedDict and Counter: a list of pairs in files of Python 2, else empty."""
  vm.charge(len(args[0]) if args else 0)
  pairs = args[0].items() if args and type(args[0]) is dict else (args[0] if args else ())
  return {vm.key(k): v for k, v in pairs}


def _tensor(vm, storage, offset, shape, stride, *rest, dtype=None):
  raw, stored = storage  # from the reader's persistent id
  dtype = dtype or stored
  if type(raw) is not Storage:
    raise FileFormatError("a tensor without a storage")
  flags = rest[2] if len(rest) > 2 and type(rest[2]) is dict else {}
  flip = {name: flags.get(name) is True for name in ("conj", "neg")}
  return TensorRef(raw, offset, shape, stride, dtype, **flip)


def _tensor_v3(vm, storage, offset, shape, stride, grad, hooks, dtype, *rest):
  known = torch_dtype(dtype)
  if known is None:
    return Placeholder(dtype.name, (offset, shape, stride))
  return _tensor(vm, storage, offset, shape, stride, grad, hooks, *rest, dtype=known)


def _from_type(vm, function, cls, args, state):
  return call(vm, function, args)


def _first(vm, value, *_):
  return value


def _sequence(kind):
  def make(vm, values=(), *_):
    vm.charge(4 * len(values))
    return kind(map(vm.key, values)) if kind in (set, frozenset) else kind(values)

  return make


def _complex(vm, re, im):
  if not all(type(x) in (int, float) for x in (re, im)):
    raise FileFormatError("a complex number of something other than numbers")
  return complex(re, im)


def _bytes(vm, text, encoding="utf-8"):
  """Bytes in protocol 2, which writes them as text in latin-1."""
  if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8"):
    raise FileFormatError("_codecs.encode of something other than text")
  vm.charge(len(text))
  return text.encode(encoding)


def _bytearray(vm, value=b"", encoding="latin1"):
  return _bytes(vm, value, encoding) if type(value) is str else bytes_of(vm, value)


def _numpy_scalar(vm, dtype, data):
  if dtype.dtype is None:
    return Placeholder("numpy.generic", (data,))
  data = bytes_of(vm, data)
  if dtype.dtype.hasobject or dtype.dtype.itemsize != len(data) or not data:
    raise FileFormatError(f"numpy scalar of {dtype.dtype} with {len(data)} bytes")
  vm.charge(len(data))
  return np.frombuffer(data, dtype.dtype)[0]


def _numpy_array(vm, cls, shape, kind):
  return TensorRef(None, 0, (), (), np.dtype("uint8"))  # BUILD sets the rest


def _numpy_buffer(vm, data, dtype, shape, order):
  """An array in protocol 5."""
  array = _numpy_array(vm, None, (), b"")
  _set_array(vm, array, shape, dtype, order == "F", data)
  return array


def _reconstructor(vm, cls, base, state):
  return Placeholder(cls.name, (state,))


def _new_with_keywords(vm, cls, args, kwargs):
  return call(vm, cls, (*args, kwargs), new=True)


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
  "builtins.complex": _complex,
  "builtins.bytearray": _bytearray,
  "copyreg.__newobj__": lambda vm, cls, *args: call(vm, cls, args, new=True),
  "copyreg.__newobj_ex__": _new_with_keywords,
  "copyreg._reconstructor": _reconstructor,
  "_codecs.encode": _bytes,
  "numpy.dtype": lambda vm, spec, *_: NumpyDtype(spec),
}
for _core in ("numpy.core", "numpy._core"):
  CALLS[f"{_core}.multiarray.scalar"] = _numpy_scalar
  CALLS[f"{_core}.multiarray._reconstruct"] = _numpy_array
  CALLS[f"{_core}.numeric._frombuffer"] = _numpy_buffer
for _kind in ("int", "double", "bool", "tensor"):
  CALLS[f"torch.jit._pickle.build_{_kind}list"] = _first


def bytes_of(vm: Machine, value: Any) -> bytes:
  """The bytes of a value, which may be text: a Python 2 `str` that is valid UTF-8."""
  if type(value) is str:
    vm.charge(len(value))
    return value.encode()
  if type(value) is not bytes:
    raise FileFormatError(f"{type(value).__name__} instead of bytes")
  return value


def torch_dtype(name: Name) -> np.dtype | None:
  """torch.float16 -> np.float16; None for a dtype of torch that NumPy has not."""
  if not isinstance(name, Name) or not name.name.startswith("torch."):
    raise FileFormatError("a tensor whose type is not a dtype of torch")
  return DTYPES.get(name.name.removeprefix("torch."))


def storage_dtype(name: Any) -> np.dtype:
  """The dtype that a storage class stands for: torch.HalfStorage, torch.cuda.HalfStorage, ..."""
  if not isinstance(name, Name):
    raise FileFormatError(f"a storage whose type is a {type(name).__name__}")
  last = name.name.rpartition(".")[2].removesuffix("Storage")
  if not name.name.startswith("torch.") or last not in _STORAGES:
    raise FileFormatError(f"a storage of type {name.name}")
  return _STORAGES[last]
