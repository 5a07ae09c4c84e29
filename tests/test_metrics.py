"""Ranks by counting against stable sorting, recalls by hand, and errors."""

import subprocess
import sys

import numpy as np
import pytest

from xmodal_jax.evaluation import metrics


def sorted_ranks(scores, caption_image):
  """The definition: position of the first positive in a stable descending sort, query by query."""
  scores = np.asarray(scores, np.float32)
  i2t = [
    np.isin(np.argsort(-row, kind="stable"), np.flatnonzero(caption_image == i)).argmax()
    for i, row in enumerate(scores)
  ]
  t2i = [
    (np.argsort(-column, kind="stable") == caption_image[j]).argmax()
    for j, column in enumerate(scores.T)
  ]
  return i2t, t2i


def random_scores(n_images, n_captions, levels=None, seed=0):
  """Scores [I, T]; with `levels`, so few different values that most scores are tied."""
  scores = np.random.default_rng(seed).standard_normal((n_images, n_captions), np.float32)
  return scores if levels is None else np.floor(scores * levels / 4).astype(np.float32)


def captions_of(n_images, layout, seed=1):
  """caption_image [T]: five captions per image; 1 to 7, adjacent; or 1 to 7 in random columns."""
  if layout == "five":
    return np.repeat(np.arange(n_images), 5)
  rng = np.random.default_rng(seed)
  image = np.repeat(np.arange(n_images), rng.integers(1, 8, n_images))
  return rng.permutation(image) if layout == "scattered" else image


def assert_ranks(scores, caption_image):
  ours, want = metrics.retrieval_ranks(scores, caption_image), sorted_ranks(scores, caption_image)
  np.testing.assert_array_equal(ours[0], want[0])
  np.testing.assert_array_equal(ours[1], want[1])


@pytest.mark.parametrize("layout", ["five", "irregular", "scattered"])
@pytest.mark.parametrize("levels", [None, 20, 2])
def test_counting_is_stable_sorting(layout, levels):
  caption_image = captions_of(60, layout)
  assert_ranks(random_scores(60, len(caption_image), levels), caption_image)


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_more_images_than_one_block_counts(value):
  # 600 equal scores per column: column counts exceed 255, and there are three blocks of rows.
  caption_image = np.arange(600)
  scores = np.full((600, 600), value, np.float32)
  scores[::7, ::3] += 1
  assert_ranks(scores, caption_image)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_compared_as_float32(dtype):
  caption_image = captions_of(30, "irregular")
  scores = random_scores(30, len(caption_image)).astype(dtype)
  if dtype == np.float64:
    scores[:] = 1 + scores * 1e-8  # different in float64, mostly equal in float32
  assert_ranks(scores, caption_image)


def test_strided_scores_and_signed_zeros():
  caption_image = captions_of(30, "five")
  scores = np.asfortranarray(random_scores(60, 150, levels=3))[::2]
  scores[scores == 0] = -0.0
  scores[:, ::2] += 0.0  # -0.0 + 0.0 is 0.0, and equal to -0.0
  assert_ranks(scores, caption_image)


def test_collapsed_model_scores_chance():
  result = metrics.summarise(np.zeros((100, 500), np.float32), captions_of(100, "five"))
  assert result["i2t_r1"] == result["t2i_r1"] == 1.0
  assert (result["i2t_r10"], result["t2i_r10"]) == (2.0, 10.0)
  assert result["t2i_meanr"] == 50.5


def test_recalls_by_hand():
  assert metrics.recalls(np.array([0, 1, 4, 5, 9, 10])) == {
    "r1": 100 / 6,
    "r5": 300 / 6,
    "r10": 500 / 6,
    "medr": 5.0,  # the median of ranks 5 and 6 (from 1), rounded down
    "meanr": 29 / 6 + 1,
  }


def test_summary_sums_both_directions():
  scores, caption_image = random_scores(20, 100), captions_of(20, "five")
  i2t, t2i = metrics.retrieval_ranks(scores, caption_image)
  got, parts = (
    metrics.summarise(scores, caption_image),
    (metrics.recalls(i2t), metrics.recalls(t2i)),
  )
  assert (got["i2t_r5"], got["t2i_r5"]) == (parts[0]["r5"], parts[1]["r5"])
  assert got["rsum"] == pytest.approx(sum(p[f"r{k}"] for p in parts for k in (1, 5, 10)))
  assert got["mean_r"] == pytest.approx(got["rsum"] / 6)
  assert got["mean_r1"] == pytest.approx((parts[0]["r1"] + parts[1]["r1"]) / 2)


@pytest.mark.parametrize("layout", ["irregular", "scattered"])
def test_folds_are_consecutive_images_with_their_captions(layout):
  caption_image = captions_of(40, layout)
  scores = random_scores(40, len(caption_image), levels=10)
  parts = []
  for k in range(4):
    ours = [j for j, i in enumerate(caption_image) if 10 * k <= i < 10 * k + 10]
    block = scores[10 * k : 10 * k + 10][:, ours]
    parts.append(metrics.summarise(block, caption_image[ours] - 10 * k))
  got = metrics.folds(scores, caption_image, 4)
  for name in parts[0]:
    assert got[name] == pytest.approx(np.mean([part[name] for part in parts])), name
  with pytest.raises(ValueError, match="40 images do not make 3 folds"):
    metrics.folds(scores, caption_image, 3)


def test_folds_are_of_the_split_also_without_some_images():
  """An image that was not read makes its own fold smaller, and moves no other image."""
  image_id = np.array([0, 1, 3, 5, 6, 7, 8, 9])  # of 12
  parts = metrics.split_folds(12, np.repeat(np.arange(8), 2), 3, image_id)
  assert [image_id[rows].tolist() for rows, _ in parts] == [[0, 1, 3], [5, 6, 7], [8, 9]]
  assert [columns for _, columns in parts] == [slice(0, 6), slice(6, 12), slice(12, 16)]
  with pytest.raises(ValueError, match="fold 3 of 3 has no image that could be read"):
    metrics.split_folds(12, np.arange(5), 3, image_id[:5])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_raise(bad):
  scores, caption_image = random_scores(300, 300), np.arange(300)
  scores[[3, 299], [7, 8]] = bad
  with pytest.raises(metrics.NonFiniteError, match=r"scores: 2 of 300 rows .*\(rows 3, 299\)"):
    metrics.retrieval_ranks(scores, caption_image)


def test_check_finite_counts_and_names_rows():
  array = np.zeros((600, 4, 3), np.float16)
  metrics.check_finite("image embed", array)
  array[np.arange(256, 600, 20), 1, 2] = np.nan
  want = r"image embed: 18 of 600 rows .*\(rows 256, 276, 296, 316, 336, ...\)"
  with pytest.raises(metrics.NonFiniteError, match=want) as error:
    metrics.check_finite("image embed", array)
  assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
  ("image", "message"),
  [
    ([0, 0, 1, 1], "2 of 4 images have no caption"),
    ([0, 1, 2], "do not fit"),
    ([0, 1, 2, 4], "outside the 4 rows"),
    ([0, 1, 2, -1], "outside the 4 rows"),
  ],
)
def test_wrong_caption_image_raises(image, message):
  with pytest.raises(ValueError, match=message):
    metrics.retrieval_ranks(np.zeros((4, 4), np.float32), np.array(image))


def test_import_is_light():
  code = (
    "import sys, xmodal_jax.evaluation.metrics; "
    "print({'jax', 'tensorflow', 'torch'} & set(sys.modules))"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "set()"
