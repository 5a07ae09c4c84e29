"""TGDT's evaluators on recorded scores and tokens: ranks, recalls, NDCG, ROUGE-L, stages, folds."""

import functools
import json
import re
from typing import NamedTuple

import compare_golden
import golden_files
import numpy as np
import pytest
from tgdt_golden import TIED

from xmodal_jax.evaluation import metrics, ndcg, rerank

MANIFEST = golden_files.manifest("tgdt")
inputs = functools.partial(golden_files.arrays, "tgdt", "inputs.npz")
outputs = functools.partial(golden_files.arrays, "tgdt", "outputs.npz")
SIDES = ("i2t", "t2i")
TOP = {"i2t": 50, "t2i": 100}  # candidates of the published second stage
NDCG_ATOL = 1e-6  # the original computes it in float32


def tolerance(which: str, pattern: str) -> float:
  return float(re.search(pattern, MANIFEST["tolerances"][which])[1])


LOCAL_ATOL = tolerance("score matrices", r"x10 local atol ([0-9.e-]+)")


@functools.cache
def recorded() -> dict:
  return json.loads(golden_files.path("tgdt", "goldens.json").read_text())


# Recorded evaluations of synthetic tokens: stage and fold.
SYNTHETIC = [
  found[1]
  for key in MANIFEST["array_shapes"]["outputs"]
  if (found := re.fullmatch(r"syneval_(\w+)_i2t_ranks", key))
]
# Columns of recorded metrics that hold NDCG, by the method of its relevances.
GRADES = {
  name.split()[-1]: n
  for n, name in enumerate(MANIFEST["metric_columns"])
  if name.startswith(f"NDCG@{ndcg.DEPTH}")
}


