"""ZeroVL's towers, losses, gradients, accumulation and trajectories against the original."""

import ast
import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zerovl_golden
from flax import nnx
from zerovl_golden import (
  BATCH,
  CONFIG,
  EMBEDDING,
  LOSS,
  TRAJECTORY,
  close,
  close_gradients,
  recorded,
)

from xmodal_jax import config as config_lib
from xmodal_jax.distributed import sharding
from xmodal_jax.interop import optimizer_state
from xmodal_jax.losses import classification, contrastive, triplet
from xmodal_jax.models import zerovl
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import step as step_lib

SUB = CONFIG["dga_sub_batch"]
ALPHA = CONFIG["mixup_alpha_explicit"]
SMOOTHING = CONFIG["label_smoothing"]
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def test_towers():
  model = zerovl_golden.Golden().model()

  @jax.jit
  def run(b):
    vit, text = model.image, model.text
    blocks = jax.tree.map(lambda x: x[0], nnx.state(vit.blocks))
    first = nnx.merge(nnx.graphdef(vit.blocks), blocks)
    x = vit.embed(b["image"])
    tokens = vit.ln_post(vit(b["image"]))
    states = text.states(b["text_ids"], b["text_mask"])
    i, t = model.encode_image(b), model.encode_text(b)
    return {
      "image_patch_embed": x[:, 1:] - vit.pos[1:],
      "image_block0": first(x),
      "image_tokens": tokens,
      "image_features": model.probe_features(b),
      "text_embed": states[0],
      "text_layer0": states[1],
      "text_hidden": states[-1],
      "image_proj": model.image_proj(tokens[:, 0]),
      "text_proj": model.encode_text(b, KEY)["embed"],
      "image_embeddings": i["embed"],
      "text_embeddings": t["embed"],
      "scores": model.score(i, t),
    }

  ours, want = run(zerovl_golden.batch()), recorded(zerovl_golden.outputs(), "eval")
  assert want.keys() == ours.keys()
  for name, value in want.items():
    close(ours[name], value, EMBEDDING, name)


