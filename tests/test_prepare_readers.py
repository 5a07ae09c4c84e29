"""Annotations as people have them: layouts, values that cannot be used, one split per picture."""

import gzip
import json
import logging
import os
import pathlib

import numpy as np
import pytest
from test_prepare_data import fails, karpathy, pairs, run
from test_records import encoded_image

from xmodal_jax.data import records
from xmodal_jax.data.preparing import annotations, coco, folders, listing, sources, tables
from xmodal_jax.data.preparing.pairs import read_pairs
from xmodal_jax.data.tfrecord import DatasetError


def read(root: pathlib.Path, text: str | bytes, name="a.csv", **options) -> dict[str, tuple]:
  """{file name: captions} of a table."""
  (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  if "form" in options:
    options["form"] = tables.Form(**options["form"])
  splits = read_pairs(root / name, root, **options)
  return {p.filename: p.captions for split in splits.values() for p in split}


A, B = ("one", "two"), ("three",)
AB = {"a.jpg": A, "b.jpg": B}
LAYOUTS = {
  "csv": ("a.csv", "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),
  "line ends": ("a.csv", "image,caption\r\n\r\na.jpg,one\r\na.jpg,two\r\nb.jpg,three"),
  "byte order mark": ("a.csv", "\ufeffimage,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),
  "no header": ("a.csv", "a.jpg,one\na.jpg,two\nb.jpg,three\n"),
  "no header, caption first": ("a.tsv", "one\ta.jpg\ntwo\ta.jpg\nthree\tb.jpg\n"),
  "semicolons": ("a.csv", "image;caption\na.jpg;one\na.jpg;two\nb.jpg;three\n"),
  "open_clip": ("a.csv", "filepath\ttitle\na.jpg\tone\na.jpg\ttwo\nb.jpg\tthree\n"),
  "Kaggle, Flickr8k": ("captions.txt", "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),
  "Kaggle, Flickr30k": (
    "results.csv",
    "image_name| comment_number| comment\na.jpg|0|one\na.jpg| 1|two\nb.jpg| 0|three\n",
  ),
  "Flickr30k": ("r.token", "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n"),
  "Flickr8k": ("Flickr8k.token.txt", "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n"),
  "Hugging Face": (
    "h.csv",
    'raw,sentids,filename,img_id\n"[""one"", ""two""]","[0, 1]",a.jpg,0\n'
    '"[""three""]",[2],b.jpg,1\n',
  ),
  "lists of Python": ("p.csv", 'image,caption\na.jpg,"[\'one\', ""two""]"\nb.jpg,[\'three\']\n'),
  "lists": (
    "a.jsonl",
    '{"image": "a.jpg", "caption": ["one", "two"]}\n{"image": "b.jpg", "caption": ["three"]}\n',
  ),
  "JSON lines in .txt": (
    "a.txt",
    '{"image": "a.jpg", "caption": ["one", "two"]}\n\n{"image": "b.jpg", "caption": "three"}',
  ),
  "one picture, two spellings": ("a.csv", "image,caption\na.jpg,one\n./a.jpg,two\nb.jpg,three\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
  name, text = LAYOUTS[layout]
  assert read(tmp_path, text, name) == AB


def test_what_is_said_about_a_table(tmp_path):
  form = {"columns": ("n", "image", "caption"), "delimiter": "|"}
  assert read(tmp_path, "1|a.jpg|one\n2|a.jpg|two\n3|b.jpg|three\n", "x.txt", form=form) == AB
  form = {"kind": "tsv", "quotes": "none"}
  assert read(tmp_path, 'image\tcaption\na.jpg\t"one"\n', "x", form=form) == {"a.jpg": ('"one"',)}
  with pytest.raises(DatasetError, match="is read as the format jsonl, which has no delim"):
    read(tmp_path, "{}", "a.jsonl", form={"delimiter": "|"})
  with pytest.raises(DatasetError, match="1: 'image', expected NAME#N<TAB>caption"):
    read(tmp_path, "image\ncaption\n", "a.token")
  args = ("--images", tmp_path, "--out", tmp_path / "out", "--format", "csv")
  (tmp_path / "a.jpg").write_bytes(encoded_image(0))
  (tmp_path / "x").write_text("7;a.jpg;'one\n")
  args += ("--delimiter", "semicolon", "--columns", "image_id,image,caption", "--quotes", "none")
  run("pairs", "--annotations", tmp_path / "x", *args)
  record = records.open_split(tmp_path / "out", "train").read(0)
  assert (record.image_id, record.captions) == (7, ("'one",))


def test_lists_of_the_images_of_a_split(tmp_path, capsys, caplog):
  """As with Flickr8k.token.txt, and with names without a suffix."""
  for i in range(4):
    (tmp_path / f"{i}.jpg").write_bytes(encoded_image(i))
  lines = [f"{i}.jpg#{j}\t{i} {j}\n" for i in range(4) for j in (0, 1)]
  (tmp_path / "a.token").write_text("".join(lines))
  (tmp_path / "train.txt").write_text("0.jpg\r\n2.jpg\r\n7.jpg\r\n")
  (tmp_path / "test.txt").write_text("1\n")
  args = ["pairs", "--annotations", tmp_path / "a.token", "--images", tmp_path]
  args += ["--split_list", "train", tmp_path / "train.txt", "--split_list", "test"]
  args += [tmp_path / "test.txt", "--out", tmp_path / "out"]
  with caplog.at_level(logging.INFO):
    run(*args)
  assert "2 rows are left out, as their image is in no --split_list" in caplog.text
  names = lambda split: [r.filename for r in records.open_split(tmp_path / "out", split)]
  assert (names("train"), names("test")) == (["0.jpg", "2.jpg"], ["1.jpg"])
  (tmp_path / "test.txt").write_text("1\n2\n")
  assert "test.txt:2: '2' is also in a list of split 'train'" in fails(capsys, *args, "--overwrite")
  (tmp_path / "test.txt").write_text("1\n")
  assert "splits are given twice" in fails(capsys, *args, "--overwrite", "--val_fraction", "0.1")
  (tmp_path / "test.txt").write_text("\n")
  assert "test.txt: no names; expected the name" in fails(capsys, *args, "--overwrite")


def test_tables_of_pandas(tmp_path, caplog):
  """Captions with marks, separators, line ends and characters at which str.splitlines splits."""
  pandas = pytest.importorskip("pandas")
  captions = [
    'A "B" C',
    '"D" e',
    '"F"',
    "a\tb",
    "c,d",
    "e\nf",
    "g\u2028h\u0085i\x0bj",
    "k" * 200_000,
  ]
  frame = pandas.DataFrame({"image": [f"{i}.jpg" for i in range(8)], "caption": captions})
  want = {f"{i}.jpg": (c,) for i, c in enumerate(captions)}
  with caplog.at_level(logging.INFO):
    for name, form in (("a.csv", {}), ("a.tsv", {"sep": "\t"}), ("b.csv", {"sep": "\t"})):
      assert read(tmp_path, frame.to_csv(index=False, **form), name) == want
  assert (
    "a.tsv: 5 fields begin with a quotation mark, first line 2, and are unquoted" in caplog.text
  )
  assert "a.csv: fields in quotation marks go over several lines, first from line 7" in caplog.text
  lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in frame.to_dict("records"))
  assert read(tmp_path, lines, "a.jsonl") == want
  assert read(tmp_path, gzip.compress(lines.encode()), "a.jsonl.gz") == want


def test_marks_of_a_plain_tsv(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    text = 'image\tcaption\na.jpg\t"one" more\nb.jpg\t5" pipe\n'
    assert read(tmp_path, text, "a.tsv") == {"a.jpg": ('"one" more',), "b.jpg": ('5" pipe',)}
  assert "a.tsv: 1 fields begin with a quotation mark, first line 2, which is kept" in caplog.text


HEAD = "image,caption\n"
BAD = {
  "open quote": (HEAD + 'a.jpg,one\nb.jpg,"A 5 inch\na.jpg,two\n', "a.csv:3: a quotation mark in"),
  "text after a quote": (HEAD + 'a.jpg,"one" two\n', "a.csv:2: a quotation mark in the row"),
  "two stray quotes": (
    HEAD + 'a.jpg,"A 5 inch\nb.jpg,two\nb.jpg,7 inch"\n',
    "a.csv:2: a quotation mark opens in this row and closes in line 4, but line 3 looks like",
  ),
  "columns": ("a.jpg,one,1\n", "is no line of column names; name them with --columns"),
  "column twice": ("image,caption,caption\na.jpg,one,two\n", "column 'caption' occurs twice"),
  "two columns": ("filepath,filename,title\na,b.jpg,c\n", "which of ['filepath', 'filename'] is"),
  "list": (HEAD + "a.jpg,\"['one', 'two'\"]\n", "a.csv:2: a quotation mark"),
  "list, damaged": (HEAD + "a.jpg,\"['one', two]\"\n", "looks like a list of captions, but"),
  "list of NumPy": (HEAD + "a.jpg,\"['one' 'two']\"\n", "is no list of texts"),
  "list of numbers": (HEAD + 'a.jpg,"[""one"", 2]"\n', "a caption of the list is 2"),
  "blank split": (HEAD[:-1] + ",split\na.jpg,one,train\nb.jpg,two,\n", "csv:3: nothing in"),
  "one id": (HEAD[:-1] + ",image_id\na.jpg,one,1\nb.jpg,two,1\n", "csv:3: image_id 1 is of"),
  "long id": (HEAD[:-1] + f",image_id\na.jpg,one,{2**63}\n", "a.csv:2: the id is"),
  "id of a float": (HEAD[:-1] + ",image_id\na.jpg,one,1.0\n", "a.csv:2: the id is '1.0', expected"),
  "two splits": (
    HEAD[:-1] + ",split\na.jpg,one,train\n./a.jpg,two,val\n",
    "a.jpg of split 'val' is also in split 'train', at",
  ),
  "no name": (HEAD + " ,one\n", "a.csv:2: the image ' ' is not a path"),
  "NUL": (HEAD + "a\0.jpg,one\n", "a.csv:2: the image 'a\\x00.jpg' is not a path"),
  "blank caption": (HEAD + "a.jpg, \n", "a.csv:2 (a.jpg): a blank caption, 1 in all; fill them in"),
  "other encoding": (HEAD.encode() + b"a.jpg,caf\xe9\n", "a.csv:2: not UTF-8 text (byte 0xe9)"),
  "UTF-16": (HEAD.encode("utf-16"), "a.csv: UTF-16, expected UTF-8 text"),
  "cut gzip": (gzip.compress(HEAD.encode() * 99)[:-9], "a.csv: no whole gzip file"),
  "damaged gzip": (gzip.compress(HEAD.encode())[:12] + b"\xff" * 30, "a.csv: no whole gzip file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path, case):
  text, message = BAD[case]
  with pytest.raises(DatasetError) as e:
    read(tmp_path, text)
  assert message in str(e.value)


def line(**values) -> str:
  return json.dumps({"image": "a.jpg", "caption": "x"} | values) + "\n"


@pytest.mark.parametrize(
  "text, message",
  [
    (line() + line(caption=2024), "a.jsonl:2: the caption is 2024, expected text"),
    (line() + line(caption=None), "a.jsonl:2: nothing in column 'caption'"),
    (line(caption=[]), "a.jsonl:1: an empty list of captions"),
    (line(caption={"a": 1}), "a.jsonl:1: the caption is {'a': 1}, expected text"),
    (line(caption="\ud83d"), "a.jsonl:1: the caption '\\ud83d' has half of a surrogate pair"),
    (line(image="\ud83d.jpg"), "a.jsonl:1: the image '\\ud83d.jpg' has half of a surrogate"),
    (line(image=7), "a.jsonl:1: the image 7 is not a path"),
    (line(split=None), "a.jsonl:1: nothing in column 'split'"),
    (line(split=3), "a.jsonl:1: the split is 3, expected text"),
    (line() + line(split="val"), "a.jsonl:2: has 'split', which the first row lacks"),
    (line(image_id=1.0), "a.jsonl:1: the id is 1.0, expected an integer"),
    (line(image_id=True), "a.jsonl:1: the id is True"),
    (line(image_id=2**63), "a.jsonl:1: the id is 9223372036854775808"),
    ('{"image": "a.jpg", "caption": "x", "caption": "y"}', "a.jsonl:1: not JSON (key 'caption'"),
    ('{"image": ' + "1" * 5000 + "}", "a.jsonl:1: not JSON (Exceeds the limit"),
    ('{"image": ' + "[" * 10**5, "a.jsonl:1: not JSON of a data set (nested too deeply)"),
    ("\ufeff[]", "a.jsonl:1: expected a JSON object"),
  ],
)  # fmt: skip
def test_bad_json_lines(tmp_path, text, message):
  with pytest.raises(DatasetError) as e:
    read(tmp_path, text, "a.jsonl")
  assert message in str(e.value)


def test_blank_captions(tmp_path, caplog):
  text = HEAD + "a.jpg,one\nb.jpg,\na.jpg, \n"
  with caplog.at_level(logging.INFO):
    assert read(tmp_path, text, blank="drop") == {"a.jpg": ("one",)}
    assert "2 blank captions are left out" in caplog.text
    assert "1 images are left out, they have no other captions" in caplog.text
    assert read(tmp_path, text, blank="keep") == {"a.jpg": ("one", " "), "b.jpg": ("",)}
    assert "2 blank captions are kept" in caplog.text


@pytest.mark.parametrize(
  "edit, message",
  [
    (lambda d: d["images"][1]["sentences"][3].update(raw=None), "images[1].sentences[3]: raw is"),
    (lambda d: d["images"][1]["sentences"][3].update(raw="\ud83d"), "sentences[3]: raw '\\ud83d'"),
    (lambda d: d["images"][1].update(filename=3), "images[1]: filename 3 is not a path"),
    (lambda d: d["images"][1].update(filename="a\0"), "images[1]: filename 'a\\x00' is not a path"),
    (lambda d: d["images"][3].update(filepath=3), "images[3]: filepath 3 is not a path"),
    (lambda d: d["images"][1].update(split=None), "images[1]: split is None, expected text"),
    (lambda d: d["images"][1].update(split=" "), "images[1]: the split is blank"),
    (lambda d: d["images"][1].update(sentences={}), "images[1].sentences is {}, expected a list"),
    (lambda d: d.update(images={"a": 1}), "images is {'a': 1}, expected a list"),
    (lambda d: d["images"][1].update(imgid=1.5), "images[1]: image ids is 1.5, expected"),
    (lambda d: d["images"][1].update(imgid=2**64), "images[1]: image ids is 18446744073709551616"),
    (lambda d: d["images"][1].update(imgid=0), "images[1]: image_id 0 is of image 1.jpg, but of 0"),
    (lambda d: d["images"][2].update(filename="./0.jpg"), "of split 'test' is also in split"),
    (lambda d: d["images"][1].update(filename="0.jpg"), "image 0.jpg has image_id 1, but 0 at"),
    (lambda d: [i.update(imgid="x", cocoid="x") for i in d["images"]], "'x' occurs 6 times"),
  ],
)  # fmt: skip
def test_bad_karpathy(tmp_path, capsys, edit, message):
  assert message in fails(capsys, *karpathy(tmp_path, edit))


def test_karpathy_counts_and_texts_as_ids(tmp_path, caplog):
  def edit(data):
    for i, item in enumerate(data["images"]):
      item.pop("cocoid", None)
      item["imgid"] = f"img{i}"
      for sentence in item["sentences"]:
        sentence["sentid"] = f"s{sentence['sentid']}"
    data["images"][0]["sentences"][1]["raw"] = " "

  with caplog.at_level(logging.INFO):
    run(*karpathy(tmp_path, edit), "--captions_per_image", "4")
  for text in (
    "image ids like 'img0' are no integers: positions are used instead",
    "sentids like 's0' are no integers: positions are used instead",
    "7 captions beyond the first ones of their image are left out (--captions_per_image all",
    "1 blank captions are kept",
  ):
    assert text in caplog.text
  source = json.loads((tmp_path / "out" / "karpathy" / "1.0.0" / "source.json").read_text())
  assert source["left_out"]["train"] == {"captions beyond the limit": 4}
  train = list(records.open_split(tmp_path / "out", "train"))
  assert [r.image_id for r in train] == [0, 1, 5] and train[1].caption_ids == (5, 6, 7, 8)


def test_karpathy_with_the_images_of_2017(tmp_path):
  names = ["COCO_val2014_000000000001.jpg", "COCO_train2014_000000000002.jpg"]
  names += ["COCO_val2014_000000000003.jpg"]
  for place in ("train2017/000000000001.jpg", "000000000002.jpg", f"val2014/{names[2]}"):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"x")
  images = [
    {"filename": n, "split": "train", "cocoid": i, "sentences": [{"raw": "x", "sentid": i}]}
    for i, n in enumerate(names)
  ]
  (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
  (split,) = sources.read_karpathy(tmp_path / "dataset_coco.json", tmp_path).values()
  assert [p.filename for p in split] == names
  found = [str(p.path.relative_to(tmp_path)) for p in split]
  assert found == ["train2017/000000000001.jpg", "000000000002.jpg", f"val2014/{names[2]}"]


def coco_file(path: pathlib.Path, first: int, count: int = 3) -> dict:
  """An annotation file of `count` images with two captions each."""
  path.parent.mkdir(exist_ok=True)
  ids = range(first, first + count)
  data = {
    "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids],
    "annotations": [
      {"id": 100 * j + i, "image_id": i, "caption": f"{i} {j}"} for j in (0, 1) for i in ids
    ],
  }
  path.write_text(json.dumps(data))
  return data


def test_coco_of_2017(tmp_path, caplog):
  folder = tmp_path / "annotations"
  coco_file(folder / "captions_train2017.json", 5)
  data = coco_file(folder / "captions_val2017.json", 1)
  data["images"].append({"id": 9, "file_name": "9.jpg"})
  (folder / "captions_val2017.json").write_text(json.dumps(data))
  (folder / "instances_val2017.json").write_text("{}")
  (tmp_path / "val2017").mkdir()
  with caplog.at_level(logging.INFO):
    splits = coco.read_coco(folder, tmp_path)
  assert "captions_val2017.json: 1 images have no captions and are left out" in caplog.text
  assert "captions_val2017.json: all of it is split 'val', as there are no id lists" in caplog.text
  val = splits["val"]
  assert [p.image_id for p in val] == [1, 2, 3] and [p.image_id for p in splits["train"]] == [
    5,
    6,
    7,
  ]
  assert val[0].captions == ("1 0", "1 1") and val[0].caption_ids == (1, 101)
  assert val[0].path == tmp_path / "val2017" / "000000000001.jpg"
  (one,) = coco.read_coco(folder / "captions_train2017.json", tmp_path).values()
  assert [p.captions for p in one] == [p.captions for p in splits["train"]]
  (tmp_path / "val2017").rmdir()
  coco_file(folder / "captions_train2017.json", 3)
  with pytest.raises(DatasetError, match="of split 'val' is also in split 'train'"):
    coco.read_coco(folder, tmp_path)
  with pytest.raises(
    DatasetError, match=r"no captions_\*\.json in it; expected captions_{train,val}"
  ):
    coco.read_coco(tmp_path, tmp_path)


@pytest.mark.parametrize(
  "key, i, values, message",
  [
    ("images", 0, {"file_name": None}, "images[0]: file_name None is not a path"),
    ("images", 0, {"id": "x"}, "images[0]: id is 'x', expected an integer"),
    ("images", 0, {"id": 2}, "images[1]: id 2 is of 000000000002.jpg, and also of 0"),
    ("images", 0, {"file_name": "000000000002.jpg"}, "000000000002.jpg has image_id 2, but 1 at"),
    ("annotations", 1, {"caption": None}, "annotations[1]: caption is None, expected text"),
    ("annotations", 1, {"image_id": [1]}, "annotations[1]: image_id is [1], expected an integer"),
    ("annotations", 1, {"image_id": 77}, "annotations[1] is of image 77, not in 'images'"),
    ("annotations", 1, {"id": 1}, "annotations[1]: id 1 is also that of"),
  ],
)  # fmt: skip
def test_bad_coco_files(tmp_path, key, i, values, message):
  file = tmp_path / "captions_val.json"
  data = coco_file(file, 1)
  data[key][i].update(values)
  file.write_text(json.dumps(data))
  with pytest.raises(DatasetError) as e:
    coco.read_coco(file, tmp_path)
  assert message in str(e.value)


def test_coco_cn(tmp_path):
  """Names without a suffix, of images in COCO's two folders."""
  (tmp_path / "val2014").mkdir()
  image = tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
  image.write_bytes(b"x")
  (tmp_path / "imageid.human-caption.txt").write_text(f"{image.stem}#0\t一只猫\n", "utf-8")
  (split,) = read_pairs(tmp_path / "imageid.human-caption.txt", tmp_path).values()
  assert [(p.path, p.captions) for p in split] == [(image, ("一只猫",))]


def test_missing_images(tmp_path, capsys, caplog):
  """--max_missing counts folders, other spellings and links to nothing."""
  args = pairs(tmp_path)
  (tmp_path / "images" / "1.jpg").rename(tmp_path / "images" / "1.JPG")
  (tmp_path / "images" / "3.jpg").unlink()
  (tmp_path / "images" / "3.jpg").mkdir()
  message = fails(capsys, *args)
  assert "2 of 3 images are missing" in message and "--max_missing" in message
  assert "3.jpg (is a folder)" in message and "1.jpg (there is 1.JPG, another spelling)" in message
  (tmp_path / "images" / "3.jpg").rmdir()
  (tmp_path / "images" / "3.jpg").symlink_to("3.jpg")
  assert "3.jpg (no such file)" in fails(capsys, *args)
  with caplog.at_level(logging.INFO):
    run(*args[:-2], "--split_column", "no", "--max_missing", "2", *args[-2:])
  assert "left out 2 missing images" in caplog.text
  assert [r.filename for r in records.open_split(tmp_path / "out", "train")] == ["b/2.jpg"]


def test_links_between_splits(tmp_path, capsys, caplog):
  args = karpathy(tmp_path)
  images = tmp_path / "images"
  (images / "2.jpg").unlink()
  (images / "2.jpg").symlink_to("0.jpg")
  assert "2.jpg of split 'test' is the same file as" in fails(capsys, *args)
  (images / "2.jpg").unlink()
  (images / "2.jpg").write_bytes(encoded_image(2))
  (images / "5.jpg").unlink()
  (images / "5.jpg").symlink_to("0.jpg")
  with caplog.at_level(logging.INFO):
    run(*args)
  assert "1 images are links to the file of another image of their split" in caplog.text


def test_names_in_another_case(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    assert len(read(tmp_path, HEAD + "a.jpg,one\nA.jpg,two\n")) == 2
  assert "1 images have a name that differs from another one's in case only" in caplog.text


def test_folders_of_links_and_odd_names(tmp_path):
  (tmp_path / "train" / "a" / "b").mkdir(parents=True)
  (tmp_path / "train" / "a" / "1.jpg").write_bytes(b"x")
  loop = tmp_path / "train" / "a" / "b" / "c"
  loop.symlink_to(tmp_path / "train" / "a")
  with pytest.raises(DatasetError, match="a link to a folder that it is in"):
    folders.read_folders(tmp_path)
  loop.unlink()
  (tmp_path / "val").symlink_to("train")
  splits, _ = folders.read_folders(tmp_path)
  with pytest.raises(DatasetError, match="of split 'val' is the same file as"):
    annotations.check_images(splits)
  (tmp_path / "val").unlink()
  (tmp_path / "train" / "a" / os.fsdecode(b"\xe9.jpg")).write_bytes(b"x")
  with pytest.raises(DatasetError, match=r"the name 'a/\\udce9.jpg' is not UTF-8"):
    folders.read_folders(tmp_path)


def test_folders_are_listed_once(tmp_path, monkeypatch):
  for i in range(20):
    (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
    (tmp_path / f"{i % 2}" / f"{i}.jpg").write_bytes(b"x")
  text = HEAD + "".join(f"{i % 2}/{i}.jpg,x\n" for i in range(24))
  (tmp_path / "a.csv").write_text(text)
  splits = read_pairs(tmp_path / "a.csv", tmp_path)
  listed, scandir = [], os.scandir
  monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
  monkeypatch.setattr(listing, "_looked_up", lambda path: pytest.fail(f"looked up {path}"))
  kept = annotations.check_images(splits, max_missing=4)
  assert len(kept["train"]) == 20 and len(listed) == 2


def test_an_image_that_cannot_be_read(tmp_path):
  image = annotations.AnnotatedImage("a", tmp_path, 0, ("x",))
  with pytest.raises(DatasetError, match="cannot be read"):
    next(annotations.examples([image]))


def cases() -> list[tuple[str, list[str], str | None]]:
  """(input, arguments, text of the message or None if it is to be read) of the shared inputs."""
  table = {
    "csv_unclosed_quote": "a.csv:5: a quotation mark", "jsonl_surrogate": "a.jsonl:5: the caption",
    "jsonl_int_caption": "a.jsonl:5: the caption is 2024", "csv_cp1252": "save the file as UTF-8",
    "karp_null_raw": "images[0].sentences[0]: raw", "karp_leak": "is also in split 'train'",
    "csv_blank_split": "a.csv:5: nothing in column 'split'",
    "coco_2017_only": "is also in split 'train'",
  }  # fmt: skip
  table |= dict.fromkeys(
    ("hf_flickr30k_csv", "tsv_pandas_quotes", "jsonl_caption_list", "jsonl_u2028", "karp_str_ids",
     "karp_ten_captions", "karp_empty_raw", "csv_long_200k", "csv_one_missing", "f30k_token",
     "i2d_upper_JPG", "i2d_appledouble", "i2d_bad_utf8_txt", "i2d_multiline_txt",
     "i2d_parquet_listcap")
  )  # fmt: skip
  return list(table.items())


@pytest.mark.parametrize("name, message", cases())
def test_shared_inputs(tmp_path, capsys, shared_data, name, message):
  root = shared_data.parent / "cases" / "data"
  if not root.is_dir():
    pytest.skip(f"needs the shared inputs: no folder {root}")
  first = {"karp": "karpathy", "coco": "coco", "i2d": "img2dataset"}
  source = first.get(name.split("_")[0], "pairs")
  if source == "img2dataset":
    args = ["--train", root / name / "s"]
  else:
    file = root / name / "annotations" if source == "coco" else next((root / name).iterdir())
    args = ["--annotations", file, "--images", root / "images"]
  args += ["--max_missing", "1"] if name == "csv_one_missing" else []
  args = [source, *args, "--out", tmp_path / "out"]
  if message:
    assert message in fails(capsys, *args)
    return
  run(*args)
  counts = json.loads(next((tmp_path / "out").glob("*/1.0.0/source.json")).read_text())["counts"]
  assert sum(split["records"] for split in counts.values()) == (11 if "bad_utf8" in name else 12)
  whole = source == "img2dataset" and "listcap" not in name
  captions = sum(split["captions"] for split in counts.values())
  assert captions == (11 if "bad_utf8" in name else 12 if whole else 60)


def test_numpy_id_lists_of_several_arrays(tmp_path):
  for part in ("train", "val"):
    coco_file(tmp_path / f"captions_{part}2014.json", 1 if part == "val" else 5)
  np.savez(tmp_path / "a.npz", x=np.arange(3))
  (tmp_path / "a.npz").rename(tmp_path / "coco_train_ids.npy")
  with pytest.raises(DatasetError, match=r"coco_train_ids\.npy: has several arrays; expected"):
    coco.read_coco(tmp_path, tmp_path)
