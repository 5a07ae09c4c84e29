"""Reader of img2dataset's output: shards of images from the web, with captions.

Supports three of its output formats:

  webdataset  00000.tar with members KEY.jpg (or png, webp), KEY.txt, KEY.json
  files       a folder 00000/ with the same files
  parquet     00000.parquet with columns key, jpg, caption, status

With a tar or folder come 00000_stats.json and 00000.parquet, the only record of images that could
not be downloaded.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from xmodal_jax.data.preparing.annotations import decode_error
from xmodal_jax.data.preparing.builder import Example
from xmodal_jax.data.tfrecord import DatasetError

TYPES = ("jpg", "jpeg", "png", "webp")

# Reasons for which a pair is left out.
FAILED = "failed"  # img2dataset could not download or resize the image
WITHOUT_CAPTION = "without caption"
BROKEN = "broken"  # does not decode; checked with check_images only
LOST = "lost"  # a success in img2dataset's statistics, but not in the shard
# Counts shards, not pairs: those without a file of statistics.
UNRECORDED = "shards without a record of failures"


@dataclasses.dataclass(frozen=True)
class Sample:
  """A pair as stored. It failed if image is None, or status neither "success" nor None."""

  key: str
  image: bytes | None
  suffix: str
  caption: str | None
  status: str | None


def find_shards(folder: epath.PathLike) -> list[str]:
  """The shards in an output folder of img2dataset, sorted. Raises DatasetError without any."""
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise DatasetError(f"{folder}: no such folder; expected an output folder of img2dataset")
  paths = sorted(folder.iterdir(), key=lambda p: p.name)
  shards = [p for p in paths if p.suffix == ".tar"]
  shards = shards or [p for p in paths if p.name.isdecimal() and p.is_dir()]
  shards = shards or [p for p in paths if p.suffix == ".parquet"]
  if not shards:
    raise DatasetError(
      f"{folder}: neither 00000.tar, nor a folder 00000, nor 00000.parquet; expected an output "
      "folder of img2dataset, of --output_format webdataset, files or parquet"
    )
  known = {p.stem for p in shards}
  stats = [p.name.removesuffix("_stats.json") for p in paths if p.name.endswith("_stats.json")]
  if lost := [stem for stem in stats if stem not in known]:
    raise DatasetError(
      f"{folder}: {len(lost)} shards are missing though their statistics exist, first "
      f"{lost[0]}_stats.json; copy the shards too, or remove the statistics"
    )
  return [str(p) for p in shards]


def read(
  shard: str, left_out: collections.Counter, check_images: bool = False
) -> Iterator[Example]:
  """The pairs of a shard, as a `shards.Reader`: one sample at a time.

  image_id, also the id of the caption, is the key if that is a number (unique within a run of
  img2dataset), else 63 bits of a hash of shard and key. Neither depends on which other shards are
  read, or on their order. Raises DatasetError, naming the shard, if it is damaged.
  """
  path, found, failed = epath.Path(shard), 0, 0
  samples = {".tar": _tar_samples, ".parquet": _parquet_samples}.get(path.suffix, _folder_samples)
  for sample in samples(path):
    if sample.image is None or sample.status not in (None, "success"):
      failed += 1
      continue
    found += 1
    if not (sample.caption or "").strip():
      left_out[WITHOUT_CAPTION] += 1
    elif check_images and decode_error(sample.image) is not None:
      left_out[BROKEN] += 1
    else:
      image_id = _image_id(path.stem, sample.key)
      yield {
        "image": sample.image,
        "image_id": image_id,
        "filename": f"{path.stem}/{sample.key}.{sample.suffix}",
        "captions": (sample.caption,),
        "caption_ids": (image_id,),
      }
  if path.suffix != ".parquet":
    if recorded := _recorded(path):
      total, successes = recorded
      failed = max(failed, total - successes)
      left_out[LOST] += max(0, successes - found)
    else:
      left_out[UNRECORDED] += 1
  left_out[FAILED] += failed
  for reason in [r for r, n in left_out.items() if not n]:
    del left_out[reason]


def _image_id(stem: str, key: str) -> int:
  if key.isascii() and key.isdecimal() and (number := int(key)) < 2**63:
    return number
  return int.from_bytes(hashlib.sha256(f"{stem}/{key}".encode()).digest()[:8], "big") >> 1


def _sample(where: str, key: str, parts: Mapping[str, bytes]) -> Sample:
  """parts: contents of a key's files, by suffix."""
  try:
    about = json.loads(parts.get("json", b"{}"))
    caption = parts["txt"].decode() if "txt" in parts else about.get("caption")
    status = about.get("status")
  except (ValueError, AttributeError) as e:
    raise DatasetError(
      f"{where}: {key}.json or {key}.txt is not what img2dataset writes, a JSON object and UTF-8 "
      f"text ({e}); download the shard again"
    ) from e
  suffix = next((s for s in TYPES if s in parts), "")
  caption = caption if isinstance(caption, str) else None
  return Sample(key, parts.get(suffix), suffix, caption, status)


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


