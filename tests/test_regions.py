"""Region features: layouts on disk, checks, and batches."""

import base64
import itertools
import json
import pathlib
import pickle
import re
import sys

import numpy as np
import pytest
import tiny
from PIL import Image
from test_pipeline import TOKENIZER
from test_prepare_data import fails, run

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import pipeline, records
from xmodal_jax.data.preparing import builder, detections, shapes
from xmodal_jax.data.tfrecord import DatasetError

WIDTH, COUNT = 8, 6  # number of features; number of images
SIZES = [(100 + i, 60 + i) for i in range(COUNT)]
SPLITS = ["train", "val", "train", "test", "train", "train"]


def detected(i: int) -> tuple[np.ndarray, np.ndarray]:
  """Image i has i % 3 + 1 regions."""
  rng, n = np.random.default_rng(i), i % 3 + 1
  low = rng.uniform(0, 40, (n, 2))
  boxes = np.concatenate([low, low + rng.uniform(1, 19, (n, 2))], 1)
  return rng.standard_normal((n, WIDTH)).astype(np.float32), boxes.astype(np.float32)


def folder(root: pathlib.Path, form: str = ".npz") -> list:
  """The published folders; -> arguments."""
  (root / "bu_att").mkdir(parents=True)
  (root / "bu_box").mkdir()
  for i in range(COUNT):
    features, boxes = detected(i)
    if form == ".npz":
      np.savez(root / "bu_att" / f"{i}.npz", feat=features)
    else:
      np.save(root / "bu_att" / f"{i}.npy", features)
    np.save(root / "bu_box" / f"{i}.npy", boxes)
  return [root]


def line(i: int, **changes) -> str:
  features, boxes = detected(i)
  encode = lambda x: base64.b64encode(np.asarray(x, "<f4").tobytes()).decode()
  fields = {"id": i, "w": SIZES[i][0], "h": SIZES[i][1], "n": len(boxes)}
  fields |= {"boxes": encode(boxes), "features": encode(features)} | changes
  return "\t".join(str(v) for v in fields.values()) + "\n"


def tables(root: pathlib.Path) -> list:
  """Two files in another order, with a line in common."""
  root.mkdir()
  (root / "a.tsv").write_text("".join(map(line, (5, 0, 3))))
  (root / "b.tsv").write_text("".join(map(line, (2, 0, 4, 1))))
  return [root / "a.tsv", root / "b.tsv"]


def hdf5(root: pathlib.Path, spans: bool = True) -> list:
  h5py = pytest.importorskip("h5py")
  root.mkdir()
  order = [3, 0, 5, 1, 2, 4]
  parts = [detected(i) for i in order]
  with h5py.File(root / "all.hdf5", "w") as f:
    f["image_features"], f["image_bb"] = (np.concatenate(x) for x in zip(*parts, strict=True))
    ends = np.cumsum([len(p[1]) for p in parts])
    f["pos_boxes"] = np.stack([ends - [len(p[1]) for p in parts], ends], 1)
    if not spans:
      f["image_id"] = order
  if spans:
    rows = {i: row for row, i in enumerate(order)}
    (root / "all_imgid2idx.pkl").write_bytes(pickle.dumps(rows, protocol=2))
  return [root / "all.hdf5"]


def karpathy(root: pathlib.Path, edit=lambda images: None) -> list:
  """The json, whose imgid is not the position in the list, and sizes; -> arguments."""
  images = [
    {
      "filename": f"p{i}.jpg",
      "imgid": 40 + i,
      "split": split,
      "sentences": [{"raw": f"{i} {j}", "sentid": 5 * i + j} for j in range(2)],
    }
    for i, split in enumerate(SPLITS)
  ]
  edit(images)
  (root / "dataset.json").write_text(json.dumps({"images": images}))
  (root / "sizes.pkl").write_bytes(pickle.dumps(SIZES))
  return ["--annotations", root / "dataset.json", "--sizes", root / "sizes.pkl"]


def prepare(root: pathlib.Path, features: list, *more) -> list:
  """Arguments of a run that writes into root/out."""
  return ["regions", *karpathy(root), "--out", root / "out", "--features", *features, *more]


