"""HAT's pictures, token ids and splits against values recorded from the published program."""

import json
import math
import pathlib
import re

import golden_files
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from tools import prepare_data
from xmodal_jax.data import augment, image, inputs, records, wordpiece
from xmodal_jax.data.preparing import sources
from xmodal_jax.models import base, hat

MANIFEST = golden_files.manifest("hat")
CONFIG, CROP = MANIFEST["config"], MANIFEST["train_random_resized_crop"]
LEVELS = MANIFEST["tolerance"]["preprocess_uint8"]["max_abs"]
INTERPOLATION = CROP["interpolation"].rpartition(".")[2].lower()
PICTURES = golden_files.arrays("hat", "preprocess.npz")
MEANING = {k: v["meaning"] for k, v in MANIFEST["arrays"]["preprocess.npz"].items()}
TRAINED = [k for k in PICTURES if k.startswith("train_uint8_")]


class Pixels(base.System):
  """What every system does with a batch of pictures, with HAT's statistics."""

  mean, std = hat.HAT.mean, hat.HAT.std


def read(*parts: str) -> dict:
  return json.loads(golden_files.path("hat", *parts).read_text(encoding="utf-8"))


def transform() -> image.Transform:
  return image.Transform(CONFIG["eval_resize"], CONFIG["eval_crop"], interpolation=INTERPOLATION)


def levels(normalised: np.ndarray) -> np.ndarray:
  """float32 [..., 3, H, W] of the published program -> float64 [..., H, W, 3] from 0 to 255."""
  x = np.moveaxis(normalised, -3, -1).astype(np.float64)
  x = 255 * (x * np.array(Pixels.std) + np.array(Pixels.mean))
  assert abs(x - np.rint(x)).max() < 1e-3  # these are the statistics it normalised with
  return np.rint(x)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
  assert got.dtype == np.uint8 and got.shape == want.shape
  assert abs(got.astype(int) - want).max() <= LEVELS


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", [k for k in PICTURES if k.startswith("raw_")])
def test_evaluation_transform(name):
  got = image.load(PICTURES[name], transform())
  assert_close(got, PICTURES[name.replace("raw_", "eval_uint8_")])


@pytest.mark.parametrize("name", [k for k in PICTURES if k.startswith("eval_float_")])
def test_normalised_pixels(name):
  """Of the recorded picture, so that only the normalisation is compared; it is the device's."""
  first, last = map(int, re.search(r"rows and columns (\d+)\.\.(\d+)", MEANING[name]).groups())
  part = slice(first, last + 1)
  picture = PICTURES[name.replace("float", "uint8")]
  got = np.asarray(Pixels().pixels(jnp.asarray(picture[None])))[0, part, part]
  np.testing.assert_allclose(got.transpose(2, 0, 1), PICTURES[name], rtol=1e-5, atol=1e-5)
  levels(PICTURES[name])


class Replay:
  """A generator that must be asked for what it was given, in that order."""

  def __init__(self, draws: list[tuple[str, tuple, float]]):
    self.draws = draws

  def _next(self, name: str, *args: float) -> float:
    want_name, want_args, value = self.draws.pop(0)
    assert name == want_name and args == pytest.approx(want_args)
    return value

  def uniform(self, low: float, high: float) -> float:
    return self._next("uniform", low, high)

  def integers(self, bound: int) -> int:
    assert 0 <= self.draws[0][2] < bound
    return int(self._next("integers", bound))

  def random(self) -> float:
    return self._next("random")


@pytest.mark.parametrize("name", TRAINED)
def test_training_pictures(name):
  """With the draws that lead to the recorded box, and flipped where that was."""
  k = int(name.rpartition("_")[2])
  picture = Image.fromarray(PICTURES[re.search(r"raw_\w+", MEANING[name])[0]])
  top, left, height, width = map(int, PICTURES["train_crop_params"][k])
  area = picture.width * picture.height
  rng = Replay(
    [
      ("uniform", tuple(CROP["scale"]), width * height / area),
      ("uniform", tuple(map(math.log, CROP["ratio"])), math.log(width / height)),
      ("integers", (picture.height - height + 1,), top),
      ("integers", (picture.width - width + 1,), left),
      ("random", (), 0.0 if PICTURES["train_flip"][k] else CROP["flip_p"]),
    ]
  )
  size = CROP["size"][0]
  assert CROP["size"] == [size, size] and size == CONFIG["eval_crop"]
  how = dict(crop="random", crop_scale=CROP["scale"], crop_ratio=CROP["ratio"])
  got = augment.build(transform(), **how, flip=CROP["flip_p"])(picture, rng)
  assert not rng.draws
  assert_close(got, PICTURES[name])


def test_every_draw_is_covered():
  assert len(TRAINED) == len(PICTURES["train_flip"]) == len(PICTURES["train_crop_params"]) > 0


# ---------------------------------------------------------------------------------------- captions


def vocab() -> pathlib.Path:
  return golden_files.path("hat", *read("captions.json")["vocab"].split("/"))


