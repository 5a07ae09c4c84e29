"""The other side of `benchmark.py hierarchical_scores`: the same scores in plain torch."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import benchmark_hierarchical
import torch

Form = tuple[Callable[[], None], dict[str, Any]]

PICTURES = 128  # that the original scores at a time
SMALL = 1e-8  # added to norms, and the least product of two
HIDDEN = -1e30  # what a word that does not count has before a softmax


def forms(args: argparse.Namespace) -> dict[str, Callable[[], Form]]:
  """What is worth measuring: name -> function that prepares it. The first word is its kind.

  attended: the original's way, attended vectors built and compared, caption by caption without its
  padding. gram: from products of tokens and Gram matrices, as ours; trimmed: caption by caption
  without its padding; N: of N captions at a time.
  """
  torch.set_num_threads(args.threads)
  names = ["attended", "gram trimmed", "gram 1", "gram 4", "gram 16"]
  if not args.no_compile:
    names += ["gram 1 compile", "gram 4 compile", "gram 16 compile"]
  return {name: lambda name=name: prepare(args, name.split()) for name in names}


def normal(dots: torch.Tensor, askers: int) -> torch.Tensor:
  """What the softmax sees of products: each answer's, of length 1 over those who ask."""
  a = torch.nn.functional.leaky_relu(dots, 0.1)
  norm = torch.linalg.vector_norm(a, dim=askers, keepdim=True)
  return benchmark_hierarchical.SHARPNESS * a / (norm + SMALL)


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
  norm = functools.partial(torch.linalg.vector_norm, dim=-1)
  return (x * y).sum(-1) / (norm(x) * norm(y)).clamp(min=SMALL)


def attended(
  images: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor, direction: str
) -> torch.Tensor:
  """images [I, R, D], texts [1, W, D], mask bool [1, W], all of them true -> [I, 1]."""
  del mask
  words = texts[0]
  dots = images @ words.T  # [I, R, W]
  score = 0.0
  if direction != "t2i":
    found = normal(dots, 1).softmax(2) @ words  # [I, R, D]
    score = score + cosine(images, found).mean(1, keepdim=True)
  if direction != "i2t":
    found = normal(dots, 2).softmax(1).mT @ images  # [I, W, D]
    score = score + cosine(words[None], found).mean(1, keepdim=True)
  return score


def gram(
  images: torch.Tensor,
  texts: torch.Tensor,
  mask: torch.Tensor,
  norm: torch.Tensor,
  of_images: torch.Tensor,
  direction: str,
) -> torch.Tensor:
  """As `attended`, of any number of texts; norm [I, R], of_images [I, R, R] of the pictures."""
  dots = torch.einsum("ird,twd->irtw", images, texts)
  score = 0.0
  if direction != "t2i":
    weights = normal(dots, 1).masked_fill(~mask, HIDDEN).softmax(3)
    square = (torch.einsum("irtw,twu->irtu", weights, texts @ texts.mT) * weights).sum(3)
    length = norm[:, :, None] * square.clamp(min=0).sqrt()  # [I, R, T]
    score = score + ((weights * dots).sum(3) / length.clamp(min=SMALL)).mean(1)
  if direction != "i2t":
    weights = normal(dots * mask, 3).softmax(1)
    square = (torch.einsum("irs,istw->irtw", of_images, weights) * weights).sum(1)
    length = torch.linalg.vector_norm(texts, dim=-1) * square.clamp(min=0).sqrt()  # [I, T, W]
    found = (weights * dots).sum(1) / length.clamp(min=SMALL) * mask
    score = score + found.sum(2) / mask.sum(1)
  return score


def prepare(args: argparse.Namespace, name: list[str]) -> Form:
  work = benchmark_hierarchical.make(args)
  images, texts, mask = map(torch.from_numpy, work)
  kind, size = name[0], name[1] if len(name) > 1 else "trimmed"
  if size == "trimmed":
    length = mask.sum(1).tolist()
    captions = [(t[None, :n], m[None, :n]) for t, m, n in zip(texts, mask, length, strict=True)]
  else:
    captions = list(zip(texts.split(int(size)), mask.split(int(size)), strict=True))
  score = gram
  if "compile" in name:
    torch._dynamo.reset()
    score = torch.compile(gram, dynamic=False)
  held = []

  def of(v: torch.Tensor) -> torch.Tensor:
    if kind == "attended":
      return torch.cat([attended(v, *t, args.direction) for t in captions], 1)
    norm = torch.linalg.vector_norm(v, dim=-1)
    own = v @ v.mT if args.direction != "i2t" else v
    return torch.cat([score(v, *t, norm, own, args.direction) for t in captions], 1)

  def run():
    with torch.inference_mode():
      held[:] = [torch.cat([of(v) for v in images.split(PICTURES)])]

  return run, work.info(args.direction) | {
    "scores": lambda: benchmark_hierarchical.named(held[0].numpy())
  }
