"""Reads PyTorch and safetensors files without torch, and without executing code from them.

`read` returns the object tree with TensorRefs for arrays, `state_dict` the named arrays in it. The
format is detected from the content: torch.save zips, TorchScript archives, the two formats of torch
before 1.6, safetensors. `write` makes files that torch.load reads.

  state, info = state_dict("ViT-B-32.pt")
  state["visual.proj"].shape, state["visual.proj"].read()
"""

import hashlib
import itertools
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from xmodal_jax.interop.torch_files import legacy, names, pickles
from xmodal_jax.interop.torch_files import write as write_lib
from xmodal_jax.interop.torch_files.names import Name, Placeholder
from xmodal_jax.interop.torch_files.tensor import (
  FileFormatError,
  Source,
  Storage,
  TensorRef,
  UnsafeFileError,
  contiguous,
)

__all__ = [
  "FileFormatError", "FileInfo", "Lazy", "Name", "Placeholder", "TensorRef", "UnsafeFileError",
  "read", "read_with_format", "sha256", "state_dict", "write",
]  # fmt: skip

Lazy, write = write_lib.Lazy, write_lib.write

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_ARCHIVE_SCALARS = ("input_resolution", "context_length", "vocab_size")
_MAX_HEADER = 100_000_000  # bytes of a safetensors header, the limit of the safetensors library
_MAX_NAMES = 1_000_000
_CHUNK = 1 << 20
_SAFETENSORS = {
  "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
  "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
  "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class FileInfo(TypedDict):
  """What a file contains besides the arrays."""

  format: str  # zip, torchscript, legacy, tar, safetensors
  wrapper: tuple[str, ...]  # keys that lead to the arrays; a last "module." is a stripped prefix
  scalars: dict[str, int]  # input_resolution, context_length, vocab_size of a TorchScript CLIP
  extras: dict[Any, Any]  # other entries of the wrapping dicts: epoch, config, optimizer


def read(path: str | os.PathLike, *, verify: bool = False) -> Any:
  """The object tree of a file: dicts, lists, numbers, text, TensorRefs; Placeholders for the rest.

  verify: also checks the CRC of every array in a zip, which reads the whole file. Raises
  FileFormatError, or UnsafeFileError if the file refers to code.
  """
  return read_with_format(path, verify=verify)[0]


def read_with_format(path: str | os.PathLike, *, verify: bool = False) -> tuple[Any, str]:
  """As `read`, and the name of the format: zip, torchscript, legacy, tar or safetensors."""
  source = Source(path)
  try:
    return _read(source, verify)
  except FileFormatError as e:
    e.args = (f"{os.fspath(path)}: {e}",)
    raise


def _read(source: Source, verify: bool) -> tuple[Any, str]:
  head = source.read(0, min(source.size, 512))
  if head[:4] == b"PK\x03\x04":
    return _read_zip(source, verify)
  if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER:
    return _read_safetensors(source), "safetensors"
  if head[257:262] == b"ustar" or (len(head) == 512 and head[:9] == b"storages\0"):
    return legacy.read_tar(source), "tar"
  for start, what in (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page or xml, not a checkpoint"),
    (b"\x89HDF", "an HDF5 file"),
    (b"", "an empty file"),
  ):
    if head.startswith(start) and (start or not head):
      raise FileFormatError(what)
  return legacy.read_magic(source), "legacy"


# --- torch.save since 1.6, TorchScript ----------------------------------------------------------


class _Zip:
  """Entries of a zip by name. Stored entries are mapped, compressed ones are read into memory."""

  def __init__(self, source: Source):
    self.source = source
    try:
      with open(source.fd, "rb", closefd=False) as f, zipfile.ZipFile(f) as z:
        entries, self.directory = z.infolist(), z.start_dir
    except (
      zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error, ValueError,
      OverflowError, MemoryError, IndexError, KeyError,
    ) as e:  # fmt: skip
      raise FileFormatError(f"damaged or truncated zip archive: {str(e)[:100]}") from e
    self.entries = {e.filename: e for e in entries}
    if len(self.entries) != len(entries):
      raise FileFormatError("a zip archive with two entries of one name")

  def _place(self, e: zipfile.ZipInfo) -> int:
    header = self.source.read(e.header_offset, 30)
    if header[:4] != b"PK\x03\x04" or e.flag_bits & 1:
      raise FileFormatError(f"zip entry {e.filename!r} is damaged or encrypted")
    start = e.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if start + e.compress_size > min(self.directory, self.source.size):
      raise FileFormatError(f"zip entry {e.filename!r} ends beyond the end of the file")
    return start

  def storage(self, name: str, nbytes: int) -> Storage:
    e = self.entries.get(name)
    if e is None:
      raise FileFormatError(f"no zip entry {name!r} for a tensor")
    if nbytes > e.file_size:
      raise FileFormatError(f"a storage of {nbytes} bytes in {name!r}, which has {e.file_size}")
    if e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size:
      storage = Storage(self.source, 0, nbytes)
      storage.place(self.source, self._place(e))
      return storage
    return Storage(self.read(name), 0, nbytes)

  def read(self, name: str) -> bytes:
    """The content of an entry; its CRC is checked."""
    e = self.entries[name]
    data = self.source.read(self._place(e), e.compress_size)
    if e.compress_type == zipfile.ZIP_DEFLATED:
      if e.file_size > 1040 * e.compress_size:  # more than deflate can reach
        raise FileFormatError(f"zip entry {name!r} claims an impossible size")
      try:
        data = zlib.decompressobj(-15).decompress(data, e.file_size + 1)
      except zlib.error as error:
        raise FileFormatError(f"zip entry {name!r}: {error}") from error
    elif e.compress_type != zipfile.ZIP_STORED:
      raise FileFormatError(f"zip entry {name!r} has compression method {e.compress_type}")
    if len(data) != e.file_size or zlib.crc32(data) != e.CRC:
      raise FileFormatError(f"zip entry {name!r} is damaged (size or CRC)")
    return data

  def check(self, name: str) -> None:
    """Raises FileFormatError if the CRC of an entry is wrong."""
    e, crc = self.entries[name], 0
    if e.compress_type != zipfile.ZIP_STORED:
      self.read(name)
      return
    offset, buffer = self._place(e), memoryview(bytearray(min(_CHUNK, e.file_size)))
    for done in range(0, e.file_size, _CHUNK):
      part = buffer[: e.file_size - done]
      self.source.read_into(part, offset + done)
      crc = zlib.crc32(part, crc)
    if crc != e.CRC:
      raise FileFormatError(f"zip entry {name!r} is damaged (CRC)")


def _read_zip(source: Source, verify: bool) -> tuple[Any, str]:
  archive = _Zip(source)
  found = [n for n in archive.entries if n.endswith("/data.pkl") and n.count("/") == 1]
  if len(found) != 1:
    raise FileFormatError(f"a zip archive with {len(found)} data.pkl: not one of torch.save")
  root = found[0].removesuffix("data.pkl")
  if root + "byteorder" in archive.entries and archive.read(root + "byteorder") != b"little":
    raise FileFormatError("a file from a big-endian machine")
  storages: dict[str, Storage] = {}

  def persistent(pid):
    kind, cls, key, _, numel = pid
    dtype = names.storage_dtype(cls)
    if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
      raise FileFormatError("a persistent id that is not a storage")
    name, nbytes = f"{root}data/{key}", numel * dtype.itemsize
    known = storages.get(name)
    if known is None or known.nbytes < nbytes:
      known = storages[name] = archive.storage(name, nbytes)
    return known, dtype

  tree = pickles.Unpickler(archive.read(found[0]), persistent=persistent).load()
  if verify:
    for name in storages:
      archive.check(name)
  return tree, "torchscript" if root + "constants.pkl" in archive.entries else "zip"


# --- safetensors --------------------------------------------------------------------------------


def _unique(pairs: list) -> dict:
  out = dict(pairs)
  if len(out) != len(pairs):
    raise ValueError("a name occurs twice")
  return out


def _read_safetensors(source: Source) -> dict[str, TensorRef]:
  (size,) = struct.unpack("<Q", source.read(0, 8))
  base = 8 + size
  out, ends = {}, [(0, 0)]
  try:
    header = json.loads(source.read(8, size).decode(), object_pairs_hook=_unique)
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      dtype = names.DTYPES[_SAFETENSORS[entry["dtype"]]]
      shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
      if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise FileFormatError(f"offsets of {name[:80]!r}")
      storage = Storage(source, 0, end - begin)
      storage.place(source, base + begin)
      out[name] = TensorRef(storage, 0, shape, contiguous(shape), dtype)
      if out[name].nbytes != end - begin:
        raise FileFormatError(f"{name[:80]!r} has {end - begin} bytes, its shape says otherwise")
      ends.append((begin, end))
  except FileFormatError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    text = f"damaged header of a safetensors file: {type(e).__name__} {str(e)[:100]}"
    raise FileFormatError(text) from e
  ends.sort()
  if any(a[1] != b[0] for a, b in itertools.pairwise(ends)) or base + ends[-1][1] != source.size:
    raise FileFormatError("arrays of a safetensors file overlap or leave gaps")
  return out


# --- state dicts --------------------------------------------------------------------------------


def state_dict(
  path: str | os.PathLike, *, verify: bool = False
) -> tuple[dict[str, TensorRef], FileInfo]:
  """({name: TensorRef}, info) of the weights in a file.

  Unwraps the keys "state_dict", "model_state_dict" and "model", walks the modules of a TorchScript
  archive, and strips a prefix "module." that all names have. Raises FileFormatError if the file has
  no state dict.
  """
  tree, kind = read_with_format(path, verify=verify)
  wrapper, extras, scalars = [], {}, {}
  if isinstance(tree, Placeholder) and kind == "torchscript":
    tree = _walk_modules(tree)
    for name in _ARCHIVE_SCALARS:
      if name in tree and tree[name].dtype == np.int64 and tree[name].shape == ():
        scalars[name] = int(tree.pop(name).read())
  while isinstance(tree, Mapping):
    key = next((k for k in _WRAPPERS if isinstance(tree.get(k), Mapping)), None)
    if key is None:
      break
    wrapper.append(key)
    extras |= {k: v for k, v in tree.items() if k != key}
    tree = tree[key]
    if len(wrapper) > 4:
      raise FileFormatError(f"{path}: weights are wrapped more than four times")
  if not isinstance(tree, Mapping):
    raise FileFormatError(f"{path}: contains a {_kind(tree)}, expected a dict of arrays")
  odd = [k for k, v in tree.items() if not (type(k) is str and isinstance(v, TensorRef))]
  if odd or not tree:
    some = ", ".join(f"{str(k)[:60]} ({_kind(tree[k])})" for k in odd[:10])
    raise FileFormatError(
      f"{path}: no state dict: "
      + (f"{len(odd)} entries are not arrays: {some}" if odd else "it is empty")
    )
  if all(k.startswith("module.") for k in tree):
    wrapper.append("module.")
    tree = {k.removeprefix("module."): v for k, v in tree.items()}
  return dict(tree), FileInfo(format=kind, wrapper=tuple(wrapper), scalars=scalars, extras=extras)


def _kind(value: Any) -> str:
  return value.name if isinstance(value, Placeholder) else type(value).__name__


def _walk_modules(root: Placeholder) -> dict[str, TensorRef]:
  """{dotted name: tensor} of a tree of modules, in the order of the attributes."""
  out, todo = {}, [("", root, 0)]
  while todo:
    name, node, depth = todo.pop()
    if isinstance(node, TensorRef):
      out[name] = node
    elif isinstance(node, Placeholder) and isinstance(node.state, dict):
      if depth > 64 or len(todo) + len(out) > _MAX_NAMES:
        raise FileFormatError("a TorchScript archive whose modules contain each other")
      prefix = f"{name}." if name else ""
      children = [
        (f"{prefix}{k}", v, depth + 1)
        for k, v in node.state.items()
        if isinstance(v, TensorRef | Placeholder)
      ]
      todo += reversed(children)
  return out


def sha256(path: str | os.PathLike) -> str:
  """Hex digest of the file's bytes, read in chunks."""
  with open(path, "rb", buffering=0) as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
