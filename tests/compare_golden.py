"""Comparisons that the golden tests of all systems share.

Ranks: programs break ties of equal scores in different ways (repeated captions tie exactly), so a
rank is right if it lies between the number of candidates that are better and the number of those
that are better or equal.

Trained parameters: Adam divides each gradient by its own magnitude. Where that is rounding noise,
the update has full size and an arbitrary sign, in the original program as in ours.
"""

from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest

# Rounding of a float32 gradient relative to the largest entry of its tensor. The golden sets
# report 1e-6 between float32 and float64 runs of the original; two programs differ by a few times
# as much.
NOISE = 1e-5
# Relative difference of two float32 scores that are equal in exact arithmetic.
ROUNDING = 8 * np.finfo(np.float32).eps

Bounds = tuple[np.ndarray, np.ndarray]  # least and greatest right rank of each query


def owners(scores: np.ndarray) -> np.ndarray:
  """The image of each caption of a score matrix [I, T] with equally many captions per image."""
  n_images, n_texts = scores.shape
  assert n_texts % n_images == 0
  return np.arange(n_texts) // (n_texts // n_images)


def rounding(scores: np.ndarray) -> float:
  """What rounding may change of a score: its finite scores count as equal when closer."""
  return ROUNDING * np.abs(scores[np.isfinite(scores)]).max()


def rank_bounds(scores: np.ndarray, owner: np.ndarray, rounded: bool = False) -> dict[str, Bounds]:
  """The 0-based ranks of the best positive that are right, {"i2t": [I], "t2i": [T]} twice.

  Args:
    scores: [I, T], recorded; -inf outside of a shortlist.
    owner: int [T], the image of each caption.
    rounded: the scores were computed by both programs, so that those which differ by rounding
      alone count as equal. Else they were given, and only equal ones do.
  """
  scores = np.asarray(scores, np.float64)
  gap = rounding(scores) if rounded else 0.0
  positive = owner == np.arange(len(scores))[:, None]
  out = {}
  for side, s, p in (("i2t", scores, positive), ("t2i", scores.T, positive.T)):
    best = np.where(p, s, -np.inf).max(1, keepdims=True)
    others = np.where(p, -np.inf, s)
    out[side] = (others > best + gap).sum(1), (others >= best - gap).sum(1)
  return out


def check_shortlist(candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """The k best of each row of recorded scores; candidates that tie at the last place may differ.

  Args:
    candidates: int [Q, k], chosen from our scores.
    scores: [Q, N], recorded, computed by both programs.

  Returns:
    bool [Q], which rows leave no choice.
  """
  k, gap = candidates.shape[1], rounding(scores)
  last = -np.sort(-scores, axis=1)[:, k - 1 : k]
  chosen = np.zeros(scores.shape, bool)
  np.put_along_axis(chosen, candidates, True, axis=1)
  assert (chosen.sum(1) == k).all()
  assert not (chosen & (scores < last - gap)).any() and not (~chosen & (scores > last + gap)).any()
  return (scores >= last - gap).sum(1) == k


def check_ranks(ours: np.ndarray, theirs: np.ndarray, bounds: Bounds) -> None:
  """Both are right; where no candidate ties with the best positive, that means equal."""
  low, high = bounds
  for name, ranks in (("recorded", theirs), ("ours", ours)):
    wrong = np.flatnonzero((ranks < low) | (ranks > high))
    assert not wrong.size, (
      f"{name}: rank {ranks[wrong[0]]} of query {wrong[0]}, "
      f"expected {low[wrong[0]]} to {high[wrong[0]]}"
    )


def check_recall(ours: float, theirs: float, k: int, bounds: Bounds, atol: float = 1e-9) -> None:
  """Recalls at k in percent: equal if no tie decides about a hit, else both within the ties."""
  low, high = bounds
  least, most = 100 * (high < k).mean(), 100 * (low < k).mean()
  for name, value in (("recorded", theirs), ("ours", ours)):
    assert least - atol <= value <= most + atol, (
      f"{name}: R@{k} is {value}, expected {least} to {most}"
    )
  if least == most:
    assert ours == pytest.approx(theirs, abs=atol)


def adam_state(opt_state) -> optax.ScaleByAdamState:
  """The moments in an optimizer's state."""
  is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
  return next(x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x))


def noise_allowance(before: dict, after: dict, second_moment: dict) -> dict[str, np.ndarray]:
  """How far rounding noise of the gradients may move each entry of the parameters under Adam.

  An entry with root mean square gradient r takes steps that rounding changes by the share
  NOISE max(r) / r, at most from one sign to the other; a step is at most about as large as the
  largest update of the tensor. Entries of ordinary gradients get next to nothing, entries without
  any gradient nothing.

  Args:
    before, after: parameters by name before and after training.
    second_moment: Adam's, by name.
  """
  out = {}
  for name, moment in second_moment.items():
    r = np.sqrt(np.asarray(moment, np.float64))
    update = np.abs(np.asarray(after[name], np.float64) - before[name]).max(initial=0)
    share = np.divide(NOISE * r.max(initial=0), r, out=np.zeros_like(r), where=r > 0)
    out[name] = np.minimum(share, 2.0) * update
  return out


def check_trained(
  ours: dict,
  theirs: dict,
  allowance: dict,
  atol: float,
  *,
  relative: bool = False,
  drop: Callable = lambda name, value: value,
) -> None:
  """Parameters after training by Adam or LAMB, entry by entry.

  Args:
    ours, theirs: parameters by name; all of theirs are compared.
    allowance: `noise_allowance`; what it does not name (running statistics) gets nothing.
    atol: the manifest's tolerance of an entry.
    relative: atol is relative to the largest entry of a tensor.
    drop: (name, array) -> the entries to compare, without those whose gradient is zero in exact
      arithmetic.
  """
  assert theirs
  for name, want in theirs.items():
    want, have = drop(name, np.asarray(want, np.float64)), drop(name, np.asarray(ours[name]))
    noise = np.broadcast_to(allowance.get(name, 0.0), np.shape(ours[name]))
    allowed = drop(name, noise) + atol * (np.abs(want).max(initial=0) if relative else 1.0)
    assert have.shape == want.shape, name
    excess = np.abs(have - want) - allowed
    assert (excess <= 0).all(), (
      f"{name}: {(excess > 0).sum()} of {want.size} entries, by up to {excess.max()} too far"
    )


def check_norms(
  ours: dict, norms: dict, allowance: dict, rtol: float, *, skip: Callable = lambda name: False
) -> None:
  """Euclidean norms of parameters after training, by name. skip: names that are not compared."""
  for name, norm in norms.items():
    if not skip(name):
      atol = np.linalg.norm(allowance.get(name, 0.0))
      have = np.linalg.norm(np.asarray(ours[name], np.float64))
      np.testing.assert_allclose(have, norm, rtol=rtol, atol=atol, err_msg=name)
