"""A HAT of any golden set: config from the manifest, parameters from its files."""

import functools
import json
import pathlib

import compare_golden
import golden_files
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx
from PIL import Image

from tools import prepare_data
from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.data import image
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
  # The manifest lists level 1, level 2, top.
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


def n_batches() -> int:
  return len([k for k in arrays("inputs") if k.endswith("/images")])


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


def read(*parts: str) -> dict:
  """A JSON file of the set."""
  return json.loads(golden_files.path("hat", *parts).read_text(encoding="utf-8"))


def vocab() -> pathlib.Path:
  return golden_files.path("hat", *read("captions.json")["vocab"].split("/"))


INTERPOLATION = MANIFEST["train_random_resized_crop"]["interpolation"].rpartition(".")[2].lower()


def transform(resize: int, crop: int) -> image.Transform:
  return image.Transform(resize, crop, interpolation=INTERPOLATION)


def evaluation_sizes() -> tuple[int, int]:
  """(resize, crop) of the recorded evaluation from files to ranks."""
  return CONFIG["eval_resize"], arrays("e2e_inputs")["test_pixels"].shape[-1]


def prepared(tmp_path: pathlib.Path) -> str:
  """Writes the recorded end-to-end dataset as a user prepares Flickr30K; -> config.data.dir.

  Images of "test" are the recorded ones; for "train" and "val" none were recorded, so those are
  grey.
  """
  annotations, images = golden_files.path("hat", "data", "dataset_flickr30k.json"), tmp_path / "in"
  images.mkdir()
  found, tests = arrays("e2e_inputs"), 0
  for item in json.loads(annotations.read_text())["images"]:
    pixels = np.full((8, 8, 3), 128, np.uint8)
    if item["split"] == "test":
      pixels, tests = found[f"test_image_{tests}"], tests + 1
    Image.fromarray(pixels).save(images / item["filename"], "PNG")
  assert tests == sum(k.startswith("test_image_") for k in found)
  where = ("--annotations", annotations, "--images", images, "--out", tmp_path)
  prepare_data.main([str(a) for a in ("karpathy", *where, "--name", "f30k")])
  return str(tmp_path / "f30k")


def run_config(data_dir: str):
  """A run's config that reads the images and captions of `prepared`."""
  resize, crop = evaluation_sizes()
  c = tiny.config(data_dir, text__tokenizer="bert", text__max_merges=0, text__vocab=str(vocab()))
  c.data.image.update(dict(size=resize, interpolation=INTERPOLATION, rgb_first=True))
  c.model.image.size = crop
  c.model.text.vocab = CONFIG["bert"]["vocab_size"]
  c.text.length = CONFIG["max_text_len"]
  return c


def to_torch(tree) -> dict[str, np.ndarray]:
  leaves = {k: np.asarray(v) for k, v in restore.flat(tree).items()}
  return dict(conversion.arrays(conversion.to_torch(leaves, hat_rules.RULES)))


def recorded(arrays, prefix: str) -> dict[str, np.ndarray]:
  return {k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")}


def drop_null(name: str, value: np.ndarray) -> np.ndarray:
  """Leaves out biases of keys, whose gradient is zero in exact arithmetic."""
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


def close_parameters(golden: Golden, state, theirs: dict) -> None:
  """Parameters after training from `golden`."""
  moment = compare_golden.adam_state(state.opt_state).nu
  before, after, moment = (to_torch(x) for x in (golden.params, state.params, moment))
  noise = compare_golden.noise_allowance(before, after, moment)
  theirs = {k: v for k, v in theirs.items() if k in after}  # we have no pooler
  atol = TOLERANCE["trajectory_params"]["atol"]
  compare_golden.check_trained(after, theirs, noise, atol, drop=drop_null)


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
