"""The TFRecord format, and the offset index of a shard, which gives random access to its records.

A TFRecord file is a sequence of

    uint64 length | uint32 masked crc32c of length | payload | uint32 masked crc32c of payload

all little-endian. The index of a shard is the file `<shard>.index`, a NumPy npz archive of

    format       int64  []    1
    shard_bytes  int64  []    size of the shard in bytes
    offsets      uint64 [n]   offset of record i (of its length field)
    lengths      uint64 [n]   bytes of record i's payload
    crcs         uint32 [n]   the masked crc32c of the payload
    captions     int32  [n]   number of captions of record i
    positions    int64  [c]   optional: position of each caption in the split's own list, by record

`preparing.builder` writes the index with the shard. For other datasets it is made when the dataset
is first opened, in the shard's folder or, if that is read-only, in `~/.cache/xmodal_jax`. Records
are located by the index and not by the chain of length fields, so a damaged byte in a shard makes
only its own record unreadable.
"""

import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import struct
import uuid
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np
from etils import epath

from xmodal_jax.data.progress import Progress
from xmodal_jax.errors import UserError

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = HEADER.size + FOOTER.size
_FORMAT = 1

# payload -> (number of captions, their positions in the split's order if any)
CountCaptions = Callable[[bytes], tuple[int, Sequence[int]]]


class DatasetError(UserError):
  """A dataset cannot be opened or written; the message has the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class ShardIndex:
  """The index of a shard; the arrays are described in the module's docstring."""

  shard_bytes: int
  offsets: np.ndarray
  lengths: np.ndarray
  crcs: np.ndarray
  captions: np.ndarray
  positions: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.offsets)

  def to_bytes(self) -> bytes:
    arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    arrays = {k: np.asarray(v) for k, v in arrays.items() if v is not None}
    buffer = io.BytesIO()
    np.savez(buffer, format=np.int64(_FORMAT), **arrays)
    return buffer.getvalue()

  @classmethod
  def from_bytes(cls, data: bytes) -> "ShardIndex":
    with np.load(io.BytesIO(data), allow_pickle=False) as f:
      if int(f["format"]) != _FORMAT:
        raise ValueError(f"format {int(f['format'])}, expected {_FORMAT}")
      arrays = {k: f[k] for k in f.files if k != "format"}
    return cls(**{**arrays, "shard_bytes": int(arrays["shard_bytes"])})

  def covers(self) -> bool:
    """True if the records are contiguous and fill the shard."""
    ends = np.cumsum(self.lengths + np.uint64(OVERHEAD), dtype=np.uint64)
    starts = np.concatenate([np.zeros(1, np.uint64), ends])
    same = len(self) == len(self.lengths) == len(self.crcs) == len(self.captions)
    return same and np.array_equal(starts[:-1], self.offsets) and starts[-1] == self.shard_bytes


class IndexBuilder:
  """Builds the index of a shard while its records are written or scanned."""

  def __init__(self):
    self.size, self._rows, self._positions = 0, [], []

  def __len__(self) -> int:
    return len(self._rows)

  def add(self, length: int, crc: int, captions: int, positions: Sequence[int] = ()) -> None:
    self._rows.append((self.size, length, crc, captions))
    self._positions.extend(positions)
    self.size += OVERHEAD + length

  def build(self) -> ShardIndex:
    offsets, lengths, crcs, captions = np.array(self._rows, np.uint64).reshape(-1, 4).T
    complete = self._positions and len(self._positions) == captions.sum()
    return ShardIndex(
      self.size,
      np.ascontiguousarray(offsets),
      np.ascontiguousarray(lengths),
      crcs.astype(np.uint32),
      captions.astype(np.int32),
      np.array(self._positions, np.int64) if complete else None,
    )


def masked_crc(data: bytes) -> int:
  """The crc32c of TFRecord files, masked by a rotation and an offset."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> tuple[bytes, int]:
  """Payload -> (bytes of its record in a TFRecord file, its masked crc)."""
  length, crc = struct.pack("<Q", len(payload)), masked_crc(payload)
  return b"".join((length, FOOTER.pack(masked_crc(length)), payload, FOOTER.pack(crc))), crc


def unframe(data: bytes, length: int, crc: int) -> bytes:
  """Bytes of a record -> payload. Raises ValueError unless the index's length and crc match."""
  if len(data) != OVERHEAD + length:
    raise ValueError(f"{len(data)} bytes could be read of {OVERHEAD + length}")
  stored, length_crc = HEADER.unpack_from(data)
  if stored != length or length_crc != masked_crc(data[:8]):
    raise ValueError(f"the length field says {stored}, the index {length}, or its crc is wrong")
  payload = data[HEADER.size : -FOOTER.size]
  if not FOOTER.unpack_from(data, len(data) - FOOTER.size)[0] == masked_crc(payload) == crc:
    raise ValueError("crc of the data is wrong")
  return payload


