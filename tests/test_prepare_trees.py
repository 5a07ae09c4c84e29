"""prepare_data.py's sources csv (ZeroVL's files) and folders (one per class)."""

import csv
import json
import pathlib

import numpy as np
import pytest
from test_prepare_data import fails, run
from test_records import encoded_image

from xmodal_jax.data import records

COLUMNS = ("image", "image_id", "caption", "caption_id")
BIG = 137438953472  # an id of COCO, beyond 32 bits
VALID = [
  ("b.jpg", BIG, "one\nof two lines", BIG + 1),
  ("a.jpg", 3, 'a "quoted", caption', BIG + 2),
  ("b.jpg", BIG, "two", 7),
  ("c/d.jpg", 0, "three", -1),
]
TRAIN = [("a.jpg", 3, "of another split", 0)]


def csv_set(root: pathlib.Path, valid=VALID, train=TRAIN, columns=COLUMNS) -> tuple:
  """A dataset in ZeroVL's layout, with one image per row; -> arguments."""
  for part, rows in (("train", train), ("valid", valid)):
    if rows is None:
      continue
    for i, row in enumerate(rows):
      path = root / "set" / part / row[0]
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encoded_image(i))
    with (root / "set" / f"{part}_anno.csv").open("w", newline="") as f:
      csv.writer(f).writerows([columns, *rows])
  return ("csv", "--root", root / "set", "--out", root / "out")


def test_csv(tmp_path):
  run(*csv_set(tmp_path), "--check_images")
  split = records.open_split(tmp_path / "out", "val")
  assert [(r.filename, r.image_id) for r in split] == [("b.jpg", BIG), ("a.jpg", 3), ("c/d.jpg", 0)]
  first = split.read(0)
  assert first.image == encoded_image(2) and first.label == -1  # written twice
  assert first.captions == ("one\nof two lines", "two") and first.caption_ids == (BIG + 1, 7)
  assert split.caption_positions.tolist() == [0, 2, 1, 3]
  assert [r.captions for r in records.open_split(tmp_path / "out", "train")] == [(TRAIN[0][2],)]
  source = json.loads((tmp_path / "out" / "csv" / "1.0.0" / "source.json").read_text())
  assert set(source["sha256"]) == {"train_anno.csv", "valid_anno.csv"}


def test_csv_of_one_file(tmp_path, caplog):
  with caplog.at_level("INFO"):
    run(*csv_set(tmp_path, train=None), "--valid_split", "test")
  assert "train_anno.csv does not exist" in caplog.text
  assert len(records.open_split(tmp_path / "out", "test")) == 3
  with pytest.raises(records.DatasetError, match="no split 'val'"):
    records.open_split(tmp_path / "out", "val")


def test_csv_missing_images(tmp_path, capsys):
  args = csv_set(tmp_path)
  (tmp_path / "set" / "valid" / "a.jpg").unlink()
  assert "1 of 4 images are missing" in fails(capsys, *args)
  run(*args, "--max_missing", "1")
  split = records.open_split(tmp_path / "out", "val")
  assert [r.filename for r in split] == ["b.jpg", "c/d.jpg"]
  assert split.caption_positions.tolist() == [0, 1, 2]  # without a gap


@pytest.mark.parametrize(
  "valid, message",
  [
    ([], "valid_anno.csv: no rows"),
    ([*VALID, ("a.jpg", 4, "x", 9)], "csv:7: image a.jpg has image_id 4, but 3 at"),
    ([*VALID, ("a.jpg", 4, "x", 9)], "valid_anno.csv:4; all records of an image"),
    ([*VALID, ("e.jpg", 3, "x", 9)], "csv:7: image_id 3 is of image e.jpg, but of a.jpg at"),
    ([*VALID, ("a.jpg", 0, "x", 9)], "csv:7: image a.jpg has image_id 0, but 3 at"),
    ([("a.jpg", "1.0", "x", 9)], "csv:2: image_id is '1.0', expected an integer of 64 bits"),
    ([("a.jpg", 1, "x", 2**63)], "caption_id is '9223372036854775808'"),
    ([("a.jpg", 1, "", 9)], "csv:2: nothing in column 'caption'"),
    ([("a.jpg", 1, "x")], "csv:2: nothing in column 'caption_id'"),
    ([("a.jpg", 1, "x", 2, "y")], "csv:2: 5 fields, expected 4"),
  ],
)
def test_bad_csv(tmp_path, capsys, valid, message):
  assert message in fails(capsys, *csv_set(tmp_path, valid))


def test_bad_csv_files(tmp_path, capsys):
  args = csv_set(tmp_path, columns=("image", "image_id", "text", "caption_id"))
  assert "nothing in column 'caption'; expected the columns ['image', " in fails(capsys, *args)
  for name in ("train", "valid"):
    (tmp_path / "set" / f"{name}_anno.csv").unlink()
  assert "neither train_anno.csv nor valid_anno.csv in it; check --root" in fails(capsys, *args)


