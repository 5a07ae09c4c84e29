"""The linear probe: cached features, training on cached and streamed ones, resuming, errors."""

import functools
import json
import logging
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from labelled import COUNT, NAMES, weights, write

from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.data import inputs, pipeline
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.evaluation import metrics
from xmodal_jax.evaluation.labels import class_ranks, report
from xmodal_jax.evaluation.probe import classifier as classifier_lib
from xmodal_jax.evaluation.probe import features, lars, lbfgs, linear_probe, regression, training
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import team
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import preemption, setup
from xmodal_jax.runtime import step as step_lib


def config(data: str, source: pathlib.Path | str = "", **changes):
  """A small ZeroVL without a text tower."""
  c = tiny.config(data, init=str(source))
  image = dict(size=16, patch=8, width=32, depth=1, heads=2)
  c.model = dict(system="zerovl", image=image, mean=(0.5,) * 3, std=(0.5,) * 3)
  c.data.test, c.data.image.size = "val", 48  # center crop
  c.probe.batch_size, c.probe.total, c.probe.every = 16, "3 epochs", "2 epochs"
  c.probe.lr, c.probe.warmup, c.probe.eta = 1.0, "2 steps", 0.2
  c.checkpoint.every, c.log_every = "100 steps", 8
  return tiny._change(c, changes)


STEPS = 3 * (COUNT["train"] // 16)


@pytest.fixture(scope="module")
def tower(labelled_data, tmp_path_factory) -> pathlib.Path:
  """A converted directory of a random image tower."""
  folder = tmp_path_factory.mktemp("tower") / "model"
  params, stats = weights(setup.build(config(labelled_data)))
  meta = dict(system="zerovl", source="drawn", sha256="0", config={}, converter=meta_lib.VERSION)
  model_files.save_model(folder, params, stats, meta)
  return folder


@pytest.fixture(scope="module")
def cached(labelled_data, tower, tmp_path_factory) -> pathlib.Path:
  """The workdir of a finished probe on cached features."""
  folder = tmp_path_factory.mktemp("cached")
  linear_probe.linear_probe(config(labelled_data, tower), folder)
  return folder


def lines(folder, kind):
  rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
  rows = [{k: v for k, v in r.items() if k != "examples_per_second"} for r in rows]
  return [r for r in rows if r["kind"] == kind]


def classifier(folder):
  with np.load(folder / classifier_lib.FILE) as f:
    return dict(f)


def same(ours: pathlib.Path, theirs: pathlib.Path, atol=0.0):
  ours, theirs = classifier(ours), classifier(theirs)
  for key in ("kernel", "bias"):
    np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=atol, err_msg=key)


def results(folder):
  return json.loads((folder / "results.json").read_text())


def test_workdir(cached):
  saved = results(cached)
  assert saved["test"]["top1"] > 80 and saved["test"]["top5"] == 100  # chance is 20
  assert saved["protocol"]["images"] == COUNT["val"] and saved["protocol"]["steps"] == STEPS
  assert saved["checkpoint"]["sha256"] == "0"
  assert [r["step"] for r in lines(cached, "train")] == [4, 8, STEPS]
  assert [r["step"] for r in lines(cached, "val")] == [8, STEPS]
  assert (
    lines(cached, "val")[-1]["top1"] == saved["test"]["top1"]
  )  # val is also the test split here
  found = classifier(cached)
  assert found["kernel"].shape == (32, 5) and found["kernel"].dtype == np.float32
  assert found["bias"].shape == (5,) and tuple(found["class_names"]) == NAMES
  # One file per split.
  assert len(list(cached.glob("features-*.npz"))) == 2 and not list(cached.glob("*.tmp"))


def test_evaluated_again(labelled_data, tower, cached, tmp_path, monkeypatch):
  """Evaluating classifier.npz, and rerunning the command, give the same results from the caches."""
  file = str(cached / classifier_lib.FILE)
  given = config(labelled_data, tower, probe__classifier=file)
  assert linear_probe.linear_probe(given, tmp_path)["test"] == results(cached)["test"]
  monkeypatch.setattr(pipeline, "eval_images", None)
  again = linear_probe.linear_probe(config(labelled_data, tower), cached)
  assert again == results(cached)


