"""Reader of img2dataset's output, or of webdataset's: shards of images with captions.

Supports three of its output formats:

  webdataset  00000.tar with files KEY.jpg (or png, webp), KEY.txt, KEY.json
  files       a folder 00000/ with the same files
  parquet     00000.parquet with columns key, jpg, caption, status

A caption may be a list of texts. With img2dataset's tars and folders come 00000_stats.json and
00000.parquet, the only record of images that could not be downloaded.
"""

import collections
import hashlib
import json
import logging
from collections.abc import Iterator

from etils import epath

from xmodal_jax.data import image as image_lib
from xmodal_jax.data.preparing import pictures, values, web_samples
from xmodal_jax.data.preparing.builder import Example
from xmodal_jax.data.preparing.web_samples import Sample
from xmodal_jax.data.tfrecord import DatasetError

# Reasons for which a pair is left out; `web_samples` has others.
FAILED = "failed"  # img2dataset could not download or resize the image
WITHOUT_CAPTION = "without caption"
WITHOUT_IMAGE = "without image (jpg, jpeg, png or webp)"
WITHOUT_KEY = "without key"
NOT_UTF8 = "key not UTF-8"
SAME_KEY = "key of an earlier pair"
EMPTY = "image of 0 bytes"
# With check_images also those of `image.DecodeError.kind`, like "damaged".
LOST = "lost"  # a success in img2dataset's statistics, but not in the shard
# Counts shards, not pairs: those without a file of statistics.
UNRECORDED = "shards without a record of failures"

_SAMPLES = {".tar": web_samples.tar_samples, ".parquet": web_samples.parquet_samples}


def find_shards(folder: epath.PathLike) -> list[str]:
  """The shards in an output folder of img2dataset, sorted. Raises DatasetError without any."""
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise DatasetError(f"{folder}: no such folder; expected an output folder of img2dataset")
  paths = sorted(folder.iterdir(), key=lambda p: p.name)
  if hidden := [p.name for p in paths if p.name.startswith(".")]:
    logging.info("%s: left out %d hidden files, first %s", folder, len(hidden), hidden[0])
  paths = [p for p in paths if not p.name.startswith(".")]
  shards = [p for p in paths if p.suffix.lower() == ".tar"]
  shards = shards or [p for p in paths if p.name.isdecimal() and p.is_dir()]
  shards = shards or [p for p in paths if p.suffix.lower() == ".parquet"]
  if not shards:
    raise DatasetError(
      f"{folder}: neither 00000.tar, nor a folder 00000, nor 00000.parquet; expected an output "
      "folder of img2dataset, of --output_format webdataset, files or parquet"
    )
  if bad := [p.name for p in shards if not values.is_utf8(p.name)]:
    raise DatasetError(f"{folder}: the name {bad[0]!r} is not UTF-8; rename it (convmv does)")
  known = {p.stem for p in shards}
  stats = [p.name.removesuffix("_stats.json") for p in paths if p.name.endswith("_stats.json")]
  if lost := [stem for stem in stats if stem not in known]:
    raise DatasetError(
      f"{folder}: {len(lost)} shards are missing though their statistics exist, first "
      f"{lost[0]}_stats.json; copy the shards too, or remove the statistics"
    )
  return [str(p) for p in shards]


def read(
  shard: str,
  left_out: collections.Counter,
  check_images: bool = False,
  caption_lines: bool = False,
  max_pixels: int = image_lib.MAX_PIXELS,
) -> Iterator[Example]:
  """The pairs of a shard, as a `shards.Reader`: one sample at a time.

  image_id, also the id of the first caption, is the key if that is a number (unique within a run of
  img2dataset), else 63 bits of a hash of shard and key, like the ids of further captions. Neither
  depends on which other shards are read, or on their order. caption_lines: each line of a .txt is a
  caption. Raises DatasetError, naming the shard, if it is damaged.
  """
  path, found, failed, seen = epath.Path(shard), 0, 0, set()
  samples = _SAMPLES.get(path.suffix.lower(), web_samples.folder_samples)
  for sample in samples(path, left_out, caption_lines):
    if sample.status not in (None, "success"):
      failed += 1
      continue
    found += 1
    if reason := _fault(sample, check_images, max_pixels):
      left_out[reason] += 1
      continue
    image_id = _image_id(path.stem, sample.key)
    if image_id in seen:
      left_out[SAME_KEY] += 1
      continue
    seen.add(image_id)
    further = range(1, len(sample.captions))
    yield {
      "image": sample.image,
      "image_id": image_id,
      "filename": f"{path.stem}/{sample.key}.{sample.suffix}",
      "captions": sample.captions,
      "caption_ids": (image_id, *(_hash(path.stem, f"{sample.key}#{i}") for i in further)),
    }
  if path.suffix.lower() != ".parquet":
    if recorded := _recorded(path):
      total, successes = recorded
      failed = max(failed, total - successes)
      left_out[LOST] += max(0, successes - found)
    else:
      left_out[UNRECORDED] += 1
  left_out[FAILED] += failed
  for reason in [r for r, n in left_out.items() if not n]:
    del left_out[reason]


def _fault(sample: Sample, check_images: bool, max_pixels: int) -> str | None:
  """The reason for which a sample is left out."""
  if sample.key is None:
    return WITHOUT_KEY
  if not values.is_utf8(sample.key):
    return NOT_UTF8
  if sample.fault:
    return sample.fault
  if not sample.captions:
    return WITHOUT_CAPTION
  if sample.image is None:
    return WITHOUT_IMAGE
  if not sample.image:
    return EMPTY
  return pictures.kind_of_fault(sample.image, max_pixels) if check_images else None


def _image_id(stem: str, key: str) -> int:
  if key.isascii() and key.isdecimal() and len(key) < 20 and (number := int(key)) < 2**63:
    return number
  return _hash(stem, key)


def _hash(stem: str, key: str) -> int:
  return int.from_bytes(hashlib.sha256(f"{stem}/{key}".encode()).digest()[:8], "big") >> 1


def _recorded(path: epath.Path) -> tuple[int, int] | None:
  """(pairs tried, successes) by the statistics of a tar or folder; None without them."""
  stats = path.with_name(f"{path.stem}_stats.json")
  if stats.exists():
    try:
      counts = json.loads(stats.read_text())
      return int(counts["count"]), int(counts["successes"])
    except (ValueError, KeyError, TypeError, OverflowError) as e:
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
  with web_samples.open_parquet(table) as file:
    if "status" not in file.schema_arrow.names:
      return None
    status = file.read(columns=["status"]).column("status").to_pylist()
  return len(status), status.count("success")
