"""HAT's evaluation from images and captions to ranks and metrics, and its checkpoint."""

import pathlib
import runpy

import compare_golden
import golden_files
import hat_golden
import jax
import numpy as np
import pytest
from hat_golden import LEVELS, arrays, close_scores

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.data import inputs
from xmodal_jax.evaluation import metrics, rerank, retrieval
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import hat as hat_rules
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import hat
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup

# Columns of a recorded row of metrics: recalls, median and mean rank.
RECALL_AT = (1, 5, 10, 20, 50, 70, 100)
SIDES = ("i2t", "t2i")
BATCH = 8  # of the evaluation
MATRICES = [k.removesuffix("/sims") for k in arrays("evaluation") if k.endswith("/sims")]


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def recalls(ranks) -> list[float]:
  return [100 * float((ranks < k).mean()) for k in RECALL_AT]


def check_row(ours: np.ndarray, row: np.ndarray, bounds: compare_golden.Bounds) -> None:
  """A recorded row of metrics against our ranks; all of it is compared where no rank is tied."""
  assert hat_golden.TOLERANCE["metrics"] == "exact"
  for k, mine, theirs in zip(RECALL_AT, recalls(ours), row, strict=False):
    compare_golden.check_recall(mine, theirs, k, bounds)
  if (bounds[0] == bounds[1]).all():
    report = metrics.recalls(ours)
    np.testing.assert_allclose([report["medr"], report["meanr"]], row[len(RECALL_AT) :])


@pytest.mark.parametrize("name", MATRICES)
def test_metrics_of_a_matrix(name):
  x = arrays("evaluation")
  scores = x[f"{name}/sims"].astype(np.float32)
  owner = compare_golden.owners(scores)
  bounds = compare_golden.rank_bounds(scores, owner)
  report = metrics.summarise(scores, owner)
  for side, ranks in zip(SIDES, metrics.retrieval_ranks(scores, owner), strict=True):
    compare_golden.check_ranks(ranks, x[f"{name}/{side}_ranks"], bounds[side])
    check_row(ranks, x[f"{name}/{side}_metrics"], bounds[side])
    ours = metrics.recalls(ranks)
    assert {k: report[f"{side}_{k}"] for k in ours} == ours


@pytest.mark.parametrize("name", MATRICES)
def test_folds_of_a_matrix(name):
  x = arrays("evaluation")
  scores = x[f"{name}/sims"].astype(np.float32)
  owner, n_folds = compare_golden.owners(scores), len(x[f"{name}/fold_i2t_metrics"])
  reports = []
  for n, (rows, columns) in enumerate(metrics.split_folds(len(scores), owner, n_folds)):
    block, block_owner = scores[rows, columns], owner[columns] - rows.start
    bounds = compare_golden.rank_bounds(block, block_owner)
    for side, ranks in zip(SIDES, metrics.retrieval_ranks(block, block_owner), strict=True):
      check_row(ranks, x[f"{name}/fold_{side}_metrics"][n], bounds[side])
    reports.append(metrics.summarise(block, block_owner))
  assert metrics.folds(scores, owner, n_folds) == pytest.approx(metrics.average(reports))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
  return hat_golden.prepared(tmp_path_factory.mktemp("hat"))


def evaluator(data_dir, **changes):
  c = hat_golden.run_config(data_dir)
  golden = hat_golden.Golden(**changes)
  c.model = golden.config
  c.eval.batch_size, c.eval.block, c.eval.rerank_block = BATCH, (8, 16), (2, 2)
  ev = retrieval.from_config(c, inputs.from_config(c), setup.build(c))
  return ev, train_state.TrainState(None, golden.params, {}, None)


@pytest.mark.parametrize("direction", [pytest.param("i2t", marks=pytest.mark.full), "t2i"])
def test_from_images_to_ranks(direction, data_dir):
  """Streamed: captions in blocks, images as they are encoded."""
  want = arrays("evaluation")
  ev, state = evaluator(data_dir, direction=direction)
  split = ev.inputs.split("test")
  texts, owner = ev.encode(state, "text", ev.inputs.texts(split))
  scores, ids = ev.stream(state, ev.inputs.images(split), texts)
  np.testing.assert_array_equal(ids, np.arange(len(split)))
  close_scores(scores, want[f"e2e/{direction}_sum"], key="scores_float64_end_to_end")
  bounds = compare_golden.rank_bounds(want[f"e2e/{direction}_sum"], owner, rounded=True)
  returned = want[f"e2e/{direction}_returned"].reshape(2, -1)  # recalls of both sides
  report = ev(state, "test")
  ours = metrics.retrieval_ranks(scores, owner)
  for side, ranks, recorded in zip(SIDES, ours, returned, strict=True):
    compare_golden.check_ranks(ranks, want[f"e2e/{direction}_{side}_ranks"], bounds[side])
    for k, mine, theirs in zip(RECALL_AT, recalls(ranks), recorded, strict=True):
      compare_golden.check_recall(mine, theirs, k, bounds[side])
      if k in metrics.RECALL_AT:
        compare_golden.check_recall(report[f"{side}_r{k}"], theirs, k, bounds[side])


