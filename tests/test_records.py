"""Random access, the index, and damaged files."""

import gc
import io
import json
import os
import pathlib
import resource
import subprocess
import sys

import child_process
import numpy as np
import pytest
from PIL import Image

from xmodal_jax.data import records, tfrecord
from xmodal_jax.data.preparing import builder


def encoded_image(i: int, size: int = 8) -> bytes:
  pixels = np.random.default_rng(i).integers(0, 255, (size, size, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "JPEG")
  return out.getvalue()


def example(i: int, base: int = 0) -> dict:
  return {
    "image": encoded_image(base + i),
    "image_id": 2**40 + i,  # beyond 32 bits
    "filename": f"{base + i}.jpg",
    "captions": [f"caption {j} of {i}, naïve" for j in range(i % 3 + 1)],
    "caption_ids": [2**41 + 10 * i + j for j in range(i % 3 + 1)],
    "regions": np.arange(6 * (i % 3), dtype=np.float32).reshape(-1, 6) + i,
    "boxes": np.full((i % 3, 4), i, np.float32),
    "image_width": 640 + i,
    "image_height": 480,
  }


def write(out: pathlib.Path, splits=None, **kw) -> pathlib.Path:
  splits = splits or {"train": map(example, range(20)), "val": (example(i, 50) for i in range(3))}
  kw = {"description": "for a test", "region_dim": 6, **kw}
  return pathlib.Path(builder.write_dataset(out, "toy", "1.0.0", splits, **kw))


def test_round_trip(tmp_path):
  folder = write(tmp_path, shard_bytes=5000)
  assert len(list(folder.glob("toy-train*.index"))) > 2
  for where in (
    folder,
    folder.parent,
    tmp_path,
  ):  # the dataset, or a folder with one name/version in it
    split = records.open_split(where, "train")
    assert len(split) == 20 and split.name == "train"
  assert split.captions_per_record.dtype == np.int32
  assert split.captions_per_record.tolist() == [i % 3 + 1 for i in range(20)]
  for i in (7, 0, 19, 3):
    record, want = split.read(i), example(i)
    assert record.image == want["image"]
    assert (record.image_id, record.filename) == (want["image_id"], want["filename"])
    assert record.captions == tuple(want["captions"])
    assert record.caption_ids == tuple(want["caption_ids"])
    np.testing.assert_array_equal(record.regions, want["regions"])
    np.testing.assert_array_equal(record.boxes, want["boxes"])
    assert record.regions.shape == (i % 3, 6) and record.boxes.dtype == np.float32
    assert record.size == (640 + i, 480)
  assert [r.filename for r in split] == [f"{i}.jpg" for i in range(20)]
  with pytest.raises(IndexError):
    split.read(20)
  with pytest.raises(IndexError):
    split.read(-1)


def test_equal_examples_give_equal_bytes():
  """Also in another process, where protobuf's hash tables have another order."""
  given = {"image_id": 1, "filename": "f", "captions": ["a"], "caption_ids": [2]}
  given |= {"image": b"i", "caption_positions": [0]}
  code = f"from xmodal_jax.data.preparing import builder; print(builder.encode({given}).hex())"
  command, env = [sys.executable, "-c", code], child_process.environment()
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == builder.encode(given).hex()


def test_tfds_reads_the_same(tmp_path):
  import tensorflow_datasets as tfds

  found = tfds.builder_from_directory(write(tmp_path)).as_dataset(split="train")
  found = {int(e["image_id"]): e for e in tfds.as_numpy(found)}
  assert len(found) == 20
  for i in range(20):
    got, want = found[2**40 + i], example(i)
    assert [c.decode() for c in got["captions"]] == want["captions"]
    assert got["caption_ids"].tolist() == want["caption_ids"]
    np.testing.assert_array_equal(got["regions"], want["regions"])
    np.testing.assert_array_equal(got["image"].shape, (8, 8, 3))


def test_joined_splits(tmp_path):
  folder = write(tmp_path)
  train, val = records.open_split(folder, "train"), records.open_split(folder, "val")
  both = records.open_split(folder, "val+train")
  assert len(both) == 23 and both.name == "val+train"
  assert both.read(2).filename == "52.jpg" and both.read(3).filename == "0.jpg"
  assert len({train.fingerprint, val.fingerprint, both.fingerprint}) == 3
  np.testing.assert_array_equal(both.caption_positions, np.arange(both.captions_per_record.sum()))


def test_fingerprint_follows_content(tmp_path):
  changed = lambda i: {
    **example(i),
    "captions": [c.replace("of", "oF") for c in example(i)["captions"]],
  }
  prints = []
  for i, source in enumerate((example, example, changed)):
    folder = write(tmp_path / str(i), {"train": map(source, range(4))})
    prints.append(records.open_split(folder, "train").fingerprint)
  assert prints[0] == prints[1] != prints[2]  # of equal length in every record


def test_caption_positions_are_the_sources(tmp_path):
  places = [[4, 1], [0], [3, 2]]
  make = lambda i: {
    **example(i), "captions": ["x"] * len(places[i]), "caption_ids": places[i],
    "caption_positions": places[i],
  }  # fmt: skip
  folder = write(tmp_path, {"train": map(make, range(3)), "val": map(make, range(3))})
  split = records.open_split(folder, "train+val")
  assert split.caption_positions.tolist() == [4, 1, 0, 3, 2, 9, 6, 5, 8, 7]
  for path in folder.glob("*.index"):
    path.unlink()
  rebuilt = records.open_split(folder, "train+val")
  assert rebuilt.caption_positions.tolist() == split.caption_positions.tolist()


def read_all(split) -> list[int]:
  """The numbers of the unreadable records; the others must be right."""
  bad = []
  for i in range(len(split)):
    try:
      assert split.read(i).image == encoded_image(i)
    except records.BadRecordError as e:
      assert (e.split, e.index) == ("train", i)
      bad.append(i)
  return bad


@pytest.mark.parametrize("field", ["length", "length_high", "length_crc", "data", "tail", "crc"])
def test_a_damaged_byte_costs_one_record(tmp_path, field):
  folder = write(tmp_path)
  (shard,) = folder.glob("toy-train.tfrecord-00000-of-00001")
  index = tfrecord.ShardIndex.from_bytes(tfrecord.index_path(shard).read_bytes())
  start, length = int(index.offsets[11]), int(index.lengths[11])
  at = {"length": 0, "length_high": 7, "length_crc": 9, "data": 12, "tail": 11 + length}
  at = start + at.get(field, 14 + length)
  data = bytearray(shard.read_bytes())
  data[at] ^= 0x10
  shard.write_bytes(data)
  assert read_all(records.open_split(folder, "train")) == [11]
  with pytest.raises(
    records.BadRecordError, match=rf"record 11 of split 'train' in .*{shard.name}"
  ):
    records.open_split(folder, "train").read(11)


def test_reads_like_a_remote_file(tmp_path, monkeypatch):
  """Remote files are read by TensorFlow's file systems; ram:// takes the place of gs://."""
  import tensorflow as tf

  (shard,) = write(tmp_path).glob("toy-train.tfrecord-*-of-00001")
  with tf.io.gfile.GFile("ram://shard", "wb") as f:
    f.write(shard.read_bytes())
  split = records.open_split(tmp_path, "train")
  split._files._paths = ["ram://shard"]
  monkeypatch.setattr(os, "pread", None)
  assert read_all(split) == []


def test_open_files_are_bounded_for_the_process(tmp_path, monkeypatch):
  """Three sets of 400 shards failed at the usual limit of 1,024."""
  count = lambda: len(os.listdir("/proc/self/fd"))
  folders = [write(tmp_path / str(i), shard_bytes=1) for i in range(3)]
  monkeypatch.setattr(records, "_KEPT_FDS", 8)
  monkeypatch.setattr(records, "_DESCRIPTORS", records._Descriptors())
  before = count()
  sets = [records.open_split(folder, "train") for folder in folders]
  for split in sets:
    assert read_all(split) == []
  assert count() - before == 8
  del sets, split
  gc.collect()
  assert count() == before and records._DESCRIPTORS._free == 8
  # Half of a lower limit of the process.
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)
  monkeypatch.setattr(resource, "getrlimit", lambda kind: (10, limit[1]))
  monkeypatch.setattr(records, "_DESCRIPTORS", records._Descriptors())
  split = records.open_split(folders[0], "train")
  assert read_all(split) == [] and count() - before == 5