@pytest.fixture(scope="module")
def tokenizer():
  return wordpiece.BertTokenizer(vocab(), lowercase=read("captions.json")["do_lower_case"])


def test_token_ids(tokenizer):
  cases, length = read("captions.json")["captions"], read("captions.json")["max_text_len"]
  assert length == CONFIG["max_text_len"]
  ids, mask = tokenizer([c["raw"] for c in cases], length)
  np.testing.assert_array_equal(ids, [c["ids"] for c in cases])
  np.testing.assert_array_equal(mask, [c["mask"] for c in cases])
  for row, found, case in zip(ids, mask, cases, strict=True):
    assert tokenizer.pieces(row[found]) == case["tokens"], case["raw"]


def test_long_captions_keep_their_first_pieces(tokenizer):
  length, long = CONFIG["max_text_len"], 0
  for case in read("captions.json")["captions"]:
    inner = tokenizer.encode(case["raw"])
    long += len(inner) > length - 2
    kept = [tokenizer.cls_id, *inner[: length - 2], tokenizer.sep_id]
    assert case["ids"] == kept + [tokenizer.pad_id] * (length - len(kept)), case["raw"]
  assert long


# -------------------------------------------------------------------------------------- Flickr30K


def prepared(tmp_path: pathlib.Path) -> str:
  """Writes the recorded end-to-end data set as a user prepares Flickr30K; -> config.data.dir.

  Pictures of "test" are the recorded ones; of "train" and "val" none are, so those are grey.
  """
  annotations, images = golden_files.path("hat", "data", "dataset_flickr30k.json"), tmp_path / "in"
  images.mkdir()
  recorded = golden_files.arrays("hat", "e2e_inputs.npz")
  tests = 0
  for item in json.loads(annotations.read_text())["images"]:
    picture = np.full((8, 8, 3), 128, np.uint8)
    if item["split"] == "test":
      picture, tests = recorded[f"test_image_{tests}"], tests + 1
    Image.fromarray(picture).save(images / item["filename"], "PNG")
  assert tests == sum(k.startswith("test_image_") for k in recorded)
  where = ("--annotations", annotations, "--images", images, "--out", tmp_path)
  prepare_data.main([str(a) for a in ("karpathy", *where, "--name", "f30k")])
  return str(tmp_path / "f30k")


def config(data_dir: str):
  """What of a run's config says how pictures and captions are read."""
  keep = {"size": CONFIG["eval_resize"], "interpolation": INTERPOLATION, "rgb_first": True}
  c = tiny.config(data_dir, text__tokenizer="bert", text__max_merges=0, text__vocab=str(vocab()))
  c.data.image.update(keep)
  c.model.image.size = CONFIG["eval_crop"]
  c.model.text.vocab = CONFIG["bert"]["vocab_size"]
  c.text.length = CONFIG["max_text_len"]
  return c


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
  return inputs.Inputs(config(prepared(tmp_path_factory.mktemp("f30k"))))


def joined(batches) -> dict[str, np.ndarray]:
  """The valid rows of all batches."""
  batches = list(batches)
  valid = np.concatenate([b["valid"] for b in batches])
  return {k: np.concatenate([b[k] for b in batches])[valid] for k in batches[0]}


