"""Shards of webdataset and img2dataset that have faults: each costs a sample at most."""

import collections
import io
import json
import logging
import pathlib
import tarfile

import pytest
from test_prepare_data import fails, run
from test_prepare_img2dataset import files_of, tar
from test_records import encoded_image

from xmodal_jax.data import records
from xmodal_jax.data.preparing import img2dataset, web_samples
from xmodal_jax.data.tfrecord import DatasetError


def read(shard: pathlib.Path, **options) -> tuple[list[dict], dict[str, int]]:
  """(examples, what was left out without the note on statistics) of a shard."""
  left_out = collections.Counter()
  examples = list(img2dataset.read(str(shard), left_out, **options))
  left_out.pop(img2dataset.UNRECORDED, None)
  return examples, dict(left_out)


def good(count: int) -> dict[str, bytes]:
  """Files of samples 0, 1, ... with captions c0, c1, ..."""
  pairs = [files_of(str(i), encoded_image(i), f"c{i}") for i in range(count)]
  return {k: v for pair in pairs for k, v in pair.items()}


def text(value) -> bytes:
  return json.dumps({"caption": value}).encode()


# Changes of files of sample 1 of 3, the captions of it that are left, what is counted.
FAULTS = {
  "upper case": ({"1.jpg": None, "1.JPG": encoded_image(1)}, ("c1",), {}),
  "hidden": ({"._1.jpg": b"x", "__MACOSX/1.jpg": b"x"}, ("c1",), {web_samples.OTHER: 2}),
  "other types": ({"1.cls": b"3", "README": b""}, ("c1",), {web_samples.OTHER: 2}),
  "txt not UTF-8": ({"1.txt": b"caf\xe9"}, (), {web_samples.NOT_UTF8: 1}),
  "json empty": ({"1.json": b""}, ("c1",), {web_samples.JSON_UNUSED: 1}),
  "json alone, empty": ({"1.json": b"", "1.txt": None}, (), {web_samples.BAD_JSON: 1}),
  "json deep": ({"1.json": b"[" * 10**5, "1.txt": None}, (), {web_samples.BAD_JSON: 1}),
  "json number": ({"1.json": b"1" * 5000}, ("c1",), {web_samples.JSON_UNUSED: 1}),
  "list": ({"1.json": text(["a", "b"]), "1.txt": None}, ("a", "b"), {}),
  "list with faults": (
    {"1.json": text(["a", None, 3, "\ud83d", " "]), "1.txt": None},
    ("a",),
    {web_samples.NOT_TEXT: 1, web_samples.NOT_UTF8: 1},
  ),
  "null": ({"1.json": text(None), "1.txt": None}, (), {img2dataset.WITHOUT_CAPTION: 1}),
  "number": ({"1.json": text(5), "1.txt": None}, (), {web_samples.NOT_TEXT: 1}),
  "surrogate": ({"1.json": text("\ud83d"), "1.txt": None}, (), {web_samples.NOT_UTF8: 1}),
  "several lines": ({"1.txt": b"a\r\nb\n"}, ("a\r\nb\n",), {web_samples.LINES: 1}),
  "no image": ({"1.jpg": None}, (), {img2dataset.WITHOUT_IMAGE: 1}),
  "gif": ({"1.jpg": None, "1.gif": b"x"}, (),
    {img2dataset.WITHOUT_IMAGE: 1, web_samples.OTHER: 1}),
  "0 bytes": ({"1.jpg": b""}, (), {img2dataset.EMPTY: 1}),
  "same id": ({"01.jpg": encoded_image(7), "01.txt": b"x"}, ("x",), {img2dataset.SAME_KEY: 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", ["tar", "files"])
def test_a_fault_costs_one_sample(tmp_path, name, kind):
  changes, captions, counts = FAULTS[name]
  files = good(3)
  for file in changes:
    files.pop(file, None)
  # Files of a sample follow each other.
  items = sorted((files | {k: v for k, v in changes.items() if v is not None}).items())
  if kind == "tar":
    shard = tar(tmp_path / "0.tar", dict(items))
  else:
    if "__MACOSX/1.jpg" in dict(items):
      items = [(k, v) for k, v in items if "/" not in k]
      counts = {web_samples.OTHER: 1}
    shard = tmp_path / "0"
    shard.mkdir()
    for file, content in items:
      (shard / file).write_bytes(content)
  examples, left_out = read(shard)
  assert left_out == counts
  found = {e["image_id"]: e for e in examples}
  assert [found[i]["captions"] for i in (0, 2)] == [("c0",), ("c2",)]
  assert found.get(1, {}).get("captions", ()) == captions
  assert all(e["image"] in {encoded_image(i) for i in (0, 1, 2, 7)} for e in examples)
  ids = [i for e in examples for i in e["caption_ids"]]
  assert len(set(ids)) == len(ids)


def test_lines_as_captions(tmp_path):
  shard = tar(tmp_path / "0.tar", good(1) | {"0.txt": b"a\r\n\nb \n"})
  (example,), left_out = read(shard, caption_lines=True)
  assert example["captions"] == ("a", "b ") and not left_out
  run("img2dataset", "--train", tmp_path, "--out", tmp_path / "out", "--caption_lines")
  assert records.open_split(tmp_path / "out", "train").read(0).captions == ("a", "b ")


@pytest.mark.parametrize("order", ["by type", "mixed"])
def test_files_apart_from_each_other(tmp_path, order):
  files = good(4)
  key = (lambda f: f.partition(".")[::-1]) if order == "by type" else (lambda f: f[::-1] + f)
  shard = tar(tmp_path / "0.tar", {f: files[f] for f in sorted(files, key=key)})
  examples, left_out = read(shard)
  assert not {k for k in left_out if k != web_samples.TWICE}
  assert sorted((e["image_id"], e["image"], e["captions"]) for e in examples) == [
    (i, encoded_image(i), (f"c{i}",)) for i in range(4)
  ]


def test_members_twice_links_and_names(tmp_path):
  path = tmp_path / "0.tar"
  with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as f:

    def add(name, content=b"", kind=tarfile.REGTYPE):
      member = tarfile.TarInfo(name)
      member.size, member.type, member.linkname = len(content), kind, "0.jpg"
      f.addfile(member, io.BytesIO(content))

    add("./0.jpg", encoded_image(0)), add("./0.txt", b"zero")
    add("./0.jpg", encoded_image(1)), add("./1.txt", b"one"), add("./1.jpg", kind=tarfile.LNKTYPE)
    add("\udce9.jpg", encoded_image(2)), add("\udce9.txt", b"two"), add("0.json", b"{}")
  examples, left_out = read(path)
  assert [(e["captions"], e["image"]) for e in examples] == [(("zero",), encoded_image(0))]
  assert left_out == {
    web_samples.TWICE: 2, web_samples.OTHER: 1, img2dataset.WITHOUT_IMAGE: 1,
    img2dataset.NOT_UTF8: 1,
  }  # fmt: skip


def test_two_archives_in_one_file(tmp_path):
  tar(tmp_path / "1.tar", good(1))
  shard = tar(tmp_path / "0.tar", files_of("7", encoded_image(7), "seven"))
  shard.write_bytes(shard.read_bytes() + (tmp_path / "1.tar").read_bytes())
  with pytest.raises(DatasetError, match=r"0\.tar: damaged .*two archives in one file"):
    read(shard)


def test_folders_with_unreadable_files(tmp_path):
  for name, content in good(2).items():
    (tmp_path / "0").mkdir(exist_ok=True)
    (tmp_path / "0" / name).write_bytes(content)
  (tmp_path / "0" / "1.jpg").unlink()
  (tmp_path / "0" / "1.jpg").mkdir()
  examples, left_out = read(tmp_path / "0")
  assert [e["image_id"] for e in examples] == [0] and left_out == {web_samples.UNREADABLE: 1}


def test_parquet_rows(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  bad = pyarrow.array([b"x", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
  table = pyarrow.table({"key": ["0", "1"], "jpg": [encoded_image(0)] * 2, "caption": bad})
  parquet.write_table(table, tmp_path / "a.parquet")
  examples, left_out = read(tmp_path / "a.parquet")
  assert [e["captions"] for e in examples] == [("x",)] and left_out == {web_samples.NOT_UTF8: 1}
  columns = {
    "key": ["0", None, "0", "3"],
    "JPG": [encoded_image(0)] * 3 + [None],
    "caption": [["a", None, "b"], ["c"], ["d"], ["e"]],
  }
  columns["jpg"] = columns.pop("JPG")
  parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
  examples, left_out = read(tmp_path / "b.parquet")
  assert [e["captions"] for e in examples] == [("a", "b")]
  assert left_out == {
    img2dataset.WITHOUT_KEY: 1, img2dataset.SAME_KEY: 1, img2dataset.WITHOUT_IMAGE: 1
  }  # fmt: skip
  parquet.write_table(pyarrow.table({"key": ["0"], "jpg": ["a path"]}), tmp_path / "c.parquet")
  with pytest.raises(DatasetError, match="column 'jpg' is string, expected the bytes"):
    read(tmp_path / "c.parquet")


def test_reasons_are_printed_when_nothing_is_left(tmp_path, capsys, caplog):
  tar(tmp_path / "in" / "0.tar", {"1.jpg": encoded_image(1), "1.txt": b"\xff"})
  (tmp_path / "in" / "._0.tar").write_bytes(b"AppleDouble")
  with caplog.at_level(logging.INFO):
    message = fails(capsys, "img2dataset", "--val", tmp_path / "in", "--out", tmp_path / "out")
  assert "left out: 1 caption not UTF-8, 1 shards without" in message
  assert "left out 1 hidden files, first ._0.tar" in caplog.text
