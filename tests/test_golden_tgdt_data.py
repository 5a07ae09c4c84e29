"""TGDT's region features, annotations, batches and token ids against the published program's."""

import json

import golden_files
import numpy as np
import pytest

from tools import prepare_data
from xmodal_jax.data import pipeline, records, wordpiece
from xmodal_jax.data.preparing import detections

MANIFEST = golden_files.manifest("tgdt")
INPUTS = golden_files.arrays("tgdt", "inputs.npz")
GOLDENS = json.loads(golden_files.path("tgdt", "goldens.json").read_text())
VOCAB = golden_files.path("tgdt", "bert_vocab.txt")


def write_folder(root, images: dict) -> None:
  """images: id -> (features [R, F], boxes [R, 4]), as the published folders have them."""
  for name in ("bu_att", "bu_box"):
    (root / name).mkdir(parents=True)
  for key, (features, boxes) in images.items():
    np.savez(root / "bu_att" / f"{key}.npz", feat=features)
    np.save(root / "bu_box" / f"{key}.npy", boxes)


def image(i: int) -> tuple[np.ndarray, np.ndarray]:
  n = INPUTS["n_regions"][i]
  return INPUTS["feats"][i, :n], INPUTS["boxes_px"][i, :n]


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
  """The dataset written from folders of the golden arrays."""
  root = tmp_path_factory.mktemp("flickr")
  write_folder(root / "features_36", {i: image(i) for i in range(len(INPUTS["feats"]))})
  (root / "sizes.json").write_text(json.dumps(INPUTS["image_wh"].tolist()))
  where = ["--annotations", golden_files.path("tgdt", "dataset_flickr30k.json")]
  where += ["--features", root / "features_36", "--sizes", root / "sizes.json", "--out", root]
  prepare_data.main([str(a) for a in ("regions", *where)])
  return root / "regions"


def captions_of(split: str) -> list[dict]:
  return [c for c in GOLDENS["captions"] if c["split"] == split]


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_splits_and_their_order(flickr, name):
  split, want = records.open_split(flickr, name), captions_of(name)
  sizes = MANIFEST["sizes"]["train/val/test images"]
  assert len(split) == sizes[("train", "val", "test").index(name)]
  rows = [(r, text) for r in split for text in r.captions]
  assert [text for _, text in rows] == [c["caption"] for c in want]
  for (record, _), caption in zip(rows, want, strict=True):
    features, boxes = image(caption["img_id"])
    np.testing.assert_array_equal(record.regions, features)
    np.testing.assert_array_equal(record.boxes, boxes)
    assert record.size == tuple(INPUTS["image_wh"][caption["img_id"]])


def test_batch_is_that_of_the_published_program(flickr):
  """Bit by bit, without the empty region in front, which the model adds."""
  want = {
    k: INPUTS[f"batch_{k}"] for k in ("features", "boxes", "feat_len", "token_ids", "cap_len")
  }
  samples = np.array(GOLDENS["batch_train_indices"])
  count = want["features"].shape[1] - 1
  stream = pipeline.train_batches(
    records.open_split(flickr, "train"),
    batch_size=len(samples),
    image_transform=None,
    tokenizer=wordpiece.BertTokenizer(VOCAB),
    text_length=want["token_ids"].shape[1],
    truncate=False,
    regions=pipeline.Regions(count, want["features"].shape[2]),
    order=lambda epoch: samples,
    seed=0,
  )
  batch = next(stream)
  stream.close()
  np.testing.assert_array_equal(batch["regions"], want["features"][:, 1:])
  np.testing.assert_array_equal(batch["boxes"], want["boxes"][:, 1:])
  assert (batch["regions"].dtype, batch["boxes"].dtype) == (np.float32, np.float32)
  mask = np.arange(count) < want["feat_len"][:, None] - 1
  np.testing.assert_array_equal(batch["region_mask"], mask)
  np.testing.assert_array_equal(batch["text_ids"], want["token_ids"])
  np.testing.assert_array_equal(batch["text_mask"].sum(1), want["cap_len"])
  np.testing.assert_array_equal(batch["caption_id"], samples)
  assert not want["features"][:, 0].any() and not want["boxes"][:, 0].any()  # what the model adds


@pytest.mark.parametrize("key", ["captions", "tokenizer_cases"])
def test_token_ids(key):
  cases = GOLDENS[key]
  length = max(len(c["ids"]) for c in cases)
  ids, mask = wordpiece.BertTokenizer(VOCAB)([c["caption"] for c in cases], length)
  for row, found, case in zip(ids, mask, cases, strict=True):
    assert row[found].tolist() == case["ids"], case["caption"]
    assert not row[~found].any()


def test_table_of_bottom_up_attention():
  reader = detections.open_reader([golden_files.path("tgdt", "bottom_up.tsv.txt")])
  assert reader.ids
  for key in reader.ids:
    found, (features, boxes) = reader.read(key), image(int(key))
    np.testing.assert_array_equal(found.features, features)
    np.testing.assert_array_equal(found.boxes, boxes)
    assert found.size == tuple(INPUTS["image_wh"][int(key)])


def test_coco_id_lists(tmp_path):
  """Captions, images and sizes in the order of the published loader, restval after train."""
  case = GOLDENS["coco_loader"]
  folder = tmp_path / "annotations"
  folder.mkdir()
  for part in ("train", "val"):
    (folder / f"captions_{part}2014.json").write_text(json.dumps(case[f"captions_{part}2014"]))
  for part in ("train", "dev", "test", "restval"):
    np.save(folder / f"coco_{part}_ids.npy", np.array(case[f"coco_{part}_ids"]))
  column = {name: i for i, name in enumerate(case["items_columns"])}
  images, sizes = {}, {}
  for items in case["items"].values():
    for row in items:
      width, height = sizes[row[column["image_id"]]] = row[column["[width,height]"]]
      box = np.array([[0, 0, width, height]], np.float32)
      images[row[column["image_id"]]] = np.full((1, 3), row[column["image_id"]], np.float32), box
  write_folder(tmp_path / "features", images)
  where = ("--annotations", folder, "--features", tmp_path / "features", "--out", tmp_path)
  prepare_data.main([str(a) for a in ("regions", *where)])
  for name, items in case["items"].items():
    split = records.open_split(tmp_path / "regions", {"train": "train+restval"}.get(name, name))
    found = [
      (caption_id, record, caption)
      for record in split
      for caption_id, caption in zip(record.caption_ids, record.captions, strict=True)
    ]
    found = [found[i] for i in np.argsort(split.caption_positions)]
    assert len(found) == len(items)
    for (caption_id, record, caption), row in zip(found, items, strict=True):
      assert caption_id == row[column["ann_id"]] and caption == row[column["caption"]]
      assert record.image_id == row[column["image_id"]] == record.regions[0, 0]
      assert list(record.size) == row[column["[width,height]"]]
  # Of the validation captions the published loader takes only the first ones.
  kept = -(-len(case["items"]["val"]) // 2)
  short = ("regions", *where, "--name", "short", "--dev_captions", kept)
  prepare_data.main([str(a) for a in short])
  split = records.open_split(tmp_path / "short", "val")
  found = [i for record in split for i in record.caption_ids]
  assert sorted(found) == sorted(case["coco_dev_ids"][:kept])
