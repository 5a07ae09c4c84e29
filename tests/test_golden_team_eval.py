"""TEAM's two-stage evaluation from annotation file and images to recalls, and its metrics."""

import functools
import json
import pathlib

import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
import team_golden
from PIL import Image
from team_golden import VARIANTS, close

from tools import prepare_data
from xmodal_jax import config as config_lib
from xmodal_jax.data import inputs
from xmodal_jax.evaluation import metrics, retrieval
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup

# Names of the original's directions, which are named by what is retrieved -> ours.
DIRECTIONS = (("txt", "i2t"), ("img", "t2i"))
OUTSIDE = -1000.0  # recorded score of what is not in a shortlist


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
  """The evaluation set, prepared as a user would."""
  recorded = team_golden.MANIFEST["versions"]["Pillow"]
  if PIL.__version__.split(".")[0] < recorded.split(".")[0]:
    pytest.skip(
      f"recorded with Pillow {recorded}; {PIL.__version__} resizes in another order of passes, "
      "which moves pixels by one level"
    )
  root = tmp_path_factory.mktemp("albef")
  annotations = golden_files.path("team", "eval_data", "annotations.json")
  images = golden_files.arrays("team", "eval_data", "images.npz")
  for item in json.loads(annotations.read_text()):
    file = root / item["image"]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images[file.stem]).save(file)
  arguments = ["albef", "--test", annotations, root, "--out", root / "out"]
  prepare_data.main([str(a) for a in arguments])
  return root / "out"


