"""HAT's pixels, token ids and splits against values recorded from the original program."""

import json
import math
import re

import golden_files
import hat_golden
import jax.numpy as jnp
import numpy as np
import pytest
from hat_golden import read
from PIL import Image

from tools import prepare_data
from xmodal_jax.data import augment, image, inputs, records, wordpiece
from xmodal_jax.data.preparing.coco import read_coco
from xmodal_jax.models import base, hat

MANIFEST = golden_files.manifest("hat")
CONFIG, CROP = MANIFEST["config"], MANIFEST["train_random_resized_crop"]
LEVELS = MANIFEST["tolerance"]["preprocess_uint8"]["max_abs"]
RECORDED = golden_files.arrays("hat", "preprocess.npz")
MEANING = {k: v["meaning"] for k, v in MANIFEST["arrays"]["preprocess.npz"].items()}
EVALUATED = [
  k for k in RECORDED if k.startswith("raw_") and k.replace("raw_", "eval_uint8_") in RECORDED
]
TRAINED = [k for k in RECORDED if k.startswith("train_uint8_")]


class Pixels(base.System):
  """A system's normalisation of image batches, with HAT's statistics."""

  mean, std = hat.HAT.mean, hat.HAT.std


def transform(name: str) -> image.Transform:
  """The evaluation transform of a recorded image, whose size and description give it.

  The original always resizes to 256 and crops to 224, whatever size the model has.
  """
  resize = re.search(r"Resize\((\d+)\)", MEANING[name])
  return hat_golden.transform(
    int(resize[1]) if resize else CONFIG["eval_resize"], len(RECORDED[name])
  )


def levels(normalised: np.ndarray) -> np.ndarray:
  """Normalised float32 [..., 3, H, W] as recorded -> float64 [..., H, W, 3] from 0 to 255."""
  x = np.moveaxis(normalised, -3, -1).astype(np.float64)
  x = 255 * (x * np.array(Pixels.std) + np.array(Pixels.mean))
  assert abs(x - np.rint(x)).max() < 1e-3  # the original used the same statistics
  return np.rint(x)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
  assert got.dtype == np.uint8 and got.shape == want.shape
  assert abs(got.astype(int) - want).max() <= LEVELS


# ---------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_transform(name):
  want = name.replace("raw_", "eval_uint8_")
  assert_close(image.load(RECORDED[name], transform(want)), RECORDED[want])


@pytest.mark.parametrize("name", [k for k in RECORDED if k.startswith("eval_float_")])
def test_normalised_pixels(name):
  """Starts from the recorded uint8 image, so that only the normalisation is compared."""
  first, last = map(int, re.search(r"rows and columns (\d+)\.\.(\d+)", MEANING[name]).groups())
  part = slice(first, last + 1)
  source = RECORDED[name.replace("float", "uint8")]
  got = np.asarray(Pixels().pixels(jnp.asarray(source[None])))[0, part, part]
  np.testing.assert_allclose(got.transpose(2, 0, 1), RECORDED[name], rtol=1e-5, atol=1e-5)
  levels(RECORDED[name])


class Replay:
  """A random generator that returns given draws and checks the calls that request them."""

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
def test_training_transform(name):
  """With the draws that give the recorded box and flip."""
  k = int(name.rpartition("_")[2])
  source = Image.fromarray(RECORDED[re.search(r"raw_\w+", MEANING[name])[0]])
  top, left, height, width = map(int, RECORDED["train_crop_params"][k])
  area = source.width * source.height
  rng = Replay(
    [
      ("uniform", tuple(CROP["scale"]), width * height / area),
      ("uniform", tuple(map(math.log, CROP["ratio"])), math.log(width / height)),
      ("integers", (source.height - height + 1,), top),
      ("integers", (source.width - width + 1,), left),
      ("random", (), 0.0 if RECORDED["train_flip"][k] else CROP["flip_p"]),
    ]
  )
  size = CROP["size"][0]
  assert CROP["size"] == [size, size]
  how = dict(crop="random", crop_scale=CROP["scale"], crop_ratio=CROP["ratio"])
  crop = hat_golden.transform(CONFIG["eval_resize"], size)
  got = augment.build(crop, **how, flip=CROP["flip_p"])(source, rng)
  assert not rng.draws
  assert_close(got, RECORDED[name])


def test_every_draw_is_covered():
  assert len(TRAINED) == len(RECORDED["train_flip"]) == len(RECORDED["train_crop_params"]) > 0


# ---------------------------------------------------------------------------------------- captions