def test_index_rebuilt_equals_index_written(tmp_path):
  folder = write(tmp_path, shard_bytes=5000)
  fingerprint = records.open_split(folder, "train").fingerprint
  written = {p: p.read_bytes() for p in folder.glob("*.index")}
  for path in written:
    path.unlink()
  assert records.open_split(folder, "train+val").fingerprint
  assert {p: p.read_bytes() for p in folder.glob("*.index")} == written
  assert records.open_split(folder, "train").fingerprint == fingerprint


def test_an_index_that_cannot_be_kept_anywhere(tmp_path, monkeypatch, caplog):
  """On a full disk, for instance: the split opens all the same."""
  folder = write(tmp_path)
  for path in folder.glob("*.index"):
    path.unlink()

  def full(path, data):
    raise OSError(28, "No space left on device")

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(tfrecord, "write_atomic", full)
  assert len(records.open_split(folder, "train")) == 20
  assert "the index will be made again" in caplog.text


def test_a_failed_atomic_write_leaves_nothing(tmp_path):
  (tmp_path / "a").mkdir()
  with pytest.raises(OSError):
    tfrecord.write_atomic(tmp_path / "a", b"x")  # a folder is in its place
  assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_index_of_a_read_only_folder_is_cached(tmp_path, monkeypatch):
  folder = write(tmp_path / "data")
  for path in folder.glob("*.index"):
    path.unlink()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  write_atomic = tfrecord.write_atomic

  def refuse(path, data):
    if pathlib.Path(path).is_relative_to(folder):
      raise PermissionError(path)
    write_atomic(path, data)

  monkeypatch.setattr(tfrecord, "write_atomic", refuse)
  assert read_all(records.open_split(folder, "train")) == []
  assert not list(folder.glob("*.index"))
  assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
  monkeypatch.setattr(tfrecord, "index_shard", None)  # not scanned again
  assert read_all(records.open_split(folder, "train")) == []


