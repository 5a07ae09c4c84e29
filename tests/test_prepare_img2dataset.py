"""Datasets of img2dataset's output, in one process and with Apache Beam."""

import collections
import io
import json
import pathlib
import sys
import tarfile

import pytest
from test_prepare_data import fails, run
from test_records import encoded_image

from xmodal_jax.data import records
from xmodal_jax.data.preparing import img2dataset, shards

MULTI = "--beam_options=--direct_running_mode=multi_processing --direct_num_workers=2"


def files_of(key: str, image: bytes | None, caption: str | None, status: str = "success") -> dict:
  """img2dataset's files of a pair: {file name: content}."""
  about = {"key": key, "caption": caption, "status": status, "url": "http://x"}
  out = {f"{key}.jpg": image} if image is not None else {}
  out[f"{key}.txt"] = (caption or "").encode()
  return out | {f"{key}.json": json.dumps(about, indent=4).encode()}


def tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as f:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      f.addfile(member, io.BytesIO(content))
  return path


def stats(shard: pathlib.Path, count: int, successes: int) -> None:
  text = json.dumps({"count": count, "successes": successes, "failed_to_download": 0})
  shard.with_name(f"{shard.stem}_stats.json").write_text(text)


def crawl(root: pathlib.Path) -> tuple:
  """Four shards, of which the second has no usable pair; -> arguments."""
  good = lambda shard, i: files_of(
    f"{shard:05d}{i:04d}", encoded_image(10 * shard + i), f"{shard} {i} é"
  )
  contents = {
    0: [good(0, 0), good(0, 2), files_of("000000003", encoded_image(3), None), good(0, 4)],
    1: [files_of("000010000", None, "x", "failed_to_resize"), files_of("000010001", b"", " ")],
    2: [good(2, i) for i in range(3)],
    3: [files_of("a/b-c", encoded_image(31), "no number"), good(3, 1)],
  }
  for shard, pairs in contents.items():
    path = tar(root / "in" / f"{shard:05d}.tar", {k: v for pair in pairs for k, v in pair.items()})
    if shard != 3:
      stats(path, len(pairs) + 2, len(pairs) - (shard == 1) + (shard == 2))
  return ("img2dataset", "--train", root / "in", "--out", root / "out")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if "tfrecord" in p.name}


def test_webdataset(tmp_path, caplog):
  import tensorflow_datasets as tfds

  with caplog.at_level("INFO"):
    run(*crawl(tmp_path))
  text = "train: 8 images of 4 shards (1 of them without any); left out: 6 failed, 1 lost, "
  assert text + "1 shards without a record of failures, 2 without caption" in caplog.text
  folder = tmp_path / "out" / "img2dataset" / "1.0.0"
  names = [f"img2dataset-train.tfrecord-{i:05d}-of-00003" for i in range(3)]
  assert sorted(contents(folder)) == sorted([*names, *(f"{n}.index" for n in names)])
  rest = {p.name for p in folder.iterdir()} - set(contents(folder))
  assert rest == {"dataset_info.json", "features.json", "source.json"}
  split = records.open_split(folder, "train")
  numbers = [0, 2, 4, 20000, 20001, 20002, None, 30001]  # of the keys
  assert [r.image_id for r in split if r.filename != "00003/a/b-c.jpg"] == [
    n for n in numbers if n is not None
  ]
  hashed = split.read(6)
  assert hashed.filename == "00003/a/b-c.jpg" and hashed.captions == ("no number",)
  assert 2**32 < hashed.image_id < 2**63 and hashed.caption_ids == (hashed.image_id,)
  other = tar(tmp_path / "other" / "00004.tar", files_of("a/b-c", encoded_image(31), "no number"))
  (same_key,) = img2dataset.read(str(other), collections.Counter())
  assert same_key["image_id"] != hashed.image_id
  first = split.read(1)
  assert (first.image, first.captions) == (encoded_image(2), ("0 2 é",))
  assert (first.filename, first.caption_ids) == ("00000/000000002.jpg", (2,))
  assert split.caption_positions.tolist() == list(range(8))
  found = tfds.as_numpy(tfds.builder_from_directory(folder).as_dataset(split="train"))
  assert {int(e["image_id"]) for e in found} == {r.image_id for r in split}
  source = json.loads((folder / "source.json").read_text())
  assert source["counts"]["train"]["records"] == 8 and source["counts"]["train"]["shards"] == 3
  own = source["inputs"]["train"]["shards"]
  assert own[1] == {
    "file": str(tmp_path / "in" / "00001.tar"), "records": 0, "failed": 3, "without caption": 1,
  }  # fmt: skip
  # Neither ids nor bytes depend on the other shards.
  (tmp_path / "in" / "00000.tar").unlink()
  (tmp_path / "in" / "00000_stats.json").unlink()
  run(*crawl_again(tmp_path), "--name", "fewer")
  fewer = contents(tmp_path / "out" / "fewer" / "1.0.0")
  assert fewer["fewer-train.tfrecord-00001-of-00002"] == (folder / names[2]).read_bytes()