@pytest.fixture(scope="module")
def tokenizer():
  return wordpiece.BertTokenizer(
    hat_golden.vocab(), lowercase=read("captions.json")["do_lower_case"]
  )


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
  if not long:
    pytest.skip(f"no caption of this set has more than {length} pieces")


# -------------------------------------------------------------------------------------- Flickr30K


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
  folder = hat_golden.prepared(tmp_path_factory.mktemp("f30k"))
  return inputs.from_config(hat_golden.run_config(folder))


def joined(batches) -> dict[str, np.ndarray]:
  """The valid rows of all batches."""
  batches = list(batches)
  valid = np.concatenate([b["valid"] for b in batches])
  return {k: np.concatenate([b[k] for b in batches])[valid] for k in batches[0]}


@pytest.mark.parametrize("name", list(read("data", "expected_items.json")["flickr"]))
def test_flickr_items(flickr, name):
  """Captions in the order of the file, each with its image and its ids."""
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
  owner = np.repeat(np.arange(len(split)), [len(r.captions) for r in split])
  np.testing.assert_array_equal(batch["image_id"], owner)


def test_end_to_end_batches(flickr):
  want = golden_files.arrays("hat", "e2e_inputs.npz")
  images = joined(flickr.images(flickr.split("test")))["image"]
  evaluated = hat_golden.transform(*hat_golden.evaluation_sizes())
  for k, got in enumerate(images):
    assert_close(got, image.load(want[f"test_image_{k}"], evaluated).astype(int))
  assert_close(images[: len(want["test_pixels"])], levels(want["test_pixels"]))
  texts = joined(flickr.texts(flickr.split("test")))
  np.testing.assert_array_equal(texts["text_ids"], want["test_text_ids"])
  np.testing.assert_array_equal(texts["text_mask"], want["test_text_masks"])
  lengths = golden_files.arrays("hat", "evaluation.npz")["e2e/lengths"]
  np.testing.assert_array_equal(texts["text_mask"].sum(1), lengths)


def test_collated_captions(flickr):
  """The original sorts a batch by length, which changes no loss; ours keeps the order."""
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
  """Writes the recorded COCO files and made-up images; -> arguments of prepare_data."""
  root, case = tmp_path_factory.mktemp("coco"), read("data", "coco_fixture.json")
  (root / "annotations").mkdir()
  for part in ("train2014", "val2014"):
    data = case[f"captions_{part}"]
    (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(data))
    (root / "images" / part).mkdir(parents=True)
    for item in data["images"]:
      pixels = np.full((4, 4, 3), item["id"] % 256, np.uint8)
      Image.fromarray(pixels).save(root / "images" / part / item["file_name"], "PNG")
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
  paths = {p.image_id: p.path for split in read_coco(coco[1], coco[3]).values() for p in split}
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
  """The original trains without restval, which is a split of its own here."""
  ids = read("data", "coco_fixture.json")["ids"]
  kept = -(-len(ids["coco_dev_ids"]) // 2)
  short = ("coco", *coco, "--name", "short", "--dev_captions", kept)
  prepare_data.main([str(a) for a in short])
  of = lambda name: [i for _, i, _ in in_list_order(records.open_split(coco[5] / "short", name))]
  assert of("restval") == ids["coco_restval_ids"]
  assert of("val") == ids["coco_dev_ids"][:kept]
  assert of("train") == ids["coco_train_ids"] and of("test") == ids["coco_test_ids"]
  with pytest.raises(SystemExit, match="dev_captions 0: expected 1 or more"):
    prepare_data.main([str(a) for a in (*short[:-1], 0, "--overwrite")])


def test_coco_images_of_one_folder_come_first(coco, tmp_path):
  """An image beside the folders train2014 and val2014 is preferred to one inside them."""
  annotations, images = coco[1], coco[3]
  flat = read_coco(annotations, tmp_path)
  assert {p.path.parent for split in flat.values() for p in split} == {tmp_path}
  item = read("data", "coco_fixture.json")["captions_val2014"]["images"][0]
  for part in ("train2014", "val2014"):
    (tmp_path / part).mkdir()
  bytes_ = (images / "val2014" / item["file_name"]).read_bytes()
  (tmp_path / item["file_name"]).write_bytes(bytes_)
  both = read_coco(annotations, tmp_path)
  paths = {p.image_id: p.path for split in both.values() for p in split}
  assert paths.pop(item["id"]) == tmp_path / item["file_name"]
  assert tmp_path not in {path.parent for path in paths.values()}