class StopAfter:
  """A fake Preemption that returns True after n calls."""

  def __init__(self, n: int):
    self.left = n

  def __call__(self) -> bool:
    self.left -= 1
    return self.left < 0


def run_in_parts(c, folder, questions) -> list[int | None]:
  """Runs that stop after these numbers of calls, then one to the end; their last saved steps."""
  saved = []
  for n in questions:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(preemption, "Preemption", functools.partial(StopAfter, n))
      assert linear_probe.linear_probe(c, folder) is None
    saved.append(checkpointer.Checkpoints(folder, keep=1, metric="", read_only=True).latest())
  linear_probe.linear_probe(c, folder)
  return saved


def test_stop_and_go_on(labelled_data, tower, cached, tmp_path):
  """Stopped while computing features of the test split, then between two epochs."""
  batches = -(-COUNT["train"] // 16) + -(-COUNT["val"] // 16)
  saved = run_in_parts(config(labelled_data, tower), tmp_path, (1, batches + 1))
  assert saved == [None, 8]
  same(tmp_path, cached)
  for kind in ("train", "val", "test"):
    assert lines(tmp_path, kind) == lines(cached, kind)


@pytest.mark.full
def test_streamed(labelled_data, tower, cached, tmp_path):
  """Streaming without augmentation, stopped within an epoch, gives the classifier of the cached
  features; with augmentation it gives another one."""
  c = config(labelled_data, tower, probe__augment=True)
  val = -(-COUNT["val"] // 16)
  saved = run_in_parts(c, tmp_path / "plain", (val + 2,))
  assert saved == [3]
  same(tmp_path / "plain", cached, 1e-5)
  assert len(list((tmp_path / "plain").glob("features-*.npz"))) == 1
  changed = config(labelled_data, tower, probe__augment=True, data__crop="random")
  linear_probe.linear_probe(changed, tmp_path / "changed")
  with pytest.raises(AssertionError):
    same(tmp_path / "changed", cached, 1e-3)


@pytest.mark.full
def test_device_count_changes_nothing(labelled_data, tower, cached, tmp_path, monkeypatch):
  monkeypatch.setattr(setup, "build", functools.partial(setup.build, devices=jax.devices()[:1]))
  linear_probe.linear_probe(config(labelled_data, tower), tmp_path)
  same(tmp_path, cached, 1e-5)


def test_first_classifier_is_uniform():
  draw = lambda seed: lars.init_classifier(jax.random.key(seed), 400, 300)
  for value in draw(1).values():
    assert np.abs(value).max() <= 400**-0.5
    assert np.std(value) == pytest.approx(400**-0.5 / 3**0.5, rel=0.1)
  assert not np.array_equal(draw(1)["kernel"], draw(2)["kernel"])


# --- features ------------------------------------------------------------------------------------


def test_features_are_those_of_the_model(labelled_data, tower, tmp_path):
  def extract(c):
    read = inputs.from_config(c)
    of = features.load_tower(c, setup.build(c))
    return of.extract(read, "val", tmp_path, lambda: False), next(read.images(read.split("val")))

  c = config(labelled_data, tower)
  found, batch = extract(c)
  assert found.features.shape == (COUNT["val"], 32) and found.features.dtype == np.float32
  want = [(COUNT["train"] + i) % len(NAMES) for i in range(COUNT["val"])]
  np.testing.assert_array_equal(found.label, want)
  built = setup.build(c)
  model = nnx.merge(
    built.graphdef, *restore.load(str(tower), "zerovl", built.params, built.stats)[:2]
  )

  @jax.jit
  def direct(image):
    return model.image.ln_post(model.image(model.pixels(image))[:, 0])

  np.testing.assert_allclose(found.features[:16], direct(batch["image"]), rtol=0, atol=1e-5)
  assert found.features.std(0).max() > 0.1

  files = lambda: len(list(tmp_path.glob("features-*.npz")))
  extract(config(labelled_data, tower, data__threads=2))
  assert files() == 1
  extract(config(labelled_data, tower, data__image__rgb_first=True))
  assert files() == 2


def test_towers_give_their_vectors():
  """probe_features are taken before the projection and the normalisation."""
  image = jnp.asarray(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8))
  c = tiny.config("")
  c.model.image = dict(kind="resnet", size=32, width=16, depths=(1, 1, 1, 1))
  built = setup.build(c)
  abstract = lambda: nnx.merge(built.graphdef, *weights(built)).probe_features({"image": image})
  assert jax.eval_shape(abstract).shape == (2, 16)  # the width of the attention pool

  def both(model):
    x = model.pixels(image)
    if isinstance(model, team.TEAM):
      return model.probe_features({"image": image}), model.encode_image({"image": image})["tokens"]
    return model.probe_features({"image": image}), model.image.ln_post(model.image(x))

  for c in (tiny.config(""), tiny.team("")):
    c.model.image.size, c.model.image.patch, c.model.image.depth = 32, 16, 1
    built = setup.build(c)
    got, tokens = jax.jit(lambda p, s: both(nnx.merge(built.graphdef, p, s)))(*weights(built))
    assert got.shape == (2, 32) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, tokens[:, 0], rtol=0, atol=1e-5)


