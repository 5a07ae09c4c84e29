"""Scores of a level of HAT's tokens, of the shape of its finest: the work, and our side of it."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SHARPNESS = 9.0  # of the softmax, as HAT has it
TOPICS = 64  # tokens of one attract each other, so that attention has something to choose


class Work(NamedTuple):
  """What both sides score: tokens float32 [I, R, D] and [T, W, D], mask bool [T, W]."""

  images: np.ndarray
  texts: np.ndarray
  mask: np.ndarray

  def info(self, direction: str) -> dict[str, int]:
    """Pairs, and FLOPs of the products per pair: of words that count, and of all.

    That is the products of all tokens, and those of the weights with the Gram matrix of who
    answers. The Gram matrices themselves, made once per picture or caption, are left out.
    """
    pictures, regions, width = self.images.shape

    def flops(words: np.ndarray) -> int:
      answers = {"i2t": words, "t2i": regions, "both": words + regions}[direction]
      return int((2 * pictures * regions * words * (width + answers)).sum())

    return {
      "examples": pictures * len(self.texts),
      "flops": flops(self.mask.sum(1)),
      "padded_flops": flops(np.full(*self.mask.shape)),
    }


def make(args: argparse.Namespace) -> Work:
  images, texts = (max(round(n * args.scale), 1) for n in (args.images, args.captions))
  rng = np.random.default_rng(0)
  topics = rng.standard_normal((TOPICS, args.width), np.float32)

  def tokens(*shape: int) -> np.ndarray:
    own = rng.standard_normal((*shape, args.width), np.float32)
    return own + topics[rng.integers(TOPICS, size=shape)]

  # As COCO's captions, with a token at either end: 8 to 20 that count, 12 in the mean.
  length = np.clip(rng.poisson(4.0, texts) + 8, None, args.words)
  mask = np.arange(args.words) < length[:, None]
  return Work(tokens(images, args.regions), tokens(texts, args.words), mask)


def named(scores: np.ndarray) -> dict[str, float]:
  """Scores [I, T] by name, in which the two sides are compared."""
  return {f"{i} {t}": float(s) for (i, t), s in np.ndenumerate(scores)}


def ours(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
  """All pairs in one call, as a block of the evaluator's."""
  import benchmark_ours
  import jax

  from xmodal_jax.losses import cross_attention

  work = make(args)
  images, texts, mask = jax.device_put(work)
  score = jax.jit(
    lambda v, t, tm: cross_attention.attended_scores(
      v, t, tm, SHARPNESS, args.direction, args.chunk
    )
  )
  held = []

  def run():
    held[:] = [score(images, texts, mask).block_until_ready()]

  return run, work.info(args.direction) | {
    "scores": lambda: named(np.asarray(held[0])),
    "peak_gflops_per_s": benchmark_ours.matmul_peak,
  }
