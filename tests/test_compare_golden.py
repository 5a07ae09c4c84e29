"""The comparisons of the golden tests accept what ties and rounding explain, and nothing else."""

import compare_golden
import numpy as np
import pytest

# Captions 1 and 2 belong to images 0 and 1 and are the same text.
SCORES = np.array([[0.1, 0.9, 0.9, 0.2], [0.3, 0.5, 0.5, 0.4]], np.float32)
OWNER = np.array([0, 0, 1, 1])


def test_rank_bounds():
  bounds = compare_golden.rank_bounds(SCORES, OWNER)
  np.testing.assert_array_equal(bounds["i2t"], [[0, 0], [1, 1]])
  np.testing.assert_array_equal(bounds["t2i"], [[1, 0, 1, 0], [1, 0, 1, 0]])
  almost = SCORES + np.array([0, 1e-7, 0, 0], np.float32)
  for rounded, want in ((True, [[0, 0], [1, 1]]), (False, [[0, 1], [0, 1]])):
    found = compare_golden.rank_bounds(almost, OWNER, rounded)["i2t"]
    np.testing.assert_array_equal(found, want)


def test_ranks_within_ties():
  low, high = compare_golden.rank_bounds(SCORES, OWNER)["i2t"]
  compare_golden.check_ranks(np.array([0, 1]), np.array([1, 0]), (low, high))
  for ours, theirs in (([2, 0], [0, 0]), ([0, 0], [2, 0])):
    with pytest.raises(AssertionError, match="rank 2 of query 0, expected 0 to 1"):
      compare_golden.check_ranks(np.array(ours), np.array(theirs), (low, high))


def test_recalls_within_ties():
  bounds = compare_golden.rank_bounds(SCORES, OWNER)["i2t"]
  compare_golden.check_recall(50.0, 100.0, 1, bounds)  # a tie decides about each hit
  compare_golden.check_recall(100.0, 100.0, 2, bounds)
  with pytest.raises(AssertionError, match=r"ours: R@2 is 50.0, expected 100.0 to 100.0"):
    compare_golden.check_recall(50.0, 100.0, 2, bounds)


def test_shortlists_within_ties():
  for chosen in ([0, 1], [0, 2]):
    sure = compare_golden.check_shortlist(np.array([chosen]), np.array([[0.9, 0.5, 0.5, 0.1]]))
    assert not sure.any()
  with pytest.raises(AssertionError):
    compare_golden.check_shortlist(np.array([[0, 3]]), np.array([[0.9, 0.5, 0.5, 0.1]]))


def test_trained_parameters():
  """Noise of the gradient moves only entries whose gradient is noise."""
  before, update = np.zeros(4), np.array([1e-3, -1e-3, 1e-3, 0])
  moment = np.array([1.0, 0.1, 1e-9, 0]) ** 2  # the third entry has a gradient of rounding noise
  noise = compare_golden.noise_allowance({"w": before}, {"w": update}, {"w": moment})
  np.testing.assert_allclose(noise["w"], [1e-8, 1e-7, 2e-3, 0])
  check = lambda want: compare_golden.check_trained({"w": update}, {"w": want}, noise, 1e-6)
  check(update * [1, 1, -1, 1])
  for wrong in ([-1, 1, 1, 1], [1, 0.99, 1, 1]):
    with pytest.raises(AssertionError, match="w: 1 of 4 entries"):
      check(update * wrong)
  with pytest.raises(AssertionError, match="w: 1 of 4 entries"):
    check(update + np.array([0, 0, 0, 1e-5]))  # without a gradient nothing moves