# --- counting ------------------------------------------------------------------------------------


def test_ranks_and_ties():
  scores = jnp.array([[3.0, 1, 2, 0], [1, 1, 1, 1], [0, 2, 2, 2], [0, jnp.nan, 0, 0]])
  label = jnp.array([2, 3, 1, 0])
  np.testing.assert_array_equal(class_ranks(scores, label), [1, 3, 0, -1])
  assert report(np.array([0, 1, 4, 5]), np.array([0, 0, 0, 2])) == {
    "top1": 25, "top5": 75, "mean_per_class": pytest.approx(100 / 6),
  }  # fmt: skip
  with pytest.raises(metrics.NonFiniteError, match="1 of 4 images"):
    report(np.array(class_ranks(scores, label)), np.array(label))


def test_scorer_leaves_out_padding_and_collapsed_is_chance(labelled_data):
  c = config(labelled_data)
  mesh, rng = setup.build(c).mesh, np.random.default_rng(0)
  label = np.arange(40, dtype=np.int32) % 20
  x = rng.standard_normal((40, 8)).astype(np.float32)
  kernel = rng.standard_normal((8, 20)).astype(np.float32)
  scorer = classifier_lib.Scorer(mesh, features.Features(None, x, label), 16)  # 8 rows of padding
  params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(20)}
  place = np.argsort(-(x @ kernel), axis=1, kind="stable")
  ranks = np.argmax(place == label[:, None], axis=1)
  assert scorer(params) == metrics.accuracy(ranks, label)
  collapsed = scorer({"kernel": jnp.zeros((8, 20)), "bias": jnp.ones(20)})
  assert collapsed == {"top1": 5.0, "top5": 25.0, "mean_per_class": 5.0}


# --- logistic regression -------------------------------------------------------------------------


def regression_data(n=60, d=6, classes=4):
  rng = np.random.default_rng(3)
  label = rng.integers(0, classes, n).astype(np.int32)
  x = rng.standard_normal((n, d)).astype(np.float32) + 0.8 * np.eye(classes, d)[label]
  return x.astype(np.float32), label


def test_regression_is_at_its_minimum():
  """Compared with Newton's method in float64; rows of weight 0 have no effect."""
  (x, label), classes, l2 = regression_data(), 4, 2.0
  weight = (np.arange(len(label)) % 6 != 0).astype(np.float32)
  part = lambda a: jnp.asarray(a.reshape(4, -1, *a.shape[1:]))
  fit = lbfgs.make_fit(classes, 200, None)
  params, facts = fit(part(x), part(label), part(weight), l2)
  assert facts["gradient"] <= lbfgs.TOLERANCE and facts["steps"] < 60

  rows, y = x[weight > 0].astype(np.float64), np.eye(classes)[label[weight > 0]]
  rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)  # the bias is the last row
  w, penalty = np.zeros((rows.shape[1], classes)), np.repeat([l2] * x.shape[1] + [0.0], classes)
  for _ in range(30):
    e = np.exp(rows @ w)
    p = e / e.sum(1, keepdims=True)
    gradient = (rows.T @ (p - y)).ravel() + penalty * w.ravel()
    curve = np.einsum("nc,ck->nck", p, np.eye(classes)) - np.einsum("nc,nk->nck", p, p)
    hessian = np.einsum("ni,nck,nj->icjk", rows, curve, rows).reshape(w.size, w.size)
    w = w - np.linalg.lstsq(hessian + np.diag(penalty), gradient, rcond=None)[0].reshape(w.shape)
  np.testing.assert_allclose(params["kernel"], w[:-1], rtol=0, atol=2e-4)
  centred = lambda b: b - b.mean()  # biases are determined up to a constant
  np.testing.assert_allclose(centred(params["bias"]), centred(w[-1]), rtol=0, atol=2e-4)