def test_cached_index_is_of_the_absolute_path(tmp_path, monkeypatch):
  """The same relative path in two working directories is two shards."""
  found = set()
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    relative = tfrecord.cached_index_path("data/x.tfrecord-00000-of-00001")
    assert relative == tfrecord.cached_index_path(
      tmp_path / name / "data/x.tfrecord-00000-of-00001"
    )
    found.add(relative)
  assert len(found) == 2
  remote = "gs://bucket/x.tfrecord"
  assert tfrecord.cached_index_path(remote) == tfrecord.cached_index_path(remote)


def test_unparsable_record_is_met_when_the_index_is_made(tmp_path):
  """Its captions cannot be counted; with a count of one it is read, and reported."""
  folder = write(tmp_path)
  (shard,) = folder.glob("toy-train.tfrecord-00000-of-00001")
  index = tfrecord.ShardIndex.from_bytes(tfrecord.index_path(shard).read_bytes())
  data = bytearray(shard.read_bytes())
  data[int(index.offsets[11]) + 12] ^= 0xFF
  shard.write_bytes(data)
  tfrecord.index_path(shard).unlink()
  split = records.open_split(folder, "train")
  assert read_all(split) == [11] and split.captions_per_record[11] == 1


def damaged(folder: pathlib.Path, how: str) -> str:
  """Damages a dataset; returns the expected part of the message."""
  (shard,) = folder.glob("toy-train.tfrecord-00000-of-00001")
  index = tfrecord.index_path(shard)
  size = shard.stat().st_size
  if how == "truncated":
    os.truncate(shard, size - 5)
    return rf"{shard.name} has {size - 5} bytes, expected {size} by its index .*delete the index"
  if how == "truncated, no index":
    os.truncate(shard, size - 5)
    index.unlink()
    return rf"{shard.name}: record 19 at byte \d+ has \d+ bytes, beyond the end"
  if how == "broken chain, no index":
    data = bytearray(shard.read_bytes())
    data[8] ^= 1
    shard.write_bytes(data)
    index.unlink()
    return rf"{shard.name}: record 0 at byte 0: crc of the length field is wrong"
  if how == "cut index":
    os.truncate(index, 100)
    return rf"{index.name}: no readable index .*delete it"
  if how == "shard lost":
    shard.unlink()
    return rf"{shard.name}: no such shard"
  assert how == "of another dataset"
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace('"20"', '"21"'))
  return r"holds 20 records, but dataset_info.json .* 21"