@pytest.mark.parametrize(
  "layout",
  [
    folder,
    lambda root: folder(root, ".npy"),
    tables,
    hdf5,
    lambda root: hdf5(root, spans=False),
  ],
  ids=["npz", "npy", "tables", "hdf5", "hdf5 with ids"],
)
def test_layouts(tmp_path, layout):
  run(*prepare(tmp_path, layout(tmp_path / "features")))
  found = {}
  for name in ("train", "val", "test"):
    split = records.open_split(tmp_path / "out", name)
    assert split.region_dim == WIDTH
    found |= {r.image_id - 40: r for r in split}
  assert sorted(found) == list(range(COUNT))
  for i, record in found.items():
    features, boxes = detected(i)
    np.testing.assert_array_equal(record.regions, features)
    np.testing.assert_array_equal(record.boxes, boxes)
    assert record.size == SIZES[i] and record.captions == (f"{i} 0", f"{i} 1")
    assert record.image == b"" and record.filename == f"p{i}.jpg"
  assert [r.image_id for r in records.open_split(tmp_path / "out", "train")] == [40, 42, 44, 45]


def test_float16_and_tfds(tmp_path):
  import tensorflow_datasets as tfds

  args = prepare(tmp_path, folder(tmp_path / "features"), "--dtype", "float16")
  run(*args)
  (record,) = records.open_split(tmp_path / "out", "test")
  half = detected(3)[0].astype(np.float16)
  assert record.regions.dtype == np.float32
  np.testing.assert_array_equal(record.regions, half.astype(np.float32))
  np.testing.assert_array_equal(record.boxes, detected(3)[1])
  read = tfds.builder_from_directory(tmp_path / "out" / "regions" / "1.0.0")
  (example,) = tfds.as_numpy(read.as_dataset(split="test"))
  assert example["regions"].dtype == np.float16 and example["image_width"] == SIZES[3][0]
  np.testing.assert_array_equal(example["regions"], half)
  features = np.full((1, WIDTH), 7e4, np.float32)
  np.savez(tmp_path / "features" / "bu_att" / "3.npz", feat=features)
  message = "features beyond float16:\n    {}, id 3: 70000; pass --dtype float32"
  file = tmp_path / "features" / "bu_att" / "3.npz"
  with pytest.raises(SystemExit, match=re.escape(message.format(file))):
    run(*args, "--overwrite")


def check(capsys, *args) -> str:
  """The report of --check, which writes nothing."""
  capsys.readouterr()
  args = [a for a in args if a != "--check"]
  out = args[args.index("--out") + 1]
  try:
    run(*args, "--check")
  except SystemExit as e:
    assert "have errors" in str(e)
  assert not out.exists()
  return capsys.readouterr().out


def test_report_of_good_features(tmp_path, capsys):
  report = check(capsys, *prepare(tmp_path, folder(tmp_path / "features")))
  assert "6 images (train 4, val 1, test 1), 12 captions" in report
  assert "6 read: 12 regions, 1 to 3 of an image; features of float32, width 8 x 6" in report
  assert report.endswith("warnings: none\nerrors: none\n")


def saved(change, what="bu_box"):
  """Edits an array of image 2, which has three regions."""

  def edit(root):
    path = root / what / ("2.npy" if what == "bu_box" else "2.npz")
    array = detected(2)[what == "bu_box"].copy()
    array = change(array)
    if what == "bu_box":
      np.save(path, array)
    else:
      np.savez(path, feat=array)

  return edit


def put(place, value):
  def change(array):
    array[place] = value
    return array

  return change


def remove(name):
  return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
  "edit, message",
  [
    (saved(put((1, 2), 1.0)), "x boxes out of order:\n    {root}/bu_att/2.npz, id 2: region 1 is"),
    (saved(put((0, 3), 64.0)), "x boxes outside of the image:\n    {root}/bu_att/2.npz, id 2"),
    (saved(put((0, 0), -1.0)), "x boxes outside of the image:\n    {root}/bu_att/2.npz, id 2"),
    (saved(lambda b: b / 100), "x boxes in parts of the image:"),
    (
      saved(lambda b: b[:2]),
      "x boxes of another shape:\n    {root}/bu_att/2.npz, id 2: float32 (2",
    ),
    (saved(put((0, 0), np.nan)), "x boxes that are not finite:"),
    (saved(put((1, 4), np.inf), "bu_att"), "not finite:\n    {root}/bu_att/2.npz, id 2: region 1"),
    (saved(lambda f: f[:, :-1], "bu_att"), "x features of another shape:\n    {root}/bu_att/2.npz"),
    (saved(lambda f: f[:0], "bu_att"), "x features of another shape:"),
    (saved(lambda f: f.astype(int), "bu_att"), "x features of another shape:"),
    (
      remove("bu_att/4.npz"),
      "x missing ids:\n    p4.jpg of split 'train': id 4 in {root}/bu_att/4.",
    ),
    (remove("bu_box/4.npy"), "{root}/bu_box/4.npy: no such file"),
    (lambda root: (root / "bu_att" / "2.npz").write_bytes(b"PK"), "2.npz: no readable NumPy file"),
  ],
)
def test_errors_are_named_and_stop_the_run(tmp_path, capsys, edit, message):
  root = tmp_path / "features"
  args = prepare(tmp_path, folder(root))
  edit(root)
  message = message.format(root=root)
  assert message in check(capsys, *args).partition("errors:")[2]
  assert message in fails(capsys, *args)


