"""Random access to the images and captions of TFRecord datasets that TFDS can read.

`open_split` opens datasets written by tools/prepare_data.py, `open_tfds` those prepared by TFDS.
Both read any record by its number, from any thread, through the offset index of `tfrecord`.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import resource
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from etils import epath

from xmodal_jax.data import tfrecord
from xmodal_jax.data.progress import Progress
from xmodal_jax.data.tfrecord import DatasetError

_KEPT_FDS = 512  # open files of all splits of the process; further shards are opened per read

# The names of a field in datasets of `preparing.builder` and in those of TFDS.
_FIELDS = {
  "image": ("image",),
  "image_id": ("image_id", "image/id"),
  "filename": ("filename", "image/filename", "file_name"),
  "captions": ("captions", "captions/text"),
  "caption_ids": ("caption_ids", "captions/id"),
  "caption_positions": ("caption_positions",),
  "regions": ("regions",),
  "boxes": ("boxes",),
  "image_width": ("image_width",),
  "image_height": ("image_height",),
  "label": ("label",),
}


class BadRecordError(Exception):
  """One record that cannot be read; the others can."""

  def __init__(self, split: str, index: int, shard: str, reason: str):
    super().__init__(split, index, shard, reason)
    self.split, self.index, self.shard, self.reason = split, index, shard, reason

  def __str__(self) -> str:
    return f"record {self.index} of split {self.split!r} in {self.shard}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Record:
  """One image with its captions."""

  image: bytes  # encoded as stored; empty in a dataset of regions alone
  image_id: int  # of the annotation file, may exceed 32 bits; -1: none
  filename: str
  captions: tuple[str, ...]
  caption_ids: tuple[int, ...]  # of the annotation file; empty: none
  regions: np.ndarray | None = None  # float32 [R, F]
  boxes: np.ndarray | None = None  # float32 [R, 4], x1 y1 x2 y2 in pixels of the image
  size: tuple[int, int] | None = None  # width and height of the image, if it has boxes
  label: int = -1  # index in Split.class_names; -1: none


@functools.cache
def _example_class() -> type:
  # Late, because it imports TensorFlow (2 s). The parser is in C (upb): 3 us for 50 kB.
  from tensorflow.core.example import example_pb2

  return example_pb2.Example


def _features(payload: bytes) -> dict:
  feature = _example_class().FromString(payload).features.feature
  found = ((k, next((n for n in names if n in feature), None)) for k, names in _FIELDS.items())
  return {k: feature[n] for k, n in found if n is not None}


def count_captions(payload: bytes) -> tuple[int, Sequence[int]]:
  """A serialised example -> (number of captions, their positions in the split's order if any)."""
  f = _features(payload)
  places = f["caption_positions"].int64_list.value if "caption_positions" in f else ()
  return len(f["captions"].bytes_list.value) if "captions" in f else 0, places


def parse(
  payload: bytes, region_dim: int | None = None, region_dtype: npt.DTypeLike = np.float32
) -> Record:
  """A serialised tf.train.Example -> Record. Raises an exception of any type if it is damaged.

  region_dim: F. region_dtype: of the features as stored.
  """
  f = _features(payload)

  def ints(name: str) -> tuple[int, ...]:
    return tuple(f[name].int64_list.value) if name in f else ()

  def texts(name: str) -> tuple[str, ...]:
    return tuple(v.decode() for v in f[name].bytes_list.value) if name in f else ()

  def floats(name: str, width: int | None, dtype: npt.DTypeLike) -> np.ndarray | None:
    if name not in f:
      return None
    if not width:
      raise ValueError(f"{name} of unknown width: the dataset's features.json gives none")
    raw = f[name].bytes_list.value  # one string of little-endian floats, or a list of floats
    flat = np.frombuffer(raw[0], dtype) if raw else np.array(f[name].float_list.value, np.float32)
    return flat.astype(np.float32, copy=False).reshape(-1, width)

  image = f["image"].bytes_list.value if "image" in f else ()
  size = (*ints("image_width")[:1], *ints("image_height")[:1])
  return Record(
    image=image[0] if image else b"",
    image_id=(ints("image_id") or (-1,))[0],
    filename=(texts("filename") or ("",))[0],
    captions=texts("captions"),
    caption_ids=ints("caption_ids"),
    regions=floats("regions", region_dim, region_dtype),
    boxes=floats("boxes", 4, np.float32),
    size=size if len(size) == 2 else None,
    label=(ints("label") or (-1,))[0],
  )


class _Descriptors:
  """Counts the shards that the process keeps open: its limit is often 1,024, of which others need.

  Thread-safe.
  """

  def __init__(self):
    self._free: int | None = None
    self._lock = threading.RLock()  # a finalizer of `_Files` may run while it is held

  def open(self, path: str) -> int | None:
    """A file to keep open; None if there are enough of them."""
    with self._lock:
      if self._free is None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._free = _KEPT_FDS if soft < 0 else min(_KEPT_FDS, soft // 2)
      if self._free <= 0:
        return None
      fd = os.open(path, os.O_RDONLY)
      self._free -= 1
      return fd

  def close(self, fd: int) -> None:
    with self._lock:
      os.close(fd)
      self._free += 1


_DESCRIPTORS = _Descriptors()


class _Files:
  """Reads at given offsets from a list of files. Thread-safe."""

  def __init__(self, paths: list[epath.Path]):
    self._paths = [os.fspath(p) for p in paths]
    self._fds: dict[int, int] = {}
    self._descriptors = _DESCRIPTORS  # globals may be gone when the interpreter deletes this
    self._lock = threading.Lock()

  def read(self, i: int, offset: int, size: int) -> bytes:
    path = self._paths[i]
    if "://" in path:  # threads cannot share a file object's position, so each read opens one
      import tensorflow as tf

      with tf.io.gfile.GFile(path, "rb") as f:
        f.seek(offset)
        return f.read(size)
    with self._lock:
      if i not in self._fds and (fd := self._descriptors.open(path)) is not None:
        self._fds[i] = fd
    if i in self._fds:
      return os.pread(self._fds[i], size, offset)
    with open(path, "rb") as f:
      f.seek(offset)
      return f.read(size)

  def __del__(self):
    for fd in self._fds.values():
      self._descriptors.close(fd)


class Split:
  """A split, or several concatenated: `len` records of an image each, read by number.

  captions_per_record: int32 [N].
  class_names: of the labels of the records; empty without labels.
  region_dim: number of features of a region; None without regions.
  fingerprint: sha256 of shard names and sizes and of the offsets and crcs of all records.
  """

  def __init__(
    self,
    name: str,
    parts: Sequence[Sequence[tuple[epath.PathLike, int]]],
    region_dim: int | None = None,
    max_captions: int | None = None,
    class_names: Sequence[str] = (),
    region_dtype: npt.DTypeLike = np.float32,
  ):
    """parts: for each split to concatenate, its shards with their numbers of records.
    max_captions: uses only the first captions of an image. region_dtype: of the features as stored.

    Raises DatasetError if a shard is missing or damaged.
    """
    self.name, self.region_dim, self._max_captions = name, region_dim, max_captions
    self._region_dtype = np.dtype(region_dtype).newbyteorder("<")
    self.class_names: tuple[str, ...] = tuple(class_names)
    shards = [(epath.Path(path), n) for part in parts for path, n in part]
    what = f"indexing split {name!r}"
    with (
      Progress(what, "records", sum(n for _, n in shards), last=False) as progress,
      concurrent.futures.ThreadPoolExecutor(16) as pool,  # remote indices load in parallel
    ):
      load = lambda shard: tfrecord.load_index(*shard, count_captions, progress)
      self._indices = list(pool.map(load, shards))
    self._paths = [path for path, _ in shards]
    self._part_sizes = [len(part) for part in parts]
    self._files = _Files(self._paths)
    self._starts = np.cumsum([0, *map(len, self._indices)]).tolist()
    self.captions_per_record = np.concatenate([x.captions for x in self._indices])
    if max_captions:
      self.captions_per_record = np.minimum(self.captions_per_record, np.int32(max_captions))
    digest = hashlib.sha256()
    for path, x in zip(self._paths, self._indices, strict=True):
      digest.update(f"{path.name}\n{x.shard_bytes}\n{len(x)}\n".encode())
      for array in (x.offsets, x.lengths, x.crcs, x.captions):
        digest.update(np.ascontiguousarray(array))
    self.fingerprint = digest.hexdigest()

  @functools.cached_property
  def caption_positions(self) -> np.ndarray:
    """int64 [C], record after record: the position of each caption in the source's own list.

    0..C-1 unless the captions of an image are not adjacent in that list. Those of concatenated
    splits are concatenated.
    """
    if self._max_captions:
      return np.arange(self.captions_per_record.sum())
    out, base, indices = [], 0, iter(self._indices)
    for size in self._part_sizes:
      part = [next(indices) for _ in range(size)]
      count = sum(int(x.captions.sum()) for x in part)
      given = [x.positions for x in part if x.captions.any()]
      complete = given and all(p is not None for p in given)
      own = np.concatenate(given) if complete else np.arange(count)
      out.append(base + own)
      base += count
    return np.concatenate(out)

  def __len__(self) -> int:
    return self._starts[-1]

  def read(self, i: int) -> Record:
    """Record i, checked. Raises BadRecordError if its bytes are damaged or do not parse."""
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)} in split {self.name!r}")
    shard = bisect.bisect_right(self._starts, i) - 1
    index, j = self._indices[shard], int(i) - self._starts[shard]
    offset, length = int(index.offsets[j]), int(index.lengths[j])
    # Outside of the try: an error of the disk is not a bad record.
    data = self._files.read(shard, offset, tfrecord.OVERHEAD + length)
    try:
      payload = tfrecord.unframe(data, length, int(index.crcs[j]))
      record = parse(payload, self.region_dim, self._region_dtype)
    except Exception as e:
      raise BadRecordError(self.name, int(i), os.fspath(self._paths[shard]), str(e)) from e
    if self._max_captions:
      n = self._max_captions
      return dataclasses.replace(
        record, captions=record.captions[:n], caption_ids=record.caption_ids[:n]
      )
    return record

  def __iter__(self) -> Iterator[Record]:
    return (self.read(i) for i in range(len(self)))


