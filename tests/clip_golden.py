"""A CLIP of any golden set: config from the manifest, parameters from its files."""

import re
from collections.abc import Mapping

import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.evaluation import metrics
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
  """Leaves out the key third of fused biases, whose gradient is zero in exact arithmetic."""
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


def trained_file(name: str) -> str:
  """The checkpoint that training of model `name` wrote, by the manifest."""
  files = golden_files.manifest("clip")["models"][name]["files"]
  return next(f for f in files if re.fullmatch(r"itm_epoch\d+\.pt", f))


def noise_allowance(golden: Golden, state: train_state.TrainState) -> dict[str, np.ndarray]:
  """See compare_golden.noise_allowance; of a run that started from `golden`."""
  moment = compare_golden.adam_state(state.opt_state).nu
  return compare_golden.noise_allowance(
    *(to_torch(x) for x in (golden.params, state.params, moment))
  )


def check_retrieval(
  scores: np.ndarray,
  owner: np.ndarray,
  want: Mapping[str, np.ndarray],
  prefix: str,
  recorded: np.ndarray,
  *,
  rounded: bool,
) -> None:
  """Ranks and recalls of our scores against those recorded under `prefix`.

  recorded: the original's scores, whose ties decide which ranks are right. rounded: see
  compare_golden.rank_bounds.
  """
  t = golden_files.manifest("clip")["tolerance"]
  assert t["ranks"] == "exact"
  bounds = compare_golden.rank_bounds(recorded, owner, rounded)
  ours = dict(zip(("i2t", "t2i"), metrics.retrieval_ranks(scores, owner), strict=True))
  report = metrics.summarise(scores, owner)
  for side, ranks in ours.items():
    compare_golden.check_ranks(ranks, want[f"{prefix}/{side}_min_rank"] - 1, bounds[side])
    for k in metrics.RECALL_AT:
      value = want[f"{prefix}/{side}_R@{k}"]
      compare_golden.check_recall(
        report[f"{side}_r{k}"], value, k, bounds[side], t["recalls"]["atol"]
      )
  if all((low == high).all() for low, high in bounds.values()):
    np.testing.assert_allclose(report["mean_r1"], want[f"{prefix}/mean_R1"], **t["recalls"])


def batch(images: np.ndarray, tokens: np.ndarray) -> dict:
  """A batch of ours from images [B, 3, S, S] and tokens [B, L] as the original takes them."""
  image = np.ascontiguousarray(np.moveaxis(images, 1, -1))
  return {"image": jnp.asarray(image), "text_ids": jnp.asarray(tokens)}