def test_warnings_are_counted(tmp_path, capsys, caplog):
  root = tmp_path / "features"
  args = prepare(tmp_path, folder(root))
  saved(put((0, 3), 62.5))(root)  # half a pixel
  for name in ("bu_att/77.npz", "bu_att/78.npz"):
    np.savez(root / name, feat=detected(0)[0])
  report = check(capsys, *args)
  assert "1 x boxes less than a pixel outside:" in report and "errors: none" in report
  assert "2 x ids without captions, left out:\n    77\n    78" in report
  with caplog.at_level("INFO"):
    run(*args)
  assert "1 x boxes less than a pixel outside:" in caplog.text


@pytest.mark.parametrize(
  "lines, message",
  [
    (["1\t2\n"], "a.tsv:1: 2 fields, expected 6 with tabs"),
    ([line(0), line(1, n=5)], "a.tsv:2: image_id 1 is damaged"),
    ([line(0), line(1, boxes="!!!!")], "a.tsv:2: image_id 1 is damaged"),
    ([line(0), line(0, w=9)], "a.tsv:2: image_id 0 is also in"),
    ([], "a.tsv: empty; expected a line per image"),
  ],
)
def test_bad_tables(tmp_path, lines, message):
  path = tmp_path / "a.tsv"
  path.write_text("".join(lines))
  with pytest.raises(DatasetError, match=re.escape(message)):
    reader = detections.open_reader([path])
    for key in reader.ids:
      reader.read(key)


def test_sizes_of_two_sources_must_agree(tmp_path, capsys):
  features = tables(tmp_path / "features")
  features[0].write_text("".join([line(5, w=99), line(0), line(3)]))
  args = prepare(tmp_path, features)
  assert "sizes that differ:" in check(capsys, *args)
  assert "id 5: (99, 65) there, (105, 65) elsewhere" in fails(capsys, *args)


def test_where_sizes_come_from(tmp_path, capsys):
  features = folder(tmp_path / "features")
  args = prepare(tmp_path, features)
  del args[args.index("--sizes") : args.index("--sizes") + 2]
  assert "6 x images of unknown size:" in check(capsys, *args)
  (tmp_path / "images").mkdir()
  for i, size in enumerate(SIZES):
    Image.new("RGB", size).save(tmp_path / "images" / f"p{i}.jpg")
  run(*args, "--name", "images", "--images", tmp_path / "images")
  add = lambda images: [item.update(width=w, height=h) for item, (w, h) in zip(images, SIZES)]  # noqa: B905
  karpathy(tmp_path, add)
  run(*args, "--name", "annotations")
  (tmp_path / "sizes.csv").write_text(
    "id,width,height\n" + "".join(f"{i},{w},{h}\n" for i, (w, h) in enumerate(SIZES))
  )
  (tmp_path / "sizes.json").write_text(json.dumps({str(i): s for i, s in enumerate(SIZES)}))
  for kind in ("csv", "json"):
    run(*args, "--name", kind, "--sizes", tmp_path / f"sizes.{kind}")
  run(*args, "--name", "tables", "--features", *tables(tmp_path / "tables"))
  for name in ("images", "annotations", "csv", "json", "tables"):
    (record,) = records.open_split(tmp_path / "out" / name, "test")
    assert record.size == SIZES[3], name
  (tmp_path / "sizes.json").write_text(json.dumps([[1, 2], [0, 5]]))
  assert "entry 1 is [0, 5]" in fails(capsys, *args, "--sizes", tmp_path / "sizes.json")