@functools.cache
def evaluated(name: str, data_dir: str):
  golden = team_golden.Golden(name)
  c = config_lib.base()
  c.model = golden.config
  c.data.dir, c.data.image.resize, c.data.image.rgb_first = data_dir, "exact", True
  c.text.tokenizer, c.text.vocab = "bert", str(golden_files.path("team", "text", "vocab.txt"))
  c.text.length = team_golden.MANIFEST["variants"][name]["text_length"]
  c.text.clean, c.text.max_words = "albef", c.text.length
  c.eval.batch_size, c.eval.block, c.eval.rerank_block = 8, (8, 32), (2, 4)
  for side in ("text_per_image", "image_per_text"):
    c.eval[f"top_k_{side.split('_')[0]}"] = want(name)[f"topk_{side}"].shape[1]
  built = setup.build(c)
  read = inputs.from_config(c)
  ev = retrieval.from_config(c, read, built)
  state = train_state.TrainState(None, golden.params, {}, None)
  split = read.split("test")
  batches = lambda n: -(-n // c.eval.batch_size)
  banks = [ev.bank(batches(n)) for n in (len(split), int(split.captions_per_record.sum()))]
  images, _ = ev.encode(state, "image", read.images(split), banks[0])
  texts, owner = ev.encode(state, "text", read.texts(split), banks[1])
  scores = ev.scores(state, images, texts)
  second = ev.second_scores(state, scores, *banks, np.ones(len(owner), bool))
  return golden, read, split, images, texts, scores, second, owner, ev(state, "test")


@pytest.fixture(
  scope="module",
  params=[VARIANTS[0], *(pytest.param(v, marks=pytest.mark.full) for v in VARIANTS[1:])],
)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def run(name, data_dir):
  with jax.default_matmul_precision("highest"):
    return evaluated(name, str(data_dir))


def want(name):
  return golden_files.arrays("team", name, "eval_outputs.npz")


def test_inputs(name, run):
  golden, read, split = run[:3]
  texts = list(read.texts(split))
  rows = lambda key: np.concatenate([b[key][b["valid"]] for b in texts])
  np.testing.assert_array_equal(rows("text_ids"), want(name)["text_ids"])
  np.testing.assert_array_equal(rows("text_mask"), want(name)["text_mask"] > 0)
  np.testing.assert_array_equal(rows("image_id"), want(name)["txt2img"])
  pixels = jnp.asarray(next(iter(read.images(split)))["image"])
  ours = np.moveaxis(np.asarray(golden.model().pixels(pixels)), -1, 1)
  recorded = want(name)["images_preprocessed"]
  # A bicubic filter may round to the next of 256 levels, which the manifest allows.
  atol = team_golden.number(team_golden.MANIFEST["tolerance"]["resized images"], "atol")
  np.testing.assert_allclose(ours[: len(recorded)], recorded, atol=atol)


def test_first_stage(name, run):
  _, _, _, images, texts, scores, _, _, _ = run
  close(texts["embed"], want(name)["text_embeds"], "text_embeds")
  close(images["embed"], want(name)["image_embeds"], "image_embeds")
  close(scores, want(name)["stage1/score_i2t"], "stage 1, image to text")
  close(scores.T, want(name)["stage1/score_t2i"], "stage 1, text to image")


@functools.cache
def recorded_scores(name: str, stage: str, side: str) -> np.ndarray:
  """[image, text] scores that rank in a direction of ours; -inf outside the shortlists."""
  scores = want(name)[f"{stage}/score_{side}"].astype(np.float64)
  scores = np.where(scores == OUTSIDE, -np.inf, scores)
  return scores if side == "i2t" else scores.T


def test_second_stage(name, run):
  for (candidates, scores), side in zip(run[6], ("i2t", "t2i"), strict=True):
    turn = (lambda x: x) if side == "i2t" else (lambda x: x.T)
    first, second = (turn(recorded_scores(name, f"stage{n}", side)) for n in (1, 2))
    compare_golden.check_shortlist(candidates, first)
    recorded = np.take_along_axis(second, candidates, 1)
    both = np.isfinite(recorded)  # in both shortlists, of which tied candidates may differ
    close(scores[both], recorded[both], f"stage 2, {side}")
    every = turn(want(name)["team_score_all_pairs"])
    close(scores, np.take_along_axis(every, candidates, 1), "team_score_all_pairs")


@functools.cache
def rank_bounds(name: str, stage: str, side: str) -> compare_golden.Bounds:
  owner = want(name)["txt2img"]
  low, high = compare_golden.rank_bounds(recorded_scores(name, stage, side), owner, True)[side]
  if stage == "stage2":  # any rank is right if the shortlist depends on a tie
    first = recorded_scores(name, "stage1", side)
    first = first if side == "i2t" else first.T
    best = want(name)["topk_text_per_image" if side == "i2t" else "topk_image_per_text"]
    sure = compare_golden.check_shortlist(best, first)
    low, high = np.where(sure, low, 0), np.where(sure, high, first.shape[1])
  return low, high


def test_recalls_are_the_published_ones(name, run):
  assert team_golden.MANIFEST["tolerance"]["eval metrics"] == "exact"
  report = run[8]
  metrics_of = json.loads(golden_files.path("team", name, "eval_metrics.json").read_text())
  for stage, prefix in (("stage1", "first_"), ("stage2", "")):
    recorded, tied = metrics_of[stage], False
    for direction, ours in DIRECTIONS:
      bounds = rank_bounds(name, stage, ours)
      tied |= (bounds[0] != bounds[1]).any()
      for k in metrics.RECALL_AT:
        mine, theirs = report[f"{prefix}{ours}_r{k}"], recorded[f"{direction}_r{k}"]
        compare_golden.check_recall(mine, theirs, k, bounds)
    if not tied:
      assert report[f"{prefix}mean_r"] == pytest.approx(recorded["r_mean"], abs=1e-9)


CASES = sorted({k.split("/")[0] for k in golden_files.arrays("team", "metrics", "itm_eval.npz")})


@pytest.mark.parametrize("case", CASES)
def test_metrics(case):
  arrays = golden_files.arrays("team", "metrics", "itm_eval.npz")
  recorded = json.loads(golden_files.path("team", "metrics", "itm_eval.json").read_text())[case]
  scores = {"i2t": arrays[f"{case}/score_i2t"], "t2i": arrays[f"{case}/score_t2i"].T}
  owner, tied = arrays[f"{case}/txt2img"], False
  report = metrics.merge_directions(*(metrics.summarise(s, owner) for s in scores.values()))
  for n, (direction, side) in enumerate(DIRECTIONS):
    bounds = compare_golden.rank_bounds(scores[side], owner)[side]
    ranks = metrics.retrieval_ranks(scores[side], owner)[n]
    compare_golden.check_ranks(ranks, arrays[f"{case}/rank_{side}"], bounds)
    for k in metrics.RECALL_AT:
      mine, theirs = report[f"{side}_r{k}"], recorded[f"{direction}_r{k}"]
      compare_golden.check_recall(mine, theirs, k, bounds)
    tied |= (bounds[0] != bounds[1]).any()
  if not tied:
    assert report["mean_r"] == pytest.approx(recorded["r_mean"], abs=1e-9)