def _find_dataset(data_dir: epath.PathLike) -> epath.Path:
  root, marker = epath.Path(data_dir), "dataset_info.json"
  remedy = "write one with `python tools/prepare_data.py SOURCE --out DIR` (sources: --help)"
  if not root.exists():
    raise DatasetError(f"{root}: no such dataset folder; {remedy}")
  if (root / marker).exists():
    return root
  below = sorted({p.parent for g in (f"*/{marker}", f"*/*/{marker}") for p in root.glob(g)})
  below = [p for p in below if not any(n.startswith(".") for n in p.parts[len(root.parts) :])]
  if not below:
    raise DatasetError(f"{root}: no {marker} in it or in a name/version folder below; {remedy}")
  if len(below) > 1:
    listing = "".join(f"\n  {p}" for p in below)
    raise DatasetError(f"{root} holds {len(below)} datasets; give the folder of one:{listing}")
  return below[0]


def _open(builder, split: str, max_captions: int | None = None) -> Split:
  """builder: a tfds builder whose data are on disk."""
  info, where = builder.info, builder.data_path
  if info.file_format.value != "tfrecord":
    raise DatasetError(f"{where}: {info.file_format.value} files, expected tfrecord; prepare it so")
  parts = []
  for name in (p.strip() for p in split.split("+")):
    if name not in info.splits:
      have = f"there are {sorted(info.splits)} (join several as train+restval)"
      raise DatasetError(f"{where}: no split {name!r}; {have}")
    counts = info.splits[name].shard_lengths
    if not sum(counts):
      raise DatasetError(f"{where}: split {name!r} is empty; prepare it from data that has it")
    parts.append(list(zip(info.splits[name].filepaths, counts, strict=True)))
  regions, label = (dict(info.features).get(name) for name in ("regions", "label"))
  region_dim = regions.shape[-1] if regions is not None else None
  region_dtype = regions.np_dtype if regions is not None else np.float32
  # Only a ClassLabel has names; they are numbers if the dataset gives none.
  names = label.names if getattr(label, "num_classes", None) else ()
  return Split(split, parts, region_dim, max_captions, names, region_dtype)


