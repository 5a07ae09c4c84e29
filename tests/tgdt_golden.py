"""A TGDT of any golden set: config from the manifest, parameters from its files."""

import functools
import json
import re

import compare_golden
import golden_files
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import tgdt as tgdt_rules
from xmodal_jax.models import tgdt
from xmodal_jax.optim import factory, schedules, train_state
from xmodal_jax.runtime import step as step_lib

MANIFEST = golden_files.manifest("tgdt")
CONFIG, SIZES, BERT = (MANIFEST[k] for k in ("config", "sizes", "bert_config"))
TRAINING = CONFIG["training"]
CHECKPOINT = "model_best_rsum.pth.tar"
# "atol 2e-5 (unit vectors), rtol 1e-4 elsewhere" and so on, as the manifest words it.
_WORDS = MANIFEST["tolerances"]


def number(key: str, after: str) -> float:
  text = _WORDS[key]
  return float(text[text.index(after) + len(after) :].split()[0].rstrip(",;)"))


UNIT, RTOL = (number("embeddings/tokens/intermediates", k) for k in ("atol", "rtol"))
GLOBAL, LOCAL = (number("score matrices", k) for k in ("global atol", "local atol"))
LOSS = number("losses", "rtol")
# Scores that are closer than this may change places, by the evaluation's kind of score.
TIED = {
  kind: float(re.search(rf"([0-9.e-]+) \({kind}\)", _WORDS["ranks"])[1])
  for kind in ("global", "local")
}
TIED["gl"] = TIED["local"]
GRADIENT = number("gradients", "<=")
TRAJECTORY, FINAL = (number("trajectories", k) for k in ("losses rtol", "final parameters atol"))


@functools.cache
def goldens() -> dict:
  return json.loads(golden_files.path("tgdt", "goldens.json").read_text())


def inputs():
  return golden_files.arrays("tgdt", "inputs.npz")


def outputs():
  return golden_files.arrays("tgdt", "outputs.npz")


def config(**objective) -> dict:
  """The model section with the quirks of the original, unless `objective` replaces them."""
  heads = SIZES["heads_of_all_non_bert_transformers"]
  ffn = SIZES["ffn_of_all_non_bert_transformers"]
  drop = CONFIG["model"]["dropout"]
  stack = lambda depth: dict(depth=depth, heads=heads, mlp=ffn, dropout=drop)
  text = dict(vocab=BERT["vocab_size"], context=BERT["max_position_embeddings"])
  text |= dict(width=SIZES["word_dim"], depth=SIZES["bert_layers_used"], heads=SIZES["bert_heads"])
  text |= dict(mlp=SIZES["bert_intermediate"], eps=SIZES["layernorm_eps"]["bert"])
  text |= dict(dropout=BERT["hidden_dropout_prob"])
  letter = dict(
    stage="upper", mask_upper_stack=False, skip_last_word=True, zero_slots=36,
    margin=TRAINING["margin"],
  )  # fmt: skip
  return dict(
    system="tgdt",
    embed=SIZES["embed"],
    image=dict(features=SIZES["feat_dim"]) | stack(SIZES["image_transformer_layers"]),
    text=text | dict(attention_dropout=BERT["attention_probs_dropout_prob"]),
    lower=stack(SIZES["joint_layers"]),
    upper=stack(SIZES["joint_layers"]),
    shared=False,
    **letter | objective,
  )


@functools.cache
def state_dict():
  state, _ = torch_files.state_dict(golden_files.path("tgdt", CHECKPOINT))
  return {k: v.read() for k, v in state.items()}


class Golden:
  """graphdef and params of a config with the weights of the checkpoint."""

  def __init__(self, accumulate: int = 1, rows=None, **objective):
    self.config = config(**objective)

    def build():
      model = tgdt.build(self.config, rngs=nnx.Rngs(0))
      model.accumulate, model.batch_sharding = accumulate, rows
      return model

    self.graphdef, params, _ = step_lib.split(nnx.eval_shape(build))
    want = restore.flat(nnx.to_pure_dict(params))
    flat, self.report = conversion.to_jax(state_dict(), tgdt_rules.RULES, want)
    self.params = restore.nested({k: jnp.asarray(v) for k, v in flat.items()})

  def model(self) -> tgdt.TGDT:
    return nnx.merge(self.graphdef, self.params, {})


