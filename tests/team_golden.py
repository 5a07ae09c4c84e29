"""A TEAM of any golden set: config from the manifest, parameters from its files."""

import pathlib
import re
from collections.abc import Mapping

import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import team as team_rules
from xmodal_jax.losses import hard_negatives
from xmodal_jax.models import team
from xmodal_jax.optim import factory, train_state
from xmodal_jax.runtime import step as step_lib

MANIFEST = golden_files.manifest("team")
VARIANTS = list(MANIFEST["variants"])
CHINESE = "chinese_large"  # the ModelScope release
OF_CLIP = [name for name in VARIANTS if "clip_width" in MANIFEST["variants"][name]]
# Checkpoint of each model. Beside "epoch0_params.pth" may stand the optimizer's "epoch0_opt.pth".
FILES = dict.fromkeys(VARIANTS, "epoch0_params.pth")
FILES |= {CHINESE: "pytorch_model.pth"} if CHINESE in MANIFEST else {}


def optimizer_file(name: str) -> pathlib.Path:
  """The optimizer state saved with a variant's checkpoint; a path that may not exist."""
  return golden_files.root("team") / name / FILES[name].replace("_params", "_opt")


WITH_OPTIMIZER = [name for name in VARIANTS if optimizer_file(name).exists()]


def some_optimizer_file() -> pathlib.Path:
  """The optimizer state of any variant; skips where no variant has one."""
  if not WITH_OPTIMIZER:
    golden_files.path("team", VARIANTS[0], optimizer_file(VARIANTS[0]).name)
  return optimizer_file(WITH_OPTIMIZER[0])


def text_length(rows: Mapping) -> int:
  """The padded length of recorded captions: n of the key "ids_padded_n"."""
  return next(int(k.rpartition("_")[2]) for k in rows if k.startswith("ids_padded_"))


def step_decay(rates: np.ndarray) -> tuple[int, float]:
  """(steps between two decays, factor) of a recorded step schedule [N]."""
  changes = np.flatnonzero(np.diff(rates)) + 1
  if not len(changes):
    return len(rates), 0.1
  return int(changes[0]), float(rates[changes[0]] / rates[0])


def _vocab(shapes) -> int:
  return next(v[0] for k, v in shapes.items() if k.endswith("word_embeddings.weight"))


def config(name: str, shapes) -> dict:
  """The model section of a variant; shapes: of the state dict, for the size of the vocabulary."""
  m = MANIFEST["variants"].get(name) or MANIFEST["chinese_large"]
  if "vit_dim" in m:
    image = dict(kind="deit", patch=m["patch"], width=m["vit_dim"], depth=m["vit_depth"])
    image |= dict(heads=m["vit_heads"], mlp_ratio=m["vit_mlp_ratio"])
  elif "clip_width" in m:
    image = dict(kind="clip", patch=m["clip_patch"], width=m["clip_width"])
    image |= dict(depth=m["clip_layers"], heads=m["clip_heads"])
  else:
    image = dict(kind="clip", patch=m["patch"], width=m["vision_width"])
    image |= dict(depth=m["vision_layers"], heads=m["vision_heads"])
  b, drop = m["bert"], m.get("dropout", 0.0)
  text = dict(vocab=_vocab(shapes), context=b["max_pos"], width=b["hidden"], depth=b["layers"])
  text |= dict(heads=b["heads"], mlp=b["inter"], eps=m.get("bert_layer_norm_eps", 1e-12))
  text |= dict(dropout=drop, attention_dropout=drop)
  matching = dict(depth=m["team_blocks"], heads=m["team_heads"], embed=m["token_proj_dim"])
  matching |= dict(mlp_ratio=m.get("team_mlp_ratio", 2), dropout=drop)
  return dict(
    system="team",
    embed=m["feat_dim"],
    image=image | dict(size=m["image_size"]),
    text=text,
    project_text=any("projector_token_embeds" in k for k in shapes),
    matching=matching,
    same_image="zero" if m.get("mask_noise", True) else "keep",
    negatives=m.get("neg_num", 1),
    layerwise=m.get("layerwise_loss", True),
  )


class Replay(team.TEAM):
  """Takes negatives from the batch (columns of the global batch) instead of sampling them."""

  def negatives(self, images, texts, batch, key):
    found = jnp.ones(batch["neg_image"].shape, bool)
    return (
      hard_negatives.Negatives(batch["neg_image"], found),
      hard_negatives.Negatives(batch["neg_text"], found),
    )