def index_shard(
  path: epath.PathLike, count: CountCaptions, progress: Progress | None = None
) -> ShardIndex:
  """Makes the index of a shard by reading all of its records. Raises DatasetError if damaged."""
  path, index = epath.Path(path), IndexBuilder()
  size = path.stat().length
  with path.open("rb") as f:
    while header := f.read(HEADER.size):
      where = f"{path}: record {len(index)} at byte {index.size}"
      remedy = "is the shard cut or damaged? Copy or write it again"
      if len(header) < HEADER.size:
        raise DatasetError(f"{where} ends inside its header; {remedy}")
      length, crc = HEADER.unpack(header)
      if crc != masked_crc(header[:8]):
        raise DatasetError(f"{where}: crc of the length field is wrong, no index; {remedy}")
      if index.size + OVERHEAD + length > size:
        raise DatasetError(f"{where} has {length} bytes, beyond the end of the file; {remedy}")
      body = f.read(length + FOOTER.size)
      try:
        captions, positions = count(body[:length])
      except Exception as e:  # of protobuf; with a count of 1 the record is read, and reported
        logging.warning("%s does not parse: %s", where, e)
        captions, positions = 1, ()
      index.add(length, FOOTER.unpack_from(body, length)[0], captions, positions)
      if progress:
        progress.add()
  return index.build()


def index_path(shard: epath.PathLike) -> epath.Path:
  shard = epath.Path(shard)
  return shard.with_name(shard.name + ".index")


def cached_index_path(shard: epath.PathLike) -> epath.Path:
  """Path of the index of a shard in a read-only folder."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  shard = os.fspath(shard)
  # A relative path is another shard in another working directory.
  absolute = shard if "://" in shard else os.path.realpath(shard)
  key = hashlib.sha256(absolute.encode()).hexdigest()[:16]
  return epath.Path(base) / "xmodal_jax" / "index" / f"{key}-{epath.Path(shard).name}.index"


def write_atomic(path: epath.PathLike, data: bytes) -> None:
  """Writes a file atomically, also if several processes write it at once."""
  path = epath.Path(path)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    temporary.write_bytes(data)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def load_index(
  shard: epath.PathLike, records: int, count: CountCaptions, progress: Progress | None = None
) -> ShardIndex:
  """Loads the index of a shard of `records` records, or makes and stores it if there is none.

  progress: to which the records are added.

  Raises DatasetError if shard and index do not fit together, or one of them is damaged.
  """
  shard = epath.Path(shard)
  places = index_path(shard), cached_index_path(shard)
  if not shard.exists():
    raise DatasetError(f"{shard}: no such shard, but dataset_info.json counts it; copy it again")
  if place := next((p for p in places if p.exists()), None):
    try:
      index = ShardIndex.from_bytes(place.read_bytes())
    except Exception as e:  # zip, npy and key errors alike
      raise DatasetError(f"{place}: no readable index ({e}); delete it, it is made again") from e
    if progress:
      progress.add(records)
  else:
    index, place = index_shard(shard, count, progress), places[0]
    _store(index, *places)
  size = shard.stat().length
  if index.shard_bytes != size:
    raise DatasetError(
      f"{shard} has {size} bytes, expected {index.shard_bytes} by its index {place}: copy the "
      "shard again if it was cut; if it was rewritten, delete the index, which is made again"
    )
  if not index.covers():
    raise DatasetError(f"{place}: the records do not fill {shard}; delete it, it is made again")
  if len(index) != records:
    raise DatasetError(
      f"{shard} holds {len(index)} records, but dataset_info.json beside it counts {records}: "
      "files of two datasets are mixed; prepare it again into an empty folder"
    )
  return index


def _store(index: ShardIndex, beside: epath.Path, cached: epath.Path) -> None:
  try:
    write_atomic(beside, index.to_bytes())
  except Exception as e:  # OSError, or an error of TensorFlow or of the cloud's library
    logging.info("%s cannot be written (%s); the index goes to %s", beside, e, cached)
    try:
      cached.parent.mkdir(parents=True, exist_ok=True)
      write_atomic(cached, index.to_bytes())
    except OSError as e:
      logging.warning("%s cannot be written (%s): the index will be made again", cached, e)