@pytest.mark.parametrize("name", list(read("data", "expected_items.json")["flickr"]))
def test_flickr_items(flickr, name):
  """Captions in the order of the file, each with its picture and its ids."""
  want = read("data", "expected_items.json")["flickr"][name]
  source = read("data", "dataset_flickr30k.json")["images"]
  split = flickr.split(name)
  rows = [(r, i, text) for r in split for i, text in zip(r.caption_ids, r.captions, strict=True)]
  for i, ((record, caption_id, text), item) in enumerate(zip(rows, want, strict=True)):
    entry = source[item["image_position_in_json"]]
    sentence = entry["sentences"][item["sentence"]]
    assert i == item["index"] and record.filename == item["filename"] == entry["filename"]
    assert (text, caption_id) == (sentence["raw"], sentence["sentid"])
  batch = joined(flickr.texts(split))
  np.testing.assert_array_equal(batch["caption_id"], [item["index"] for item in want])
  np.testing.assert_array_equal(batch["text_ids"], [item["text_ids"] for item in want])
  # Pair 5 k + j is caption j of the k-th picture.
  per = len(want) // len(split)
  np.testing.assert_array_equal(batch["image_id"], np.arange(len(want)) // per)


def test_end_to_end_batches(flickr):
  want = golden_files.arrays("hat", "e2e_inputs.npz")
  pictures = joined(flickr.images(flickr.split("test")))["image"]
  for k, picture in enumerate(pictures):
    assert_close(picture, image.load(want[f"test_image_{k}"], transform()).astype(int))
  assert_close(pictures[: len(want["test_pixels"])], levels(want["test_pixels"]))
  texts = joined(flickr.texts(flickr.split("test")))
  np.testing.assert_array_equal(texts["text_ids"], want["test_text_ids"])
  np.testing.assert_array_equal(texts["text_mask"], want["test_text_masks"])
  lengths = golden_files.arrays("hat", "evaluation.npz")["e2e/lengths"]
  np.testing.assert_array_equal(texts["text_mask"].sum(1), lengths)


def test_collated_captions(flickr):
  """The published program sorts a batch by length, which changes no loss; ours keeps the order."""
  case = read("data", "expected_items.json")["collate_example"]
  lengths = joined(flickr.texts(flickr.split("test")))["text_mask"].sum(1)
  lengths = lengths[: len(case["input_lengths"])]
  np.testing.assert_array_equal(lengths, case["input_lengths"])
  order = np.argsort(-lengths, kind="stable")
  np.testing.assert_array_equal(order, case["ids_after_sort"])
  np.testing.assert_array_equal(lengths[order], case["lengths_after_sort"])


# -------------------------------------------------------------------------------------------- COCO


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> tuple:
  """The fixture as files, with a picture for each image in its folder; -> arguments."""
  root, case = tmp_path_factory.mktemp("coco"), read("data", "coco_fixture.json")
  (root / "annotations").mkdir()
  for part in ("train2014", "val2014"):
    data = case[f"captions_{part}"]
    (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(data))
    (root / "images" / part).mkdir(parents=True)
    for item in data["images"]:
      picture = np.full((4, 4, 3), item["id"] % 256, np.uint8)
      Image.fromarray(picture).save(root / "images" / part / item["file_name"], "PNG")
  for name, ids in case["ids"].items():
    np.save(root / "annotations" / f"{name}.npy", np.array(ids))
  return ("--annotations", root / "annotations", "--images", root / "images", "--out", root / "out")


def in_list_order(split: records.Split) -> list[tuple]:
  """(record, caption id, caption) in the order of the id list."""
  rows = [(r, i, text) for r in split for i, text in zip(r.caption_ids, r.captions, strict=True)]
  return [rows[i] for i in np.argsort(split.caption_positions)]


def test_coco_items(coco, tokenizer):
  ids, length = read("data", "coco_fixture.json")["ids"], CONFIG["max_text_len"]
  prepare_data.main([str(a) for a in ("coco", *coco, "--dev_captions", 5000)])
  paths = {
    p.image_id: p.path for split in sources.read_coco(coco[1], coco[3]).values() for p in split
  }
  for name, want in read("data", "expected_items.json")["coco"].items():
    found = in_list_order(records.open_split(coco[5] / "coco", name))
    stem = {"val": "dev"}.get(name, name)
    assert [caption_id for _, caption_id, _ in found] == ids[f"coco_{stem}_ids"][: len(want)]
    for i, ((record, _, text), item) in enumerate(zip(found, want, strict=True)):
      assert i == item["index"] and text == item["caption"]
      assert (record.image_id, record.filename) == (item["image_id"], item["file_name"])
      folder = item["image_folder"]
      assert paths[record.image_id] == coco[3] / folder / item["file_name"]
      assert record.image == paths[record.image_id].read_bytes()
    got, _ = tokenizer([text for _, _, text in found], length)
    np.testing.assert_array_equal(got, [item["text_ids"] for item in want])


def test_coco_restval_and_the_first_of_dev(coco):
  """The published program trains without restval, which is a split of its own here."""
  ids = read("data", "coco_fixture.json")["ids"]
  kept = len(ids["coco_dev_ids"]) // 2
  short = ("coco", *coco, "--name", "short", "--dev_captions", kept)
  prepare_data.main([str(a) for a in short])
  of = lambda name: [i for _, i, _ in in_list_order(records.open_split(coco[5] / "short", name))]
  assert of("restval") == ids["coco_restval_ids"]
  assert of("val") == ids["coco_dev_ids"][:kept]
  assert of("train") == ids["coco_train_ids"] and of("test") == ids["coco_test_ids"]
  with pytest.raises(SystemExit, match="dev_captions 0: expected 1 or more"):
    prepare_data.main([str(a) for a in (*short[:-1], 0, "--overwrite")])


def test_coco_pictures_of_one_folder_come_first(coco, tmp_path):
  """As before the folders train2014 and val2014 were looked into."""
  annotations, images = coco[1], coco[3]
  flat = sources.read_coco(annotations, tmp_path)
  assert {p.path.parent for split in flat.values() for p in split} == {tmp_path}
  item = read("data", "coco_fixture.json")["captions_val2014"]["images"][0]
  for part in ("train2014", "val2014"):
    (tmp_path / part).mkdir()
  bytes_ = (images / "val2014" / item["file_name"]).read_bytes()
  (tmp_path / item["file_name"]).write_bytes(bytes_)
  both = sources.read_coco(annotations, tmp_path)
  paths = {p.image_id: p.path for split in both.values() for p in split}
  assert paths.pop(item["id"]) == tmp_path / item["file_name"]
  assert tmp_path not in {path.parent for path in paths.values()}
