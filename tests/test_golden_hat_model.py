"""HAT's features, scores in both directions, losses, gradients and trajectories."""

import functools

import hat_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hat_golden import LEVELS, TOLERANCE, arrays, close_features, close_scores, recorded

from xmodal_jax.losses import cross_attention, triplet
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import step as step_lib

KEY = jax.random.key(0)
DIRECTIONS = ("i2t", "t2i")


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def forward():
  model = hat_golden.Golden().model()

  @jax.jit
  def run(b):
    v, t = model.encode_image(b), model.encode_text(b)
    states = model.text.states(b["text_ids"], b["text_mask"])
    out = {"bert_layers": states[1:]}
    for n, suffix in enumerate(("", "_1", "_2")):
      out |= {f"image_feats{suffix}": v[f"level_{n}"], f"text_feats{suffix}": t[f"level_{n}"]}
    for direction in DIRECTIONS:
      each = model.level_scores(v, t, range(3), direction)
      out |= {f"scores_{direction}_{n}": s for n, s in zip(LEVELS, each, strict=True)}
      out[f"scores_{direction}_sum"] = sum(each)
    return out

  with jax.default_matmul_precision("highest"):
    return jax.device_get(run(hat_golden.batch()))


def test_features_and_scores():
  ours, want = forward(), arrays("outputs")
  checked = 0
  for name, value in ours.items():
    if name.startswith("scores"):
      close_scores(value, want[name], name)
    else:
      # Features of padded positions are not masked here: both programs compute them.
      close_features(value, want[name], name)
    checked += 1
  assert checked == len(ours) >= 15


@functools.cache
def program(direction):
  golden = hat_golden.Golden(direction=direction)

  @jax.jit
  def run(params, b):
    loss_fn = lambda params: nnx.merge(golden.graphdef, params, {}).loss(b, KEY)
    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  return golden, run


@pytest.mark.parametrize("direction", ["t2i", pytest.param("i2t", marks=pytest.mark.full)])
def test_loss_and_gradients(direction):
  golden, run = program(direction)
  (loss, _), grads = run(golden.params, hat_golden.batch())
  want = arrays("outputs")
  np.testing.assert_allclose(loss, want[f"loss_{direction}"], rtol=TOLERANCE["loss"]["rtol"])
  ours, theirs = hat_golden.to_torch(grads), recorded(want, f"grad_{direction}")
  assert set(hat_golden.MANIFEST["parameter_names_with_gradient_goldens"]) <= theirs.keys()
  hat_golden.close_gradients(ours, theirs)
  for name in hat_golden.MANIFEST["parameters_without_gradient"]:
    if name in ours:
      assert not ours[name].any(), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_of_given_tokens(direction):
  s = arrays("scoring")
  v, c = jnp.asarray(s["images"]), jnp.asarray(s["captions"])
  mask = jnp.arange(c.shape[1]) < jnp.asarray(s["lengths"])[:, None]
  prefix = f"scores64_{direction}_lambda"
  names = [k for k in s if k.startswith(prefix)]
  assert names
  many = lambda x: jnp.broadcast_to(x, (len(v), *x.shape))

  @jax.jit
  def run(sharpness):
    args = sharpness, direction
    return [
      *(cross_attention.attended_scores(v, c, mask, *args, chunk) for chunk in (0, 1, 2)),
      cross_attention.aligned_scores(v, many(c), many(mask), *args),
    ]

  for name in names:
    for scores in run(float(name.removeprefix(prefix))):
      close_scores(scores, s[name], name)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_of_given_tokens(direction):
  s, names = arrays("scoring"), ("top", "1", "2")
  images, captions = (
    [jnp.asarray(s[f"loss_{side}_{n}"]) for n in names] for side in ("images", "captions")
  )
  mask = jnp.arange(captions[0].shape[1]) < jnp.asarray(s["loss_lengths"])[:, None]
  sharpness = hat_golden.CONFIG["lambda_softmax"]

  def f(images, captions):
    score = functools.partial(
      cross_attention.attended_scores, sharpness=sharpness, direction=direction
    )
    total = sum(score(v, c, mask, chunk=2) for v, c in zip(images, captions, strict=True))
    return triplet.triplet_from_scores(total, hat_golden.CONFIG["margin"], "max")

  value, (dv, dc) = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(images, captions)
  np.testing.assert_allclose(value, s[f"loss_{direction}"], rtol=TOLERANCE["loss"]["rtol"])
  ours = {f"images_{n}": g for n, g in zip(names, dv, strict=True)}
  ours |= {f"captions_{n}": g for n, g in zip(names, dc, strict=True)}
  prefix = f"loss_{direction}_grad_"
  theirs = {k.removeprefix(prefix): v for k, v in s.items() if k.startswith(prefix)}
  hat_golden.close_gradients(ours, theirs)


def stepper(golden, schedule, **kw):
  tx = hat_golden.optimizer(schedule, golden.params, **kw)
  step = step_lib.make_train_step(golden.graphdef, tx, KEY, None, schedule)
  params = jax.tree.map(jnp.copy, golden.params)
  return step, train_state.TrainState(jnp.int32(0), params, {}, tx.init(params))


@pytest.mark.full
@pytest.mark.parametrize("run", ["frozen", "unfrozen"])
def test_trajectories(run):
  want = arrays("trajectory")
  golden, loss = program(hat_golden.CONFIG["direction"])
  constant = lambda step: jnp.float32(hat_golden.CONFIG["learning_rate"])
  freeze = ((hat_golden.ENCODERS, "1000 steps"),) if run == "frozen" else ()
  step, state = stepper(golden, constant, freeze=freeze)
  rtol = TOLERANCE["trajectory_losses"]["rtol"]
  for k, value in enumerate(want[f"{run}/losses"]):
    state, metrics = step(state, hat_golden.batch(k % hat_golden.n_batches()))
    np.testing.assert_allclose(metrics["loss"], value, rtol=rtol, err_msg=f"step {k}")
  for k, value in enumerate(want[f"{run}/losses_after"]):
    (after, _), _ = loss(state.params, hat_golden.batch(k))
    np.testing.assert_allclose(after, value, rtol=rtol)
  hat_golden.close_parameters(golden, state, recorded(want, f"{run}/final"))
  if run == "frozen":
    for side in ("image", "text"):
      same = jax.tree.map(lambda a, b: (a == b).all(), state.params[side], golden.params[side])
      assert all(jax.tree.leaves(same))


@pytest.mark.full
def test_schedule_of_many_epochs():
  """One step per epoch: learning rates, the epoch that unfreezes the encoders, final parameters."""
  want = arrays("schedule")
  epochs = len(want["epoch"])
  first = int(np.flatnonzero(want["vit_trainable"])[0])
  assert first == hat_golden.CONFIG["unfreeze_after_epoch"] + 1
  np.testing.assert_array_equal(want["vit_trainable"], want["bert_encoder_trainable"])
  schedule = hat_golden.schedule(epochs)
  golden = hat_golden.Golden()
  freeze = ((hat_golden.ENCODERS, f"{first} epochs"),)
  step, state = stepper(golden, schedule, freeze=freeze, steps_per_epoch=1)
  rtol = TOLERANCE["trajectory_losses"]["rtol"]
  for k in range(epochs):
    np.testing.assert_allclose(schedule(k, np), want["lr"][k], rtol=1e-6)
    state, metrics = step(state, hat_golden.batch())
    np.testing.assert_allclose(metrics["loss"], want["loss"][k], rtol=rtol, err_msg=f"epoch {k}")
  hat_golden.close_parameters(golden, state, recorded(want, "final"))
