"""The other side of `benchmark.py local_scores`: the same scores in plain torch."""

import argparse
from collections.abc import Callable
from typing import Any

import benchmark_local
import torch

Form = tuple[Callable[[], None], dict[str, Any]]

SHARDS = 5  # of the captions, as the original evaluates


def forms(args: argparse.Namespace) -> dict[str, Callable[[], Form]]:
  """What is worth measuring: name -> function that prepares it. The first word is its kind.

  expanded: the original's arithmetic, tokens expanded over all pairs of pictures and a shard of the
  captions; query: the same for one picture at a time. einsum N: products of all pictures' tokens
  with those of N captions at a time, without a copy of either.
  """
  torch.set_num_threads(args.threads)
  names = ["expanded", "query", "einsum 4", "einsum 16", "einsum 64"]
  if not args.no_compile:
    names += ["einsum 4 compile", "einsum 16 compile", "einsum 64 compile"]
  return {name: lambda name=name: prepare(args, name.split()) for name in names}


def expanded(
  images: torch.Tensor, regions: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
  """images [I, R, D], regions bool [I, R], texts [T, W, D], mask bool [T, W] -> [I, T]."""
  pairs = len(images), len(texts), -1, -1
  v, t = images[:, None].expand(*pairs), texts[None].expand(*pairs)
  a = torch.matmul(v, t.transpose(2, 3))  # [I, T, R, W]
  both = regions[:, None, :, None] & mask[None, :, None]
  return a.masked_fill_(~both, 0).max(2).values.sum(2)


def einsum(
  images: torch.Tensor, regions: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
  """As `expanded`, for pictures that have all their regions."""
  del regions
  best = torch.einsum("ird,twd->irtw", images, texts).amax(1)  # [I, T, W]
  return (best * mask).sum(2)


def prepare(args: argparse.Namespace, name: list[str]) -> Form:
  work = benchmark_local.make(args)
  images, texts, mask = map(torch.from_numpy, work)
  regions = torch.ones(images.shape[:2], dtype=torch.bool)
  score = einsum if name[0] == "einsum" else expanded
  if "compile" in name:
    torch._dynamo.reset()
    score = torch.compile(score, dynamic=False)
  pictures = list(
    zip(*(x.split(1 if name[0] == "query" else len(x)) for x in (images, regions)), strict=True)
  )
  size = int(name[1]) if name[0] == "einsum" else -(-len(texts) // SHARDS)
  captions = list(zip(texts.split(size), mask.split(size), strict=True))
  held = []

  def run():
    with torch.inference_mode():
      rows = [torch.cat([score(*v, *t) for t in captions], 1) for v in pictures]
      held[:] = [benchmark_local.SCALE * torch.cat(rows)]

  return run, work.info() | {"scores": lambda: benchmark_local.named(held[0].numpy())}