class Case(NamedTuple):
  """Scores [I, T] of both stages and relevances [T, I] of a split or a fold of it."""

  coarse: np.ndarray
  local: np.ndarray
  graded: dict[str, np.ndarray]

  @property
  def owner(self) -> np.ndarray:
    each = self.coarse.shape[1] // len(self.coarse)
    return np.repeat(np.arange(len(self.coarse)), each)

  def fold(self, n: int, size: int) -> "Case":
    """The n-th fold of `size` images."""
    (part,) = metrics.split_folds(len(self.coarse), self.owner, len(self.coarse) // size)[n : n + 1]
    graded = {k: v[part[1], part[0]] for k, v in self.graded.items()}
    return Case(self.coarse[part], self.local[part], graded)

  def ranked(self, stage: str) -> metrics.Ranked:
    """As test.py ranks ("global", "local"), or test_gl.py ("gl")."""
    if stage != "gl":
      scores = self.coarse if stage == "global" else self.local
      return metrics.Ranked(scores, scores, self.owner)
    lists = []
    for side, coarse, local in self.sides():
      candidates = metrics.top(coarse, TOP[side])
      lists.append((candidates, np.take_along_axis(coarse + local, candidates, 1)))
    return rerank.combine(metrics.Ranked(self.coarse, self.coarse, self.owner), *lists)

  def sides(self):
    return zip(SIDES, (self.coarse, self.coarse.T), (self.local, self.local.T), strict=True)


class Side(NamedTuple):
  """One direction: recorded scores and relevances [Q, N], and our ranking of them."""

  scores: np.ndarray  # -inf outside a shortlist
  positive: np.ndarray  # bool
  sure: np.ndarray  # bool [Q]: no tie decides about the shortlist
  grades: np.ndarray
  ranked: np.ndarray  # our scores that rank
  shortlist: tuple[np.ndarray, np.ndarray] | None


def sides(case: Case, stage: str) -> dict[str, Side]:
  ranked, out = case.ranked(stage), {}
  positive = case.owner == np.arange(len(case.coarse))[:, None]
  for n, (side, coarse, local) in enumerate(case.sides()):
    turn = (lambda x: x) if side == "i2t" else (lambda x: x.T)
    scores, sure, shortlist = (
      (coarse if stage == "global" else local),
      np.full(len(coarse), True),
      None,
    )
    if stage == "gl":
      shortlist = chosen, second = ranked.shortlists[n]
      scores = np.full(coarse.shape, -np.inf, np.float32)
      np.put_along_axis(scores, chosen, second, 1)
      if chosen.shape[1] < coarse.shape[1]:
        last = -np.partition(-coarse, chosen.shape[1] - 1, axis=1)[:, chosen.shape[1] - 1]
        outside = np.where(np.isfinite(scores), -np.inf, coarse).max(1)
        sure = last - outside >= TIED["global"]
    grades = {k: turn(v.T) for k, v in case.graded.items()}
    out[side] = Side(
      scores, turn(positive), sure, grades, turn((ranked.i2t, ranked.t2i)[n]), shortlist
    )
  return out


def rank_bounds(side: Side, tied: float) -> tuple[np.ndarray, np.ndarray]:
  """Least and greatest right rank [Q] if scores closer than `tied` may change places.

  0 for a query without a positive in its shortlist, as the original has it.
  """
  best = np.where(side.positive, side.scores, -np.inf).max(1)
  others = np.where(side.positive, -np.inf, side.scores)
  low, high = (others >= (best + tied)[:, None]).sum(1), (others > (best - tied)[:, None]).sum(1)
  return np.where(np.isfinite(best), low, 0), np.where(np.isfinite(best), high, 0)


def ndcg_bounds(side: Side, method: str, tied: float) -> list[np.ndarray]:
  """Least and greatest right NDCG [Q], likewise."""
  order = np.argsort(-side.scores, axis=1, kind="stable")
  scores, grades = (np.take_along_axis(x, order, 1) for x in (side.scores, side.grades[method]))
  with np.errstate(invalid="ignore"):  # scores outside a shortlist are one run of equal scores
    run = np.cumsum(np.pad(scores[:, :-1] - scores[:, 1:] >= tied, [(0, 0), (1, 0)]), axis=1)
  gain, depth = np.exp2(grades.astype(np.float64)) - 1, min(ndcg.DEPTH, scores.shape[1])
  total = lambda x: x[:, :depth] @ (1 / np.log2(np.arange(depth) + 2))
  ideal = np.maximum(total(-np.sort(-gain, axis=1)), 1e-30)
  best_last, best_first = (
    np.take_along_axis(gain, np.lexsort((sign * gain, run), axis=1), 1) for sign in (1, -1)
  )
  return [
    np.where(side.sure, total(best_last) / ideal, 0),
    np.where(side.sure, total(best_first) / ideal, 1),
  ]


def check_ranks(side: Side, stage: str, ours: np.ndarray, want: np.ndarray) -> bool:
  """Asserts that both are right; returns whether they are the same."""
  low, high = rank_bounds(side, TIED[stage])
  for ranks in (ours, want):
    assert ((low <= ranks) & (ranks <= high))[side.sure].all()
  return np.array_equal(ours, want)


def check(case: Case, stage: str, ranks: dict, numbers: dict) -> None:
  """ranks [Q] and numbers (a row of the metric columns) are those recorded of each side."""
  ranked = case.ranked(stage)
  summary = metrics.summarise_published(ranked)
  right = (
    metrics.retrieval_ranks(ranked.i2t, case.owner)[0],
    metrics.retrieval_ranks(ranked.t2i, case.owner)[1],
  )
  for (name, side), ours in zip(sides(case, stage).items(), right, strict=True):
    if side.shortlist is not None:
      hits = np.take_along_axis(side.positive, side.shortlist[0], 1)
      published = metrics.published_ranks(hits, side.shortlist[1])
      lost = ~hits.any(1)
      assert (published[lost] == 0).all() and (ours[lost] >= hits.shape[1]).all()
      np.testing.assert_array_equal(published[~lost], ours[~lost])
      ours = published
    same = check_ranks(side, stage, ours, ranks[name])
    want = dict(zip(("r1", "r5", "r10", "medr", "meanr"), numbers[name], strict=False))
    assert metrics.recalls(ranks[name]) == pytest.approx(want, abs=1e-9)
    if same:
      assert {k: summary[f"{name}_{k}"] for k in want} == pytest.approx(want, abs=1e-9)
    for method, column in GRADES.items():
      gains = ndcg.ndcg(side.ranked, side.grades[method])
      low, high = ndcg_bounds(side, method, TIED[stage])
      assert ((low - 1e-9 <= gains) & (gains <= high + 1e-9)).all()
      mean = ndcg.means(method, gains, gains, published=True)[f"{name}_ndcg_{method}"]
      some = max(np.count_nonzero(low), 1)
      slack = ((high - low).sum() + np.count_nonzero(high) - np.count_nonzero(low)) / some
      assert mean == pytest.approx(numbers[name][column], abs=NDCG_ATOL + slack)


def aligned(images, image_lengths, texts, text_lengths) -> np.ndarray:
  """[I, T]: ten times the sum over words of the best region.

  Slot 0 of both sides is the global vector; of texts the last two slots are left out as well, and
  a caption has three words less than its length. Products with padding are 0.
  """
  regions, words = images[:, 1:], texts[:, 1:-2]
  region = np.arange(regions.shape[1]) < (image_lengths - 1)[:, None]
  word = np.arange(words.shape[1]) < (text_lengths - 3)[:, None]
  out = np.zeros((len(images), len(texts)), np.float32)
  flat = regions.reshape(-1, regions.shape[2])
  for t in range(len(texts)):
    s = (flat @ words[t, word[t]].T).reshape(*region.shape, -1)
    out[:, t] = 10 * np.where(region[..., None], s, 0).max(1).sum(-1)
  return out


@functools.cache
def synthetic() -> Case:
  images, texts = inputs()["syneval_img_tokens"], inputs()["syneval_txt_tokens"]
  lengths = inputs()["syneval_img_len"], inputs()["syneval_txt_len"]
  graded = {m: inputs()[f"syneval_relevance_{m}"] for m in GRADES}
  local = aligned(images, lengths[0], texts, lengths[1])
  return Case(images[:, 0] @ texts[:, 0].T, local, graded)


def model() -> Case:
  graded = {m: inputs()[f"relevance_test_{m}"] for m in GRADES}
  return Case(outputs()["enc_global_scores"], outputs()["enc_local_scores"], graded)


def ranks_of(key: str) -> dict[str, np.ndarray]:
  return {side: outputs()[f"{key}_{side}_ranks"] for side in SIDES}


def test_local_scores():
  (want,) = (v for k, v in outputs().items() if k.startswith("syneval_local_scores_first"))
  np.testing.assert_allclose(synthetic().local[: len(want)], want, atol=LOCAL_ATOL, rtol=0)
  # The evaluator has more slots than any image has regions, so that no maximum is below 0.
  images = np.pad(outputs()["enc_img_tokens"], [(0, 0), (0, 1), (0, 0)])
  lengths = outputs()["enc_img_len"], outputs()["enc_txt_len"]
  ours = aligned(images, lengths[0], outputs()["enc_txt_tokens"], lengths[1])
  np.testing.assert_allclose(ours, model().local, atol=LOCAL_ATOL, rtol=0)


@pytest.mark.parametrize("stage", ["global", "local", "gl"])
def test_evaluation_with_the_checkpoint(stage):
  numbers = {side: recorded()[f"eval_{stage}"][side][0] for side in SIDES}
  check(model(), stage, ranks_of(f"eval_{stage}"), numbers)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_evaluation_of_synthetic_tokens(name):
  stage, _, fold = name.partition("_fold")
  ranks, case = ranks_of(f"syneval_{name}"), synthetic()
  if fold:
    case = case.fold(int(fold), len(ranks["i2t"]))
  check(case, stage, ranks, recorded()["syneval"][name])


@pytest.mark.parametrize("stage", ["global", "local"])
def test_folds(stage):
  want, case = recorded()[f"eval_syn5fold_{stage}"], synthetic()
  ranks = ranks_of(f"eval_syn5fold_{stage}")
  n = len(want["i2t"])
  split = {side: np.split(ranks[side], n) for side in SIDES}
  for fold in range(n):
    pick = lambda x, fold=fold: {side: x[side][fold] for side in SIDES}
    check(case.fold(fold, len(ranks["i2t"]) // n), stage, pick(split), pick(want))
  recalls = [sum(sum(want[side][fold][:3]) for side in SIDES) for fold in range(n)]
  parts = [
    metrics.summarise_published(case.fold(f, len(ranks["i2t"]) // n).ranked(stage))
    for f in range(n)
  ]
  assert metrics.average(parts)["rsum"] == pytest.approx(np.mean(recalls), abs=1e-9)
  printed = want["printed"][want["printed"].index("Mean metrics: ") + 1]
  assert printed == f"rsum: {metrics.average(parts, published=True)['rsum']:.1f}"
  if stage == "global":  # no ties
    scores = case.ranked(stage)
    ours = metrics.folds(scores.i2t, case.owner, n)
    assert ours == pytest.approx(metrics.average(parts), abs=1e-9)


def test_score_matrix():
  scores = inputs()["scorematrix"]
  owner = np.repeat(np.arange(len(scores)), scores.shape[1] // len(scores))
  bounds, want = compare_golden.rank_bounds(scores, owner), recorded()["scorematrix"]
  names = ("r1", "r5", "r10", "medr", "meanr")
  rows = {"i2t": want["i2t"], "t2i": [want[f"t2i_{k}"] for k in names]}
  for side, ranks in zip(SIDES, metrics.retrieval_ranks(scores, owner), strict=True):
    theirs, (low, high) = outputs()[f"scorematrix_{side}_ranks"], bounds[side]
    compare_golden.check_ranks(ranks, theirs, (low, high))
    for r in (theirs, ranks) if (low == high).all() else (theirs,):
      found = metrics.recalls(r)
      assert [found[k] for k in names] == pytest.approx(rows[side], abs=1e-9)


def test_rouge_l():
  annotations = json.loads(golden_files.path("tgdt", "dataset_flickr30k.json").read_text())
  captions = [
    [sentence["raw"] for sentence in image["sentences"]]
    for image in annotations["images"]
    if image["split"] == "val"
  ]
  ours = ndcg.rouge_l(captions)
  assert ours.dtype == np.float32
  np.testing.assert_array_equal(ours, outputs()["rougeL_val"])