# Recorded run -> changes of the model, and the draws of mixup.
RUNS = {
  "nce": {},
  "nce_const": dict(learn=False),
  "nce_smooth": dict(smoothing=SMOOTHING),
  "nce_local": {},  # of one process
  "nce_temp_high": {},
  "nce_temp_low": {},
  "mix_image": dict(mixup=True),
  "mix_text": dict(mixup=True),
  "mix_text_smooth": dict(mixup=True, smoothing=SMOOTHING),
  "dga_plain": dict(accumulate=BATCH // SUB),
  "dga_mix_image": dict(mixup=True, block=SUB, accumulate=BATCH // SUB),
  "dga_mix_text": dict(mixup=True, block=SUB, accumulate=BATCH // SUB),
}


def draws(run: str) -> dict:
  return dict(weight=ALPHA, of_image="image" in run) if "mix" in run else {}


@functools.cache
def program(devices: int = 1, **changes):
  """(golden model, batch sharding, jitted (params, batch) -> ((loss, metrics), gradients))."""
  mesh = sharding.make_mesh((("data", -1),), jax.devices()[:devices])
  rows = sharding.batch_sharding(mesh)
  golden = zerovl_golden.Golden(rows=rows, **changes)

  @jax.jit
  def run(params, b):
    loss_fn = lambda params: nnx.merge(golden.graphdef, params, {}).loss(b, KEY)
    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  return golden, rows, run


# The default tier's programs: the plain loss, mixup, and mixup in parts.
DEFAULT = ("nce", "nce_local", "nce_temp_high", "nce_temp_low", "mix_image", "mix_text")
DEFAULT += ("dga_mix_image", "dga_mix_text")


def tiers(runs) -> list:
  return [r if r in DEFAULT else pytest.param(r, marks=pytest.mark.full) for r in runs]


@pytest.mark.parametrize("run", tiers(RUNS))
def test_losses_and_gradients(run):
  golden, rows, loss = program(**RUNS[run])
  want, params = zerovl_golden.outputs(), golden.params
  meaning = zerovl_golden.MANIFEST["arrays"][f"outputs/{run}/loss"]["meaning"]
  if given := re.search(r"temperature parameter ([0-9.]+)", meaning):
    params = params | {"temperature": jnp.float32(given[1])}
  b = jax.device_put(zerovl_golden.batch(**draws(run)), rows)
  (value, metrics), grads = loss(params, b)
  if metrics["temperature"] < CONFIG["temperature"]:
    # At this temperature, float32 rounding of cosines (1e-7) moves the loss by its tolerance in
    # either program: compare it on the recorded embeddings, which test_towers checks.
    pair = [jnp.asarray(want[f"{run}/{side}_embeddings"]) for side in ("image", "text")]
    both = (pair, pair[::-1])
    logits = [contrastive.pair_logits(*x, metrics["temperature"]) for x in both]
    each = [contrastive.nce(x)[0] for x in logits]
    metrics |= dict(zip(("loss_i2t", "loss_t2i"), each, strict=True))
    value = sum(each) / 2
  close(value, want.get(f"{run}/true_loss", want[f"{run}/loss"]), LOSS)
  if "dga" in run:
    # The runner reports the loss of unmixed targets.
    close(metrics.get("loss_unmixed", value), want[f"{run}/loss"], LOSS)
    accuracy = want[f"{run}/acc"]
  else:
    accuracy = want[f"{run}/i2t_acc"], want[f"{run}/t2i_acc"]
    for side in ("i2t", "t2i"):
      if f"{run}/{side}_loss" in want:
        close(metrics[f"loss_{side}"], want[f"{run}/{side}_loss"], LOSS, side)
  np.testing.assert_allclose([metrics["accuracy_i2t"], metrics["accuracy_t2i"]], accuracy)
  if gradients := recorded(want, f"{run}/grad"):
    close_gradients(zerovl_golden.to_torch(grads), gradients)


@pytest.mark.parametrize("run", ["mix_image", "mix_text", "nce"])
def test_embeddings_in_training(run):
  """Embeddings of mixed images or texts that enter the loss."""
  golden, _, _ = program(**RUNS[run])
  model, want = golden.model(), zerovl_golden.outputs()

  @jax.jit
  def embeddings(b):
    b = model.prepare(b, KEY)
    return model.mixed(model.encode_image(b, KEY), model.encode_text(b, KEY), b)

  image, text, _ = embeddings(zerovl_golden.batch(**draws(run)))
  close(image, want[f"{run}/image_embeddings"], EMBEDDING)
  close(text, want[f"{run}/text_embeddings"], EMBEDDING)


ARRAYS = zerovl_golden.MANIFEST["arrays"]
(RANKS,) = ARRAYS["outputs_two_ranks/w2_nce_gather_backward/loss_per_rank"]["shape"]
TWO_RANKS = {
  "w2_nce_gather_backward": {},
  "w2_nce_no_gather_backward": dict(gather_gradient=False),
  "w2_nce_group1": dict(groups=RANKS),
  "w2_mix_text": dict(mixup=True, block=BATCH // RANKS),
  "w2_mix_image": dict(mixup=True, block=BATCH // RANKS),
  "w2_dga_plain": dict(accumulate=BATCH // SUB),
  "w2_dga_mix_text": dict(mixup=True, block=SUB // RANKS, accumulate=BATCH // SUB),
  "w2_dga_mix_image": dict(mixup=True, block=SUB // RANKS, accumulate=BATCH // SUB),
}


@pytest.mark.parametrize("run", tiers(TWO_RANKS))
def test_two_processes(run):
  """The ranks of the original are one global batch of ours, on as many devices."""
  want = golden_files.arrays("zerovl", "outputs_two_ranks.npz")
  golden, rows, loss = program(devices=RANKS, **TWO_RANKS[run])
  b = jax.device_put(zerovl_golden.batch(**draws(run)), rows)
  (value, metrics), grads = loss(golden.params, b)
  reported = metrics.get("loss_unmixed", value) if "dga" in run else value
  close(reported, want[f"{run}/loss_per_rank"].mean(), LOSS)
  if f"{run}/acc_per_rank" in want:
    ours = [metrics["accuracy_i2t"], metrics["accuracy_t2i"]]
    np.testing.assert_allclose(ours, want[f"{run}/acc_per_rank"].mean(1))
  close_gradients(zerovl_golden.to_torch(grads), recorded(want, f"{run}/grad"))


# Recorded trajectory -> changes of the model.
TRAJECTORIES = {
  "traj_nce": {},
  "resume": {},
  "traj_mixup": dict(mixup=True),
  "traj_dga": dict(mixup=True, block=SUB, accumulate=BATCH // SUB),
  "traj_debias": dict(mixup=True, block=SUB, accumulate=BATCH // SUB),
}


@functools.cache
def stepper(run: str):
  learn = f"{run}/final/loss.temperature" in zerovl_golden.outputs()
  file = zerovl_golden.step_file("nce") if run == "resume" else "ckpt_init.pth"
  golden = zerovl_golden.Golden(file, learn=learn, **TRAJECTORIES[run])
  schedule = zerovl_golden.schedule(run)
  tx = zerovl_golden.optimizer(schedule, golden.params)
  step = step_lib.make_train_step(golden.graphdef, tx, KEY, None, schedule)
  return golden, tx, step


def batches(run: str) -> list[int]:
  """The recorded batch of each step."""
  want = zerovl_golden.outputs()
  steps = len(want[f"{run}/loss"])
  if f"{run}/order" not in want:
    return list(range(steps))
  # Batches are numbered through the loaders of both datasets.
  return [int(index) for _, index in want[f"{run}/order"]]


@pytest.mark.full
@pytest.mark.parametrize("run", TRAJECTORIES)
def test_trajectories(run):
  want = zerovl_golden.outputs()
  golden, tx, step = stepper(run)
  state = golden.state(tx)
  if run == "resume":
    file = str(golden_files.path("zerovl", zerovl_golden.step_file("nce")))
    opt_state, count = optimizer_state.for_init(file, file, "zerovl", golden.params, tx)
    assert count == len(want["traj_nce/loss"])
    state = state.replace(opt_state=opt_state, step=jnp.int32(count))
  mixed = recorded(want, run).get("mixup")
  for k, index in enumerate(batches(run)):
    drawn = {}
    if mixed is not None:
      drawn = dict(weight=mixed[k, 1], of_image=mixed[k, 0] == 0)
    state, metrics = step(state, zerovl_golden.batch(index, **drawn))
    # With accumulation the original reports the loss of unmixed targets.
    name = "loss_unmixed" if "accumulate" in TRAJECTORIES[run] else "loss"
    close(metrics[name], want[f"{run}/loss"][k], TRAJECTORY, f"loss of step {k}")
    ours = [metrics["accuracy_i2t"], metrics["accuracy_t2i"]]
    np.testing.assert_allclose(ours, want[f"{run}/acc"][k])
    np.testing.assert_allclose(metrics["lr"], want[f"{run}/lr"][k], rtol=1e-6)
    if "temperature" in state.params:
      value = want[f"{run}/temperature"][k]
      close(state.params["temperature"], value, zerovl_golden.FINAL, f"temperature of step {k}")
  zerovl_golden.close_parameters(golden, state, recorded(want, f"{run}/final"))
  model = nnx.merge(golden.graphdef, state.params, {})
  b = zerovl_golden.batch()
  scores = model.score(model.encode_image(b), model.encode_text(b))
  close(scores, want[f"{run}/final_scores"], EMBEDDING)


def test_draws_of_mixup():
  """A coin chooses images (above one half) or texts; weights are Beta distributed."""
  want = zerovl_golden.outputs()
  drawn = want["rng/mixup_draws"]
  for run in ("traj_mixup", "traj_dga"):
    of_text, weight = want[f"{run}/mixup"].T
    np.testing.assert_array_equal(of_text, drawn[: len(of_text), 1] <= 0.5)
    np.testing.assert_allclose(weight, drawn[: len(weight), 0])
  c = zerovl_golden.config(mixup=True)
  model = nnx.eval_shape(lambda: zerovl.build(c, rngs=nnx.Rngs(0)))  # draws need no parameters
  keys = jax.random.split(KEY, 20_000)
  weight, of_image = jax.jit(jax.vmap(lambda key: model.draw({}, key)))(keys)
  n, beta = len(keys), CONFIG["mixup_beta"]
  assert abs(of_image.mean() - 0.5) < 4 * (0.25 / n) ** 0.5
  variance = 1 / (4 * (2 * beta + 1))  # of Beta(beta, beta)
  assert abs(weight.mean() - 0.5) < 4 * (variance / n) ** 0.5
  assert abs(weight.var() - variance) < 0.01


# --- losses on features ---------------------------------------------------------------------------


def value_and_grads(f):
  x = zerovl_golden.inputs()
  arguments = jnp.asarray(x["loss/feat1"]), jnp.asarray(x["loss/feat2"])
  return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*arguments)


def check_loss(name: str, value, accuracy, grads):
  want = recorded(zerovl_golden.outputs(), f"loss/{name}")
  close(value, want["value"], LOSS)
  np.testing.assert_allclose(np.broadcast_to(accuracy, want["acc"].shape), want["acc"], rtol=1e-6)
  close_gradients(dict(zip("12", grads, strict=True)), {k: want[f"grad_feat{k}"] for k in "12"})


NCE = {
  "nce_gather1_mask0": {},
  "nce_gather1_mask1": dict(ignore=True),
  "nce_gather0_mask0": dict(gather=False),
  "nce_gather0_mask1": dict(gather=False, ignore=True),
  "nce_smooth": dict(smoothing=SMOOTHING),
  "mixup": dict(mix=ALPHA),
  "mixup_mask1": dict(mix=ALPHA, ignore=True),
}


def ignored():
  return jnp.asarray(zerovl_golden.inputs()["loss/ignore_mask"])


@pytest.mark.parametrize("name", NCE)
def test_nce_of_one_direction(name):
  options = dict(NCE[name])
  ignore = ignored() if options.pop("ignore", False) else None
  still = (lambda x: x) if options.pop("gather", True) else jax.lax.stop_gradient

  def f(queries, candidates):
    candidates = still(candidates)
    if ignore is not None:  # an ignored row is a candidate of logit 0
      candidates = candidates * (1 - ignore)[:, None]
    logits = contrastive.pair_logits(queries, candidates, CONFIG["temperature"])
    rows = None if ignore is None else ignore[None]
    loss, metrics = contrastive.nce(logits, ignore=rows, **options)
    return loss, metrics["accuracy"]

  (value, accuracy), grads = value_and_grads(f)
  check_loss(name, value, accuracy, grads)


def test_nce_inside_a_process_multiplies_means():
  """The original zeroes only the texts of ignored rows, and its mask has a wrong shape.

  Its loss is the mean loss times the share of rows that count. Here it is composed of our parts.
  """

  def f(a, b):
    s = contrastive.pair_logits(a, b * (1 - ignored())[:, None], CONFIG["temperature"])
    parts = [contrastive.nce(x)[0] for x in (s, s.swapaxes(1, 2))]
    kept = [contrastive.nce(x, ignore=ignored()[None])[1] for x in (s, s.swapaxes(1, 2))]
    accuracy = jnp.stack([m["accuracy"] for m in kept])
    return sum(parts) / 2 * (1 - ignored()).mean(), accuracy

  (value, accuracy), grads = value_and_grads(f)
  check_loss("nce_local_mask1", value, accuracy, grads)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_triplet(reduce):
  def f(a, b):
    scores = a @ b.T
    each = [(s >= jnp.diagonal(s)[:, None]).sum(1) == 1 for s in (scores, scores.T)]
    loss = triplet.triplet_from_scores(scores, CONFIG["triplet_margin"], reduce)
    return loss, jnp.stack([x.mean() for x in each])

  (value, accuracy), grads = value_and_grads(f)
  check_loss(f"triplet_{reduce}", value, accuracy, grads)


def test_losses_over_classes():
  x, want = zerovl_golden.inputs(), zerovl_golden.outputs()
  logits = jnp.asarray(x["loss/feat3"])
  labels = jnp.asarray(x["loss/class_target"])
  smooth = classification.cross_entropy(logits, labels, SMOOTHING)
  close(smooth, want["loss/label_smoothing_ce"], LOSS)
  close(zerovl.normalize(logits), want["loss/l2norm_feat3"], EMBEDDING)


# --- schedules ------------------------------------------------------------------------------------

SCHEDULES = [k for k in ARRAYS if k.startswith("outputs/schedule/")]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
  want = zerovl_golden.outputs()[name.removeprefix("outputs/")]
  options = ast.literal_eval(re.search(r"\{.*\}", ARRAYS[name]["meaning"])[0])
  c = config_lib.base().optim
  kinds = {"constant": "constant", "linear": "linear", "cosine": "cosine"}
  kind = name.split("/")[-1].split("_")[0]
  c.lr, c.warmup_from, c.schedule = 1.0, "zero", kinds.get(kind, "milestones")
  c.warmup = f"{options.get('num_warmup_steps', 0)} steps"
  c.cycles, c.end = options.get("num_cycles", 0.5), options.get("min_lr_scale", 0.0)
  with c.ignore_type():
    c.milestones = tuple(f"{n} steps" for n in options.get("milestone_steps", ()))
  c.step_factor = options.get("gamma", 0.1)
  total = options.get("num_training_steps", len(want))
  schedule = schedules.make_schedule(c, schedules.RunLength(BATCH, BATCH, f"{total} steps"))
  np.testing.assert_allclose([schedule(s, np) for s in range(len(want))], want, atol=1e-12)
