"""Ranks and recalls against the original CLIP_ITM evaluation (spec clip, section 6)."""

import golden_files
import numpy as np
import pytest

from xmodal_jax.evaluation import metrics

# Names of the golden set -> ours.
RECALLS = {f"{d}_R@{k}": f"{d}_r{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)}
RECALLS |= {"mean_R1": "mean_r1", "rsum": "rsum"}


def case(name):
  scores = golden_files.arrays("clip", "eval", "inputs.npz")[name]
  return scores, np.arange(scores.shape[1]) // 5


def check_recalls(ours, name):
  want = golden_files.arrays("clip", "eval", "outputs.npz")
  atol = golden_files.manifest("clip")["tolerance"]["recalls"]["atol"]
  for theirs, key in RECALLS.items():
    np.testing.assert_allclose(ours[key], want[f"{name}/{theirs}"], rtol=0, atol=atol)


def check_ranks(scores, caption_image, name):
  assert golden_files.manifest("clip")["tolerance"]["ranks"] == "exact"
  want = golden_files.arrays("clip", "eval", "outputs.npz")
  i2t, t2i = metrics.retrieval_ranks(scores, caption_image)
  np.testing.assert_array_equal(i2t + 1, want[f"{name}/i2t_min_rank"])
  np.testing.assert_array_equal(t2i + 1, want[f"{name}/t2i_min_rank"])


@pytest.mark.parametrize("name", ["plain", "coarse_ties", "fp16", "constant"])
def test_ranks_and_recalls(name):
  scores, caption_image = case(name)
  check_ranks(scores, caption_image, name)
  check_recalls(metrics.summarise(scores, caption_image), name)


def test_folds():
  scores, caption_image = case("plain")
  for k in range(5):
    block, image = scores[8 * k : 8 * k + 8, 40 * k : 40 * k + 40], caption_image[:40]
    check_ranks(block, image, f"fold{k}")
    check_recalls(metrics.summarise(block, image), f"fold{k}")
  check_recalls(metrics.folds(scores, caption_image), "fivefold_mean")