@pytest.mark.parametrize(
  "how",
  [
    "truncated",
    "truncated, no index",
    "broken chain, no index",
    "cut index",
    "shard lost",
    "of another dataset",
  ],
)
def test_damaged_shard(tmp_path, how):
  folder = write(tmp_path)
  message = damaged(folder, how)
  with pytest.raises(records.DatasetError, match=message):
    records.open_split(folder, "train")


def test_what_is_not_there(tmp_path):
  folder = write(tmp_path)
  with pytest.raises(records.DatasetError, match=r"no split 'dev'; there are \['train', 'val'\]"):
    records.open_split(folder, "train+dev")
  with pytest.raises(records.DatasetError, match=r"nowhere: no such dataset.*prepare_data\.py"):
    records.open_split(tmp_path / "nowhere", "train")
  (tmp_path / "empty").mkdir()
  with pytest.raises(records.DatasetError, match=r"empty: no dataset_info.json.*prepare_data\.py"):
    records.open_split(tmp_path / "empty", "train")
  builder.write_dataset(
    tmp_path, "toy2", "1.0.0", {"train": [example(0)]}, description="", region_dim=6
  )
  with pytest.raises(records.DatasetError, match=r"holds 2 datasets(?s:.*)toy2"):
    records.open_split(tmp_path, "train")
  info = folder / "dataset_info.json"
  parsed = json.loads(info.read_text())
  parsed["splits"][1] |= {"shardLengths": ["0"], "numBytes": "0"}
  info.write_text(json.dumps(parsed))
  with pytest.raises(records.DatasetError, match="split 'val' is empty"):
    records.open_split(folder, "val")


