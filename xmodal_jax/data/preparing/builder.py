"""Writes datasets as TFRecords with offset indices and the metadata that TFDS reads.

A dataset is a folder NAME/VERSION of shards `NAME-SPLIT.tfrecord-00000-of-00001`, one `.index` per
shard (`tfrecord`), dataset_info.json and features.json for `tfds.builder_from_directory`, and
source.json with its origin, counts and checksums. Image files are stored unchanged, in the order of
the source.
"""

import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from xmodal_jax.data import tfrecord
from xmodal_jax.data.preparing import publish, summary
from xmodal_jax.data.progress import Progress
from xmodal_jax.data.tfrecord import DatasetError

SHARD_BYTES = 256 << 20

# One image: image (encoded bytes), image_id, filename, captions [C], caption_ids [C],
# caption_positions [C] (both are enumerated if absent), label (optional); and either all of regions
# [R, F], boxes [R, 4] in pixels, image_width and image_height, or none of them.
Example = Mapping[str, Any]


def features(
  region_dim: int | None = None,
  images: bool = True,
  class_names: Sequence[str] = (),
  positions: bool = True,
  region_dtype: npt.DTypeLike = np.float32,
):
  """The feature spec of a dataset, a tfds.features.FeaturesDict.

  region_dim: F; None without regions and boxes. class_names: of labels 0, 1, ..., all different;
  empty without labels. positions: False if the captions are in the order of the records.
  region_dtype: stored dtype of region features; boxes are always float32.
  """
  import tensorflow_datasets as tfds

  spec = {
    "image_id": np.int64,
    "filename": tfds.features.Text(),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "caption_ids": tfds.features.Sequence(np.int64),
  }
  if positions:
    spec["caption_positions"] = tfds.features.Sequence(np.int64)
  if images:
    spec["image"] = tfds.features.Image()
  if region_dim is not None:
    spec |= {"regions": _array(region_dim, region_dtype), "boxes": _array(4, np.float32)}
    spec |= {"image_width": np.int64, "image_height": np.int64}
  if class_names:
    spec["label"] = tfds.features.ClassLabel(names=class_names)
  return tfds.features.FeaturesDict(spec)


def _array(width: int, dtype: npt.DTypeLike):
  """The feature of an array [R, width], stored as one string: a list of floats parses slowly."""
  import tensorflow_datasets as tfds

  return tfds.features.Tensor(
    shape=(None, width), dtype=np.dtype(dtype).type, encoding=tfds.features.Encoding.BYTES
  )


def encode(example: Example) -> bytes:
  """An example -> a serialised tf.train.Example. Equal examples give equal bytes.

  Region features of float16 are stored as such, others as float32. Raises DatasetError unless each
  caption has one id and one position.
  """
  from tensorflow.core.example import example_pb2

  out = example_pb2.Example()
  feature = out.features.feature
  if "image" in example:
    feature["image"].bytes_list.value.append(example["image"])
  feature["image_id"].int64_list.value.append(int(example["image_id"]))
  feature["filename"].bytes_list.value.append(example["filename"].encode())
  feature["captions"].bytes_list.value.extend(c.encode() for c in example["captions"])
  for name in ("caption_ids", "caption_positions"):
    if name not in example:
      continue
    values = [int(i) for i in example[name]]
    if len(values) != len(example["captions"]):
      count = f"{len(values)} {name} for {len(example['captions'])} captions"
      raise DatasetError(f"image {example['filename']}: {count}; there must be one each")
    feature[name].int64_list.value.extend(values)
  for name in ("regions", "boxes"):
    if name in example:
      half = name == "regions" and np.asarray(example[name]).dtype == np.float16
      array = np.ascontiguousarray(example[name], "<f2" if half else "<f4")
      feature[name].bytes_list.value.append(array.tobytes())
  for name in ("image_width", "image_height", "label"):
    if name in example:
      feature[name].int64_list.value.append(int(example[name]))
  return out.SerializeToString(deterministic=True)


def write_dataset(
  out_dir: epath.PathLike,
  name: str,
  version: str,
  splits: Mapping[str, Iterable[Example]],
  *,
  description: str,
  sources: Mapping[str, Any] | None = None,
  region_dim: int | None = None,
  images: bool = True,
  class_names: Sequence[str] = (),
  region_dtype: npt.DTypeLike = np.float32,
  shard_bytes: int = SHARD_BYTES,
  overwrite: bool = False,
  totals: Mapping[str, int] | None = None,
  left_out: Mapping[str, summary.LeftOut] | None = None,
) -> epath.Path:
  """Writes a dataset and returns its folder, out_dir/name/version.

  The folder is published at the end, complete, and a table of the splits is logged; after an error
  nothing is left (see `publish`).

  Args:
    splits: split -> its examples.
    sources: JSON about the origin of the dataset, stored in source.json.
    region_dim, images, class_names, region_dtype: the optional fields of the examples, see
      `features`.
    shard_bytes: size from which a new shard is started.
    overwrite: replace an existing dataset.
    totals: split -> number of its examples, for the line of progress.
    left_out: split -> what its source had and the split has not, for the table and source.json.

  Raises:
    DatasetError: for bad names, an empty split, a full disk, or examples with different fields.
    OutputExistsError: if the dataset exists and `overwrite` is false.
  """
  from tensorflow.core.example import example_pb2  # noqa: F401 (10 s, before the clock starts)

  final = publish.dataset_dir(out_dir, name, version)
  totals, left_out, rows = totals or {}, left_out or {}, {}
  with publish.publishing(final, splits, overwrite) as folder:
    spec, written = features(region_dim, images, class_names, region_dtype=region_dtype), {}
    for split, examples in splits.items():
      start, prefix = time.monotonic(), shard_prefix(final, split)
      with Progress(f"writing {split}", "images", totals.get(split)) as progress:
        counts = _write_split(folder, prefix, split, examples, shard_bytes, spec, progress)
      written[split] = counts
      rows[split] = row(counts, time.monotonic() - start, left_out.get(split, {}))
    origin = {**(sources or {}), **({"left_out": left_out} if any(left_out.values()) else {})}
    write_metadata(folder, final, written, description, spec, origin)
  logging.info("%s", summary.table(rows))
  return final