def _tar_samples(path: epath.Path) -> Iterator[Sample]:
  key, parts = None, {}
  try:
    # As a stream, from start to end: remote files are not seekable.
    with path.open("rb") as f, tarfile.open(fileobj=f, mode="r|", tarinfo=_Member) as archive:
      for member in archive:
        if not member.isfile():
          continue
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = name.partition(".")
        if folder + slash + stem != key:
          if key is not None:
            yield _sample(f"{path}", key, parts)
          key, parts = folder + slash + stem, {}
        if suffix in (*TYPES, "txt", "json"):
          parts[suffix] = archive.extractfile(member).read()
  except tarfile.TarError as e:
    raise DatasetError(
      f"{path}: damaged or cut short, no whole tar archive ({e}); copy the shard again, or remove "
      "it with its _stats.json and .parquet"
    ) from e
  if key is not None:
    yield _sample(f"{path}", key, parts)


def _folder_samples(path: epath.Path) -> Iterator[Sample]:
  keys: dict[str, list[tuple[str, epath.Path]]] = {}
  for file in sorted(path.iterdir(), key=lambda p: p.name):
    stem, _, suffix = file.name.partition(".")
    if suffix in (*TYPES, "txt", "json"):
      keys.setdefault(stem, []).append((suffix, file))
  for key, files in keys.items():
    yield _sample(f"{path}", key, {suffix: file.read_bytes() for suffix, file in files})


def _parquet_samples(path: epath.Path) -> Iterator[Sample]:
  with _parquet(path) as file:
    names = file.schema_arrow.names
    suffix = next((s for s in TYPES if s in names), None)
    if suffix is None or "key" not in names:
      raise DatasetError(
        f"{path}: has the columns {names}, expected key and one of {TYPES}; if these are addresses "
        "to download, run img2dataset on them first"
      )
    text = "caption" if "caption" in names else "txt"
    wanted = [c for c in ("key", suffix, text, "status") if c in names]
    for batch in file.iter_batches(batch_size=100, columns=wanted):
      for row in batch.to_pylist():
        yield Sample(str(row["key"]), row[suffix], suffix, row.get(text), row.get("status"))


def _seekable(path: epath.Path) -> IO[bytes]:
  # pyarrow cannot use TensorFlow's file objects, so remote shards are read whole.
  return io.BytesIO(path.read_bytes()) if "://" in os.fspath(path) else path.open("rb")


@contextlib.contextmanager
def _parquet(path: epath.Path) -> Iterator[Any]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as e:
    raise DatasetError(f"{path}: to read parquet, `pip install pyarrow`") from e
  try:
    with _seekable(path) as f, parquet.ParquetFile(f) as file:
      yield file
  except (pyarrow.ArrowException, OSError) as e:
    if isinstance(e, OSError) and e.errno is not None:  # of the disk or network
      raise
    raise DatasetError(f"{path}: damaged or cut short ({e}); copy the shard again") from e


def _recorded(path: epath.Path) -> tuple[int, int] | None:
  """(pairs tried, successes) by the statistics of a tar or folder; None without them."""
  stats = path.with_name(f"{path.stem}_stats.json")
  if stats.exists():
    try:
      counts = json.loads(stats.read_text())
      return int(counts["count"]), int(counts["successes"])
    except (ValueError, KeyError, TypeError) as e:
      raise DatasetError(
        f"{stats}: no counts 'count' and 'successes' ({e!r}); remove the file or copy it again"
      ) from e
  table = path.with_name(f"{path.stem}.parquet")
  if not table.exists():
    return None
  try:
    import pyarrow  # noqa: F401
  except ImportError:
    return None
  with _parquet(table) as file:
    if "status" not in file.schema_arrow.names:
      return None
    status = file.read(columns=["status"]).column("status").to_pylist()
  return len(status), status.count("success")