def test_search_finds_the_best_strength():
  asked = []

  def score(l2, peak=10**1.4):
    asked.append(l2)
    return -abs(np.log10(l2 / peak))

  assert lbfgs.search(score) == pytest.approx(10**1.375) and len(asked) == len(set(asked)) == 15
  assert lbfgs.search(lambda l2: 50.0) == 1e6  # ties: the largest l2
  assert lbfgs.search(functools.partial(score, peak=1e-9)) == 1e-6


def test_regression_from_the_workdir(labelled_data, tower, cached, tmp_path, monkeypatch):
  """If val is the test split, l2 is chosen on held-out training images."""
  for file in cached.glob("features-*.npz"):
    (tmp_path / file.name).write_bytes(file.read_bytes())
  monkeypatch.setattr(pipeline, "eval_images", None)
  c = config(labelled_data, tower, probe__optim="lbfgs", probe__holdout=0.3)
  found = linear_probe.linear_probe(c, tmp_path)
  assert found["test"]["top1"] > 90 and found["protocol"]["train_images"] == COUNT["train"]
  assert len(lines(tmp_path, "val")) == 15
  best = max(lines(tmp_path, "val"), key=lambda r: (r["top1"], r["l2"]))
  assert found["protocol"]["l2"] == best["l2"]


def test_what_a_regression_learns_from(labelled_data, monkeypatch):
  """If val is not the test split, l2 is chosen on val, and the final fit includes val."""
  rng, seen, tries = np.random.default_rng(0), [], []
  split = types.SimpleNamespace(class_names=NAMES)
  make = lambda n: features.Features(
    split, rng.standard_normal((n, 3)).astype(np.float32), rng.integers(0, 5, n).astype(np.int32)
  )
  parts = {"train": make(19), "val": make(9)}

  def fit(x, label, weight, l2):
    on = np.asarray(weight).ravel() > 0
    seen.append((float(l2), np.asarray(x).reshape(-1, 3)[on], np.asarray(label).ravel()[on]))
    params = {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5).at[0].set(float(l2) == 1)}
    return params, {"steps": jnp.int32(1), "gradient": jnp.float32(0)}

  monkeypatch.setattr(lbfgs, "make_fit", lambda *a: fit)
  writer = types.SimpleNamespace(scalars=lambda step, kind, values: tries.append(values["l2"]))
  c = config(labelled_data, probe__optim="lbfgs")
  options = dict(seed=c.seed, writer=writer, stop=lambda: False)

  def run():
    built = setup.build(c)
    return regression.regress(c.probe, built, parts["train"], parts["val"], **options)

  *_, facts = run()
  assert len(tries) == len(seen) - 1 and facts["train_images"] == 28 and facts["l2"] == seen[-1][0]
  for l2, x, label in seen[:-1]:
    assert l2 in np.float32(tries)
    np.testing.assert_array_equal(x, parts["train"].features)
    np.testing.assert_array_equal(label, parts["train"].label)
  both = [parts["train"], parts["val"]]
  np.testing.assert_array_equal(seen[-1][1], np.concatenate([p.features for p in both]))
  np.testing.assert_array_equal(seen[-1][2], np.concatenate([p.label for p in both]))
  # With a given l2 there is no search, and val is not used.
  seen.clear()
  c.probe.l2 = 3.0
  run()
  assert len(seen) == 1 and seen[0][0] == 3.0
  np.testing.assert_array_equal(seen[0][1], parts["train"].features)


