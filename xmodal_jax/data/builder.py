"""Writes data sets as TFRecords with offset indices and the metadata that TFDS reads.

A data set is a folder NAME/VERSION of shards `NAME-SPLIT.tfrecord-00000-of-00001`, one `.index` per
shard (`tfrecord`), dataset_info.json and features.json for `tfds.builder_from_directory`, and
source.json: what it was made of, with counts and checksums. Pictures are stored as the bytes that
came, never encoded again, and in the order that came.
"""

import errno
import itertools
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from xmodal_jax.data import tfrecord
from xmodal_jax.data.tfrecord import DatasetError

SHARD_BYTES = 256 << 20
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")

# One picture: image (encoded bytes), image_id, filename, captions [C], caption_ids [C],
# caption_positions [C] (may be left out: enumerated), regions [R, F] and boxes [R, 4] (optional).
Example = Mapping[str, Any]


class OutputExistsError(DatasetError):
  """The data set is there already."""


def features(region_dim: int | None = None, images: bool = True):
  """The feature spec of a data set. region_dim: F of regions, None without regions and boxes."""
  import tensorflow_datasets as tfds

  spec = {
    "image_id": np.int64,
    "filename": tfds.features.Text(),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "caption_ids": tfds.features.Sequence(np.int64),
    "caption_positions": tfds.features.Sequence(np.int64),
  }
  if images:
    spec["image"] = tfds.features.Image()
  if (
    region_dim is not None
  ):  # as one string each: a list of 36 x 2048 floats parses in milliseconds
    array = lambda width: tfds.features.Tensor(
      shape=(None, width), dtype=np.float32, encoding=tfds.features.Encoding.BYTES
    )
    spec |= {"regions": array(region_dim), "boxes": array(4)}
  return tfds.features.FeaturesDict(spec)


def encode(example: Example) -> bytes:
  """An example -> a serialised tf.train.Example. Equal examples give equal bytes."""
  from tensorflow.core.example import example_pb2

  out = example_pb2.Example()
  feature = out.features.feature
  if "image" in example:
    feature["image"].bytes_list.value.append(example["image"])
  feature["image_id"].int64_list.value.append(int(example["image_id"]))
  feature["filename"].bytes_list.value.append(example["filename"].encode())
  feature["captions"].bytes_list.value.extend(c.encode() for c in example["captions"])
  for name in ("caption_ids", "caption_positions"):
    values = [int(i) for i in example[name]]
    if len(values) != len(example["captions"]):
      count = f"{len(values)} {name} for {len(example['captions'])} captions"
      raise DatasetError(f"picture {example['filename']}: {count}; there must be one each")
    feature[name].int64_list.value.extend(values)
  for name in ("regions", "boxes"):
    if name in example:
      array = np.ascontiguousarray(example[name], "<f4")
      feature[name].bytes_list.value.append(array.tobytes())
  return out.SerializeToString(deterministic=True)


def dataset_dir(out_dir: epath.PathLike, name: str, version: str) -> epath.Path:
  """Where `write_dataset` puts a data set."""
  if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
    raise DatasetError(
      f"data set {name!r}, version {version!r}: a name is lower-case letters, digits and "
      "underscores after a letter, a version is like 1.0.0; choose others (--name, --version)"
    )
  return epath.Path(out_dir) / name / version


def check_absent(out_dir: epath.PathLike, name: str, version: str, overwrite: bool) -> None:
  """Raises OutputExistsError if the data set is there already and may not be replaced."""
  path = dataset_dir(out_dir, name, version)
  if path.exists() and not overwrite:
    raise OutputExistsError(f"{path} exists; pass --overwrite to replace it, or another --name")


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
  shard_bytes: int = SHARD_BYTES,
  overwrite: bool = False,
) -> epath.Path:
  """Writes a data set and returns its folder, out_dir/name/version.

  sources: JSON that says what it is made of, kept in source.json. region_dim, images: which of the
  optional fields the examples have. The folder appears whole, at the end, or not at all.
  """
  final = dataset_dir(out_dir, name, version)
  check_absent(out_dir, name, version, overwrite)
  for split in splits:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
      raise DatasetError(f"split {split!r}: a name is lower-case letters, digits and underscores")
  final.parent.mkdir(parents=True, exist_ok=True)
  temporary = final.parent / f".{version}.incomplete-{uuid.uuid4().hex}"
  temporary.mkdir()
  try:
    spec = features(region_dim, images)
    written = {
      split: _write_split(temporary, f"{name}-{split}.tfrecord", split, examples, shard_bytes, spec)
      for split, examples in splits.items()
    }
    _write_metadata(temporary, name, version, written, description, spec, sources or {})
    _publish(temporary, final, overwrite)
  except BaseException:
    temporary.rmtree(missing_ok=True)
    raise
  return final


