"""Local scores (TGDT's MrSw) of tokens of the shape of COCO 5K: the work, and our side of it."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SCALE = 10.0  # what local scores are multiplied by, as TGDT does


class Work(NamedTuple):
  """What both sides score: unit tokens float32 [I, R, D] and [T, W, D], mask bool [T, W].

  Pictures have all their regions, as in the published features; of the tokens of a picture and of a
  text the first, and a text's last two, which do not count, are already left out.
  """

  images: np.ndarray
  texts: np.ndarray
  mask: np.ndarray

  def info(self) -> dict[str, int]:
    """Pairs, and FLOPs of the products of all their tokens: of words that count, and of all."""
    each = 2 * self.images.size
    return {
      "examples": len(self.images) * len(self.texts),
      "flops": each * int(self.mask.sum()),
      "padded_flops": each * self.mask.size,
    }


def make(args: argparse.Namespace) -> Work:
  images, texts = (max(round(n * args.scale), 1) for n in (args.images, args.captions))
  rng = np.random.default_rng(0)

  def tokens(*shape: int) -> np.ndarray:
    x = rng.standard_normal((*shape, args.width), np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  # As COCO's captions: 6 to 18 words that count, 10 in the mean.
  length = np.clip(rng.poisson(4.0, texts) + 6, None, args.words)
  mask = np.arange(args.words) < length[:, None]
  return Work(tokens(images, args.regions), tokens(texts, args.words), mask)


def named(scores: np.ndarray) -> dict[str, float]:
  """Scores [I, T] by name, in which the two sides are compared."""
  return {f"{i} {t}": float(s) for (i, t), s in np.ndenumerate(scores)}


def ours(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
  """All pairs in one call, as a block of the evaluator's."""
  import benchmark_ours
  import jax
  import jax.numpy as jnp

  from xmodal_jax.losses import local

  work = make(args)
  images, texts, mask = jax.device_put(work)
  regions = jnp.ones(images.shape[:2], bool)
  score = jax.jit(lambda v, vm, t, tm: SCALE * local.local_scores(v, vm, t, tm, chunk=args.chunk))
  held = []

  def run():
    held[:] = [score(images, regions, texts, mask).block_until_ready()]

  return run, work.info() | {
    "scores": lambda: named(np.asarray(held[0])),
    "peak_gflops_per_s": benchmark_ours.matmul_peak,
  }
