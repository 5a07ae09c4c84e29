"""The two formats of torch.save before its zip format (torch 1.6)."""

import re
import struct
from typing import Any

import numpy as np

from xmodal_jax.interop.torch_files import foreign, names, pickles
from xmodal_jax.interop.torch_files.tensor import (
  FileFormatError,
  Source,
  Storage,
  TensorRef,
  UnsafeFileError,
)

BIG_ENDIAN = (
  "written on a big-endian machine, which is not read: load it with torch on a little-endian "
  "machine (x86, Arm) and save it again"
)
_MAGIC = 0x1950A86A20F9469CFC6C


def read_magic(source: Source) -> Any:
  """The format of torch 0.2 to 1.5: five pickles, then the storages. Bare pickles are refused."""
  data = source.map()
  first = pickles.Unpickler(data)
  try:
    magic = first.load()
  except UnsafeFileError:
    raise
  except FileFormatError as e:
    raise FileFormatError(
      foreign.text_file(data[:512])
      or "neither a PyTorch nor a safetensors file, or a damaged one: compare its size with the "
      "original's, and download it again"
    ) from e
  if type(magic) is not int or magic != _MAGIC:
    raise FileFormatError(
      "a bare pickle (pickle.dump), not a file of torch.save: load it in Python and write its "
      "arrays with torch.save"
    )
  protocol, system = first.load(), first.load()
  if type(protocol) is not int or protocol != 1001 or not isinstance(system, dict):
    raise FileFormatError("a legacy file of torch.save with an unknown protocol")
  if system.get("little_endian", True) is not True:
    raise FileFormatError(BIG_ENDIAN)
  storages = _Storages(source)
  pickled = pickles.Unpickler(data, first.pos, storages.persistent)
  tree = pickled.load()
  pickled = pickles.Unpickler(data, pickled.pos)
  storages.place(pickled.load(), pickled.pos)
  return tree


def check_storage_id(kind: Any, key: Any, count: Any) -> None:
  """Raises FileFormatError unless a persistent id has these parts of a storage."""
  if type(kind) is not str or kind != "storage" or type(key) is not str or len(key) > 255:
    raise FileFormatError("a persistent id that is not a storage")
  if type(count) is not int or not 0 <= count < 1 << 60:
    raise FileFormatError("a storage whose size is not a natural number")


class _Storages:
  """The storages of a file, which the pickle refers to before their offsets are known."""

  def __init__(self, source: Source):
    self.source = source
    self.by_key: dict[str, tuple[Storage, np.dtype]] = {}
    self.views: list[tuple[Storage, Storage, int]] = []  # (view, its storage, offset in bytes)

  def persistent(self, pid: Any) -> Any:
    """(storage, dtype) of a persistent id."""
    if type(pid) is not tuple or not pid:
      raise FileFormatError("a persistent id that is not a storage")
    if pid[0] == "module":
      return pid[1]
    kind, cls, key, _, numel, view = pid
    dtype = names.storage_dtype(cls)
    check_storage_id(kind, key, numel)
    if key not in self.by_key:
      storage = Storage(None, 0, numel * dtype.itemsize)
      storage.limit = max(storage.limit, self.source.size)
      self.by_key[key] = storage, dtype
    root, _ = self.by_key[key]
    if numel * dtype.itemsize > root.nbytes:
      raise FileFormatError(f"storage {key[:40]!r} with two sizes")
    return (root, dtype) if view is None else (self._view(root, dtype, view), dtype)

  def _view(self, root: Storage, dtype: np.dtype, view: Any) -> Storage:
    _, offset, size = view
    if not type(offset) is type(size) is int:
      raise FileFormatError("a view of a storage that is not a range")
    part = Storage(None, 0, size * dtype.itemsize)
    part.limit = root.limit
    if not 0 <= offset * dtype.itemsize <= root.nbytes - part.nbytes:
      raise FileFormatError("a view that ends beyond its storage")
    self.views.append((part, root, offset * dtype.itemsize))
    return part

  def place(self, keys: Any, pos: int) -> None:
    """Sets the offsets. keys: the list of storages in the file, in order; pos: of the first."""
    remaining = dict(self.by_key)
    known = type(keys) is list and all(type(k) is str and k in remaining for k in keys)
    if not known or len(set(keys)) != len(keys):
      raise FileFormatError("a list of storages that does not fit its tensors")
    for key in keys:
      storage, dtype = remaining.pop(key)
      (numel,) = struct.unpack("<q", self.source.read(pos, 8))
      if numel * dtype.itemsize != storage.nbytes:
        raise FileFormatError(
          f"storage {key[:40]!r} has {numel} elements, its tensors say otherwise"
        )
      storage.place(self.source, pos + 8)
      pos += 8 + storage.nbytes
    if remaining:
      raise FileFormatError(f"{len(remaining)} storages are missing")
    for part, root, offset in self.views:
      part.place(self.source, root.offset + offset)


