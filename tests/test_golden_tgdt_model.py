"""TGDT's branches, scores, losses and trajectories against the original program."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tgdt_golden
from flax import nnx
from tgdt_golden import GLOBAL, LOCAL, LOSS, RTOL, UNIT, after, close_gradients, outputs

from xmodal_jax.interop import optimizer_state
from xmodal_jax.losses import local, triplet
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import step as step_lib

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def close(ours, theirs, atol=0.0, rtol=0.0, what=""):
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=atol, err_msg=what)


@functools.cache
def forward():
  model = tgdt_golden.Golden().model()
  upper = tgdt_golden.Golden(upper_tokens=True).model()

  @jax.jit
  def run(b):
    b = model.prepare(b, KEY)
    mask = b["region_mask"]
    states = model.text.states(b["text_ids"], b["text_mask"])
    lower_v, lower_t = model.lower_image(b), model.lower_text(b)
    out = {
      "bert_embeddings": states[0],
      "bert_hidden_1": states[1],
      "bert_last_hidden": states[-1],
      "img_pos_encoded": model.image.embed(b["regions"], b["boxes"]),
      "img_enc_tokens": (tower := model.image(b["regions"], b["boxes"], mask)),
      "img_proj": model.image_proj(tower),
      "cap_proj": model.text_proj(states[-1]),
      "enc1_txt_tokens": lower_t,
      "enc2_img_tokens": lower_v,
      "enctext_tokens": model.text_upper(lower_t),
      "encimg_tokens": model.image_upper(lower_v),
    }
    for name, m in (("train", upper), ("test", model)):
      v, t = m.encode_image(b), m.encode_text(b)
      v["zero"] = mask.sum(1) < mask.shape[1]  # recorded with this batch's padding alone
      out |= {f"{name}_img_tokens": v["tokens"], f"{name}_txt_tokens": t["tokens"]}
      out[f"{name}_align_scores"] = m.local_scores(v, t)
      paired = jax.tree.map(lambda x: x[None], t)
      each = m.rerank(
        {k: v[k] for k in m.second_stage},
        jax.tree.map(lambda x: jnp.broadcast_to(x, (len(mask), *x.shape[1:])), paired),
      )
      out[f"{name}_reranked"] = each
      out |= {"img_global": v["embed"], "txt_global": t["embed"], "global_scores": m.score(v, t)}
    return out

  return jax.device_get(run(tgdt_golden.recorded_batch()))


def test_forward():
  ours = forward()
  want = {k.removeprefix("fwd_"): v for k, v in outputs().items() if k.startswith("fwd_")}
  checked = 0
  for name, value in want.items():
    if name.startswith("shortest"):
      continue
    checked += 1
    if name.endswith("_global") or name == "global_scores":
      close(ours[name], value, GLOBAL, what=name)
    elif "align_scores" in name:
      close(ours[name], value, LOCAL, what=name)
      close(ours[name.replace("align_scores", "reranked")], value, LOCAL, what=name)
    elif name.startswith(("train_", "test_")):
      side = "img" if "img" in name else "txt"
      close(ours[f"{side}_global"], value[:, 0], UNIT, what=name)  # slot 0
      close(ours[name], value[:, 1:], UNIT, what=name)
    else:
      close(ours[name], value, UNIT, RTOL, what=name)
  assert checked >= 15


@pytest.mark.full
def test_alone_in_a_batch():
  """Global text vectors depend on the padding of their batch, unless the upper stack is masked."""
  b = tgdt_golden.recorded_batch()
  i = tgdt_golden.goldens()["shortest_in_batch"]
  length, count = int(b["text_mask"][i].sum()), int(b["region_mask"][i].sum())
  alone = {k: v[i : i + 1] for k, v in b.items()}
  alone |= {k: alone[k][:, :length] for k in ("text_ids", "text_mask")}
  alone |= {k: alone[k][:, :count] for k in ("regions", "boxes", "region_mask")}
  model = tgdt_golden.Golden().model()
  embed = jax.jit(lambda m, b: (m.encode_image(b)["embed"], m.encode_text(b)["embed"]))
  for ours, side in zip(embed(model, alone), ("img", "txt"), strict=True):
    close(ours, outputs()[f"fwd_shortest_alone_{side}_global"], GLOBAL)
  wide = {k: v[i : i + 1] for k, v in b.items()}  # the same, padded to a static shape
  for ours, side in zip(embed(model, wide), ("img", "txt"), strict=True):
    close(ours, outputs()[f"fwd_shortest_alone_{side}_global"], GLOBAL)
  if length < b["text_mask"].shape[1]:
    assert np.abs(embed(model, b)[1][i] - embed(model, alone)[1][0]).max() > 10 * GLOBAL
  masked = tgdt_golden.Golden(mask_upper_stack=True).model()
  for whole, one in zip(embed(masked, b), embed(masked, alone), strict=True):
    close(whole[i], one[0], GLOBAL)


RUNS = {
  "loss_all": dict(loss="all"),
  "loss_global": dict(loss="matching"),
  "loss_local": dict(loss="alignment"),
  "loss_all_summed": dict(loss="all", reduce="sum"),
}
STAGE_1 = {
  m: dict(stage="lower", loss="alignment", mode=m, scale=1.0) for m in ("MrSw", "MwSr", "symm")
}


@functools.cache
def trained(**objective):
  golden = tgdt_golden.Golden(**objective)

  @jax.jit
  def run(params, b):
    loss_fn = lambda params: nnx.merge(golden.graphdef, params, {}).loss(b, KEY)
    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  with jax.default_matmul_precision("highest"):
    out = run(golden.params, tgdt_golden.recorded_batch())
  return jax.device_get(out)


def norm_of(grads) -> float:
  return np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))


@pytest.mark.parametrize(
  "run", [r if r == "loss_all" else pytest.param(r, marks=pytest.mark.full) for r in RUNS]
)
def test_losses_and_gradients(run):
  (total, metrics), grads = trained(**RUNS[run])
  want = outputs()
  close(total, want[f"{run}_total"], rtol=LOSS)
  for ours, theirs in (("loss_matching", "matching-loss"), ("loss_alignment", "alignment-loss")):
    assert (ours in metrics) == (f"{run}_{theirs}" in want)
    if ours in metrics:
      close(metrics[ours], want[f"{run}_{theirs}"], rtol=LOSS)
  if run == "loss_global":
    close(metrics["loss_inter"], want["loss_global_inter"], rtol=LOSS)
    close(metrics["loss_intra"], want["loss_global_intra"], rtol=LOSS)
  close(norm_of(grads), want[f"{run}_grad_norm"], rtol=tgdt_golden.GRADIENT)
  ours = tgdt_golden.to_torch(grads)
  close_gradients(ours, after(f"{run}_grad"))
  if run == "loss_all":
    moved = {k for k, g in ours.items() if np.abs(g).max() > 0}
    assert moved == set(tgdt_golden.goldens()["params_with_gradient"])


@pytest.mark.full
@pytest.mark.parametrize("mode", STAGE_1)
def test_first_stage(mode):
  """TERAN's objective on the same weights and batch; its gradients reach all layers."""
  (total, _), grads = trained(**STAGE_1[mode])
  want = outputs()
  close(total, want[f"stage1_{mode}_loss"], rtol=LOSS)
  close(norm_of(grads), want[f"stage1_{mode}_grad_norm"], rtol=tgdt_golden.GRADIENT)
  close_gradients(tgdt_golden.to_torch(grads), after(f"stage1_{mode}_grad"))


