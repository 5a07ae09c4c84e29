"""Writes files that torch.load reads, also with weights_only, without torch: an array at a time."""

import dataclasses
import os
import pathlib
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xmodal_jax.interop.torch_files.tensor import DTYPES, STORAGE_DTYPES, TensorRef, contiguous

_ROOT = "archive"
_ALIGN = 64  # as in torch, so that entries can be mapped as arrays
_STORAGES = {d: f"{n}Storage" for n, d in STORAGE_DTYPES.items() if n != "Untyped"}
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # constant, so that equal trees give equal files
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Lazy:
  """An array that is computed when it is written, and freed afterwards."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]


def write(path: str | os.PathLike, tree: Any) -> None:
  """Writes a torch.save zip of nested dicts, lists, tuples, text, numbers and arrays.

  Arrays may be numpy arrays, TensorRefs or Lazy; one at a time is in memory. The file gets its name
  when it is complete.

    write("model.pth", {"state_dict": {"weight": np.ones((2, 3), np.float32)}})
  """
  path = pathlib.Path(path)
  pickler = _Pickler()
  data = pickler.dump(tree)
  fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with open(fd, "wb") as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
      _entry(archive, "data.pkl", data)
      _entry(archive, "byteorder", b"little")
      for i, array in enumerate(pickler.arrays):
        _entry(archive, f"data/{i}", _fetch(array))
      _entry(archive, "version", b"3\n")
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp allows only the owner
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def _fetch(array: Any) -> memoryview:
  if isinstance(array, Lazy):
    made = array.make()
  else:
    made = array.read() if isinstance(array, TensorRef) else array
  if tuple(made.shape) != tuple(array.shape) or made.dtype != array.dtype:
    raise ValueError(f"made {made.dtype}{made.shape}, declared {array.dtype}{array.shape}")
  made = made.astype(_little(made.dtype), copy=False)
  return memoryview(np.ascontiguousarray(made).reshape(-1).view(np.uint8))


def _little(dtype: np.dtype) -> np.dtype:
  return dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype


def _entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
  """A stored entry whose data begins at a multiple of _ALIGN."""
  info = zipfile.ZipInfo(f"{_ROOT}/{name}", _FIRST_DATE)
  info.file_size = len(data)
  # The condition of ZipFile for 20 more bytes with 64-bit sizes in the header.
  grown = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
  start = archive.fp.tell() + 30 + len(info.filename) + grown + 4
  pad = -start % _ALIGN
  info.extra = struct.pack("<HH", 0x4246, pad) + b"Z" * pad
  with archive.open(info, "w") as f:
    for i in range(0, len(data), _CHUNK):
      f.write(data[i : i + _CHUNK])


class _Pickler:
  """Writes pickle protocol 2. It never calls `__reduce__` of an object."""

  def __init__(self):
    self.out = bytearray(b"\x80\x02")
    self.arrays: list[Any] = []

  def dump(self, tree: Any) -> bytes:
    self.save(tree)
    return bytes(self.out + b".")

  def save(self, value: Any) -> None:
    if isinstance(value, np.generic):
      value = value.item()
    if value is None or value is True or value is False:
      self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif type(value) is int:
      self.integer(value)
    elif type(value) is float:
      self.out += b"G" + struct.pack(">d", value)
    elif type(value) is str:
      data = value.encode("utf-8", "surrogatepass")
      self.out += b"X" + struct.pack("<I", len(data)) + data
    elif isinstance(value, Mapping):
      self.out += b"}("
      for k, v in value.items():
        self.save(k)
        self.save(v)
      self.out += b"u"
    elif isinstance(value, list | tuple):
      self.out += b"](" if isinstance(value, list) else b"("
      for v in value:
        self.save(v)
      self.out += b"e" if isinstance(value, list) else b"t"
    elif isinstance(value, np.ndarray | TensorRef | Lazy):
      self.array(value)
    else:
      raise TypeError(f"{type(value).__name__} cannot be written to a PyTorch file")

  def integer(self, value: int) -> None:
    if -(1 << 31) <= value < 1 << 31:
      self.out += b"J" + struct.pack("<i", value)
    else:
      data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
      self.out += b"\x8a" + struct.pack("<B", len(data)) + data

  def array(self, array: Any) -> None:
    dtype, shape = _little(np.dtype(array.dtype)), tuple(map(int, array.shape))
    old = _STORAGES.get(dtype)
    if old is None and dtype not in DTYPES.values():
      raise TypeError(f"arrays of {dtype} cannot be written to a PyTorch file")
    count = 1
    for d in shape:
      count *= d
    # Types without a storage class are pickled as bytes and a dtype.
    function, numel = ("v2", count) if old else ("v3", count * dtype.itemsize)
    storage = f"torch\n{old}" if old else "torch.storage\nUntypedStorage"
    self.out += f"ctorch._utils\n_rebuild_tensor_{function}\n((".encode()
    self.save("storage")
    self.out += f"c{storage}\n".encode()
    for v in (str(len(self.arrays)), "cpu", numel):
      self.save(v)
    self.out += b"tQ"
    for v in (0, shape, contiguous(shape), False):
      self.save(v)
    self.out += b"ccollections\nOrderedDict\n)R"
    if not old:
      self.out += f"ctorch\n{dtype.name}\n".encode()
    self.out += b"tR"
    self.arrays.append(array)