def _tar_members(source: Source) -> dict[str, tuple[int, int]]:
  """{name: (offset, size)} of regular files. The tarfile module can hang on damaged headers."""
  members, pos = {}, 0
  while any(header := source.read(pos, 512)):
    digits = [header[i:j].strip(b" \0") for i, j in ((124, 136), (148, 156))]
    if not all(re.fullmatch(rb"[0-7]+", d) for d in digits):
      raise FileFormatError("a damaged tar header")
    size, checksum = (int(d, 8) for d in digits)
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32:
      raise FileFormatError("a damaged tar header (checksum)")
    if header[156:157] in b"0\0":
      members[header[:100].rstrip(b"\0").decode("latin1").removeprefix("./")] = pos + 512, size
    pos += 512 + -(-size // 512) * 512
  return members


def read_tar(source: Source) -> Any:
  """The format of torch < 0.2: a tar of storages, tensors and a pickle."""
  members, data = _tar_members(source), source.map()
  if not {"storages", "tensors", "pickle"} <= set(members):
    some = ", ".join(list(members)[:3])
    raise FileFormatError(f"a tar archive ({some}), not one of torch.save: unpack it first")
  typed: dict[Any, tuple[Storage, np.dtype]] = {}
  tensors: dict[int, TensorRef] = {}

  def load(pos, persistent=None):
    reader = pickles.Unpickler(data, pos, persistent)
    return reader.load(), reader.pos

  def persistent(pid):
    return pid[0] if type(pid) is tuple else tensors[int(pid[:20] if type(pid) is str else pid)]

  try:
    count, pos = load(members["storages"][0])
    for _ in range(count):
      (key, _, cls), pos = load(pos)
      dtype = names.storage_dtype(cls)
      check_storage_id("storage", key, 0)
      (numel,) = struct.unpack("<q", source.read(pos, 8))
      storage = Storage(source, 0, numel * dtype.itemsize)
      storage.place(source, pos + 8)
      typed[key], pos = (storage, dtype), pos + 8 + storage.nbytes
    views, pos = load(pos)
    for target, root, offset, numel in views:
      check_storage_id("storage", target, numel)
      check_storage_id("storage", root, offset)
      storage, dtype = typed[root]
      part = Storage(source, 0, numel * dtype.itemsize)
      if not 0 <= offset * dtype.itemsize <= storage.nbytes - part.nbytes:
        raise FileFormatError("a view that ends beyond its storage")
      part.place(source, storage.offset + offset * dtype.itemsize)
      typed[target] = part, dtype
    count, pos = load(members["tensors"][0])
    for _ in range(count):
      (key, storage_key, _), pos = load(pos)
      if type(key) is not int or not 0 <= key < 1 << 60 or type(storage_key) is not str:
        raise FileFormatError("a tensor whose key is not a number")
      (ndim,) = struct.unpack("<i", source.read(pos, 4))
      numbers = struct.unpack(f"<{2 * ndim + 1}q", source.read(pos + 8, 16 * ndim + 8))
      storage, dtype = typed[storage_key]
      shape, stride, offset = numbers[:ndim], numbers[ndim:-1], numbers[-1]
      tensors[key] = TensorRef(storage, offset, shape, stride, dtype)
      pos += 16 * ndim + 16
    return load(members["pickle"][0], persistent)[0]
  except (TypeError, ValueError, KeyError, struct.error, OverflowError) as e:
    if isinstance(e, FileFormatError):
      raise
    raise FileFormatError(f"damaged tar archive of torch.save: {str(e)[:100]}") from e