def fake_coco(root: pathlib.Path) -> None:
  """A small dataset in the format of TFDS's coco_captions."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  folder = root / "coco_captions" / "2014" / "1.1.0"
  folder.mkdir(parents=True)
  features = tfds.features
  spec = features.FeaturesDict(
    {
      "image": features.Image(encoding_format="jpeg"),
      "image/filename": features.Text(),
      "image/id": np.int64,
      "captions": features.Sequence({"id": np.int64, "text": np.str_}),
      "objects": features.Sequence({"bbox": features.BBoxFeature(), "is_crowd": np.bool_}),
    }
  )
  with tf.io.TFRecordWriter(str(folder / "coco_captions-test.tfrecord-00000-of-00001")) as f:
    for i in range(4):
      captions = [{"id": 2**40 + j, "text": f"{i} {j} ü"} for j in range(5 + (i == 2))]
      example = {
        "image": io.BytesIO(encoded_image(i)),
        "image/filename": f"{i}.jpg",
        "image/id": 100 + i,
      }
      f.write(spec.serialize_example({**example, "captions": captions, "objects": []}))
  split = tfds.core.SplitInfo(name="test", shard_lengths=[4], num_bytes=0)
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=spec, split_infos=[split], version="1.1.0", check_data=False
  )


def test_data_set_of_tfds(tmp_path):
  with pytest.raises(
    records.DatasetError, match="not prepared; run `tfds build coco_captions --data"
  ):
    records.open_tfds("coco_captions", "test", tmp_path)
  fake_coco(tmp_path)
  split = records.open_tfds("coco_captions", "test", tmp_path)
  assert split.captions_per_record.tolist() == [5, 5, 6, 5]
  record = split.read(2)
  assert (record.image, record.filename, record.image_id) == (encoded_image(2), "2.jpg", 102)
  assert record.captions == tuple(f"2 {j} ü" for j in range(6))
  assert record.caption_ids == tuple(2**40 + j for j in range(6))
  assert record.regions is None and record.boxes is None
  np.testing.assert_array_equal(split.caption_positions, np.arange(21))
  five = records.open_tfds("coco_captions", "test", tmp_path, max_captions=5)
  assert five.captions_per_record.tolist() == [5, 5, 5, 5] and five.caption_positions[-1] == 19
  assert five.read(2).captions == record.captions[:5]
  assert five.read(2).caption_ids == record.caption_ids[:5]


def test_labels(tmp_path):
  names = ("bus", "big cat, lynx", "ü")
  labelled = lambda i: {
    "image": encoded_image(i), "image_id": i, "filename": "", "captions": [], "label": i % 4 - 1
  }  # fmt: skip
  folder = write(tmp_path, {"a": map(labelled, range(6))}, region_dim=None, class_names=names)
  split = records.open_split(folder, "a")
  assert split.class_names == names
  assert [r.label for r in split] == [-1, 0, 1, 2, -1, 0]
  assert split.captions_per_record.tolist() == [0] * 6 and len(split.caption_positions) == 0
  with pytest.raises(records.DatasetError, match=r"'0\.jpg' of split 'a' has the fields"):
    write(tmp_path / "b", {"a": [example(0)]}, class_names=names)
  unlabelled = records.open_split(write(tmp_path / "c"), "train")
  assert unlabelled.class_names == () and unlabelled.read(0).label == -1


@pytest.mark.parametrize("split", ["train", "validation", "train+validation"])
def test_imagenet_of_tfds(tmp_path, split):
  """Labelled images without captions, in the format of TFDS's imagenet2012."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  info = tfds.builder("imagenet2012", data_dir=tmp_path).info
  assert set(info.features) == {"image", "label", "file_name"}
  folder = tmp_path / "imagenet2012" / str(info.version)
  folder.mkdir(parents=True)
  labels, infos = {"train": [999, 0, 7], "validation": [7, -1]}, []
  for name, values in labels.items():
    shard = folder / f"imagenet2012-{name}.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(str(shard)) as f:
      for i, label in enumerate(values):
        fields = {
          "image": io.BytesIO(encoded_image(i)),
          "label": label,
          "file_name": f"{name}{i}.JPEG",
        }
        f.write(info.features.serialize_example(info.features.encode_example(fields)))
    infos.append(tfds.core.SplitInfo(name=name, shard_lengths=[len(values)], num_bytes=0))
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=info.features, split_infos=infos, version=str(info.version),
    check_data=False,
  )  # fmt: skip
  want = [label for part in split.split("+") for label in labels[part]]
  for opened in (
    records.open_tfds("imagenet2012", split, tmp_path),
    records.open_split(folder, split),
  ):
    assert [r.label for r in opened] == want
    assert len(opened.class_names) == 1000 and opened.class_names[7] == "n01514668"
    first = opened.read(0)
    assert first.image == encoded_image(0) and first.filename == f"{split.split('+')[0]}0.JPEG"
    assert (first.captions, first.caption_ids, first.image_id) == ((), (), -1)
    assert opened.captions_per_record.tolist() == [0] * len(want)
    assert len(opened.caption_positions) == 0