def row(shards: Sequence["ShardCounts"], seconds: float | None, left_out: summary.LeftOut) -> tuple:
  """A split's row of `summary.table`."""
  total = [sum(getattr(x, k) for x in shards) for k in ("records", "captions", "bytes")]
  return (*total, seconds, left_out)


def shard_prefix(final: epath.Path, split: str) -> str:
  """First part of the names of a split's shards."""
  return f"{final.parent.name}-{split}.tfrecord"


def shard_name(prefix: str, i: int, of: int) -> str:
  return f"{prefix}-{i:05d}-of-{of:05d}"


@dataclasses.dataclass(frozen=True)
class ShardCounts:
  """Counts of one shard for the dataset's metadata. bytes: of the payloads."""

  records: int
  captions: int
  bytes: int

  @classmethod
  def of(cls, index: tfrecord.ShardIndex) -> "ShardCounts":
    return cls(len(index), int(index.captions.sum()), int(index.lengths.sum()))


def _write_split(
  folder: epath.Path,
  prefix: str,
  split: str,
  examples: Iterable[Example],
  shard_bytes: int,
  spec,
  progress: Progress,
) -> list[ShardCounts]:
  indices, numbered = [], _numbered(examples, spec, split)
  first = next(numbered, None)
  if first is None:
    raise DatasetError(f"split {split!r} is empty: no image of the source belongs to it")
  numbered = itertools.chain([first], numbered)
  # The number of shards, a part of their names, is known only at the end.
  shard = lambda i, of: folder / shard_name(prefix, i, of)
  for i in itertools.count():
    index = write_records(shard(i, 0), numbered, shard_bytes, progress)
    if not len(index):
      shard(i, 0).unlink()
      break
    indices.append(index)
  for i, index in enumerate(indices):
    path = shard(i, len(indices))
    shard(i, 0).rename(path)
    tfrecord.index_path(path).write_bytes(index.to_bytes())
  return [ShardCounts.of(index) for index in indices]


def write_records(
  path: epath.PathLike,
  examples: Iterator[Example],
  shard_bytes: int | None = None,
  progress: Progress | None = None,
) -> tfrecord.ShardIndex:
  """Writes examples to one file until it has shard_bytes, and returns the index of the file.

  Takes no more examples from the iterator than it writes.
  """
  builder = tfrecord.IndexBuilder()
  with epath.Path(path).open("wb") as f:
    for example in examples:
      payload = encode(example)
      data, crc = tfrecord.frame(payload)
      f.write(data)
      places = example.get("caption_positions", ())
      builder.add(len(payload), crc, len(example["captions"]), places)
      if progress:
        progress.add()
      if shard_bytes and builder.size >= shard_bytes:
        break
  return builder.build()


def _numbered(examples: Iterable[Example], spec, split: str) -> Iterator[Example]:
  """Adds missing caption ids and positions, checks the fields, and casts regions to the spec."""
  count, fields = 0, set(spec)
  for example in examples:
    places = range(count, count + len(example["captions"]))
    count += len(example["captions"])
    example = {"caption_ids": places, "caption_positions": places, **example}
    example = checked(example, fields, split)
    if "regions" in fields:
      example["regions"] = np.asarray(example["regions"], spec["regions"].np_dtype)
    yield example


def checked(example: Example, fields: set[str], split: str) -> Example:
  """Returns the example. Raises DatasetError if its fields are not those of the dataset."""
  if set(example) != fields:
    raise DatasetError(
      f"image {example.get('filename')!r} of split {split!r} has the fields {sorted(example)}, "
      f"the dataset {sorted(fields)}: all images of a dataset must have the same"
    )
  return example


def write_metadata(
  folder: epath.Path,
  final: epath.Path,
  written: Mapping[str, Sequence[ShardCounts]],
  description: str,
  spec,
  sources: Mapping[str, Any],
) -> None:
  """Writes TFDS's metadata and source.json into the folder that becomes `final`.

  written: counts of the shards of each split, in order. spec: of `features`. sources: JSON, stored
  in source.json with the counts.
  """
  import tensorflow_datasets as tfds

  name, version, counts, infos = final.parent.name, final.name, {}, []
  for split, shards in written.items():
    payload = sum(x.bytes for x in shards)
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix="tfrecord"
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[x.records for x in shards],
        num_bytes=payload,
        filename_template=template,
      )
    )
    counts[split] = {
      "records": sum(x.records for x in shards),
      "captions": sum(x.captions for x in shards),
      "shards": len(shards),
      "bytes": payload,
    }
  source = {"name": name, "version": version, "counts": counts, **sources}
  (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n")
  tfds.folder_dataset.write_metadata(
    data_dir=os.fspath(folder),
    features=spec,
    split_infos=infos,
    version=version,
    filename_template=tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, filetype_suffix="tfrecord"
    ),
    check_data=False,
    description=description,
  )