def test_first_stage_vectors():
  """TERAN's unit tokens of the lower stacks; the first is the global vector."""
  model, want = tgdt_golden.Golden().model(), outputs()
  b = tgdt_golden.recorded_batch()
  run = jax.jit(lambda m, b: {"img": m.lower_image(b), "txt": m.lower_text(b)})
  for side, x in run(model, b).items():
    unit = np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))
    close(unit, want[f"stage1_{side}_tokens"], UNIT)
    close(unit[:, 0], want[f"stage1_{side}_aggr"], UNIT)


# --- losses on given vectors ----------------------------------------------------------------------


def tokens(skip: int):
  """(images, their mask, texts, their mask) of synloss, without slot 0 and the last `skip`."""
  x = tgdt_golden.inputs()
  v, t = (jnp.asarray(x[f"synloss_{side}_tokens"]) for side in ("img", "txt"))
  regions, words = x["synloss_img_len"] - 1, x["synloss_txt_len"] - 1 - skip
  mask = lambda count, n: jnp.asarray(np.arange(n) < count[:, None])
  return (
    (v[:, 1:], mask(regions, v.shape[1] - 1)),
    (t[:, 1 : t.shape[1] - skip], mask(words, t.shape[1] - 1 - skip)),
  )


@pytest.mark.parametrize("mode", local.MODES)
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_local_scores(mode, chunk):
  (v, vm), (t, tm) = tokens(2)
  zero = dict(image_zero=~vm.all(1), text_zero=~tm.all(1))
  ours = np.asarray(local.local_scores(v, vm, t, tm, mode, chunk=chunk, **zero))
  want = outputs()[f"stage1_synscores_{mode}"]
  if len(want) < len(ours):
    rows = np.array(tgdt_golden.goldens()["stage1_synscores_rows_for_MrAVGw_and_scan"])
    ours = ours[rows][:, rows]
  close(ours, want, LOCAL)
  if mode == "MrSw":
    scale = tgdt_golden.config().get("scale", 10.0)
    close(scale * ours, outputs()["synloss_local_scores"], LOCAL)


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_local_loss(reduce):
  (v, vm), (t, tm) = tokens(2)
  name = f"synloss_local_{reduce}"

  def f(v, t):
    scores = 10 * local.local_scores(v, vm, t, tm, image_zero=~vm.all(1), chunk=4)
    return triplet.triplet_from_scores(scores, tgdt_golden.TRAINING["margin"], reduce)

  value, (dv, dt) = jax.value_and_grad(f, argnums=(0, 1))(v, t)
  want = outputs()
  close(value, want[name], rtol=LOSS)
  images, texts = want[f"{name}_dimg"], want[f"{name}_dtxt"]
  close_gradients({"v": dv, "t": dt}, {"v": images[:, 1:], "t": texts[:, 1 : t.shape[1] + 1]})