class Golden:
  """graphdef and params of a variant with the weights of its checkpoint."""

  def __init__(self, name: str, **changes):
    self.path = golden_files.path("team", name, FILES[name])
    state, _ = torch_files.state_dict(self.path)
    self.names = [k for k in state if not k.endswith("position_ids")]
    self.config = config(name, {k: v.shape for k, v in state.items()}) | changes
    kw = {k: v for k, v in self.config.items() if k != "system"}
    build = lambda: Replay(**kw, rngs=nnx.Rngs(0))
    self.graphdef, params, stats = step_lib.split(nnx.eval_shape(build))
    self.params, _, _ = restore.load(str(self.path), "team", params, stats)
    self.params = jax.tree.map(jnp.asarray, self.params)

  def model(self) -> Replay:
    return nnx.merge(self.graphdef, self.params, {})

  def state(self, tx, **kw) -> train_state.TrainState:
    # Copies: the step donates its state.
    params = jax.tree.map(jnp.copy, self.params)
    return train_state.TrainState(jnp.int32(0), params, {}, tx.init(params)).replace(**kw)


def to_torch(tree) -> dict[str, np.ndarray]:
  """Parameters or gradients under the names and layouts of the state dict."""
  leaves = {k: np.asarray(v) for k, v in restore.flat(tree).items()}
  return dict(conversion.arrays(conversion.to_torch(leaves, team_rules.RULES)))


def drop_null(key: str, value: np.ndarray) -> np.ndarray:
  """Leaves out the key third of fused biases, whose gradient is zero in exact arithmetic."""
  if re.search(r"(in_proj|qkv)[._]bias$", key):
    d = len(value) // 3
    return np.concatenate([value[:d], value[2 * d :]])
  return value


def batch(arrays, prefix: str = "", step: int | None = None) -> dict:
  """Inputs as the original takes them -> a batch of ours."""
  get = lambda k: arrays[prefix + k] if step is None else arrays[prefix + k][step]
  image = np.ascontiguousarray(np.moveaxis(get("images"), 1, -1))
  out = {"image": image, "text_ids": get("text_ids"), "text_mask": get("text_mask") > 0}
  if prefix + "img_idx" in arrays:
    out["image_id"] = get("img_idx")
  return jax.tree.map(jnp.asarray, out)


def number(text: str, what: str) -> float:
  """The number that follows `what` in a tolerance written in words."""
  return float(re.search(re.escape(what) + r"\s*<?\s*([0-9.]+(?:e-?[0-9]+)?)", text)[1])


_FEATURES = next(v for k, v in MANIFEST["tolerance"].items() if k.startswith("features"))
_TRAJECTORY = MANIFEST["tolerance"]["parameters after training"]
RTOL = number(_FEATURES, "rtol")
GRADIENT = number(MANIFEST["tolerance"]["gradients"], "max abs value")


def trajectory_tolerance(run: str) -> float:
  """ "1e-4 for traj and traj_resumed, 1e-3 for traj_hi_lr" -> that of a run."""
  for value, runs in re.findall(r"([0-9.]+e-?[0-9]+) for ((?:\w+(?: and )?)+)", _TRAJECTORY):
    if run in runs.split(" and "):
      return float(value)
  raise KeyError(run)


def close(ours, theirs, what):
  np.testing.assert_allclose(
    np.asarray(ours, np.float32),
    theirs,
    rtol=RTOL,
    atol=number(_FEATURES, "atol"),
    err_msg=what,
  )


def close_to_scale(ours, theirs, factor, what):
  """max |a - b| < factor * max |b|."""
  error = np.abs(np.asarray(ours, np.float64) - theirs).max()
  assert error <= factor * np.abs(theirs).max(), f"{what}: {error} of {np.abs(theirs).max()}"


def noise_allowance(golden: Golden, state: train_state.TrainState) -> dict[str, np.ndarray]:
  """See compare_golden.noise_allowance; of a run that started from `golden`."""
  moment = compare_golden.adam_state(state.opt_state).nu
  return compare_golden.noise_allowance(
    *(to_torch(x) for x in (golden.params, state.params, moment))
  )


def optimizer(name: str, schedule, params):
  """The published LAMB as the manifest words it; of two groups, the image tower is the second."""
  text = MANIFEST["variants"][name]["optimizer"]
  c = config_lib.base().optim
  b1, b2 = re.search(r"betas \(([0-9.]+),([0-9.]+)\)", text).groups()
  rates = golden_files.arrays("team", name, "outputs.npz")["schedule/lr_per_epoch_per_group"][0]
  with c.ignore_type():
    c.name, c.trust = "lamb", "original"
    c.b1, c.b2, c.eps = float(b1), float(b2), number(text, "eps")
    c.weight_decay, c.grad_clip = number(text, "weight_decay"), number(text, "max_grad_norm")
    c.decay = ((".*", 1.0),)
    slow = (("^image/", float(rates[1] / rates[0])),) if len(rates) > 1 else ()
    c.lr_mult = (*slow, (".*", 1.0))
  tensors = conversion.tensors_of(team_rules.RULES, params)
  return factory.make_optimizer(c, schedule, params, tensors)
