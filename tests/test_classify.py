"""Zero-shot classification: prompts, both ways to average templates, ranks, errors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from labelled import COUNT, NAMES, weights

from xmodal_jax.checkpoints import model_files
from xmodal_jax.data import inputs
from xmodal_jax.data import text as text_lib
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.evaluation import batching, retrieval, zero_shot
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import base
from xmodal_jax.runtime import setup

TEMPLATES = ("a photo of a {}.", "{} or a {}", "many {}s, drawn")


def config(data: str, **changes):
  c = tiny.config(data)
  c.model.image.depth = c.model.text.depth = 1
  c.data.test, c.data.image.size = "val", 48
  return tiny._change(c, changes)


@pytest.fixture(scope="module")
def model(labelled_data, tmp_path_factory) -> tuple[str, setup.Built]:
  """A converted directory of a random CLIP, and its abstract model."""
  built = setup.build(config(labelled_data))
  folder = tmp_path_factory.mktemp("clip") / "model"
  meta = dict(system="clip", source="drawn", sha256="0", config={}, converter=meta_lib.VERSION)
  model_files.save_model(folder, *weights(built), meta)
  return str(folder), built


def text_batches(c, texts, tokenizer):
  sizes = dict(batch_size=c.eval.batch_size, length=c.text.length, truncate=c.text.truncate)
  return zero_shot.text_batches(texts, tokenizer, **sizes)


@pytest.fixture
def templates(tmp_path) -> str:
  path = tmp_path / "templates.txt"
  path.write_text("\n".join(TEMPLATES) + "\n")
  return str(path)


def test_prompts():
  assert zero_shot.prompts(["ox", "a {}"], ["{}.", "{} and {}"]) == [
    "ox.", "ox and ox", "a {}.", "a {} and a {}",
  ]  # fmt: skip


def test_classes_by_mean_embeddings(labelled_data, model, templates, tmp_path):
  """Compared with the definition in numpy on the evaluator's features, for two block sizes."""
  init, built = model
  c = config(labelled_data, init=init, classify__templates=templates)
  report = zero_shot.classify(c, tmp_path / "a")
  c.classify.block = 2
  assert zero_shot.classify(c, tmp_path / "b")["test"] == report["test"]
  saved = json.loads((tmp_path / "a" / "results.json").read_text())
  assert saved["test"] == report["test"] and saved["protocol"]["templates"] == list(TEMPLATES)
  assert saved["protocol"]["images"] == COUNT["val"] and saved["protocol"]["classes"] == len(NAMES)

  read = inputs.from_config(c)
  state, _ = state_lib.load_state(built, init)
  ev = retrieval.from_config(c, read, built)
  images, ids = ev.encode(state, "image", read.images(read.split("test")))
  texts = [t.replace("{}", n) for n in NAMES for t in TEMPLATES]
  embeds, order = ev.encode(state, "text", text_batches(c, texts, read.tokenizer))
  np.testing.assert_array_equal(order, np.arange(len(texts)))
  classes = embeds["embed"].reshape(len(NAMES), len(TEMPLATES), -1).mean(1)
  classes /= np.linalg.norm(classes, axis=1, keepdims=True)
  label = (COUNT["train"] + ids) % len(NAMES)
  right = (images["embed"] @ classes.T).argmax(1) == label
  assert report["test"]["top1"] == pytest.approx(100 * right.mean())
  first = (images["embed"] @ embeds["embed"][:: len(TEMPLATES)].T).argmax(1)
  assert 0 < right.mean() < 1 and (first != (images["embed"] @ classes.T).argmax(1)).any()


class Levels(base.System):
  """A system whose texts are several vectors, not one."""

  second_stage = ("tokens",)

  def encode_image(self, batch, key=None):
    return {"levels": batch["image"], "tokens": batch["image"]}

  def score(self, images, texts):
    assert images.keys() == texts.keys() == {"levels"}
    return jnp.einsum("ipd,tqd->itpq", images["levels"], texts["levels"]).max((2, 3))


