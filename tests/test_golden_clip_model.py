"""CLIP's towers, losses, gradients and short trajectories against the original program."""

import re

import clip_golden
import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xmodal_jax.interop import torch_files
from xmodal_jax.models import clip
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import step as step_lib

MANIFEST = golden_files.manifest("clip")
TOLERANCE = MANIFEST["tolerance"]
MODELS = list(MANIFEST["models"])


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module", params=MODELS)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def golden(name):
  return clip_golden.Golden(name)


def arrays(name):
  return golden_files.arrays("clip", name, "inputs.npz"), golden_files.arrays(
    "clip", name, "outputs.npz"
  )


def close(ours, theirs, what):
  np.testing.assert_allclose(
    np.asarray(ours, np.float32), theirs, **TOLERANCE["eval_fp32"], err_msg=what
  )


def factor_of(name):
  """x of a tolerance that the manifest words as "max abs error <= x * max abs value ..."."""
  return float(re.search(r"<= *([0-9.e+-]+) *\* *max abs value", TOLERANCE[name])[1])


def close_to_scale(ours, theirs, factor, what):
  """max |a - b| <= factor * max |b|."""
  error = np.abs(np.asarray(ours, np.float32) - theirs).max()
  assert error <= factor * np.abs(theirs).max(), f"{what}: {error} of {np.abs(theirs).max()}"


@jax.jit
def outputs(model, b):
  image = model.image_features(model.pixels(b["image"]))
  text = model.text_features(b["text_ids"])
  i, t = model.encode_image(b), model.encode_text(b)
  logits = jnp.exp(model.logit_scale[...]) * model.score(i, t)
  return {
    "image_features": image,
    "text_features": text,
    "image_embeds": i["embed"],
    "text_embeds": t["embed"],
    "logits_per_image": logits,
    "logits_per_text": logits.T,
  }


def test_outputs(name, golden):
  inputs, want = arrays(name)
  for key, value in outputs(
    golden.model(), clip_golden.batch(inputs["images"], inputs["tokens"])
  ).items():
    close(value, want[key], key)


def test_pooled_position(name, golden):
  """Last position, right after the start, two ends, and no end with a tie of the largest id."""
  inputs, want = arrays(name)
  ours = golden.model().text_features(jnp.asarray(inputs["edge_tokens"]))
  close(ours, want["edge_text_features"], "edge_text_features")


