"""A CLIP of any golden set: config from the manifest, parameters from its files."""

import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion
from xmodal_jax.models import clip
from xmodal_jax.optim import factory, schedules, train_state
from xmodal_jax.runtime import step as step_lib


def config(name: str) -> dict:
  m = golden_files.manifest("clip")["models"][name]
  size, width = m["image_resolution"], m["vision_width"]
  if m["vision_patch_size"]:
    image = dict(kind="vit", size=size, patch=m["vision_patch_size"], width=width)
    image |= dict(depth=m["vision_layers"], heads=m["vision_heads"])
  else:
    image = dict(kind="resnet", size=size, width=width, depths=tuple(m["vision_layers"]))
  text = dict(vocab=m["vocab_size"], context=m["context_length"], width=m["text_width"])
  text |= dict(depth=m["text_layers"], heads=m["text_heads"])
  return dict(system="clip", embed=m["embed_dim"], image=image, text=text)


class Golden:
  """graphdef, params, stats of model `name` ("vit", "rn") with the weights of `file`."""

  def __init__(self, name: str, file: str = "state_dict.pth", dtype=jnp.float32):
    build = lambda: clip.build(config(name), dtype=dtype, rngs=nnx.Rngs(0))
    self.graphdef, params, stats = step_lib.split(nnx.eval_shape(build))
    path = golden_files.path("clip", name, file)
    params, stats, _ = restore.load(str(path), "clip", params, stats)
    self.params, self.stats = jax.tree.map(jnp.asarray, (params, stats))

  def model(self) -> clip.CLIP:
    return nnx.merge(self.graphdef, self.params, self.stats)

  def state(self, tx) -> train_state.TrainState:
    # Copies: the step donates its state.
    params, stats = jax.tree.map(jnp.copy, (self.params, self.stats))
    return train_state.TrainState(jnp.int32(0), params, stats, tx.init(params))


def to_torch(*trees) -> dict[str, np.ndarray]:
  """Parameters or gradients under the names and layouts of the state dict."""
  leaves = {}
  for tree in trees:
    leaves |= {k: np.asarray(v) for k, v in restore.flat(tree).items()}
  return dict(conversion.arrays(conversion.to_torch(leaves, clip_rules.RULES)))


def drop_null(key: str, value: np.ndarray) -> np.ndarray:
  """Without the key third of fused biases, whose gradient is zero in exact arithmetic."""
  if key.endswith("attn.in_proj_bias"):
    d = len(value) // 3
    return np.concatenate([value[:d], value[2 * d :]])
  return value


def is_null(key: str) -> bool:
  return bool(re.search(r"attn\.in_proj_bias$|attnpool\.k_proj\.bias$", key))


def optimizer(train: dict, schedule, params, **changes):
  """CLIP_ITM's AdamW as the manifest gives it: decay on everything."""
  c = dict(
    name="adamw",
    b1=train["betas"][0],
    b2=train["betas"][1],
    eps=train["eps"],
    weight_decay=train["weight_decay"],
    decay=((".*", 1.0),),
    lr_mult=((".*", 1.0),),
    grad_clip=0.0,
    bounds=(),
    round_to="",
    round_paths=(),
  )
  return factory.make_optimizer(tiny.optim(**c | changes), schedule, params)


def schedule(train: dict, run: schedules.RunLength):
  warmup = f"{train['warmup']} steps"
  c = tiny.optim(lr=train["lr"], warmup=warmup, end=0.0, schedule="clip_itm")
  return schedules.make_schedule(c, run)


def batch(images: np.ndarray, tokens: np.ndarray) -> dict:
  """images [B, 3, S, S] as the original takes them."""
  image = np.ascontiguousarray(np.moveaxis(images, 1, -1))
  return {"image": jnp.asarray(image), "text_ids": jnp.asarray(tokens)}
