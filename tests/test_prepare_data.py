"""The sources of prepare_data.py: what they write, and errors of bad input."""

import csv
import gzip
import hashlib
import io
import json
import pathlib
import subprocess
import sys

import child_process
import golden_files
import numpy as np
import pytest
from PIL import Image
from test_records import encoded_image

from tools import prepare_data
from xmodal_jax.data import records
from xmodal_jax.data.preparing import builder

ROOT = pathlib.Path(__file__).parents[1]


def run(*args) -> None:
  prepare_data.main([str(a) for a in args])


def fails(capsys, *args) -> str:
  """The message of a run that must fail and write nothing."""
  out = pathlib.Path(args[args.index("--out") + 1])
  before = sorted(out.rglob("*"))
  with pytest.raises(SystemExit) as e:
    run(*args)
  assert sorted(p for p in out.rglob("*") if p.is_file()) == [p for p in before if p.is_file()]
  return str(e.value)


def karpathy(root: pathlib.Path, edit=lambda data: None, name="dataset.json") -> tuple:
  """Six images, the fourth in a subfolder; -> arguments."""
  images = []
  (root / "images" / "val2014").mkdir(parents=True, exist_ok=True)
  for i, split in enumerate(["train", "train", "test", "restval", "val", "train"]):
    path = root / "images" / ("val2014" if i == 3 else "") / f"{i}.jpg"
    path.write_bytes(encoded_image(i))
    sentences = [{"raw": f"  {i} {j} é", "sentid": 7 * i + j} for j in range(6 if i == 1 else 5)]
    item = {"filename": f"{i}.jpg", "imgid": i, "split": split, "sentences": sentences}
    images.append({**item, "filepath": "val2014", "cocoid": 900 + i} if i == 3 else item)
  data = {"dataset": "toy", "images": images}
  edit(data)
  text = json.dumps(data).encode()
  (root / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
  where = ("--annotations", root / name, "--images", root / "images", "--out", root / "out")
  return ("karpathy", *where)


def test_karpathy(tmp_path):
  run(*karpathy(tmp_path, name="dataset.json.gz"), "--name", "mine", "--check_images")
  folder = tmp_path / "out" / "mine" / "1.0.0"
  train = records.open_split(folder, "train")
  assert [r.filename for r in train] == ["0.jpg", "1.jpg", "5.jpg"]
  assert train.captions_per_record.tolist() == [5, 5, 5]  # the sixth caption is left out
  record = records.open_split(folder, "restval").read(0)
  assert record.image == encoded_image(3) and record.image_id == 903
  assert record.captions[4] == "  3 4 é" and record.caption_ids == (21, 22, 23, 24, 25)
  source = json.loads((folder / "source.json").read_text())
  assert source["counts"]["train"]["captions"] == 15 and source["counts"]["val"]["records"] == 1
  digest = hashlib.sha256((tmp_path / "dataset.json.gz").read_bytes()).hexdigest()
  assert source["sha256"] == {"dataset.json.gz": digest}


def test_all_captions_and_overwrite(tmp_path, capsys):
  args = karpathy(tmp_path)
  run(*args)
  assert "karpathy/1.0.0 exists; pass --overwrite" in fails(capsys, *args)
  run(*args, "--captions_per_image", "all", "--overwrite")
  train = records.open_split(tmp_path / "out", "train")
  assert train.captions_per_record.tolist() == [5, 6, 5]
  assert [p.name for p in (tmp_path / "out" / "karpathy").iterdir()] == ["1.0.0"]


def remove(*path):
  """An edit that removes a key of the json."""

  def edit(data):
    for key in path[:-1]:
      data = data[key]
    del data[path[-1]]

  return edit


@pytest.mark.parametrize(
  "edit, message",
  [
    (remove("images"), "dataset.json: no key 'images'; expected Karpathy's layout"),
    (remove("images", 2, "split"), "dataset.json: images[2]: no key 'split'"),
    (remove("images", 2, "imgid"), "dataset.json: images[2]: no key 'imgid'"),
    (remove("images", 1, "sentences", 3, "raw"), "images[1].sentences[3]: no key 'raw'"),
    (lambda d: d["images"][4]["sentences"].clear(), "images[4] (4.jpg) has no captions"),
    (lambda d: d["images"].clear(), "dataset.json: the list 'images' is empty"),
  ],
)
def test_bad_karpathy(tmp_path, capsys, edit, message):
  assert message in fails(capsys, *karpathy(tmp_path, edit))


def test_bad_images(tmp_path, capsys):
  args = karpathy(tmp_path)
  cut = encoded_image(2, size=64)[:-500]  # the header is intact
  (tmp_path / "images" / "2.jpg").write_bytes(cut)
  message = fails(capsys, *args, "--check_images")
  assert "1 of 6 images are broken" in message and "2.jpg (" in message
  for path in (tmp_path / "images").rglob("*.jpg"):
    path.unlink()
  message = fails(capsys, *args)
  assert "6 of 6 images are missing; check the folder of the images" in message
  assert message.count(".jpg") == 5 and "and 1 more" in message


def test_bad_files_and_arguments(tmp_path, capsys):
  args = karpathy(tmp_path)
  assert "expected 1 or more" in fails(capsys, *args, "--captions_per_image", "0")
  assert "'My-Data'" in fails(capsys, *args, "--name", "My-Data")
  (tmp_path / "dataset.json").write_text('{"images": [')
  assert "dataset.json: not JSON" in fails(capsys, *args)
  (tmp_path / "dataset.json").unlink()
  assert "dataset.json: no such file; check --annotations" in fails(capsys, *args)


def test_a_failed_write_leaves_nothing(tmp_path):
  def examples():
    yield {"image": b"x", "image_id": 0, "filename": "x", "captions": ["a"]}
    raise KeyboardInterrupt

  for splits, error in (
    ({"train": examples()}, KeyboardInterrupt),
    ({"train": iter(())}, builder.DatasetError),
  ):
    with pytest.raises(error):
      builder.write_dataset(tmp_path, "toy", "1.0.0", splits, description="")
    assert list((tmp_path / "toy").iterdir()) == []


@pytest.mark.parametrize("name", ["coco_mini", "flickr8k_mini"])
def test_photographs(tmp_path, shared_data, name):
  """Photographs are stored unchanged, in the order of the json."""
  data = json.loads((shared_data / name / f"dataset_{name}.json").read_text())
  splits = sorted({item["split"] for item in data["images"]})
  of = lambda split: [item for item in data["images"] if item["split"] == split][:3]
  data["images"] = [item for split in splits for item in of(split)]
  (tmp_path / "subset.json").write_text(json.dumps(data))
  images = shared_data / name / "images"
  run("karpathy", "--annotations", tmp_path / "subset.json", "--images", images, "--out", tmp_path)
  for split in splits:
    for item, record in zip(of(split), records.open_split(tmp_path, split), strict=True):
      assert record.image == (images / item["filename"]).read_bytes()
      assert record.image_id == item.get("cocoid", item["imgid"])
      assert record.captions == tuple(s["raw"] for s in item["sentences"])
      assert record.caption_ids == tuple(item["sentids"])


@pytest.fixture
def coco(tmp_path) -> tuple:
  """The small dataset of the golden vectors, as files; -> arguments."""
  arrays = golden_files.arrays("clip", "mini_coco", "inputs.npz")
  for folder in ("annotations", "images"):
    (tmp_path / folder).mkdir()
  for name, array in arrays.items():
    kind, stem = name.split("/")
    if kind == "image":
      Image.fromarray(array).save(tmp_path / "images" / stem)
    else:
      np.save(tmp_path / "annotations" / f"{stem}.npy", array)
  for part in ("train", "val"):
    name = f"captions_{part}2014.json"
    text = golden_files.path("clip", "mini_coco", name).read_bytes()
    (tmp_path / "annotations" / name).write_bytes(text)
  where = ("--annotations", tmp_path / "annotations", "--images", tmp_path / "images")
  return ("coco", *where, "--out", tmp_path / "out")


def coco_captions(folder: pathlib.Path) -> dict[int, dict]:
  files = [json.loads((folder / f"captions_{p}2014.json").read_text()) for p in ("train", "val")]
  return {a["id"]: a for f in files for a in f["annotations"]}


def check_coco(tmp_path: pathlib.Path) -> None:
  captions = coco_captions(tmp_path / "annotations")
  for stem, name in (("train", "train"), ("dev", "val"), ("test", "test"), ("restval", "restval")):
    ids = np.load(tmp_path / "annotations" / f"coco_{stem}_ids.npy")
    split = records.open_split(tmp_path / "out", name)
    in_order: dict[int, tuple] = {}
    positions = iter(split.caption_positions)
    for record in split:
      assert record.image == (tmp_path / "images" / record.filename).read_bytes()
      for text, caption_id in zip(record.captions, record.caption_ids, strict=True):
        in_order[int(next(positions))] = (caption_id, text, record.image_id)
    want = [(i, captions[i]["caption"], captions[i]["image_id"]) for i in ids.tolist()]
    assert [in_order[p] for p in range(len(ids))] == want
    first = list(dict.fromkeys(image for _, _, image in want))
    assert [record.image_id for record in split] == first


def test_coco_layout(tmp_path, coco):
  run(*coco)
  check_coco(tmp_path)


def test_coco_layout_with_images_apart(tmp_path, coco):
  file = tmp_path / "annotations" / "coco_train_ids.npy"
  np.save(file, np.random.default_rng(0).permutation(np.load(file)))
  run(*coco)
  check_coco(tmp_path)
  split = records.open_split(tmp_path / "out", "train")
  assert len(split) == 14 and (np.diff(split.caption_positions) < 0).any()


def test_bad_coco(tmp_path, coco, capsys):
  folder = tmp_path / "annotations"
  file = folder / "coco_dev_ids.npy"
  ids, test = np.load(file), np.load(folder / "coco_test_ids.npy")
  for bad, message in (
    (ids[:0], "coco_dev_ids.npy: has shape (0,) of int64"),
    (ids.astype(np.float64), "has shape (5,) of float64; expected an integer array [C]"),
    (np.append(ids, ids[0]), f"coco_dev_ids.npy: id {ids[0]} occurs twice"),
    (np.append(ids, [5, 6]), "2 of 7 ids are in neither captions_train2014.json nor"),
    (np.append(ids, test[0]), "is also in split 'val'"),
  ):
    np.save(file, bad)
    assert message in fails(capsys, *coco)
  file.write_bytes(b"no array")
  assert "coco_dev_ids.npy: not an npy file" in fails(capsys, *coco)
  file.unlink()
  assert "coco_dev_ids.npy: no such file" in fails(capsys, *coco)
  annotations = folder / "captions_val2014.json"
  data = json.loads(annotations.read_text())
  del data["annotations"][3]["caption"]
  annotations.write_text(json.dumps(data))
  assert "captions_val2014.json: annotations[3]: no key 'caption'" in fails(capsys, *coco)


PAIRS = [
  ("b/2.jpg", 'two, "quoted"', 12, "train"),
  ("1.jpg", "one", 11, "val"),
  ("b/2.jpg", '"two" again', 12, "train"),
  ("3.jpg", "three", 2**40, "train"),
]


def pairs(
  root: pathlib.Path, rows=PAIRS, kind="csv", columns=("image", "caption", "image_id", "split")
):
  (root / "images" / "b").mkdir(parents=True, exist_ok=True)
  for i, name in enumerate(("1.jpg", "b/2.jpg", "3.jpg")):
    (root / "images" / name).write_bytes(encoded_image(i + 1))
  rows = [dict(zip(columns, row, strict=False)) for row in rows]
  path = root / f"pairs.{kind}"
  with path.open("w") as f:
    if kind == "jsonl":
      f.writelines(json.dumps(row) + "\n" for row in rows)
    elif kind == "tsv":
      f.writelines("\t".join(map(str, r)) + "\n" for r in (columns, *(r.values() for r in rows)))
    else:
      writer = csv.DictWriter(f, columns)
      writer.writeheader()
      writer.writerows(rows)
  return ("pairs", "--annotations", path, "--images", root / "images", "--out", root / "out")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_pairs(tmp_path, kind):
  run(*pairs(tmp_path, kind=kind))
  train = list(records.open_split(tmp_path / "out", "train"))
  assert [r.filename for r in train] == ["b/2.jpg", "3.jpg"]
  assert train[0].captions == ('two, "quoted"', '"two" again') and train[0].image == encoded_image(
    2
  )
  assert [r.image_id for r in train] == [12, 2**40] and train[1].caption_ids == (2,)
  assert records.open_split(tmp_path / "out", "val").read(0).captions == ("one",)


def test_pairs_without_split_or_id(tmp_path):
  args = pairs(tmp_path, columns=("path", "text"))
  run(*args, "--image_column", "path", "--caption_column", "text")
  assert [r.image_id for r in records.open_split(tmp_path / "out", "train")] == [0, 1, 2]
  names = [f"{i}.jpg" for i in range(60)]
  for i, name in enumerate(names):
    (tmp_path / "images" / name).write_bytes(encoded_image(i))
  found = []
  for order in (names, names[::-1]):  # an image's split does not depend on the others
    args = pairs(tmp_path, [(n, "x") for n in order], columns=("image", "caption"))
    run(*args, "--val_fraction", "0.2", "--test_fraction", "0.2", "--name", "drawn", "--overwrite")
    folder = tmp_path / "out" / "drawn"
    of = lambda s: {r.filename for r in records.open_split(folder, s)}
    found.append([of(s) for s in ("train", "val", "test")])
  assert found[0] == found[1] and sum(map(len, found[0])) == 60
  assert 25 < len(found[0][0]) < 47


@pytest.mark.parametrize(
  "rows, extra, message",
  [
    ([], (), "pairs.csv: no rows"),
    ([("1.jpg", "", 1, "val")], (), "pairs.csv:2 (1.jpg): a blank caption, 1 in all"),
    (PAIRS, ("--caption_column", "text"), "nothing in column 'text'; the columns are ['image', "),
    (
      [*PAIRS, ("1.jpg", "x", 11, "test")],
      (),
      "1.jpg of split 'test' is also in split 'val', at",
    ),
    (
      [*PAIRS, ("1.jpg", "x", 13, "val")],
      (),
      "pairs.csv:6: image 1.jpg has image_id 13, but 11 at",
    ),
    ([("1.jpg", "x", "one", "val")], (), "pairs.csv:2: the id is 'one', expected an integer"),
    (PAIRS, ("--val_fraction", "0.1"), "splits are given twice: leave out"),
    (PAIRS, ("--val_fraction", "1.5"), "val_fraction 1.5"),
    (
      [("1.jpg", "x", 0)],
      ("--split_column", "none", "--val_fraction", "1e-9"),
      "split 'val' is empty",
    ),
    ([("1.jpg", "x", 0, "a-b")], (), "split 'a-b': a name is"),
  ],
)
def test_bad_pairs(tmp_path, capsys, rows, extra, message):
  assert message in fails(capsys, *pairs(tmp_path, rows), *extra)


def test_bad_tables(tmp_path, capsys):
  args = list(pairs(tmp_path, kind="jsonl"))
  with args[2].open("a") as f:
    f.write("[1, 2]\n")
  assert "pairs.jsonl:5: expected a JSON object" in fails(capsys, *args)
  args[2] = args[2].rename(tmp_path / "pairs.xlsx")
  assert "pairs.xlsx: expected a file .csv, .tsv, .jsonl" in fails(capsys, *args)
  args = pairs(tmp_path)
  with args[2].open("a") as f:
    f.write("1.jpg,a caption, with a comma,11,val\n")
  assert "pairs.csv:6: 5 fields, expected 4" in fails(capsys, *args)


def albef(root: pathlib.Path) -> tuple:
  """Two lists of a train split in two folders, with an image in common, and a test list."""
  lists = {
    "a": ("one", [("1.jpg", ["a", " B. "]), ("b/2.jpg", "plain"), ("b/../1.jpg", ["c"])]),
    "b": ("", [("two/1.jpg", [""]), ("one/b/2.jpg", ["d", "e"])]),
    "c": ("two", [("3.jpg", ["f"])]),
  }
  for i, name in enumerate(("one/1.jpg", "one/b/2.jpg", "two/1.jpg", "two/3.jpg")):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(encoded_image(i))
  args = []
  for name, (folder, rows) in lists.items():
    data = [{"image": p, "caption": c, "image_id": "x", "dataset": 7} for p, c in rows]
    (root / f"{name}.json").write_text(json.dumps(data))
    args += ["--test" if name == "c" else "--train", root / f"{name}.json", root / folder]
  return ("albef", *args, "--out", root / "out")


def test_albef(tmp_path, caplog):
  with caplog.at_level("INFO"):
    run(*albef(tmp_path), "--check_images")
  assert "train: 5 records, 2 merged into earlier ones" in caplog.text
  assert "test: 1 records" not in caplog.text
  folder = tmp_path / "out" / "albef" / "1.0.0"
  train = list(records.open_split(folder, "train"))
  assert [r.captions for r in train] == [("a", " B. ", "c"), ("plain", "d", "e"), ("",)]
  assert [r.image for r in train] == [encoded_image(0), encoded_image(1), encoded_image(2)]
  assert [r.filename for r in train] == ["1.jpg", "b/2.jpg", "two/1.jpg"]
  assert [r.image_id for r in train] == [0, 1, 2]
  assert [r.image_id for r in records.open_split(folder, "test")] == [3]
  source = json.loads((folder / "source.json").read_text())
  name = str(tmp_path / "b.json")
  assert source["options"]["train"][1] == [name, f"{tmp_path}"]
  assert source["sha256"][name] == hashlib.sha256((tmp_path / "b.json").read_bytes()).hexdigest()
  # Images are in the order of the lists on the command line.
  args = albef(tmp_path)
  run("albef", *args[4:7], *args[1:4], "--out", tmp_path / "out", "--name", "turned")
  turned = records.open_split(tmp_path / "out" / "turned", "train")
  assert [r.captions[0] for r in turned] == ["", "d", "a"]


def test_albef_of_the_golden_set(tmp_path):
  data = json.loads(golden_files.path("team", "eval_data", "annotations.json").read_text())
  pixels = golden_files.arrays("team", "eval_data", "images.npz")
  for item in data:
    path = tmp_path / item["image"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[path.stem]).save(path)
  file = golden_files.path("team", "eval_data", "annotations.json")
  run("albef", "--test", file, tmp_path, "--out", tmp_path / "out")
  split = records.open_split(tmp_path / "out", "test")
  assert [(r.filename, list(r.captions)) for r in split] == [
    (item["image"], item["caption"]) for item in data
  ]
  for record in split:
    got = np.asarray(Image.open(io.BytesIO(record.image)))
    np.testing.assert_array_equal(got, pixels[pathlib.Path(record.filename).stem])


def test_albef_missing_images(tmp_path, capsys, caplog):
  args = albef(tmp_path)
  for name in ("one/1.jpg", "two/1.jpg"):
    (tmp_path / name).unlink()
  message = fails(capsys, *args)
  assert "2 of 4 images are missing; check" in message and "--max_missing" in message
  assert str(tmp_path / "two" / "1.jpg") in message and str(tmp_path / "one" / "1.jpg") in message
  assert "missing, more than the 1 allowed" in fails(capsys, *args, "--max_missing", "1")
  with caplog.at_level("INFO"):
    run(*args, "--max_missing", "2")
  assert "left out 2 missing images:" in caplog.text
  train = records.open_split(tmp_path / "out", "train")
  assert [(r.filename, r.image_id, r.caption_ids) for r in train] == [("b/2.jpg", 1, (0, 1, 2))]


@pytest.mark.parametrize(
  "text, message",
  [
    ('[{"image": "1.jpg"', "a.json: not JSON"),
    ('{"images": []}', "a.json: not a list of records; expected ALBEF's"),
    ("[]", "a.json: not a list of records"),
    ('[{"image": "1.jpg", "caption": "x"}, 3]', "a.json: record 1 (counted from 0): no key"),
    ('[{"image": "1.jpg", "captions": ["x"]}]', "a.json: record 0 (counted from 0): no key 'capt"),
    ('[{"image": 5, "caption": "x"}]', "a.json: record 0 (counted from 0): image 5 is not a path"),
    ('[{"image": "", "caption": "x"}]', "image '' is not a path"),
    ('[{"image": "1.jpg", "caption": ["x", 4]}]', "record 0 (counted from 0) (1.jpg): caption"),
    ('[{"image": "1.jpg", "caption": null}]', "(1.jpg): caption is None; expected ALBEF's"),
    ('[{"image": "1.jpg", "caption": []}]', "record 0 (counted from 0) (1.jpg) has no captions"),
    ('[{"image": "../two/3.jpg", "caption": "x"}]', "c.json: record 0 (counted from 0): image"),
  ],
)
def test_bad_albef(tmp_path, capsys, text, message):
  args = albef(tmp_path)
  (tmp_path / "a.json").write_text(text)
  assert message in fails(capsys, *args)


def test_albef_without_lists(tmp_path, capsys):
  (tmp_path / "out").mkdir()
  assert "pass --train, --val or --test" in fails(capsys, "albef", "--out", tmp_path / "out")
  args = ("albef", "--val", tmp_path / "no.json", tmp_path, "--out", tmp_path / "out")
  assert "no.json: no such file; check --val" in fails(capsys, *args)


def test_runs_as_a_script_from_anywhere(tmp_path):
  """In any working directory. The annotation file is missing, so it ends at once."""
  command = [sys.executable, ROOT / "tools" / "prepare_data.py", "karpathy", "--out", "out"]
  command += ["--annotations", "no.json", "--images", "."]
  env = child_process.environment()
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 1 and "prepare_data.py: no.json: no such file" in done.stderr