def crawl_again(root: pathlib.Path) -> tuple:
  return ("img2dataset", "--train", root / "in", "--out", root / "out")


def test_several_folders_and_splits(tmp_path):
  crawl(tmp_path)
  tar(tmp_path / "more" / "00000.tar", files_of("000000000", encoded_image(50), "fifty"))
  run(*crawl_again(tmp_path), "--train", tmp_path / "more", "--val", tmp_path / "more")
  train = records.open_split(tmp_path / "out", "train")
  assert len(train) == 9 and train.read(8).captions == ("fifty",)
  assert [r.image for r in records.open_split(tmp_path / "out", "val")] == [encoded_image(50)]


def test_files_and_parquet(tmp_path, monkeypatch):
  """The other two formats give the same records as tars."""
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  rows = [
    ("000000000", encoded_image(0), "zero", "success"),
    ("000000001", None, "one", "failed_to_download"),
    ("000000002", encoded_image(2), "two", "success"),
    ("000000003", encoded_image(3), None, "success"),
    ("000000004", b"broken", "four", "success"),
  ]
  pairs = {row[0]: files_of(*row) for row in rows if row[1] is not None}
  columns = dict(zip(("key", "jpg", "caption", "status"), zip(*rows, strict=True), strict=True))
  tar(tmp_path / "tar" / "00000.tar", {k: v for p in pairs.values() for k, v in p.items()})
  (tmp_path / "files" / "00000").mkdir(parents=True)
  for pair in pairs.values():
    for name, content in pair.items():
      (tmp_path / "files" / "00000" / name).write_bytes(content)
  (tmp_path / "parquet").mkdir()
  for kind in ("tar", "files"):
    table = pyarrow.table({k: v for k, v in columns.items() if k != "jpg"})
    parquet.write_table(table, tmp_path / kind / "00000.parquet")
  parquet.write_table(pyarrow.table(columns), tmp_path / "parquet" / "00000.parquet")
  found = {}
  for kind in ("tar", "files", "parquet"):
    (shard,) = img2dataset.find_shards(tmp_path / kind)
    left_out = collections.Counter()
    found[kind] = list(img2dataset.read(shard, left_out, check_images=True))
    assert left_out == {"failed": 1, "without caption": 1, "unknown format": 1}
  assert found["tar"] == found["files"] == found["parquet"]
  assert [e["captions"] for e in found["tar"]] == [("zero",), ("two",)]
  # Without pyarrow the failures of tars and folders are unknown, and reported as such.
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  left_out = collections.Counter()
  assert len(list(img2dataset.read(str(tmp_path / "tar" / "00000.tar"), left_out))) == 3
  assert left_out == {img2dataset.UNRECORDED: 1, "without caption": 1}
  with pytest.raises(records.DatasetError, match=r"00000\.parquet: .*`pip install pyarrow`"):
    next(img2dataset.read(str(tmp_path / "parquet" / "00000.parquet"), left_out))