def _write_split(
  folder: epath.Path, prefix: str, split: str, examples: Iterable[Example], shard_bytes: int, spec
) -> list[tfrecord.ShardIndex]:
  indices, numbered = [], _numbered(examples, set(spec), split)
  first = next(numbered, None)
  if first is None:
    raise DatasetError(f"split {split!r} is empty: no picture of the source belongs to it")
  numbered = itertools.chain([first], numbered)
  # A shard's name has the number of shards, which is known only at the end.
  shard = lambda i, of: folder / f"{prefix}-{i:05d}-of-{of:05d}"
  for i in itertools.count():
    builder = tfrecord.IndexBuilder()
    with shard(i, 0).open("wb") as f:
      for example in numbered:
        payload = encode(example)
        data, crc = tfrecord.frame(payload)
        f.write(data)
        places = example["caption_positions"]
        builder.add(len(payload), crc, len(example["captions"]), places)
        if builder.size >= shard_bytes:
          break
    if not len(builder):
      shard(i, 0).unlink()
      break
    indices.append(builder.build())
    logging.info("%s: shard %d, %d records", split, i, len(builder))
  for i, index in enumerate(indices):
    path = shard(i, len(indices))
    shard(i, 0).rename(path)
    tfrecord.index_path(path).write_bytes(index.to_bytes())
  return indices


def _numbered(examples: Iterable[Example], fields: set[str], split: str) -> Iterator[Example]:
  """Adds caption ids and positions where there are none, and checks that all fields are there."""
  count = 0
  for example in examples:
    places = range(count, count + len(example["captions"]))
    count += len(example["captions"])
    example = {"caption_ids": places, "caption_positions": places, **example}
    if set(example) != fields:
      raise DatasetError(
        f"picture {example.get('filename')!r} of split {split!r} has the fields {sorted(example)}, "
        f"the data set {sorted(fields)}: all pictures of a data set have the same"
      )
    yield example


def _write_metadata(
  folder: epath.Path,
  name: str,
  version: str,
  written: dict[str, list[tfrecord.ShardIndex]],
  description: str,
  spec,
  sources: Mapping[str, Any],
) -> None:
  import tensorflow_datasets as tfds

  counts, infos = {}, []
  for split, indices in written.items():
    payload = sum(int(x.lengths.sum()) for x in indices)
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix="tfrecord"
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(x) for x in indices],
        num_bytes=payload,
        filename_template=template,
      )
    )
    captions = sum(int(x.captions.sum()) for x in indices)
    counts[split] = {
      "records": sum(map(len, indices)),
      "captions": captions,
      "shards": len(indices),
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


def _publish(temporary: epath.Path, final: epath.Path, overwrite: bool) -> None:
  old = None
  if overwrite and final.exists():
    old = final.parent / f".{final.name}.old-{uuid.uuid4().hex}"
    final.rename(old)
  if "://" in os.fspath(final):  # object stores rename one file at a time: the marker comes last
    final.mkdir()
    for path in sorted(temporary.iterdir(), key=lambda p: p.name == "dataset_info.json"):
      path.rename(final / path.name)
    temporary.rmtree(missing_ok=True)
  else:
    try:
      os.rename(temporary, final)
    except OSError as e:
      if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
      raise OutputExistsError(f"{final} was written meanwhile by another process") from e
  if old is not None:
    old.rmtree()