def open_split(data_dir: epath.PathLike, split: str) -> Split:
  """Opens a split of a dataset on disk, written by tools/prepare_data.py or by TFDS.

  Example::

    split = open_split("data/flickr30k", "test")
    print(len(split), split.captions_per_record.sum())
    record = split.read(0)
    picture = image.decode(record.image)
    print(record.filename, record.captions)

  Args:
    data_dir: a local or gs:// folder that `tfds.builder_from_directory` can read, or one with
      exactly one such folder (name/version) below it.
    split: a name, or several to concatenate, like "train+restval".

  Raises:
    DatasetError: if there is no such dataset or split, or its files are damaged.
  """
  import tensorflow_datasets as tfds

  return _open(tfds.builder_from_directory(_find_dataset(data_dir)), split)


def open_tfds(
  name: str,
  split: str,
  data_dir: epath.PathLike | None = None,
  max_captions: int | None = None,
) -> Split:
  """Opens a split of a dataset that TFDS has prepared, e.g. "coco_captions".

  max_captions: uses only the first captions of an image. The COCO protocol has five, and some
  images have six or seven. TFDS shuffles the records. Raises DatasetError as `open_split`.
  """
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))
  except tfds.core.DatasetNotFoundError:
    raise DatasetError(f"TFDS has no dataset {name!r}; `tfds.list_builders()` lists them") from None
  where = epath.Path(builder.data_path)
  if not (where / "dataset_info.json").exists():
    command = f"tfds build {name}" + (f" --data_dir={os.fspath(data_dir)}" if data_dir else "")
    raise DatasetError(f"{where}: dataset {name!r} of TFDS is not prepared; run `{command}`")
  return _open(builder, split, max_captions)
