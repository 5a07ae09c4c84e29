"""Ranks and recalls against the original CLIP_ITM evaluation (spec clip, section 6)."""

import re

import clip_golden
import compare_golden
import golden_files
import numpy as np
import pytest

from xmodal_jax.evaluation import metrics

SCORES = golden_files.arrays("clip", "eval", "inputs.npz")
RECORDED = golden_files.arrays("clip", "eval", "outputs.npz")
RECALLS = golden_files.manifest("clip")["tolerance"]["recalls"]
# Ties go to the lower index in the original as in ours, unless the manifest does not say so.
STABLE = "stable" in golden_files.manifest("clip")["eval"].get("note", "")

# Names of the golden set -> ours.
NAMES = {f"{d}_R@{k}": f"{d}_r{k}" for d in ("i2t", "t2i") for k in metrics.RECALL_AT}
NAMES |= {"mean_R1": "mean_r1", "rsum": "rsum"}


def check(scores, owner, name):
  clip_golden.check_retrieval(scores, owner, RECORDED, name, scores, rounded=False)
  if STABLE:
    for side, ours in zip(("i2t", "t2i"), metrics.retrieval_ranks(scores, owner), strict=True):
      np.testing.assert_array_equal(ours + 1, RECORDED[f"{name}/{side}_min_rank"])
    check_report(metrics.summarise(scores, owner), name)


def check_report(ours, name):
  for theirs, key in NAMES.items():
    np.testing.assert_allclose(ours[key], RECORDED[f"{name}/{theirs}"], rtol=0, **RECALLS)


@pytest.mark.parametrize("name", SCORES)
def test_ranks_and_recalls(name):
  check(SCORES[name], compare_golden.owners(SCORES[name]), name)


def test_folds():
  """Consecutive diagonal blocks of the matrix "plain", as many as were recorded, and their mean."""
  scores = SCORES["plain"]
  owner = compare_golden.owners(scores)
  folds = sorted(int(f[1]) for k in RECORDED if (f := re.fullmatch(r"fold(\d+)/i2t_min_rank", k)))
  assert folds == list(range(len(folds))) and folds
  start, ours = 0, []
  for k in folds:
    end = start + len(RECORDED[f"fold{k}/i2t_min_rank"])
    captions = np.flatnonzero((owner >= start) & (owner < end))
    block, block_owner = scores[start:end, captions], owner[captions] - start
    check(block, block_owner, f"fold{k}")
    ours.append(metrics.summarise(block, block_owner))
    start = end
  assert start == len(scores)
  mean = metrics.folds(scores, owner, len(folds))
  assert mean == pytest.approx(metrics.average(ours))
  if STABLE:
    check_report(mean, "fivefold_mean")
  for name in NAMES:  # the recorded mean is that of the recorded folds
    each = [RECORDED[f"fold{k}/{name}"] for k in folds]
    np.testing.assert_allclose(np.mean(each), RECORDED[f"fivefold_mean/{name}"], rtol=0, **RECALLS)
