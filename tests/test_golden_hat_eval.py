"""HAT's evaluation from pictures and captions to ranks, levels, metrics, and its checkpoint."""

import pathlib
import runpy

import golden_files
import hat_golden
import jax
import numpy as np
import pytest
import test_golden_hat_data
from hat_golden import LEVELS, arrays, close_scores

from xmodal_jax import config as config_lib
from xmodal_jax.data import inputs
from xmodal_jax.evaluation import metrics, retrieval
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import hat as hat_rules
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import hat
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup

COLUMNS = ("r1", "r5", "r10")


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def recalls(ranks, at) -> list[float]:
  return [100 * float((ranks < k).mean()) for k in at]


@pytest.mark.parametrize("name", ["a", "b"])
def test_metrics_of_a_matrix(name):
  x = arrays("evaluation")
  scores = x[f"{name}/sims"].astype(np.float32)
  owner = np.arange(scores.shape[1]) // 5
  i2t, t2i = metrics.retrieval_ranks(scores, owner)
  np.testing.assert_array_equal(i2t, x[f"{name}/i2t_ranks"])
  np.testing.assert_array_equal(t2i, x[f"{name}/t2i_ranks"])
  report = metrics.summarise(scores, owner)
  for side, ranks in (("i2t", i2t), ("t2i", t2i)):
    want = x[f"{name}/{side}_metrics"]
    np.testing.assert_allclose(recalls(ranks, (1, 5, 10, 20, 50, 70, 100)), want[:7])
    ours = [report[f"{side}_{k}"] for k in (*COLUMNS, "medr", "meanr")]
    np.testing.assert_allclose(ours, [*want[:3], *want[7:]])
  folds = metrics.folds(scores, owner, len(x[f"{name}/fold_i2t_metrics"]))
  for side in ("i2t", "t2i"):
    want = x[f"{name}/fold_{side}_metrics"].mean(0)
    np.testing.assert_allclose([folds[f"{side}_{k}"] for k in COLUMNS], want[:3])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
  return test_golden_hat_data.prepared(tmp_path_factory.mktemp("hat"))


def evaluator(data_dir, **changes):
  c = test_golden_hat_data.config(data_dir)
  golden = hat_golden.Golden(**changes)
  c.model = golden.config
  c.eval.batch_size, c.eval.block, c.eval.rerank_block = 8, (8, 16), (2, 2)
  ev = retrieval.Evaluator(c, inputs.Inputs(c), setup.build(c))
  return ev, train_state.TrainState(None, golden.params, {}, None)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_from_pictures_to_ranks(direction, data_dir):
  """Streamed: captions in blocks of 16, pictures as they are encoded."""
  want = arrays("evaluation")
  ev, state = evaluator(data_dir, direction=direction)
  split = ev.inputs.split("test")
  texts, owner = ev.encode(state, "text", ev.inputs.texts(split))
  scores, ids = ev.stream(state, ev.inputs.images(split), texts)
  np.testing.assert_array_equal(ids, np.arange(len(split)))
  close_scores(scores, want[f"e2e/{direction}_sum"], key="scores_float64_end_to_end")
  i2t, t2i = metrics.retrieval_ranks(scores, owner)
  np.testing.assert_array_equal(i2t, want[f"e2e/{direction}_i2t_ranks"])
  np.testing.assert_array_equal(t2i, want[f"e2e/{direction}_t2i_ranks"])
  returned = want[f"e2e/{direction}_returned"]
  at = (1, 5, 10, 20, 50, 70, 100)
  np.testing.assert_allclose(recalls(i2t, at) + recalls(t2i, at), returned)
  report = ev(state, "test")
  np.testing.assert_allclose([report[f"i2t_{k}"] for k in COLUMNS], returned[:3])


def test_levels_and_two_stages(data_dir):
  """One level first, then the sum of all for its candidates: with all of them it is the sum."""
  want = arrays("evaluation")
  direction = hat_golden.CONFIG["direction"]
  ev, state = evaluator(data_dir, first_levels=(0,))
  ev.second = (10**6, 10**6, 1.0)
  split = ev.inputs.split("test")
  banks = [ev.bank(-(-n // 8)) for n in (len(split), int(split.captions_per_record.sum()))]
  images, _ = ev.encode(state, "image", ev.inputs.images(split), banks[0])
  texts, owner = ev.encode(state, "text", ev.inputs.texts(split), banks[1])
  first = ev.scores(state, images, texts)
  close_scores(first, want[f"e2e/{direction}_top"], key="scores_float64_end_to_end")
  kept = np.ones(len(owner), bool)
  (captions, scores), _ = ev.second_scores(state, first, *banks, kept)
  found = np.take_along_axis(want[f"e2e/{direction}_sum"], captions, 1)
  close_scores(scores, found, key="scores_float64_end_to_end")


@pytest.mark.parametrize("n", range(len(LEVELS)))
def test_each_level_alone(n, data_dir):
  want = arrays("evaluation")
  direction = hat_golden.CONFIG["direction"]
  ev, _ = evaluator(data_dir, first_levels=(n,))
  split = ev.inputs.split("test")
  model = hat_golden.Golden(first_levels=(n,)).model()
  b = next(iter(ev.inputs.images(split)))
  t = next(iter(ev.inputs.texts(split)))
  v = model.encode_image({k: b[k] for k in ("image",)})
  w = model.encode_text({k: t[k] for k in ("text_ids", "text_mask")})
  ours = np.asarray(model.level_scores(v, w, (n,))[0])
  recorded = want[f"e2e/{direction}_{LEVELS[n]}"][: ours.shape[0], : ours.shape[1]]
  close_scores(ours[: len(recorded)], recorded, key="scores_float64_end_to_end")


# --- files ----------------------------------------------------------------------------------------


def test_conversion_both_ways(tmp_path):
  """A Lightning file: a class as a key, buffers, fields of the trainer. All tensors come back."""
  tool = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "tools" / "convert.py"))["main"]
  source = golden_files.path("hat", hat_golden.CHECKPOINT)
  out, back = tmp_path / "ours", tmp_path / "back.pth"
  tool(["--system", "hat", "--checkpoint", str(source), "--out", str(out)])
  meta = meta_lib.read_meta(out)
  want = hat_golden.config()
  assert meta["config"]["image"]["depths"] == list(want["image"]["depths"])
  assert meta["config"]["image"]["heads"] == list(want["image"]["heads"])
  assert [list(x) for x in want["levels"]] == meta["config"]["levels"]
  tool(["--system", "hat", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  theirs, ours = (torch_files.state_dict(p)[0] for p in (source, back))
  assert list(ours) == list(theirs)
  for key, value in theirs.items():
    a, b = value.read(), ours[key].read()
    assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes(), key


def test_buffers_are_not_trusted():
  state = dict(hat_golden.state_dict())
  name = next(k for k in state if k.endswith("attn_mask"))
  state[name] = state[name] + 1
  golden = hat_golden.Golden()
  from xmodal_jax.checkpoints import restore

  with pytest.raises(conversion.ConversionError, match=name):
    conversion.to_jax(state, hat_rules.RULES, restore.flat(golden.params))


def test_config_of_a_run():
  c = config_lib.base()
  c.model.update(hat.preset("swin_b"))
  assert c.model.image.depths == (2, 2, 18, 2) and c.model.levels[0] == (3, 11)
