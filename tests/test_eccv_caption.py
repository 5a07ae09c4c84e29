"""The COCO protocol against the published eccv_caption package, and its parts by hand."""

import gzip
import json

import numpy as np
import pytest

from xmodal_jax.evaluation import coco as coco_lib
from xmodal_jax.evaluation import metrics


def test_precision_at_r_by_hand():
  # Candidates in order: 2, 0, 1, 3 (a tie of 0 and 1). R = 3; one positive is no candidate.
  rows = np.array([[0.5, 0.5, 0.9, 0.1], [0.1, 0.9, 0.8, 0.7]])
  positives = coco_lib.Positives(
    np.array([0, 1]), np.array([3, 1]), np.array([0, 0, 1]), np.array([2, 1, 0])
  )
  got = coco_lib.precision_at_r(rows, positives)
  assert (got["r1"], got["r5"]) == (50.0, 100.0)
  assert got["rprecision"] == pytest.approx(100 * (2 / 3 + 0) / 2)
  assert got["map_at_r"] == pytest.approx(100 * ((1 + 0 + 2 / 3) / 3 + 0) / 2)


def test_read_positives(tmp_path):
  (tmp_path / "plain.json").write_text(json.dumps({"30": [5, 7, 7], "10": ["6", 99]}))
  (tmp_path / "packed.json.gz").write_bytes(gzip.compress(b'{"20": [6]}'))
  got = coco_lib.read_positives(tmp_path, "plain", [10, 20, 30], [5, 6, 7])
  assert got.query.tolist() == [2, 0]
  assert got.total.tolist() == [2, 2]  # duplicates count once; 99 is no candidate but counts
  assert sorted(zip(got.pair.tolist(), got.item.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 1)]
  packed = coco_lib.read_positives(tmp_path, "packed", [10, 20, 30], [5, 6, 7])
  assert (packed.query.tolist(), packed.item.tolist()) == ([1], [1])
  with pytest.raises(ValueError, match=r"plain: 1 of 2 queries .*\(ids \[30\]\)"):
    coco_lib.read_positives(tmp_path, "plain", [10, 20], [5])


@pytest.fixture(scope="module")
def coco(shared_data):
  """Ids of the COCO 5K test split in order, and scores with ties of a random model of rank 16."""
  folder = shared_data / "coco_splits"
  packed = (folder / "dataset_coco_karpathy_test5k.json.gz").read_bytes()
  images = json.loads(gzip.decompress(packed))["images"]
  image_ids = np.array([image["cocoid"] for image in images])
  caption_ids = np.array([image["sentids"] for image in images])
  caption_image = np.repeat(np.arange(len(images)), 5)
  rng = np.random.default_rng(0)
  image = rng.standard_normal((len(images), 16), np.float32)
  caption = image[caption_image] + 0.7 * rng.standard_normal((len(caption_image), 16), np.float32)
  # Multiples of 1/8, as from a narrow float type: most scores are tied.
  scores = np.rint(8 * image @ caption.T) / 8
  return scores, image_ids, caption_ids.ravel(), caption_image, folder / "eccv_caption"


@pytest.mark.full
def test_coco_protocol_is_that_of_the_package(coco):
  package = pytest.importorskip("eccv_caption")
  scores, image_ids, caption_ids, _, _ = coco
  # The package takes a sorted list of all candidates (2 GB of Python integers, minutes), but reads
  # only the first 48; the 1K folds are compared with the golden vectors instead.
  depth = 48
  # Multiples of 1/8 are small integers, which sort ten times faster.
  order = lambda row: np.argsort((-8 * row).astype(np.int16), kind="stable")[:depth]
  i2t = {int(q): caption_ids[order(row)].tolist() for q, row in zip(image_ids, scores, strict=True)}
  t2i = {
    int(q): image_ids[order(row)].tolist()
    for q, row in zip(caption_ids, np.ascontiguousarray(scores.T), strict=True)
  }
  theirs = package.Metrics().compute_all_metrics(
    i2t,
    t2i,
    target_metrics=("coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_r1"),
  )
  theirs |= package.Metrics().eccv_metrics({"i2t": i2t, "t2i": t2i}, "all")
  ours = coco_lib.coco_protocol(*coco)
  assert len(theirs) == 9
  for name, directions in theirs.items():
    dataset, key = name.rsplit("_r", 1) if "map" not in name else ("eccv", "map_at_r")
    key = key if "map" in key else "r" + key
    for direction, value in directions.items():
      # Equal up to rounding of a float64 mean.
      want = pytest.approx(100 * value, rel=1e-12)
      assert ours[f"{dataset}_{direction}_{key}"] == want, (name, direction)
      assert 0 < value < 1, f"{name} cannot tell right from wrong"


def test_coco_protocol_has_all_parts(coco):
  scores, image_ids, caption_ids, caption_image, folder = coco
  result = coco_lib.coco_protocol(*coco)
  for key, value in metrics.summarise(scores, caption_image).items():
    assert result[f"coco_5k_{key}"] == value
  assert {"cxc_rsum", "cxc_i2t_r10", "eccv_i2t_r1", "eccv_t2i_rprecision"} <= set(result)
  with pytest.raises(ValueError, match="caption ids"):
    coco_lib.coco_protocol(scores, image_ids, caption_ids[:-1], caption_image, folder)
