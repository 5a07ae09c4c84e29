"""A ZeroVL of any golden set: config from the manifest, parameters from its files."""

import functools
import re

import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import zerovl as zerovl_rules
from xmodal_jax.models import zerovl
from xmodal_jax.optim import factory, schedules, train_state
from xmodal_jax.runtime import step as step_lib

MANIFEST = golden_files.manifest("zerovl")
CONFIG = MANIFEST["config"]
BATCH = CONFIG["batch"]


def tolerance(what: str) -> float:
  """The manifest's, by the beginning of its name."""
  return next(v for k, v in MANIFEST["tolerances"].items() if k.startswith(what))


EMBEDDING, LOSS, GRADIENT = map(tolerance, ("embeddings", "losses", "gradients"))
FINAL, TRAJECTORY = map(tolerance, ("final parameters", "trajectory losses"))


def step_file(run: str) -> str:
  """Name of the checkpoint that a run ("nce", "linear") wrote after its last step."""
  return golden_files.find("zerovl", f"ckpt_{run}_step*.pth")[-1].name


def image_config() -> dict:
  v = CONFIG["vit"]
  out = dict(size=CONFIG["image_size"], patch=v["patch_size"], width=v["embed_dim"])
  return out | dict(depth=v["depth"], heads=v["num_heads"], mlp_ratio=v["mlp_ratio"])


def config(*, mixup: bool = False, block: int = 0, learn: bool = True, **loss) -> dict:
  """The model section. loss: options of the objective "nce"."""
  b, drop = CONFIG["bert"], CONFIG["bert"]["dropout"]
  text = dict(vocab=b["vocab_size"], context=b["max_position_embeddings"], width=b["hidden_size"])
  text |= dict(depth=b["num_hidden_layers"], heads=b["num_attention_heads"])
  text |= dict(mlp=b["intermediate_size"], types=b["type_vocab_size"], eps=b["ln_eps"])
  return dict(
    system="zerovl",
    embed=CONFIG["projection"],
    image=image_config(),
    text=text | dict(dropout=drop, attention_dropout=drop),
    temperature=CONFIG["temperature"],
    learn_temperature=learn,
    loss=dict(name="nce", **loss),
    mixup=dict(beta=CONFIG["mixup_beta"] if mixup else 0.0, block=block),
  )


class Replay(zerovl.ZeroVL):
  """Takes mixup's draws from the batch instead of drawing them."""

  def draw(self, batch, key):
    return batch["weight"][0], batch["of_image"][0]


@functools.cache
def state_dict(file: str) -> dict[str, np.ndarray]:
  state, _ = torch_files.state_dict(golden_files.path("zerovl", file))
  return {k: v.read() for k, v in state.items()}


class Golden:
  """graphdef and params of a config with the weights of `file`."""

  def __init__(self, file: str = "ckpt_init.pth", *, accumulate: int = 1, rows=None, **changes):
    self.config = config(**changes)
    kw = {k: v for k, v in self.config.items() if k != "system"}

    def build():
      model = Replay(**kw, rngs=nnx.Rngs(0))
      model.accumulate, model.batch_sharding = accumulate, rows
      return model

    self.graphdef, params, _ = step_lib.split(nnx.eval_shape(build))
    state = dict(state_dict(file))
    if not self.config["learn_temperature"]:
      state.pop("loss.temperature", None)  # recorded from the same weights without it
    want = restore.flat(nnx.to_pure_dict(params))
    flat, _ = conversion.to_jax(state, zerovl_rules.RULES, want)
    self.params = restore.nested({k: jnp.asarray(v) for k, v in flat.items()})

  def model(self) -> Replay:
    return nnx.merge(self.graphdef, self.params, {})

  def state(self, tx, **kw) -> train_state.TrainState:
    # Copies: the step donates its state.
    params = jax.tree.map(jnp.copy, self.params)
    return train_state.TrainState(jnp.int32(0), params, {}, tx.init(params)).replace(**kw)


def inputs():
  return golden_files.arrays("zerovl", "inputs.npz")


def outputs():
  return golden_files.arrays("zerovl", "outputs.npz")


def batch(step: int = 0, weight: float = 1.0, of_image: bool = False) -> dict:
  """A training batch of ours from the recorded ones, with mixup's draws for `Replay`."""
  x = inputs()
  image = np.ascontiguousarray(np.moveaxis(x["batches/image"][step], 1, -1))
  return {
    "image": jnp.asarray(image),
    "text_ids": jnp.asarray(x["batches/input_ids"][step], jnp.int32),
    "text_mask": jnp.asarray(x["batches/attention_mask"][step] > 0),
    "weight": jnp.full(len(image), weight, jnp.float32),
    "of_image": jnp.full(len(image), of_image),
  }


def to_torch(tree) -> dict[str, np.ndarray]:
  """Parameters or gradients under the names and layouts of the state dict."""
  leaves = {k: np.asarray(v) for k, v in restore.flat(tree).items()}
  return dict(conversion.arrays(conversion.to_torch(leaves, zerovl_rules.RULES)))


def recorded(arrays, prefix: str) -> dict[str, np.ndarray]:
  """{rest of the name: array} of what begins with `prefix`/."""
  return {k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")}


def close(ours, theirs, atol, what=""):
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol, err_msg=what)


def close_gradients(ours: dict, theirs: dict) -> None:
  """max |a - b| <= tolerance * max |b|; gradients recorded as zero have to be zero."""
  assert theirs
  for name, want in theirs.items():
    error = np.abs(np.asarray(ours[name], np.float64) - want).max()
    assert error <= GRADIENT * np.abs(want).max(), f"{name}: {error} of {np.abs(want).max()}"


def drop_null(name: str, value: np.ndarray) -> np.ndarray:
  """Leaves out biases of keys, whose gradient is zero in exact arithmetic."""
  if name.endswith("self.key.bias"):
    return value[:0]
  if re.search(r"qkv\.bias$", name):
    d = len(value) // 3
    return np.concatenate([value[:d], value[2 * d :]])
  return value


def close_parameters(golden: Golden, state: train_state.TrainState, theirs: dict) -> None:
  """Parameters after training from `golden`."""
  moment = compare_golden.adam_state(state.opt_state).nu
  before, after, moment = (to_torch(x) for x in (golden.params, state.params, moment))
  noise = compare_golden.noise_allowance(before, after, moment)
  compare_golden.check_trained(after, theirs, noise, FINAL, drop=drop_null)


def optimizer(schedule, params):
  o, c = CONFIG["optimizer"], config_lib.base().optim
  assert o["name"] == "AdamW" and o["decay_applies_to"] == "every parameter"
  with c.ignore_type():
    (c.b1, c.b2), c.eps, c.weight_decay = o["betas"], o["eps"], o["weight_decay"]
    c.decay = ((".*", 1.0),)
  return factory.make_optimizer(c, schedule, params)


def schedule(run: str):
  """Our schedule with the settings of a recorded trajectory."""
  s = CONFIG["schedule"]
  steps = s.get(run, s)
  c = config_lib.base().optim
  c.lr, c.end, c.cycles = CONFIG["optimizer"]["lr"], s["min_lr_scale"], s["num_cycles"]
  c.warmup, c.warmup_from = f"{steps['warmup_steps']} steps", "zero"
  return schedules.make_schedule(
    c, schedules.RunLength(BATCH, BATCH, f"{steps['total_steps']} steps")
  )