@pytest.mark.parametrize("block", [1, 4, 15])
def test_scores_of_templates_are_averaged(block):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  images, texts = draw(6, 2, 4), {"levels": draw(5 * 3, 3, 4)}
  label = np.array([0, 1, 2, 3, 4, -1], np.int32)
  features, count = zero_shot.class_features(texts, 3)
  assert features is texts and count == 3
  graphdef, _, _ = nnx.split(Levels(), nnx.Param, nnx.BatchStat)
  step = zero_shot.make_step(graphdef, Levels.second_stage, 5, 3, None)
  batch = dict(image=images, label=label, valid=label >= 0, image_id=np.arange(6))
  out = step({}, {}, batch, batching.split_blocks(features, block))
  scores = np.einsum("ipd,tqd->itpq", images, texts["levels"]).max((2, 3)).reshape(6, 5, 3).mean(-1)
  want = [(row > row[k]).sum() for row, k in zip(scores, label[:5], strict=False)]
  np.testing.assert_array_equal(out["rank"][:5], want)
  assert max(want) > 0


def test_text_batches_are_padded():
  c, seen = config(""), []

  def tokenizer(texts, length, truncate):
    seen.extend(texts)
    return np.zeros((len(texts), length), np.int32), np.ones((len(texts), length), bool)

  batches = list(text_batches(c, [str(i) for i in range(21)], tokenizer))
  assert [b["text_ids"].shape for b in batches] == [(16, 24)] * 2
  assert seen == [str(i) for i in range(21)] + [""] * 11
  assert np.concatenate([b["image_id"] for b in batches]).tolist() == [*range(21)] + [-1] * 11
  assert np.concatenate([b["valid"] for b in batches]).sum() == 21


def test_names_and_templates_from_files(tmp_path, caplog):
  own = ("n01", "n02", "n03")
  assert zero_shot.class_names("", "val", own) == ["n01", "n02", "n03"]
  assert zero_shot.read_templates("") == ["a photo of a {}."]
  assert not caplog.records
  zero_shot.class_names("", "val", ("n01", "n02", "n01"))
  assert "split 'val': classes share the names n01: their texts are the same" in caplog.text
  names, templates = str(tmp_path / "names"), str(tmp_path / "templates")
  write = lambda name, text: (tmp_path / name).write_bytes(text)
  write("names", "\ufeffcrane\r\n maillot \ncrane\n\n".encode())
  assert zero_shot.class_names(names, "val", own) == ["crane", "maillot", "crane"]
  assert "share the names crane" in caplog.text
  for text, message in (
    (b"crane\nox\n", r"has 2 names, split 'val' 3 classes"),
    (b"crane\n\nox\ndog", r"names:2 is empty; expected one entry per line"),
    (b"", r"names:1 is empty"),
    (b"\xff\n", "not UTF-8"),
  ):
    write("names", text)
    with pytest.raises(DatasetError, match=message):
      zero_shot.class_names(names, "val", own)
  write("templates", b"a {}\na photo\n")
  with pytest.raises(DatasetError, match=r"templates:2 is 'a photo'; expected {} where"):
    zero_shot.read_templates(templates)
  (tmp_path / "names").unlink()
  with pytest.raises(DatasetError, match=r"config\.classify\.names: there is no file"):
    zero_shot.class_names(names, "val", own)


def test_prompts_with_the_same_tokens_are_noticed(caplog):
  tokenizer = text_lib.ClipTokenizer(max_merges=200)
  check = lambda template, length: zero_shot.warn_same_tokens(
    ["red cube", "blue cube", "red cube"], [template], tokenizer, length, True
  )
  check("a photo of a {}.", 24)
  assert not caplog.records
  check("a photo of a very large {}.", 8)
  assert "1 of 2 names have the same tokens as another" in caplog.text
  assert "config.text.length=8 cuts the text" in caplog.text


def test_what_cannot_be_classified(labelled_data, tiny_data, tmp_path):
  with pytest.raises(ValueError, match=r"config\.init is empty"):
    zero_shot.classify(config(labelled_data), tmp_path)
  with pytest.raises(DatasetError, match=r"config\.data\.test, has no class names"):
    zero_shot.classify(config(tiny_data, init="x", data__test="test"), tmp_path)
  c = config(labelled_data, init="x")
  del c.model.text
  with pytest.raises(ValueError, match="no text tower"):
    zero_shot.classify(c, tmp_path)
