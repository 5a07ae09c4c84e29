"""TEAM's two-stage evaluation from annotation file and pictures to recalls, and its metrics."""

import functools
import json
import pathlib

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

TOP = 16  # candidates of the published evaluation


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
  pictures = golden_files.arrays("team", "eval_data", "images.npz")
  for item in json.loads(annotations.read_text()):
    file = root / item["image"]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures[file.stem]).save(file)
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
  c.text.clean, c.text.max_words = "albef", 30
  c.eval.batch_size, c.eval.block, c.eval.rerank_block = 8, (8, 32), (2, 4)
  assert (golden.model().top_k_text, golden.model().top_k_image) == (TOP, TOP)
  built = setup.build(c)
  read = inputs.Inputs(c)
  ev = retrieval.Evaluator(c, read, built)
  state = train_state.TrainState(None, golden.params, {}, None)
  split = read.split("test")
  batches = lambda n: -(-n // c.eval.batch_size)
  banks = [ev.bank(batches(n)) for n in (len(split), int(split.captions_per_record.sum()))]
  images, _ = ev.encode(state, "image", read.images(split), banks[0])
  texts, owner = ev.encode(state, "text", read.texts(split), banks[1])
  scores = ev.scores(state, images, texts)
  second = ev.second_scores(state, scores, *banks, np.ones(len(owner), bool))
  return golden, read, split, images, texts, scores, second, owner, ev(state, "test")


@pytest.fixture(scope="module", params=VARIANTS)
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
  # Sums of a bicubic filter may round to the next of 256 levels, which the manifest allows.
  atol = team_golden.number(team_golden.MANIFEST["tolerance"]["resized images"], "atol")
  np.testing.assert_allclose(ours[: len(recorded)], recorded, atol=atol)


def test_first_stage(name, run):
  _, _, _, images, texts, scores, _, _, _ = run
  close(texts["embed"], want(name)["text_embeds"], "text_embeds")
  close(images["embed"], want(name)["image_embeds"], "image_embeds")
  close(scores, want(name)["stage1/score_i2t"], "stage 1, image to text")
  close(scores.T, want(name)["stage1/score_t2i"], "stage 1, text to image")


def test_second_stage(name, run):
  by_image, by_text = run[6]
  for (candidates, scores), best, key in (
    (by_image, "topk_text_per_image", "stage2/score_i2t"),
    (by_text, "topk_image_per_text", "stage2/score_t2i"),
  ):
    np.testing.assert_array_equal(candidates, np.sort(want(name)[best]))
    recorded = np.take_along_axis(want(name)[key], candidates, 1)
    close(scores, recorded, key)
    every = want(name)["team_score_all_pairs"]
    every = every if "i2t" in key else every.T
    close(scores, np.take_along_axis(every, candidates, 1), "team_score_all_pairs")


def test_recalls_are_the_published_ones(name, run):
  assert team_golden.MANIFEST["tolerance"]["eval metrics"] == "exact"
  report = run[8]
  recorded = json.loads(golden_files.path("team", name, "eval_metrics.json").read_text())
  for stage, prefix in (("stage1", "first_"), ("stage2", "")):
    for direction, ours in (("txt", "i2t"), ("img", "t2i")):
      recalls = [report[f"{prefix}{ours}_r{k}"] for k in (1, 5, 10)]
      theirs = [recorded[stage][f"{direction}_r{k}"] for k in (1, 5, 10)]
      assert recalls == pytest.approx(theirs, abs=1e-9)
      assert np.mean(recalls) == pytest.approx(recorded[stage][f"{direction}_r_mean"], abs=1e-9)
    assert report[f"{prefix}mean_r"] == pytest.approx(recorded[stage]["r_mean"], abs=1e-9)


@pytest.mark.parametrize("case", ["regular", "ragged"])
def test_metrics(case):
  arrays = golden_files.arrays("team", "metrics", "itm_eval.npz")
  recorded = json.loads(golden_files.path("team", "metrics", "itm_eval.json").read_text())[case]
  get = lambda key: arrays[f"{case}/{key}"]
  i2t, _ = metrics.retrieval_ranks(get("score_i2t"), get("txt2img"))
  _, t2i = metrics.retrieval_ranks(get("score_t2i").T, get("txt2img"))
  np.testing.assert_array_equal(i2t, get("rank_i2t"))
  np.testing.assert_array_equal(t2i, get("rank_t2i"))
  reports = [metrics.summarise(s, get("txt2img")) for s in (get("score_i2t"), get("score_t2i").T)]
  report = metrics.merge_directions(*reports)
  for direction, ours in (("txt", "i2t"), ("img", "t2i")):
    for k in (1, 5, 10):
      assert report[f"{ours}_r{k}"] == pytest.approx(recorded[f"{direction}_r{k}"], abs=1e-9)
  assert report["mean_r"] == pytest.approx(recorded["r_mean"], abs=1e-9)
