"""Samples of webdataset's and img2dataset's shards: tars, folders and parquet files.

A sample is what a shard has for one key. What cannot be read costs at most its own sample, and is
counted by reason.
"""

import collections
import contextlib
import dataclasses
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from xmodal_jax.data.preparing import values
from xmodal_jax.data.tfrecord import DatasetError

TYPES = ("jpg", "jpeg", "png", "webp")
_SUFFIXES = (*TYPES, "txt", "json")

# Reasons for which a pair is left out, or one caption of several.
NOT_UTF8 = "caption not UTF-8"
NOT_TEXT = "caption no text"
BAD_JSON = "json unreadable and no txt"
UNREADABLE = "file unreadable"
# These count files.
OTHER = "files of other types, hidden files and links"
TWICE = "files of a sample that is complete without them"
JSON_UNUSED = "json unreadable, txt used"
# This one counts pairs that are kept.
LINES = "captions of several lines, kept whole (--caption_lines splits them)"

Counter = collections.Counter


@dataclasses.dataclass(frozen=True)
class Sample:
  """What a shard has for a key. fault: the reason for which it is not used, if there is one."""

  key: str | None
  image: bytes | None
  suffix: str
  captions: tuple[str, ...] = ()
  status: str | None = None
  fault: str | None = None


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a tar has the bytes of a file."""

  offset: int
  size: int


def tar_samples(path: epath.Path, left_out: Counter, lines: bool = False) -> Iterator[Sample]:
  """The samples of a tar, which is read once if the files of each sample follow each other.

  Of the others the images are read again, when all their files are known. lines: each line of a
  .txt is a caption. Raises DatasetError for a damaged archive.
  """
  key: str | None = None
  parts: dict[str, bytes | _Place] = {}
  place: dict[str, _Place] = {}  # of the images of `parts`
  done: set[str] = set()
  aside: dict[str, dict[str, bytes | _Place]] = {}  # incomplete samples, by key
  for member, data in _members(path, left_out):
    name, suffix = _key_and_suffix(member.name)
    if name != key:
      if _is_whole(parts):
        done.add(key)
        yield _sample(key, _filled(path, parts), left_out, lines)
      elif parts:
        aside[key] = parts | place
      key, parts, place = name, aside.pop(name, {}), {}
    if key in done or suffix in parts:
      left_out[TWICE] += 1
      continue
    parts[suffix] = data
    if suffix in TYPES:
      place[suffix] = _Place(member.offset_data, member.size)
  aside |= {key: parts} if parts else {}
  for name, rest in aside.items():
    yield _sample(name, _filled(path, rest), left_out, lines)


def _is_whole(parts: Mapping[str, Any]) -> bool:
  return ("txt" in parts or "json" in parts) and any(s in parts for s in TYPES)


def _filled(path: epath.Path, parts: Mapping[str, bytes | _Place]) -> dict[str, bytes]:
  """The parts with the bytes of those that are places in the tar."""
  if not any(isinstance(part, _Place) for part in parts.values()):
    return parts
  with path.open("rb") as f:
    out = {}
    for suffix, part in parts.items():
      if isinstance(part, _Place):
        f.seek(part.offset)
        part = f.read(part.size)
      out[suffix] = part
    return out


def _key_and_suffix(name: str) -> tuple[str, str]:
  """webdataset's: the suffix is all after the first dot of the file's name, in lower case."""
  folder, slash, file = name.removeprefix("./").rpartition("/")
  stem, _, suffix = file.partition(".")
  return folder + slash + stem, suffix.lower()


class _Member(tarfile.TarInfo):
  """Raises for a damaged header, which tarfile would take for the end of the archive."""

  @classmethod
  def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
    try:
      return super().fromtarfile(archive)
    except tarfile.EOFHeaderError:
      raise
    except tarfile.HeaderError as e:
      raise tarfile.ReadError(f"{e} at byte {archive.offset}") from e


def _members(path: epath.Path, left_out: Counter) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
  """The files of samples in a tar, with their contents."""
  try:
    # As a stream, from start to end: remote files are slow to seek in.
    with path.open("rb") as f, tarfile.open(fileobj=f, mode="r|", tarinfo=_Member) as archive:
      for member in archive:
        key, suffix = _key_and_suffix(member.name)
        hidden = key.rpartition("/")[2] == "" or key.startswith("__MACOSX/")
        if member.isreg() and not member.issparse() and suffix in _SUFFIXES and not hidden:
          yield member, archive.extractfile(member).read()
        elif not member.isdir():
          left_out[OTHER] += 1
        archive.members = []  # which tarfile would keep
      while rest := archive.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
          raise tarfile.ReadError("there is more after its end: two archives in one file?")
  except (tarfile.TarError, EOFError, ValueError, OverflowError) as e:
    raise DatasetError(
      f"{path}: damaged or cut short, no whole tar archive ({e}); copy the shard again, or remove "
      "it with its _stats.json and .parquet"
    ) from e


def folder_samples(path: epath.Path, left_out: Counter, lines: bool = False) -> Iterator[Sample]:
  """The samples of a folder."""
  keys: dict[str, dict[str, epath.Path]] = {}
  for file in sorted(path.iterdir(), key=lambda p: p.name):
    key, suffix = _key_and_suffix(file.name)
    if not key or suffix not in _SUFFIXES:
      left_out[OTHER] += 1
    elif keys.setdefault(key, {}).setdefault(suffix, file) != file:
      left_out[TWICE] += 1
  for key, files in keys.items():
    try:
      parts = {suffix: file.read_bytes() for suffix, file in files.items()}
    except OSError:  # a folder, or a link to nothing
      yield Sample(key, None, "", fault=UNREADABLE)
      continue
    yield _sample(key, parts, left_out, lines)


def _sample(key: str, parts: Mapping[str, bytes], left_out: Counter, lines: bool) -> Sample:
  """parts: contents of a key's files, by suffix."""
  suffix = next((s for s in TYPES if s in parts), "")
  image, about, fault = parts.get(suffix), {}, None
  if "json" in parts:
    try:
      about = values.parse_json(key, parts["json"])
      if not isinstance(about, dict):
        raise DatasetError("no object")
    except DatasetError:
      about, fault = {}, BAD_JSON
  status = about.get("status") if isinstance(about.get("status"), str) else None
  if "txt" not in parts:
    captions, reason = captions_of(about.get("caption"), left_out)
    return Sample(key, image, suffix, captions, status, fault or reason)
  if fault:
    left_out[JSON_UNUSED] += 1
  try:
    text = parts["txt"].decode()
  except UnicodeDecodeError:
    return Sample(key, image, suffix, (), status, NOT_UTF8)
  own = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
  if lines:
    return Sample(key, image, suffix, tuple(own), status)
  left_out[LINES] += len(own) > 1
  return Sample(key, image, suffix, (text,) if own else (), status)