def test_a_pickle_of_sizes_is_never_run(tmp_path, capsys):
  class Evil:
    def __reduce__(self):
      return exec, ("import sys; sys.xmodal_evil = True",)

  args = prepare(tmp_path, folder(tmp_path / "features"))
  (tmp_path / "sizes.pkl").write_bytes(pickle.dumps([(1, 2), Evil()]))
  assert "sizes.pkl: cannot be read safely" in fails(capsys, *args)
  assert not hasattr(sys, "xmodal_evil")


def test_keys_by_file_name(tmp_path, capsys):
  root = tmp_path / "features"
  args = prepare(tmp_path, [folder(root)[0] / "bu_att"], "--boxes", root / "bu_box")
  assert "6 x missing ids:" in check(capsys, *args, "--key", "id")  # which count from 40
  for path in [*root.rglob("*.npz"), *root.rglob("*.npy")]:
    path.rename(path.with_name(f"p{path.name}"))
  run(*args, "--key", "stem")
  assert len(records.open_split(tmp_path / "out", "train")) == 4


def test_other_bad_arguments(tmp_path, capsys):
  root = tmp_path / "features"
  args = prepare(tmp_path, folder(root))
  with pytest.raises(SystemExit, match="no --out"):
    run(*args[:5], *args[7:])
  assert "is a file" in fails(capsys, *args, "--dev_captions", "5")
  nowhere = [tmp_path / "nowhere"]
  assert "nowhere: no such file or folder; check --features" in fails(
    capsys, *args, "--features", *nowhere
  )
  empty = tmp_path / "empty"
  empty.mkdir()
  assert "no .npz or .npy files" in fails(capsys, *args, "--features", empty)
  assert "bu_box: no such folder of boxes" in fails(capsys, *args, "--features", root / "bu_att")
  np.save(root / "bu_att" / "2.npy", detected(2)[0])
  assert "there is 2.np" in fails(capsys, *args)


def test_a_real_sample(shared_data, tmp_path):
  """34 published regions of a photograph, found by its file name; without boxes."""
  sample = shared_data / "regions_mini"
  name = "COCO_test2015_000000000001"
  sentences = [{"raw": "an image", "sentid": 0}]
  item = {"filename": f"{name}.jpg", "split": "test", "sentences": sentences, "cocoid": 1}
  (tmp_path / "a.json").write_text(json.dumps({"images": [item]}))
  args = ["regions", "--annotations", tmp_path / "a.json", "--features", sample]
  args += ["--images", sample, "--key", "stem", "--out", tmp_path, "--boxes", tmp_path / "boxes"]
  with pytest.raises(SystemExit, match="boxes: no such folder of boxes"):
    run(*args)
  (tmp_path / "boxes").mkdir()
  features = np.load(sample / f"{name}.npy")
  np.save(tmp_path / "boxes" / f"{name}.npy", np.tile([[0, 0, 341, 256]], (len(features), 1)))
  run(*args)
  (record,) = records.open_split(tmp_path / "regions", "test")
  np.testing.assert_array_equal(record.regions, features)
  assert record.size == (341, 256) and record.boxes.dtype == np.float32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("prepared")
  run(*prepare(root, folder(root / "features")))
  return root / "out"


def stream(split, count, truncate=False, **kw):
  kw = {"batch_size": 4, "image_transform": None, "tokenizer": TOKENIZER, "seed": 3, **kw}
  shape = pipeline.Regions(count, WIDTH, truncate)
  return pipeline.train_batches(split, text_length=8, regions=shape, **kw)


def test_batches(prepared):
  """Padded, with boxes as fractions of the image, in training and evaluation."""
  split = records.open_split(prepared, "train")
  batches = stream(split, 4)
  train = list(itertools.islice(batches, 2))
  batches.close()
  (evaluation,) = pipeline.eval_images(
    split, batch_size=5, image_transform=None, regions=pipeline.Regions(4, WIDTH)
  )
  assert {k: (v.shape, v.dtype.name) for k, v in train[0].items()} == {
    "regions": ((4, 4, WIDTH), "float32"),
    "boxes": ((4, 4, 4), "float32"),
    "region_mask": ((4, 4), "bool"),
    "text_ids": ((4, 8), "int32"),
    "text_mask": ((4, 8), "bool"),
    "image_id": ((4,), "int32"),
    "caption_id": ((4,), "int32"),
  }
  assert set(evaluation) == {"regions", "boxes", "region_mask", "image_id", "valid"}
  assert evaluation["valid"].tolist() == [True] * 4 + [False]
  assert not evaluation["region_mask"][4].any() and not evaluation["regions"][4].any()
  for batch in (*train, {k: v[:4] for k, v in evaluation.items()}):
    for row, record in enumerate(batch["image_id"]):
      i = [0, 2, 4, 5][record]
      features, boxes = detected(i)
      n = len(features)
      assert batch["region_mask"][row].tolist() == [j < n for j in range(4)]
      np.testing.assert_array_equal(batch["regions"][row, :n], features)
      want = boxes / np.array(SIZES[i] * 2, np.float32)
      np.testing.assert_array_equal(batch["boxes"][row, :n], want)
      assert not batch["regions"][row, n:].any() and not batch["boxes"][row, n:].any()