def test_reads_one_sample_at_a_time(tmp_path):
  shard = tar(
    tmp_path / "0.tar",
    {k: v for i in range(3) for k, v in files_of(f"{i}", encoded_image(i), "x").items()},
  )
  cut = shard.read_bytes()
  shard.write_bytes(cut[: len(cut) // 2])
  examples = img2dataset.read(str(shard), collections.Counter())
  assert next(examples)["image_id"] == 0  # though the end of the file is missing
  with pytest.raises(records.DatasetError, match=r"0\.tar: damaged or cut short"):
    list(examples)


def damage(path: pathlib.Path, how: str) -> None:
  data = bytearray(path.read_bytes())
  if how == "cut at a member":
    path.write_bytes(data[: data.index(b"000020001.jpg")])
  elif how == "cut inside":
    path.write_bytes(data[: data.index(b"000020001.txt") - 700])
  elif how == "header":
    data[data.index(b"000020001.jpg") + 150] ^= 1  # its checksum
    path.write_bytes(data)
  elif how == "no tar":
    path.write_bytes(b"<html>" * 1000)
  else:
    path.write_bytes(b"")


@pytest.mark.parametrize("how", ["cut at a member", "cut inside", "header", "no tar", "empty"])
def test_damaged_tar(tmp_path, capsys, how):
  args = crawl(tmp_path)
  damage(tmp_path / "in" / "00002.tar", how)
  message = fails(capsys, *args)
  assert f"{tmp_path / 'in' / '00002.tar'}: damaged or cut short, no whole tar archive" in message


def test_bad_input(tmp_path, capsys, monkeypatch):
  args = crawl(tmp_path)
  out = ("--out", tmp_path / "out")
  (tmp_path / "in" / "00002_stats.json").write_text("{}")
  assert "00002_stats.json: no counts 'count' and 'successes'" in fails(capsys, *args)
  (tmp_path / "in" / "00002.tar").unlink()
  assert "1 shards are missing though their statistics exist" in fails(capsys, *args)
  tar(tmp_path / "json" / "0.tar", {"7.jpg": b"", "7.json": b"[]"})
  message = fails(capsys, "img2dataset", "--val", tmp_path / "json", *out)
  assert "split 'val' is empty: its sources have no image with a caption; left out: " in message
  assert "1 json unreadable and no txt" in message
  tar(tmp_path / "none" / "0.tar", files_of("1", None, "x"))
  message = fails(capsys, "img2dataset", "--train", tmp_path / "none", *out)
  assert "split 'train' is empty: its sources have no image with a caption" in message
  (tmp_path / "bare").mkdir()
  message = fails(capsys, "img2dataset", "--train", tmp_path / "bare", *out)
  assert "bare: neither 00000.tar, nor a folder 00000, nor 00000.parquet" in message
  (tmp_path / "bare" / "urls.parquet").write_bytes(b"PAR1")
  message = fails(capsys, "img2dataset", "--train", tmp_path / "bare", *out)
  assert "urls.parquet: damaged or cut short" in message
  assert "no such folder" in fails(capsys, "img2dataset", "--train", tmp_path / "no", *out)
  assert "pass --train, --val or --test DIR" in fails(capsys, "img2dataset", *out)
  message = fails(capsys, "img2dataset", "--train", tmp_path / "none", *out, MULTI)
  assert "--beam_options without --beam_runner" in message
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  args = ("img2dataset", "--train", tmp_path / "json", *out, "--beam_runner", "DirectRunner")
  assert "`pip install xmodal_jax[beam]`" in fails(capsys, *args)


def test_a_retried_shard(tmp_path):
  """A failed attempt leaves no shard, and the next one writes the same bytes."""
  from xmodal_jax.data.preparing import builder

  crawl(tmp_path)
  job = shards.Job("train", 4, str(tmp_path / "in" / "00000.tar"))
  where = {"folder": str(tmp_path), "fields": frozenset(builder.features(positions=False))}

  def dies(source, left_out):
    yield from img2dataset.read(source, left_out)
    raise KeyboardInterrupt

  files = lambda: {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
  with pytest.raises(KeyboardInterrupt):
    shards.write_shard(job, **where, read=dies)
  assert files() == {}
  report = shards.write_shard(job, **where, read=img2dataset.read)
  assert report["records"] == 3 and report["left_out"] == {"failed": 2, "without caption": 1}
  written = files()
  assert len(written) == 3  # shard, index, report
  with pytest.raises(KeyboardInterrupt):
    shards.write_shard(job, **where, read=dies)
  assert files() == written
  shards.write_shard(job, **where, read=img2dataset.read)
  assert files() == written


def test_what_killed_workers_leave_is_removed(tmp_path, monkeypatch):
  args = crawl(tmp_path)
  write_shard = shards.write_shard

  def leaves_a_part(job, *, folder, **rest):
    (pathlib.Path(folder) / f".train.tfrecord-{job.number:05d}-of-00000.dead").write_bytes(b"x")
    return write_shard(job, folder=folder, **rest)

  monkeypatch.setattr(shards, "write_shard", leaves_a_part)
  run(*args)
  assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")]
  assert len(records.open_split(tmp_path / "out", "train")) == 8


def beam_equals_plain(root: pathlib.Path, *options: str) -> None:
  args = crawl_again(root)
  run(*args, "--version", "1.0.0")
  run(*args, "--version", "2.0.0", "--beam_runner", "DirectRunner", *options)
  plain, beam = (contents(root / "out" / "img2dataset" / v) for v in ("1.0.0", "2.0.0"))
  assert plain == beam
  sources = [
    json.loads((root / "out" / "img2dataset" / v / "source.json").read_text())
    for v in ("1.0.0", "2.0.0")
  ]
  assert sources[0]["inputs"] == sources[1]["inputs"]
  assert sources[0]["counts"] == sources[1]["counts"]


def test_beam(tmp_path, capsys):
  pytest.importorskip("apache_beam")
  args = crawl(tmp_path)
  beam_equals_plain(tmp_path)
  for name in ("00002.tar", "00003.tar"):
    damage(tmp_path / "in" / name, "no tar")
  message = fails(capsys, *args, "--name", "bad", "--beam_runner", "DirectRunner")
  assert "2 of 4 source shards failed:" in message
  assert "00002.tar: damaged" in message and "00003.tar: damaged" in message


def photographs(shared_data: pathlib.Path, out: pathlib.Path, count: int, per_tar: int) -> None:
  """Writes photographs and their first captions in img2dataset's format."""
  folder = shared_data / "flickr8k_mini"
  images = json.loads((folder / "dataset_flickr8k_mini.json").read_text())["images"][:count]
  for start in range(0, count, per_tar):
    files = {}
    for i, item in enumerate(images[start : start + per_tar]):
      content = (folder / "images" / item["filename"]).read_bytes()
      key = f"{start // per_tar:05d}{i:04d}"
      files |= files_of(key, content, item["sentences"][0]["raw"])
    stats(tar(out / f"{start // per_tar:05d}.tar", files), len(files) // 3, len(files) // 3)


@pytest.mark.parametrize(
  "count, per_tar", [(40, 20), pytest.param(2000, 250, marks=pytest.mark.slow)]
)
def test_photographs_by_two_processes(tmp_path, shared_data, count, per_tar):
  pytest.importorskip("apache_beam")
  photographs(shared_data, tmp_path / "in", count, per_tar)
  beam_equals_plain(tmp_path, MULTI)
  split = records.open_split(tmp_path / "out" / "img2dataset" / "2.0.0", "train")
  images = json.loads((shared_data / "flickr8k_mini" / "dataset_flickr8k_mini.json").read_text())[
    "images"
  ]
  assert len(split) == count
  for i in (0, count // 2, count - 1):
    item, record = images[i], split.read(i)
    path = shared_data / "flickr8k_mini" / "images" / item["filename"]
    assert record.image == path.read_bytes()
    assert record.captions == (item["sentences"][0]["raw"],)