def captions_of(value: Any, left_out: Counter) -> tuple[tuple[str, ...], str | None]:
  """(captions, the reason for which there are none) of a text, a list of texts or None.

  Of a list, what is no text is counted.
  """
  if not isinstance(value, list):
    fault = _text_fault(value)
    return ((), fault) if fault or not (value or "").strip() else ((value,), None)
  faults = [_text_fault(caption) for caption in value]
  captions = [c for c, fault in zip(value, faults, strict=True) if fault is None and c]
  left_out.update(fault for fault in faults if fault)
  return tuple(c for c in captions if c.strip()), None


def _text_fault(value: Any) -> str | None:
  if value is not None and not isinstance(value, str):
    return NOT_TEXT
  return None if value is None or values.is_utf8(value) else NOT_UTF8


def parquet_samples(path: epath.Path, left_out: Counter, lines: bool = False) -> Iterator[Sample]:
  """The rows of a parquet file."""
  with open_parquet(path) as file:
    names = file.schema_arrow.names
    suffix = next((s for s in TYPES if s in names), None)
    if suffix is None or "key" not in names:
      raise DatasetError(
        f"{path}: has the columns {names}, expected key and one of {TYPES}; if these are addresses "
        "to download, run img2dataset on them first"
      )
    if "binary" not in (kind := str(file.schema_arrow.field(suffix).type)):
      raise DatasetError(f"{path}: column {suffix!r} is {kind}, expected the bytes of images")
    text = "caption" if "caption" in names else "txt"
    wanted = [c for c in ("key", suffix, text, "status") if c in names]
    count = 0
    for batch in file.iter_batches(batch_size=100, columns=wanted):
      count += len(batch)
      for row in _rows(batch):
        captions, fault = captions_of(row.get(text), left_out)
        key, status = row["key"], row.get("status")
        status = status if isinstance(status, str) else None
        key = None if key is None else str(key)
        yield Sample(key, row[suffix], suffix, captions, status, fault)
    if count != file.metadata.num_rows:  # pyarrow ends at some damages without an error
      raise DatasetError(
        f"{path}: damaged: of {file.metadata.num_rows} rows {count} can be read; copy the shard "
        "again"
      )


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
  """The rows of a batch. Text that is not UTF-8 becomes an object that is no text."""
  try:
    yield from batch.to_pylist()
    return
  except UnicodeDecodeError:
    pass
  for i in range(len(batch)):
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
      try:
        row[name] = column[i].as_py()
      except UnicodeDecodeError:
        row[name] = "\ud800"  # like all that is not UTF-8
    yield row


def _seekable(path: epath.Path) -> IO[bytes]:
  # pyarrow cannot use TensorFlow's file objects, so remote shards are read whole.
  return io.BytesIO(path.read_bytes()) if "://" in os.fspath(path) else path.open("rb")


@contextlib.contextmanager
def open_parquet(path: epath.Path) -> Iterator[Any]:
  """A pyarrow.parquet.ParquetFile. Raises DatasetError if it is damaged or pyarrow is missing."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as e:
    raise DatasetError(f"{path}: to read parquet, `pip install pyarrow`") from e
  try:
    with _seekable(path) as f, parquet.ParquetFile(f) as file:
      yield file
  except DatasetError:
    raise
  except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as e:
    if isinstance(e, OSError) and e.errno is not None:  # of the disk or network
      raise
    raise DatasetError(f"{path}: damaged or cut short ({e}); copy the shard again") from e