@pytest.mark.parametrize("measure", triplet.MEASURES)
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_global_loss(measure, reduce):
  x, want = tgdt_golden.inputs(), outputs()
  score, prefix = triplet.MEASURES[measure], f"synloss_global_{measure}_{reduce}"

  def f(v, t):
    inter = triplet.triplet_from_scores(score(v, t), tgdt_golden.TRAINING["margin"], reduce)
    intra = triplet.consistency(score(v, v), score(t, t))
    return inter + intra, (inter, intra)

  pair = (jnp.asarray(x[f"synloss_{side}_global"]) for side in ("img", "txt"))
  (total, (inter, intra)), (dv, dt) = jax.value_and_grad(f, (0, 1), has_aux=True)(*pair)
  for ours, name in ((total, "total"), (inter, "inter"), (intra, "intra")):
    close(ours, want[f"{prefix}_{name}"], rtol=LOSS, what=name)
  assert np.isfinite(dv).all() and np.isfinite(dt).all()
  if f"{prefix}_dimg" in want:
    theirs = {"v": want[f"{prefix}_dimg"], "t": want[f"{prefix}_dtxt"]}
    close_gradients({"v": dv, "t": dt}, theirs)


# --- trajectories ---------------------------------------------------------------------------------

TRAJECTORIES = {
  "train_all": dict(loss="all"),
  "trainft_global": dict(loss="matching"),
  "train_resume": dict(loss="all"),
  "stage1": dict(stage="lower", loss="alignment", scale=1.0),
}


@pytest.mark.full
@pytest.mark.parametrize(
  "run",
  [pytest.param(r, marks=pytest.mark.slow) if r == "trainft_global" else r for r in TRAJECTORIES],
)
def test_trajectories(run):
  record = tgdt_golden.goldens()[f"traj_{run}"]
  golden = tgdt_golden.Golden(**TRAJECTORIES[run])
  resumed = run == "train_resume"
  schedule = tgdt_golden.schedule(warmup=not resumed)
  tx = tgdt_golden.optimizer(schedule, golden.params)
  step = step_lib.make_train_step(golden.graphdef, tx, KEY, None, schedule)
  params, count = jax.tree.map(jnp.copy, golden.params), 0
  opt_state = tx.init(params)
  if resumed:
    path = str(golden_files.path("tgdt", tgdt_golden.CHECKPOINT))
    opt_state, count = optimizer_state.for_init(path, path, "tgdt", golden.params, tx)
  state = train_state.TrainState(jnp.int32(count), params, {}, opt_state)
  for k, index in enumerate(record["batches"]):
    state, metrics = step(state, tgdt_golden.rows("train", index))
    for ours, theirs in (("loss_matching", "matching_loss"), ("loss_alignment", "alignment_loss")):
      if record[theirs] is not None and ours in metrics:
        close(metrics[ours], record[theirs][k], rtol=tgdt_golden.TRAJECTORY, what=f"{ours} {k}")
    close(metrics["grad_norm"], record["grad_norms"][k], rtol=tgdt_golden.TRAJECTORY)
    close(metrics["lr"], record["lr"][k], rtol=1e-5)
  tgdt_golden.close_parameters(golden, state, after(f"{run}_final"))