@pytest.mark.full
def test_levels_and_two_stages(data_dir):
  """The top level ranks first, then the sum of all levels; with all candidates, that is the sum."""
  want = arrays("evaluation")
  direction = hat_golden.CONFIG["direction"]
  ev, state = evaluator(data_dir, first_levels=(0,))
  ev.second = rerank.SecondStage(10**6, 10**6, 1.0)
  split = ev.inputs.split("test")
  batches = lambda n: -(-n // BATCH)
  banks = [ev.bank(batches(n)) for n in (len(split), int(split.captions_per_record.sum()))]
  images, _ = ev.encode(state, "image", ev.inputs.images(split), banks[0])
  texts, owner = ev.encode(state, "text", ev.inputs.texts(split), banks[1])
  first = ev.scores(state, images, texts)
  close_scores(first, want[f"e2e/{direction}_top"], key="scores_float64_end_to_end")
  kept = np.ones(len(owner), bool)
  (captions, scores), _ = ev.second_scores(state, first, *banks, kept)
  found = np.take_along_axis(want[f"e2e/{direction}_sum"], captions, 1)
  close_scores(scores, found, key="scores_float64_end_to_end")


@pytest.mark.parametrize(
  "n", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, len(LEVELS)))]
)
def test_each_level_alone(n, data_dir):
  want = arrays("evaluation")
  direction = hat_golden.CONFIG["direction"]
  ev, _ = evaluator(data_dir, first_levels=(n,))
  split = ev.inputs.split("test")
  model = hat_golden.Golden(first_levels=(n,)).model()
  b = next(iter(ev.inputs.images(split)))
  t = next(iter(ev.inputs.texts(split)))

  @jax.jit
  def run(model, b, t):
    return model.level_scores(model.encode_image(b), model.encode_text(t), (n,))[0]

  sides = ({k: b[k] for k in ("image",)}, {k: t[k] for k in ("text_ids", "text_mask")})
  ours = np.asarray(run(model, *sides))
  recorded = want[f"e2e/{direction}_{LEVELS[n]}"][: ours.shape[0], : ours.shape[1]]
  close_scores(ours[: len(recorded)], recorded, key="scores_float64_end_to_end")


# --- files ----------------------------------------------------------------------------------------


def test_conversion_both_ways(tmp_path):
  """Of a Lightning file with buffers, a class as a key and fields of the trainer: every tensor."""
  tool = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "tools" / "convert.py"))["main"]
  source = golden_files.path("hat", hat_golden.CHECKPOINT)
  out, back = tmp_path / "ours", tmp_path / "back.pth"
  tool(["--system", "hat", "--checkpoint", str(source), "--out", str(out)])
  meta = meta_lib.read_meta(out)
  want = hat_golden.config()
  assert meta["config"]["image"]["depths"] == list(want["image"]["depths"])
  assert meta["config"]["image"]["heads"] == list(want["image"]["heads"])
  if want["levels"][1:] == ((1, 3), (2, 9)):  # no file has them, so the published ones are taken
    assert [list(x) for x in want["levels"]] == meta["config"]["levels"]
  tool(["--system", "hat", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  theirs, ours = (torch_files.state_dict(p)[0] for p in (source, back))
  assert list(ours) == list(theirs)
  for key, value in theirs.items():
    a, b = value.read(), ours[key].read()
    assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes(), key


def test_buffers_are_not_trusted():
  state = dict(hat_golden.state_dict())
  name = next(k for k in state if k.endswith(("attn_mask", "relative_position_index")))
  state[name] = state[name] + 1
  golden = hat_golden.Golden()
  with pytest.raises(conversion.ConversionError, match=name):
    conversion.to_jax(state, hat_rules.RULES, restore.flat(golden.params))


def test_config_of_a_run():
  c = config_lib.base()
  c.model.update(hat.preset("swin_b"))
  assert c.model.image.depths == (2, 2, 18, 2) and c.model.levels[0] == (3, 11)
