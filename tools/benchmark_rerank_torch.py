"""The other side of `benchmark.py rerank`: the same blocks and scores in plain torch."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import benchmark_rerank
import numpy as np
import torch
from torch.nn import functional as F

from xmodal_jax.interop import conversion
from xmodal_jax.interop import team as team_rules

Form = tuple[Callable[[], None], dict[str, Any]]
Call = tuple[np.ndarray, np.ndarray]  # picture [N] and caption [N, M]


def forms(args: argparse.Namespace) -> dict[str, Callable[[], Form]]:
  """What is worth measuring: name -> function that prepares it. The first word is its kind.

  query: the 16 candidates of one query at a time, as the original evaluates; an image's keys and
  values are made for every pair of it. batch N: N pairs at a time, across queries. shared: our
  calls, each pair once and several captions to an image, whose keys and values are made once.
  """
  torch.set_num_threads(args.threads)
  names = ["query", "batch 8", "batch 32", "batch 64", "shared"]
  if not args.no_compile:
    names += ["query compile", "batch 8 compile", "batch 32 compile", "shared compile"]
  return {name: lambda name=name: prepare(args, name.split()) for name in names}


class Attention(torch.nn.Module):
  """Multi-head attention with a fused input projection, rows [query; key; value]."""

  def __init__(self, dim: int, heads: int):
    super().__init__()
    self.heads = heads
    self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * dim, dim))
    self.in_proj_bias = torch.nn.Parameter(torch.empty(3 * dim))
    self.out_proj = torch.nn.Linear(dim, dim)

  def project(self, x: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, ...]:
    """Parts first .. last of the projection of x [B, L, D], each [B, H, L, D/H]."""
    dim = x.shape[-1]
    part = slice(first * dim, last * dim)
    y = F.linear(x, self.in_proj_weight[part], self.in_proj_bias[part])
    y = y.unflatten(-1, (last - first, self.heads, -1))
    return y.permute(2, 0, 3, 1, 4).unbind(0)

  def forward(self, q, k, v, mask=None) -> torch.Tensor:
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(torch.nn.Module):
  def __init__(self, dim: int):
    super().__init__()
    self.fc1, self.fc2 = torch.nn.Linear(dim, 2 * dim), torch.nn.Linear(2 * dim, dim)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(F.gelu(self.fc1(x)))


class Block(torch.nn.Module):
  def __init__(self, dim: int, heads: int):
    super().__init__()
    self.norm1, self.norm2, self.norm3 = (torch.nn.LayerNorm(dim) for _ in range(3))
    self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
    self.ffn = MLP(dim)

  def forward(self, r, texts, mask, images) -> torch.Tensor:
    """r, texts [N M, L, D], mask bool [N M, 1, 1, L], images [N, P, D]."""
    y = self.norm1(r)
    q, k = self.self_attn.project(texts + y, 0, 2)
    (v,) = self.self_attn.project(y, 2, 3)
    r = r + self.self_attn(q, k, v, mask)
    q = (texts + self.norm2(r)).reshape(len(images), -1, r.shape[-1])
    (q,), (k, v) = self.cross_attn.project(q, 0, 1), self.cross_attn.project(images, 1, 3)
    r = r + self.cross_attn(q, k, v).reshape(r.shape)
    return r + self.ffn(self.norm3(r))


class Matching(torch.nn.Module):
  def __init__(self, dim: int, depth: int, heads: int, embed: int):
    super().__init__()
    self.team_block_list = torch.nn.ModuleList(Block(dim, heads) for _ in range(depth))
    self.image_tensor_fc = torch.nn.Linear(dim, embed)
    self.text_tensor_fc = torch.nn.Linear(dim, embed)

  def forward(self, images, texts, mask) -> torch.Tensor:
    """images [N, P, D], texts [N, M, L, D], mask bool [N, M, L] -> [N, M]."""
    shape, texts, mask = mask.shape, texts.flatten(0, 1), mask.flatten(0, 1)
    target = F.normalize(self.text_tensor_fc(texts), dim=-1)
    r, total = torch.zeros_like(texts), 0.0
    for block in self.team_block_list:
      r = block(r, texts, mask[:, None, None], images)
      cosine = (F.normalize(self.image_tensor_fc(r), dim=-1) * target).sum(-1)
      total = total + (cosine * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return total.reshape(shape[:2])


def model(args: argparse.Namespace) -> Matching:
  """Our weights, through the table by which released files are converted."""
  c = benchmark_rerank.model_config(args)["matching"]
  out = Matching(args.width, c["depth"], c["heads"], c["embed"])
  _, flat = benchmark_rerank.parameters(args)
  own = set(out.state_dict())
  state = conversion.arrays(conversion.to_torch(flat, team_rules.RULES))
  out.load_state_dict({k: torch.from_numpy(np.array(x)) for k, x in state if k in own})
  return out.eval()


def calls_of(args: argparse.Namespace, kind: str, work: benchmark_rerank.Work) -> list[Call]:
  """All calls of a form that makes one call per query, or of `shared`."""
  if kind == "query":
    return [(np.array([i]), row[None]) for i, row in enumerate(work.captions)] + [
      (row, np.full((len(row), 1), t)) for t, row in enumerate(work.pictures)
    ]
  return [
    (p, c + n * work.block)
    for n, calls in benchmark_rerank.plan(args, work).items()
    for p, c in zip(calls.picture, calls.caption, strict=True)
  ]


def spread(items: list, count: int) -> list:
  """`count` of the items, evenly spaced; all of them where there are not more."""
  return [items[i] for i in np.arange(count) * len(items) // count] if count < len(items) else items


def prepare(args: argparse.Namespace, name: list[str]) -> Form:
  """A slice of the work, `times` of which is all of it."""
  work, module, kind = benchmark_rerank.make(args), model(args), name[0]
  every = calls_of(args, "shared" if kind == "shared" else "query", work)
  calls = spread(every, -(-args.slice // every[0][1].size) if args.slice else len(every))
  times = len(every) / len(calls)
  if kind != "shared":  # one image and its captions are that many pairs
    each = lambda p, c: (np.broadcast_to(p[:, None], c.shape).flatten(), c.reshape(-1, 1))
    calls = [each(*call) for call in calls]
  if kind == "batch":
    picture, caption = (np.concatenate(x) for x in zip(*calls, strict=True))
    size = min(int(name[1]), len(picture))
    whole = len(picture) // size * size  # a smaller last batch would be compiled apart
    times *= len(picture) / whole
    cut = lambda x: np.split(x[:whole], whole // size)
    calls = list(zip(cut(picture), cut(caption), strict=True))
  images, texts, mask = (torch.from_numpy(x) for x in (work.images, work.texts, work.mask))
  forward = module
  if "compile" in name:
    torch._dynamo.reset()
    forward = torch.compile(module, dynamic=False)
  asked, found = len(work.asked()[0]), []

  def scores() -> Iterator[torch.Tensor]:
    for picture, caption in calls:
      p, c = torch.from_numpy(picture), torch.from_numpy(caption)
      yield forward(images[p], texts[c], mask[c])

  def run():
    with torch.inference_mode():
      found[:] = scores()

  def compared():
    pairs = (np.broadcast_to(p[:, None], c.shape).ravel() for p, c in calls)
    caption = np.concatenate([c.ravel() for _, c in calls])
    picture = np.concatenate(list(pairs))
    return work.named(picture, caption, torch.cat([x.ravel() for x in found]).numpy())

  return run, {
    "examples": asked,
    "times": times,
    "parameters": sum(p.numel() for p in module.parameters()),
    "scores": compared,
  }