def test_more_regions_than_asked_for(prepared):
  split = records.open_split(prepared, "train")
  with pytest.raises(pipeline.DataError, match=r"p\d.jpg.*more than config.data.regions = 1"):
    next(stream(split, 1))
  batch = next(stream(split, 1, truncate=True))
  for row, record in enumerate(batch["image_id"]):
    i = [0, 2, 4, 5][record]
    np.testing.assert_array_equal(batch["regions"][row], detected(i)[0][:1])
  assert batch["region_mask"].all()


def test_damaged_records_are_replaced(prepared, tmp_path):
  """Like images that do not decode: counted, and replaced by another sample."""
  copy = tmp_path / "copy"
  copy.mkdir()
  for path in (prepared / "regions" / "1.0.0").iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  shard = next(p for p in copy.glob("*train*") if p.suffix != ".index")
  data = bytearray(shard.read_bytes())
  data[200] ^= 1
  shard.write_bytes(data)
  bad, split = {}, records.open_split(copy, "train")
  batches = stream(split, 4, max_bad_fraction=0.5, on_bad=bad.__setitem__)
  rows = [next(batches) for _ in range(2)]
  batches.close()
  assert list(bad) == [0] and all(0 not in batch["image_id"] for batch in rows)


def test_images_have_no_regions(tmp_path):
  example = {"image": b"x", "image_id": 0, "filename": "a.jpg", "captions": ["b"]}
  folder = builder.write_dataset(
    tmp_path, "toy", "1.0.0", {"train": [example] * 4}, description="x"
  )
  with pytest.raises(pipeline.DataError, match=r"a.jpg.*prepare_data.py regions"):
    next(stream(records.open_split(folder, "train"), 4))


def config(data_dir, **changes):
  c = tiny.config(data_dir)
  c.model.image = dict(features=shapes.REGION_DIM)
  c.data.regions = shapes.MAX_REGIONS
  return tiny._change(c, changes)


def test_inputs_of_a_model_of_regions(tiny_data):
  inputs = inputs_lib.from_config(config(tiny_data))
  assert inputs.transform is None
  batches = inputs.train(0)
  batch = next(batches)
  batches.close()
  assert batch["regions"].shape == (16, shapes.MAX_REGIONS, shapes.REGION_DIM)
  assert "image" not in batch and (batch["boxes"] <= 1).all() and batch["boxes"].any()
  assert 4 <= batch["region_mask"].sum(1).min() <= batch["region_mask"].sum(1).max() <= 7
  evaluated = list(inputs.images(inputs.split("test")))
  assert sum(b["valid"].sum() for b in evaluated) == tiny.SIZES["test"]
  assert evaluated[0]["regions"].shape[1:] == batch["regions"].shape[1:]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(data__regions=0), "reads regions: set config.data.regions"),
    (dict(data__regions=-1), "config.data.regions is -1"),
    (dict(model__image=dict(size=16)), "0 for one of pixels"),
    (dict(data__flip=0.5), "config.data.flip is 0.5, which changes pixels"),
    (dict(data__crop="random"), "config.data.crop is 'random'"),
    (dict(data__jitter=(0.1, 0.0, 0.0, 0.0)), "config.data.jitter is"),
    (dict(data__rand_augment=(2, 7)), "config.data.rand_augment is"),
    (dict(data__auto_augment="imagenet"), "config.data.auto_augment is"),
    (dict(data__erase=0.1), "config.data.erase is"),
  ],
)
def test_keys_that_do_not_go_together(tiny_data, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    inputs_lib.from_config(config(tiny_data, **changes))


def test_features_of_another_width(tiny_data):
  inputs = inputs_lib.from_config(config(tiny_data, model__image=dict(features=7)))
  message = f"has regions of {shapes.REGION_DIM} numbers, and config.model.image.features is 7"
  with pytest.raises(DatasetError, match=message):
    inputs.split("train")
