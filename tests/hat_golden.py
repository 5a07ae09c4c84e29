"""A HAT of any golden set: config from the manifest, parameters from its files."""

import functools

import golden_files
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import hat as hat_rules
from xmodal_jax.models import hat
from xmodal_jax.optim import factory, schedules
from xmodal_jax.runtime import step as step_lib

MANIFEST = golden_files.manifest("hat")
CONFIG, TOLERANCE = MANIFEST["config"], MANIFEST["tolerance"]
CHECKPOINT = "hat.pth"
LEVELS = ("top", "level1", "level2")  # as recorded, in the order of ours


def image_config(section: dict = CONFIG, **changes) -> dict:
  keys = dict(size="image_size", window="window_size", embed="embed_dim", depths="depths")
  out = {ours: section[theirs] for ours, theirs in keys.items()}
  out |= dict(heads=section["num_heads"], patch=CONFIG["patch_size"])
  out |= dict(mlp_ratio=CONFIG["mlp_ratio"], eps=CONFIG["swin_layer_norm_eps"], drop_path=0.0)
  return out | changes


def config(**changes) -> dict:
  """The model section, without dropout, as the vectors were recorded."""
  b = CONFIG["bert"]
  text = dict(vocab=b["vocab_size"], context=b["max_position_embeddings"], width=b["hidden_size"])
  text |= dict(depth=b["num_hidden_layers"], heads=b["num_attention_heads"])
  text |= dict(mlp=b["intermediate_size"], types=b["type_vocab_size"])
  text |= dict(eps=CONFIG["bert_layer_norm_eps"], dropout=0.0, attention_dropout=0.0)
  depth = b["num_hidden_layers"]
  stages, layers = CONFIG["image_stage_indices"], CONFIG["text_layer_indices"]
  # Recorded as level 1, level 2, top.
  pairs = [(s, t % depth) for s, t in zip(stages, layers, strict=True)]
  return (
    dict(
      system="hat",
      embed=CONFIG["hidden_size"],
      image=dict(kind="swin", **image_config()),
      text=text,
      levels=(pairs[-1], *pairs[:-1]),
      sharpness=CONFIG["lambda_softmax"],
      margin=CONFIG["margin"],
      direction=CONFIG["direction"],
    )
    | changes
  )


@functools.cache
def state_dict(file: str = CHECKPOINT):
  state, _ = torch_files.state_dict(golden_files.path("hat", file))
  return {k: v.read() for k, v in state.items()}


class Golden:
  """graphdef and params of a config with the weights of the checkpoint."""

  def __init__(self, rows=None, **changes):
    self.config = config(**changes)

    def build():
      model = hat.build(self.config, rngs=nnx.Rngs(0))
      model.batch_sharding = rows
      return model

    self.graphdef, params, _ = step_lib.split(nnx.eval_shape(build))
    want = restore.flat(nnx.to_pure_dict(params))
    flat, self.report = conversion.to_jax(state_dict(), hat_rules.RULES, want)
    self.params = restore.nested({k: jnp.asarray(v) for k, v in flat.items()})

  def model(self) -> hat.HAT:
    return nnx.merge(self.graphdef, self.params, {})


def arrays(name: str):
  return golden_files.arrays("hat", f"{name}.npz")


def batch(index: int = 0) -> dict:
  x = arrays("inputs")
  get = lambda key: x[f"batch{index}/{key}"]
  return {
    "image": jnp.asarray(np.ascontiguousarray(np.moveaxis(get("images"), 1, -1))),
    "text_ids": jnp.asarray(get("text_ids"), jnp.int32),
    "text_mask": jnp.asarray(get("text_masks") > 0),
  }


def to_torch(tree) -> dict[str, np.ndarray]:
  leaves = {k: np.asarray(v) for k, v in restore.flat(tree).items()}
  return dict(conversion.arrays(conversion.to_torch(leaves, hat_rules.RULES)))


def recorded(arrays, prefix: str) -> dict[str, np.ndarray]:
  return {k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")}


def drop_null(name: str, value: np.ndarray) -> np.ndarray:
  """Without what has no gradient in exact arithmetic: nothing is left of a key's bias."""
  if name.endswith("attention.self.key.bias"):
    return value[:0]
  if name.endswith("qkv.bias"):
    d = len(value) // 3
    return np.concatenate([value[:d], value[2 * d :]])
  return value


def close_features(ours, theirs, what=""):
  t = TOLERANCE["features"]
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=t["rtol"], atol=t["atol"], err_msg=what)


def close_scores(ours, theirs, what="", key="scores_float32"):
  atol = TOLERANCE[key]["atol"]
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol, err_msg=what)


def close_gradients(ours: dict, theirs: dict) -> None:
  t = TOLERANCE["gradients"]
  assert theirs
  for name, want in theirs.items():
    have, want = drop_null(name, np.asarray(ours[name])), drop_null(name, want)
    atol = t["atol_relative_to_max"] * np.abs(want).max(initial=0)
    np.testing.assert_allclose(have, want, rtol=t["rtol"], atol=atol, err_msg=name)


def close_parameters(ours: dict, theirs: dict) -> None:
  assert theirs
  for name, want in theirs.items():
    have, want = drop_null(name, ours[name]), drop_null(name, want)
    atol = TOLERANCE["trajectory_params"]["atol"]
    np.testing.assert_allclose(have, want, rtol=0, atol=atol, err_msg=name)


ENCODERS = r"^(image|text)/"


def optimizer(schedule, params, freeze=(), steps_per_epoch: int = 0):
  a, c = CONFIG["adam"], config_lib.base().optim
  with c.ignore_type():
    (c.b1, c.b2), c.eps, c.weight_decay = a["betas"], a["eps"], a["weight_decay"]
    c.freeze = freeze
  return factory.make_optimizer(c, schedule, params, (), steps_per_epoch)


def schedule(epochs: int, steps_per_epoch: int = 1):
  s, c = CONFIG["step_lr"], config_lib.base().optim
  c.lr, c.schedule, c.warmup = CONFIG["learning_rate"], "step", "0 steps"
  c.step_every, c.step_factor = f"{s['step_size']} epochs", s["gamma"]
  size = CONFIG["batch"]
  run = schedules.RunLength(steps_per_epoch * size, size, f"{epochs} epochs")
  return schedules.make_schedule(c, run)