def batch(features, ids, feat_len, cap_len, boxes) -> dict:
  """Arrays as the original collates them, slot 0 of images included -> a batch of ours."""
  return {
    "regions": jnp.asarray(features[:, 1:]),
    "boxes": jnp.asarray(boxes[:, 1:]),
    "region_mask": jnp.asarray(np.arange(features.shape[1] - 1) < (feat_len - 1)[:, None]),
    "text_ids": jnp.asarray(ids, jnp.int32),
    "text_mask": jnp.asarray(np.arange(ids.shape[1]) < cap_len[:, None]),
  }


def recorded_batch() -> dict:
  keys = ("features", "token_ids", "feat_len", "cap_len", "boxes")
  return batch(*(inputs()[f"batch_{k}"] for k in keys))


def to_torch(tree) -> dict[str, np.ndarray]:
  leaves = {k: np.asarray(v) for k, v in restore.flat(tree).items()}
  return dict(conversion.arrays(conversion.to_torch(leaves, tgdt_rules.RULES)))


def after(prefix: str) -> dict[str, np.ndarray]:
  """{parameter name: array} of the outputs "prefix:name"."""
  return {k.split(":")[1]: v for k, v in outputs().items() if k.startswith(f"{prefix}:")}


def without_key_third(name: str, value: np.ndarray) -> np.ndarray:
  """Leaves out the key third of fused biases, whose gradient is zero in exact arithmetic."""
  if not name.endswith("in_proj_bias"):
    return value
  d = len(value) // 3
  return np.concatenate([value[:d], value[2 * d :]])


def close_gradients(ours: dict, theirs: dict) -> None:
  assert theirs
  for name, want in theirs.items():
    have = without_key_third(name, np.asarray(ours[name], np.float64))
    want = without_key_third(name, want)
    error = np.abs(have - want).max()
    assert error <= GRADIENT * np.abs(want).max(), f"{name}: {error} of {np.abs(want).max()}"


def close_parameters(golden: Golden, state: train_state.TrainState, theirs: dict) -> None:
  """Parameters after training from `golden`."""
  moment = compare_golden.adam_state(state.opt_state).nu
  before, after, moment = (to_torch(x) for x in (golden.params, state.params, moment))
  noise = compare_golden.noise_allowance(before, after, moment)
  compare_golden.check_trained(after, theirs, noise, FINAL, drop=without_key_third)


@functools.cache
def captions(split: str) -> list[dict]:
  return [c for c in goldens()["captions"] if c["split"] == split]


def rows(split: str, index) -> dict:
  """A batch of captions of a split with their images.

  Padded for the whole split, so that programs compile once. The model finds what the original pads
  to from the masks.
  """
  chosen = [captions(split)[i] for i in index]
  x = inputs()
  image = np.array([c["img_id"] for c in chosen])
  count = x["n_regions"][image]
  most, longest = x["feats"].shape[1], max(len(c["ids"]) for c in captions(split))
  wh = x["image_wh"][image]
  boxes = x["boxes_px"][image][:, :most] / np.concatenate([wh, wh], 1)[:, None].astype(np.float32)
  mask = np.arange(most) < count[:, None]
  ids = np.zeros((len(chosen), longest), np.int32)
  for row, c in zip(ids, chosen, strict=True):
    row[: len(c["ids"])] = c["ids"]
  length = np.array([len(c["ids"]) for c in chosen])
  return {
    "regions": jnp.asarray(np.where(mask[..., None], x["feats"][image][:, :most], 0)),
    "boxes": jnp.asarray(np.where(mask[..., None], boxes, 0).astype(np.float32)),
    "region_mask": jnp.asarray(mask),
    "text_ids": jnp.asarray(ids),
    "text_mask": jnp.asarray(np.arange(longest) < length[:, None]),
  }


def optimizer(schedule, params):
  c = config_lib.base().optim
  with c.ignore_type():
    c.b1, c.b2, c.eps, c.weight_decay = 0.9, 0.999, 1e-8, 0.0
    c.grad_clip = TRAINING["grad-clip"]
  return factory.make_optimizer(c, schedule, params)


def schedule(warmup: bool):
  t, c = TRAINING, config_lib.base().optim
  c.lr, c.schedule, c.step_factor = t["lr"], "step", t["gamma"]
  c.step_every = f"{t['step-size']} epochs"
  c.warmup = f"{t['warmup-period'] if warmup else 0} steps"
  c.warmup_from = "second"
  per_epoch = -(-len(captions("train")) // t["bs"])
  return schedules.make_schedule(c, schedules.RunLength(per_epoch * t["bs"], t["bs"], "9 epochs"))