# --- errors --------------------------------------------------------------------------------------


def test_errors(labelled_data, tower, tiny_data, tmp_path):
  def run(data=labelled_data, **kw):
    linear_probe.linear_probe(config(data, tower, **kw), tmp_path / str(sorted(kw)))

  with pytest.raises(ValueError, match=r"config\.probe\.optim is 'sgd'; expected lars or lbfgs"):
    run(probe__optim="sgd")
  with pytest.raises(ValueError, match=r"config\.probe\.augment needs optim='lars'"):
    run(probe__optim="lbfgs", probe__augment=True)
  with pytest.raises(ValueError, match=r"config\.probe\.batch_size is 12, not a multiple of 8"):
    run(probe__batch_size=12)
  with pytest.raises(DatasetError, match=r"split 'val', config\.data\.test, has no class names"):
    run(tiny_data)
  with pytest.raises(ValueError, match=r"70 images in batches of config\.probe\.batch_size=128"):
    run(probe__batch_size=128, probe__augment=True)
  with pytest.raises(step_lib.NonFiniteLossError, match=r"lower config\.probe\.lr"):
    run(probe__lr=1e30, probe__eta=1e10)


def test_classifier_that_does_not_fit(labelled_data, tower, tmp_path):
  found = features.Features(types.SimpleNamespace(class_names=NAMES), np.zeros((1, 4)), np.zeros(1))
  of = types.SimpleNamespace(state=types.SimpleNamespace(params={}))
  given = lambda source: classifier_lib.load(source, of, found)
  with pytest.raises(checkpointer.CheckpointError, match=r"config\.model has no classifier"):
    given("model")
  with pytest.raises(checkpointer.CheckpointError, match="there is no file"):
    given(str(tmp_path / "absent.npz"))
  file = tmp_path / "other.npz"
  np.savez(file, kernel=np.zeros((4, 2)), bias=np.zeros(2), class_names=["a", "b"])
  with pytest.raises(checkpointer.CheckpointError, match="is of 2 classes, first a, b; expected"):
    given(str(file))
  np.savez(file, kernel=np.zeros((3, 5)), bias=np.zeros(5), class_names=NAMES)
  with pytest.raises(checkpointer.CheckpointError, match=r"a kernel of \(3, 5\), but .* \(4, 5\)"):
    given(str(file))


def test_unlabelled_pictures_are_an_error(tower, tmp_path):
  data = write(tmp_path / "data", count={"train": 17, "val": 5}, last=-1)
  for augment in (False, True):
    c = config(data, tower, probe__augment=augment)
    with pytest.raises(DatasetError, match=r"1 of \d+ images of split 'train' have no label"):
      linear_probe.linear_probe(c, tmp_path / f"run{augment}")


def test_workdir_of_a_training_run_is_refused(labelled_data, tower, tmp_path):
  checkpoints = checkpointer.Checkpoints(tmp_path, keep=1, metric="rsum")
  state = train_state.TrainState(jnp.int32(0), {"kernel": jnp.zeros(1)}, {}, ())
  checkpoints.save(1, state, dict(system="clip", metric="rsum"))
  checkpoints.close()
  with pytest.raises(checkpointer.CheckpointError, match=r"training run of clip.*config\.init"):
    linear_probe.linear_probe(config(labelled_data, tower), tmp_path)


def test_going_on_with_something_else():
  meta = dict(fingerprint="data", source={"sha256": "0"})
  saved = types.SimpleNamespace(restore_latest=lambda want, check: check(4, meta))
  new = lambda: jnp.zeros(1)
  with pytest.raises(checkpointer.CheckpointError, match="the model changed since step 4"):
    training.first_state(new, saved, meta | {"source": {"sha256": "1"}}, None)
  with pytest.raises(checkpointer.CheckpointError, match="the training data changed since step 4"):
    training.first_state(new, saved, meta | {"fingerprint": "other"}, None)


def test_random_tower_is_said_to_be_one(labelled_data, caplog):
  c = config(labelled_data)
  with caplog.at_level(logging.WARNING):
    of = features.load_tower(c, setup.build(c))
  assert "config.init is empty" in caplog.text and of.source["kind"] == "random weights"