@jax.jit
def taps(model, b):
  """Intermediate activations of the first row under the names of the manifest, channels last."""
  one = jax.tree.map(lambda x: x[:1], b)
  images = model.pixels(one["image"])
  out = {}
  if hasattr(model.image, "blocks"):
    tower = model.image
    kernel = tower.patch.kernel[...]
    out["visual.conv1"] = jax.lax.conv_general_dilated(
      images, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = out["visual.ln_pre"] = tower.embed(images)
    for i in range(tower.blocks.wi.bias.shape[0]):
      x = out[f"visual.block{i}"] = jax.tree.map(lambda a, i=i: a[i], tower.blocks)(x)
    out["visual.ln_post"] = tower.ln_post(x[:, 0])
  else:
    x = out["visual.stem"] = model.image.stem(images, False)
    for i in range(1, 5):
      x = out[f"visual.layer{i}"] = getattr(model.image, f"stage{i}")(x, False)
  ids = one["text_ids"]
  x = model.text.token(ids) + model.text.pos[: ids.shape[1]]
  for i in range(model.text.blocks.wi.bias.shape[0]):
    x = out[f"text.block{i}"] = jax.tree.map(lambda a, i=i: a[i], model.text.blocks)(x)
  out["text.ln_final"] = model.text.ln_final(x)
  return out


def test_taps(name, golden):
  inputs, want = arrays(name)
  ours = taps(golden.model(), clip_golden.batch(inputs["images"], inputs["tokens"]))
  recorded = {k.removeprefix("tap/"): v for k, v in want.items() if k.startswith("tap/")}
  assert recorded and recorded.keys() <= ours.keys()
  for key, value in recorded.items():
    close(ours[key], np.moveaxis(value, 1, -1) if value.ndim == 4 else value, key)


def test_fine_tuned_checkpoint(name):
  inputs, want = arrays(name)
  model = clip_golden.Golden(name, clip_golden.trained_file(name)).model()
  ours = outputs(model, clip_golden.batch(inputs["images"], inputs["tokens"]))
  for key, value in want.items():
    if key.startswith("itm/"):
      close(ours[key.removeprefix("itm/")], value, key)


def test_half_precision_features(name):
  inputs, want = arrays(name)
  model = clip_golden.Golden(name, dtype=jnp.float16).model()
  ours = outputs(model, clip_golden.batch(inputs["images"], inputs["tokens"]))
  assert ours["image_features"].dtype == jnp.float16
  for key, value in want.items():
    if key.startswith("half/"):
      close_to_scale(ours[key.removeprefix("half/")], value, factor_of("half_features"), key)


def run(name, golden, **changes):
  """The recorded training steps. Returns (metrics of each step, state after each step)."""
  inputs, _ = arrays(name)
  train = MANIFEST["models"][name]["train"]
  length = train["train_length_times_epochs"]
  schedule = clip_golden.schedule(
    train, schedules.RunLength(length, length // train["steps"], "1 epoch")
  )
  tx = clip_golden.optimizer(train, schedule, golden.params, **changes)
  step = step_lib.make_train_step(golden.graphdef, tx, jax.random.key(0), None, schedule)
  state, log, states = golden.state(tx), [], []
  for i in range(train["steps"]):
    b = clip_golden.batch(inputs["train_images"][i], inputs["train_tokens"][i])
    state, m = step(state, b)
    log.append(jax.device_get(m))
    states.append(jax.device_get(state))
  return log, states, schedule


def test_learning_rate(name, golden):
  _, want = arrays(name)
  train = MANIFEST["models"][name]["train"]
  length = train["train_length_times_epochs"]
  schedule = clip_golden.schedule(
    train, schedules.RunLength(length, length // train["steps"], "1 epoch")
  )
  np.testing.assert_allclose(
    schedule(want["train_fp32/step_arg"], np), want["train_fp32/lr"], **TOLERANCE["lr"]
  )


def test_gradients(name, golden):
  inputs, want = arrays(name)
  b = clip_golden.batch(inputs["train_images"][0], inputs["train_tokens"][0])

  def loss(params):
    model = nnx.merge(golden.graphdef, params, jax.tree.map(jnp.copy, golden.stats))
    return model.loss(b, jax.random.key(0))[0]

  ours = clip_golden.to_torch(jax.jit(jax.grad(loss))(golden.params), golden.stats)
  for key, value in want.items():
    if key.startswith("train_fp32/grad0/"):
      key = key.removeprefix("train_fp32/grad0/")
      drop = clip_golden.drop_null
      close_to_scale(drop(key, ours[key]), drop(key, value), factor_of("grad0"), key)
  for key, norm in zip(want["param_names"], want["train_fp32/grad0_norm"], strict=True):
    if not clip_golden.is_null(key):
      np.testing.assert_allclose(
        np.linalg.norm(ours[key]), norm, **TOLERANCE["grad0_norm"], err_msg=key
      )


@pytest.mark.full
def test_trajectory(name, golden):
  _, want = arrays(name)
  log, states, _ = run(name, golden)
  get = lambda key: np.array([m[key] for m in log])
  for ours, theirs in (("loss", "loss"), ("loss_i2t", "loss_img"), ("loss_t2i", "loss_txt")):
    np.testing.assert_allclose(
      get(ours), want[f"train_fp32/{theirs}"], rtol=0, **TOLERANCE["loss_fp32"]
    )
  before = np.log(get("logit_scale"))
  np.testing.assert_allclose(
    before, want["train_fp32/logit_scale_before"], rtol=0, **TOLERANCE["final_fp32"]
  )
  first = clip_golden.to_torch(states[0].params, states[0].stats)
  final = clip_golden.to_torch(states[-1].params, states[-1].stats)
  noise = clip_golden.noise_allowance(golden, states[-1])
  for key, value in want.items():
    kind, _, key = key.removeprefix("train_fp32/").partition("/")
    if kind == "bn_after_step0":
      np.testing.assert_allclose(first[key], value, **TOLERANCE["bn_after_step0"], err_msg=key)
  prefix = "train_fp32/final/"
  recorded = {k.removeprefix(prefix): v for k, v in want.items() if k.startswith(prefix)}
  atol, drop = TOLERANCE["final_fp32"]["atol"], clip_golden.drop_null
  compare_golden.check_trained(final, recorded, noise, atol, drop=drop)
  norms = dict(zip(want["param_names"], want["train_fp32/final_norm"], strict=True))
  rtol = TOLERANCE["grad0_norm"]["rtol"]
  compare_golden.check_norms(final, norms, noise, rtol, skip=clip_golden.is_null)
  evaluate(name, golden, states[-1], want)


def evaluate(name, golden, state, want):
  inputs, _ = arrays(name)
  model = nnx.merge(golden.graphdef, state.params, state.stats)
  images, tokens = inputs["eval_images"], inputs["eval_tokens"]
  b = clip_golden.batch(images, tokens.reshape(-1, tokens.shape[-1]))
  score = jax.jit(lambda m, b: m.score(m.encode_image(b), m.encode_text(b)))
  scores = score(model, b)
  sim = np.exp(model.logit_scale[...]) * np.asarray(scores)
  close(sim, want["train_fp32/eval0/sim_matrix"], "sim_matrix")
  caption_image = np.repeat(np.arange(len(images)), tokens.shape[1])
  recorded = want["train_fp32/eval0/sim_matrix"]
  clip_golden.check_retrieval(sim, caption_image, want, "train_fp32/eval0", recorded, rounded=True)


@pytest.mark.full
def test_half_trajectory(name):
  """fp16 forward and backward, float32 AdamW, weights rounded back to fp16."""
  _, want = arrays(name)
  golden = clip_golden.Golden(name, dtype=jnp.float16)
  changes = dict(round_to="float16", round_paths=clip.HALF_PATHS)
  log, states, _ = run(name, golden, **changes)
  loss = np.array([m["loss"] for m in log])
  np.testing.assert_allclose(loss, want["train_half/loss"], rtol=0, **TOLERANCE["half_losses"])
  final = clip_golden.to_torch(states[-1].params, states[-1].stats)
  released, _ = torch_files.state_dict(golden_files.path("clip", name, "state_dict.pth"))
  halves = 0
  for key, value in released.items():
    if value.dtype == np.float16:
      halves += 1
      np.testing.assert_array_equal(final[key], final[key].astype(np.float16), err_msg=key)
  assert halves