def folders(root: pathlib.Path) -> tuple:
  """Three classes, not created in alphabetical order; -> arguments."""
  files = ("train/b/1.JPEG", "train/B/2.png", "train/a/x/0.jpg", "train/a/3.jpg", "val/b/4.jpg")
  for i, name in enumerate(files):
    path = root / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_image(i))
  (root / "names.txt").write_text("b\tbig cat, lynx\n\nB\tbus\na\tapple \nz\tzebra\n")
  return ("folders", "--root", root / "set", "--out", root / "out")


def test_folders(tmp_path, caplog):
  args = folders(tmp_path)
  for name in ("train/a/notes.txt", "train/a/._3.jpg", "train/.cache/1.jpg"):
    (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / name).write_bytes(b"no image")
  with caplog.at_level("INFO"):
    run(*args, "--check_images")
  for text in (
    "left out 2 files",
    "hidden folders ['.cache']",
    "no images of 2 classes, first B",
  ):
    assert text in caplog.text
  train = records.open_split(tmp_path / "out", "train")
  assert train.class_names == ("B", "a", "b")  # by code points, as the published programs sort
  found = [(r.filename, r.label, r.image_id, r.captions) for r in train]
  assert found == [
    ("B/2.png", 0, 0, ()), ("a/3.jpg", 1, 1, ()), ("a/x/0.jpg", 1, 2, ()), ("b/1.JPEG", 2, 3, ()),
  ]  # fmt: skip
  assert train.read(0).image == encoded_image(1)
  assert train.captions_per_record.tolist() == [0] * 4 and len(train.caption_positions) == 0
  val = records.open_split(tmp_path / "out", "val")
  assert [(r.filename, r.label, r.image_id) for r in val] == [("b/4.jpg", 2, 4)]
  assert val.class_names == train.class_names


def test_names_and_tfds(tmp_path):
  """TFDS reads the same labels, and a new index equals the first."""
  import tensorflow_datasets as tfds

  args = folders(tmp_path)
  (tmp_path / "set" / "val").rename(tmp_path / "elsewhere")
  run(*args, "--names", tmp_path / "names.txt")
  folder = tmp_path / "out" / "folders" / "1.0.0"
  split = records.open_split(folder, "train")
  assert split.class_names == ("bus", "apple", "big cat, lynx")
  builder = tfds.builder_from_directory(folder)
  assert tuple(builder.info.features["label"].names) == split.class_names
  found = list(tfds.as_numpy(builder.as_dataset(split="train")))
  assert [int(e["label"]) for e in found] == [r.label for r in split] == [0, 1, 1, 2]
  assert all(len(e["captions"]) == 0 and e["image"].shape == (8, 8, 3) for e in found)
  for path in folder.glob("*.index"):
    path.unlink()
  again = records.open_split(folder, "train")
  assert again.fingerprint == split.fingerprint and not len(again.caption_positions)


def test_bad_folders(tmp_path, capsys):
  args = folders(tmp_path)
  root, names = tmp_path / "set", tmp_path / "names.txt"
  for text, message in (
    ("b\tx\n", "names.txt: no line for 2 of 3 classes, first 'B'"),
    ("b\tx\nB\tx\na\ty\n", "classes 'B' and 'b' are both called 'x'"),
    ("b x\n", "names.txt:1: 'b x', expected 'folder<TAB>readable name'"),
    ("b\tx\nb\ty\n", "names.txt:2: 'b' has another name in an earlier line"),
  ):
    names.write_text(text)
    assert message in fails(capsys, *args, "--names", names)
  assert "no.txt: no such file; check --names" in fails(capsys, *args, "--names", "no.txt")
  (root / "val" / "c").mkdir()
  assert f"{root / 'val' / 'c'}: no such class in" in fails(capsys, *args)
  (root / "val" / "c").rename(root / "train" / "c")
  assert f"{root / 'train' / 'c'}: no image in it" in fails(capsys, *args)
  (root / "train" / "c").rmdir()
  (root / "val" / "b" / "4.jpg").rename(root / "val" / "4.jpg")
  (root / "val" / "b").rmdir()
  assert f"{root / 'val'}: no folder in it; expected one per class" in fails(capsys, *args)
  (root / "train").rename(root / "training")
  assert "no such folder; expected train/CLASS/ below --root" in fails(capsys, *args)


def test_photographs_in_folders(tmp_path, shared_data):
  source = sorted((shared_data / "flickr8k_native" / "images").glob("*.jpg"))[:4]
  for i, path in enumerate(source):
    link = tmp_path / "set" / "train" / f"class{i % 2}" / path.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(path)
  run("folders", "--root", tmp_path / "set", "--out", tmp_path / "out", "--check_images")
  split = records.open_split(tmp_path / "out", "train")
  want = source[::2] + source[1::2]
  assert [r.image for r in split] == [p.read_bytes() for p in want]
  np.testing.assert_array_equal([r.label for r in split], [0, 0, 1, 1])
