"""ZeroVL's linear probe: features, steps of LARS, and its corner cases, against the original."""

import ast
import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zerovl_golden
from flax import nnx
from zerovl_golden import EMBEDDING, FINAL, LOSS, MANIFEST, close, close_gradients, recorded

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.evaluation import metrics
from xmodal_jax.evaluation.labels import class_ranks
from xmodal_jax.evaluation.probe import classifier as classifier_lib
from xmodal_jax.evaluation.probe import lars
from xmodal_jax.optim import schedules, train_state, transforms
from xmodal_jax.runtime import setup

PROBE = MANIFEST["linear_probe_config"]


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def inputs():
  return golden_files.arrays("zerovl", "inputs_linear.npz")


@functools.cache
def outputs():
  return golden_files.arrays("zerovl", "outputs_linear.npz")


@functools.cache
def loaded(file: str):
  """The model of a linear-probe file, restored as config.init is."""
  c = config_lib.base()
  c.model.update(
    dict(system="zerovl", image=zerovl_golden.image_config(), classes=PROBE["classes"])
  )
  built = setup.build(c)
  path = str(golden_files.path("zerovl", file))
  params, stats, _ = restore.load(path, "zerovl", built.params, built.stats)
  return nnx.merge(built.graphdef, params, stats), params


def features(step: int) -> jax.Array:
  model, _ = loaded("ckpt_linear_init.pth")
  image = np.ascontiguousarray(np.moveaxis(inputs()["image"][step], 1, -1))
  return jax.jit(model.probe_features)({"image": jnp.asarray(image)})


def torch_names(params) -> dict[str, np.ndarray]:
  return {"weight": np.asarray(params["kernel"]).T, "bias": np.asarray(params["bias"])}


def classifier(prefix: str) -> dict[str, jax.Array]:
  weight, bias = (outputs()[f"{prefix}/classifier.{k}"] for k in ("weight", "bias"))
  return {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}


def section():
  """config.probe of the recorded run."""
  o, s, p = PROBE["optimizer"], PROBE["schedule"], config_lib.base().probe
  assert o["name"] == "LARS" and s["name"] == "cosine_schedule_with_warmup"
  p.momentum, p.weight_decay, p.eta = o["momentum"], o["weight_decay"], o["eta"]
  p.lr, p.warmup = float(s["lr"]), f"{s['warmup_steps']} steps"
  p.total, p.batch_size = f"{s['total_steps']} steps", PROBE["batch"]
  return p


def test_files_are_read():
  _, params = loaded("ckpt_linear_init.pth")
  for name, want in torch_names(classifier("init")).items():
    np.testing.assert_array_equal(torch_names(params["classifier"])[name], want)
  steps = len(inputs()["label"])
  _, trained = loaded(zerovl_golden.step_file("linear"))
  for name, want in torch_names(classifier(f"step{steps - 1}")).items():
    np.testing.assert_array_equal(torch_names(trained["classifier"])[name], want)
  jax.tree.map(np.testing.assert_array_equal, trained["image"], params["image"])  # frozen


def test_features():
  close(features(0), outputs()["final/features"], EMBEDDING)


def test_steps():
  """Loss, accuracies, gradients, learning rate and weights of every recorded step."""
  p, want = section(), outputs()
  schedule = lars.make_schedule(p, schedules.RunLength(p.batch_size, p.batch_size, p.total))
  tx = lars.make_optimizer(p, schedule)
  params = classifier("init")
  state = train_state.TrainState(jnp.int32(0), params, {}, tx.init(params))
  update = jax.jit(functools.partial(lars.update, tx, schedule))
  for step, label in enumerate(inputs()["label"]):
    x, label = features(step), jnp.asarray(label, jnp.int32)
    grads = jax.grad(lambda q: lars.loss(q, x, label)[0])(state.params)
    got = {f"grad_{k}": v for k, v in torch_names(grads).items()}
    close_gradients(got, {k: want[f"step{step}/{k}"] for k in got})
    state, out = update(state, x, label)
    close(out["loss"], want["loss"][step], LOSS)
    for ours, theirs in (("top1", "acc1"), ("top5", "acc5")):
      close(out[ours], want[theirs][step], 1e-3, ours)  # percent
    np.testing.assert_allclose(out["lr"], want["lr"][step], rtol=1e-6)
    for name, value in torch_names(state.params).items():
      close(value, want[f"step{step}/classifier.{name}"], FINAL, f"step {step}, {name}")
  label = jnp.asarray(inputs()["label"][0], jnp.int32)
  logits = classifier_lib.logits(state.params, features(0))
  close(logits, want["final/logits"], EMBEDDING)
  report = metrics.accuracy(np.asarray(class_ranks(logits, label)), np.asarray(label))
  close([report["top1"], report["top5"]], want["final/acc"], 1e-3)


def test_schedule_of_the_released_recipe():
  """config.probe on ImageNet-1K: 78 steps an epoch, 779 of 7020 steps of warm-up from 0."""
  p = config_lib.base().probe
  run = schedules.RunLength(1281167, p.batch_size, p.total)
  assert (run.steps_per_epoch, run.total_steps) == (78, 7020)
  lr = lars.make_schedule(p, run)
  half = (1 + np.cos(np.pi * (3000 - 779) / (7020 - 779))) / 2
  got = [lr(s, xp=np) for s in (0, 1, 778, 779, 3000)]
  np.testing.assert_allclose(got, p.lr * np.array([0, 1 / 779, 778 / 779, 1, half]), rtol=1e-12)


CASES = sorted(k for k in recorded(golden_files.arrays("zerovl", "outputs_linear.npz"), "lars"))


@pytest.mark.parametrize("case", [k for k in CASES if k not in ("p0", "grads")])
def test_lars_cases(case):
  """Zero parameters, zero gradients, a tensor that is not adapted; options of the manifest."""
  meaning = MANIFEST["arrays"][f"outputs_linear/lars/{case}"]["meaning"]
  rate = float(re.search(r"LARS lr ([0-9.]+)", meaning)[1])
  options = ast.literal_eval(re.search(r"\{.*?\}", meaning)[0])
  want = outputs()[f"lars/{case}"]  # [step, tensor, ...]; the last is the first one not adapted
  start, grads = outputs()["lars/p0"], outputs()["lars/grads"]
  names = [f"p{i}" for i in range(len(start))] + ["excluded"]
  tree = lambda arrays: dict(zip(names, map(jnp.asarray, [*arrays, arrays[0]]), strict=True))
  params = tree(start)
  adapted = {name: name != "excluded" for name in names}
  tx = transforms.lars(optax.constant_schedule(rate), adapted=adapted, **options)
  state, update = tx.init(params), jax.jit(tx.update)
  for step, g in enumerate(grads):
    updates, state = update(tree(g), state, params)
    params = optax.apply_updates(params, updates)
    for name, value in zip(names, want[step], strict=True):
      close(params[name], value, FINAL, f"step {step}, {name}")
