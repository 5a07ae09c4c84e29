"""The zip format of torch.save since torch 1.6, and TorchScript archives."""

import struct
import zipfile
import zlib
from typing import Any

from xmodal_jax.interop.torch_files import foreign, legacy, names, pickles
from xmodal_jax.interop.torch_files.tensor import FileFormatError, Source, Storage

_CHUNK = 1 << 20
# Compressed entries may unfold to this many bytes in all, and as many times the file's size.
_FREE_BYTES, _RATIO = 1 << 26, 32


class _Zip:
  """Entries of a zip by name. Stored entries are mapped, compressed ones are read into memory."""

  def __init__(self, source: Source):
    self.source = source
    try:
      with open(source.fd, "rb", closefd=False) as f, zipfile.ZipFile(f) as z:
        entries, directory = z.infolist(), z.start_dir
    except (
      zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error, ValueError,
      OverflowError, MemoryError, IndexError, KeyError,
    ) as e:  # fmt: skip
      raise FileFormatError(
        f"damaged or truncated zip archive ({str(e)[:100]}): compare its size with the original's, "
        "and download it again"
      ) from e
    self.entries = {e.filename: e for e in entries}
    if len(self.entries) != len(entries):
      raise FileFormatError("a zip archive with two entries of one name")
    starts = sorted(e.header_offset for e in entries)
    ends = [*starts[1:], min(directory, source.size)]
    self._ends = dict(zip(starts, ends, strict=True)) if starts else {}
    if len(self._ends) != len(entries):
      raise FileFormatError("a zip archive whose entries overlap")
    self._contents: dict[str, bytes] = {}  # of compressed entries
    self._budget = _FREE_BYTES + _RATIO * source.size

  def _place(self, e: zipfile.ZipInfo) -> int:
    header = self.source.read(e.header_offset, 30)
    if header[:4] != b"PK\x03\x04" or e.flag_bits & 1:
      raise FileFormatError(f"zip entry {e.filename[:200]!r} is damaged or encrypted")
    start = e.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if start + e.compress_size > self._ends[e.header_offset]:
      raise FileFormatError(
        f"zip entry {e.filename[:200]!r} ends beyond the next one or the end of the file"
      )
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
    if name in self._contents:
      return self._contents[name]
    e = self.entries[name]
    data = self.source.read(self._place(e), e.compress_size)
    if e.compress_type == zipfile.ZIP_DEFLATED:
      data = self._contents[name] = self._inflate(e, data)
    elif e.compress_type != zipfile.ZIP_STORED:
      raise FileFormatError(f"zip entry {name!r} has compression method {e.compress_type}")
    if len(data) != e.file_size or zlib.crc32(data) != e.CRC:
      raise FileFormatError(f"zip entry {name!r} is damaged (size or CRC)")
    return data

  def _inflate(self, e: zipfile.ZipInfo, data: bytes) -> bytes:
    self._budget -= e.file_size
    if self._budget < 0 or e.file_size > 1040 * e.compress_size:  # more than deflate can reach
      raise FileFormatError(f"zip entry {e.filename!r} unfolds to much more than the file's size")
    try:
      return zlib.decompressobj(-15).decompress(data, e.file_size + 1)
    except zlib.error as error:
      raise FileFormatError(f"zip entry {e.filename!r}: {error}") from error

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
      raise FileFormatError(f"zip entry {name!r} is damaged (CRC): download the file again")


def read(source: Source, verify: bool) -> tuple[Any, str]:
  """(object tree, "zip" or "torchscript"). verify: also checks the CRC of every array."""
  archive = _Zip(source)
  found = [n for n in archive.entries if n.endswith("/data.pkl") and n.count("/") == 1]
  if len(found) != 1:
    raise FileFormatError(foreign.other_zip(list(archive.entries)))
  root = found[0].removesuffix("data.pkl")
  if root + "byteorder" in archive.entries and archive.read(root + "byteorder") != b"little":
    raise FileFormatError(legacy.BIG_ENDIAN)
  storages: dict[str, Storage] = {}

  def persistent(pid):
    kind, cls, key, _, numel = pid
    legacy.check_storage_id(kind, key, numel)
    dtype = names.storage_dtype(cls)
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
