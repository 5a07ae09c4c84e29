"""TEAM's second stage on token tensors of the shape of COCO 5K: the work, and our side of it."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.evaluation import metrics, rerank
from xmodal_jax.models import team
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import step

IMAGES, CAPTIONS, PATCHES, WORDS = 5000, 5, 257, 30  # CAPTIONS of each image
TOP = 16
BATCH = 256  # rows of a bank's batch


class Work(NamedTuple):
  """What both sides score. Tokens float32 [I, P, D] and [T, L, D], mask bool [T, L]; captions int
  [I, k] and pictures [T, k] are the candidates of each image and of each text; block is how many
  captions our side hands to the device at a time."""

  images: np.ndarray
  texts: np.ndarray
  mask: np.ndarray
  captions: np.ndarray
  pictures: np.ndarray
  block: int

  def asked(self) -> tuple[np.ndarray, np.ndarray]:
    """(picture, caption), int [I k + T k], query by query: all images first, then all texts."""
    row = lambda candidates: np.repeat(np.arange(len(candidates)), candidates.shape[1])
    picture = np.concatenate([row(self.captions), self.pictures.ravel()])
    return picture, np.concatenate([self.captions.ravel(), row(self.pictures)])

  def unique(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(picture, caption) of each pair once, and the place of every asked pair among them."""
    picture, caption = self.asked()
    pair, back = np.unique(picture * len(self.texts) + caption, return_inverse=True)
    return *np.divmod(pair, len(self.texts)), back

  def named(self, picture: np.ndarray, caption: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Scores of pairs by name, in which the two sides are compared."""
    return {f"{i} {t}": float(s) for i, t, s in zip(picture, caption, scores, strict=True)}


def candidates(images: int) -> tuple[np.ndarray, np.ndarray]:
  """(int [I, k], int [T, k]) by the cosines of random unit vectors, captions near their image.

  Some directions weigh more than others, so that a few images are chosen by many captions. Of the
  pairs that images ask for, captions ask for 84 % too at 5,000 images, for 99 % at 100.
  """
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  weight = np.arange(1, 65, dtype=np.float32) ** -0.5
  image = unit(rng.standard_normal((images, 64), np.float32) * weight)
  noise = unit(rng.standard_normal((images * CAPTIONS, 64), np.float32))
  scores = image @ unit(np.repeat(image, CAPTIONS, 0) + 2 * noise).T
  return metrics.top(scores, TOP), metrics.top(scores.T, TOP)


def make(args: argparse.Namespace) -> Work:
  images = max(round(IMAGES * args.scale), TOP)
  rng = np.random.default_rng(1)
  tokens = lambda *shape: rng.standard_normal((*shape, args.width), np.float32)
  # As COCO's captions: 9 to 20 word pieces, 13 in the mean, both ends included.
  length = np.clip(rng.poisson(4.0, images * CAPTIONS) + 9, None, WORDS)
  block = max(round(config_lib.base().eval.block[1] * args.scale), 1)
  return Work(
    tokens(images, PATCHES),
    tokens(images * CAPTIONS, WORDS),
    np.arange(WORDS) < length[:, None],
    *candidates(images),
    block=block // min(BATCH, block) * min(BATCH, block),
  )


def plan(args: argparse.Namespace, work: Work) -> dict[int, rerank.Calls]:
  """Our calls on one device, by the number of the block of captions."""
  picture, caption, _ = work.unique()
  return rerank.schedule(
    picture,
    caption,
    batch=len(work.images),
    devices=1,
    block=work.block,
    shape=tuple(args.rerank_block),
  )


def model_config(args: argparse.Namespace) -> dict[str, Any]:
  """TEAM with CLIP ViT-L/14, its towers cut down to what they must have: they are not measured."""
  c = team.preset("clip_l14")
  heads = max(args.width // 64, 1)
  c["matching"] |= dict(depth=args.blocks, heads=heads, embed=args.width // 2)
  c["image"] |= dict(width=args.width, depth=1, heads=heads)
  c["text"] |= dict(vocab=8, context=8, width=64, depth=1, heads=1, mlp=64)
  return c


def parameters(args: argparse.Namespace) -> tuple[Any, dict[str, np.ndarray]]:
  """(graphdef, {path: array}): random weights, biases and norms included, equal on both sides."""
  build = lambda: team.build(model_config(args), rngs=nnx.Rngs(0))
  graphdef, params, _ = step.split(nnx.eval_shape(build))
  rng, flat = np.random.default_rng(2), {}
  for path, leaf in restore.flat(nnx.to_pure_dict(params)).items():
    x = np.asarray(rng.standard_normal(leaf.shape, np.float32))
    if path.endswith("kernel"):
      flat[path] = x * leaf.shape[-2] ** -0.5
    else:
      flat[path] = 0.1 * x + path.endswith("scale")
  return graphdef, {path: np.asarray(x, np.float32) for path, x in flat.items()}


def bank(rows: Any, features: dict[str, np.ndarray], batch: int) -> rerank.Bank:
  """Features [N, ...] on the device, in batches of `batch` rows of which the last is filled up."""
  import jax

  n = len(features["tokens"])
  steps = -(-n // batch)
  out = rerank.Bank(steps, rows, np.float32)
  for first in range(0, steps * batch, batch):
    part = {k: x[first : first + batch] for k, x in features.items()}
    fill = batch - len(part["tokens"])
    part = {k: np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)) for k, x in part.items()}
    out.add(jax.device_put(part, rows), first + np.arange(batch) < n)
  return out


def ours(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
  """From candidates to their scores as the evaluator goes: each pair once, scheduled, scored."""
  import jax

  from xmodal_jax.distributed import sharding

  work = make(args)
  graphdef, flat = parameters(args)
  rows = sharding.batch_sharding(sharding.make_mesh((("data", -1),), jax.devices()[:1]))
  whole = jax.sharding.NamedSharding(rows.mesh, jax.sharding.PartitionSpec())
  state = train_state.TrainState(None, jax.device_put(restore.nested(flat), whole), {}, None)
  images = bank(rows, {"tokens": work.images}, min(BATCH, len(work.images)))
  texts = bank(rows, {"tokens": work.texts, "mask": work.mask}, min(BATCH, work.block))
  reranker = rerank.Reranker(graphdef, rows, block=work.block, shape=args.rerank_block)
  picture, caption, back = work.unique()
  found, places = np.empty(0), [x.pair for x in plan(args, work).values()]

  def run():
    nonlocal found
    picture, caption, _ = work.unique()
    found = reranker.scores(
      state, images, texts, images.places[picture], texts.places[caption], lambda: None
    )

  return run, {
    "examples": len(back),
    "unique": len(picture),
    "filled": len(picture) / sum(x.size for x in places),  # share of the places of all calls
    "parameters": sum(x.size for path, x in flat.items() if path.startswith("matching/")),
    "scores": lambda: work.named(picture, caption, found),
  }
