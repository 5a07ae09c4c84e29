"""Scores of all pairs from tokens: TGDT's local scores and a level of HAT's, beside plain torch."""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from benchmarks.runner import Form, Forms, Workload, matmul_peak

SCALE = 10.0  # TGDT multiplies local scores by it
SHARPNESS = 9.0  # of HAT's softmax
TOPICS = 64  # HAT's noise: tokens of one topic attract each other, so that attention is not flat
SHARDS = 5  # of the captions, in TGDT's original evaluation
IMAGES = 128  # that HAT's original evaluation scores at a time
SMALL = 1e-8  # HAT's original adds it to norms, and bounds the product of two by it
HIDDEN = -1e30  # logit of padding before a softmax


class Tokens(NamedTuple):
  """Tokens float32 [I, R, D] and [T, W, D], mask bool [T, W]: what both sides score.

  Images have all their regions, as in the published features. Special tokens that no score
  reads are left out.
  """

  images: np.ndarray
  texts: np.ndarray
  mask: np.ndarray


def arguments(scale: float, regions: int, words: int, width: int) -> Callable:
  def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", type=float, default=scale, help="of the images and captions")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25000)
    parser.add_argument("--regions", type=int, default=regions, help="tokens of an image")
    parser.add_argument("--words", type=int, default=words, help="tokens of a caption, padded")
    parser.add_argument("--width", type=int, default=width, help="of tokens")
    parser.add_argument(
      "--chunk", type=int, default=0, help="captions at a time (ours); 0: its own"
    )
    parser.add_argument("--form", help="the only form of the other side to measure")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")

  return add


def hierarchical_arguments(parser: argparse.ArgumentParser) -> None:
  arguments(0.004, 784, 32, 768)(parser)
  parser.add_argument("--direction", default="i2t", choices=["i2t", "t2i", "both"])


def make(args: argparse.Namespace, draw: Callable, shortest: int) -> Tokens:
  """draw(rng, *shape): tokens. Lengths as COCO's captions: `shortest` words plus 4 in the mean."""
  images, texts = (max(round(n * args.scale), 1) for n in (args.images, args.captions))
  rng = np.random.default_rng(0)
  draw = draw(rng, args.width)
  length = np.clip(rng.poisson(4.0, texts) + shortest, None, args.words)
  mask = np.arange(args.words) < length[:, None]
  return Tokens(draw(images, args.regions), draw(texts, args.words), mask)


def unit_tokens(rng: np.random.Generator, width: int) -> Callable:
  def draw(*shape: int) -> np.ndarray:
    x = rng.standard_normal((*shape, width), np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  return draw


def topical_tokens(rng: np.random.Generator, width: int) -> Callable:
  topics = rng.standard_normal((TOPICS, width), np.float32)

  def draw(*shape: int) -> np.ndarray:
    own = rng.standard_normal((*shape, width), np.float32)
    return own + topics[rng.integers(TOPICS, size=shape)]

  return draw


def local_tokens(args: argparse.Namespace) -> Tokens:
  return make(args, unit_tokens, 6)


def level_tokens(args: argparse.Namespace) -> Tokens:
  return make(args, topical_tokens, 8)  # with a special token at either end


def local_info(tokens: Tokens) -> dict[str, int]:
  """Pairs, and FLOPs of the products of their tokens: without padding, and with."""
  each = 2 * tokens.images.size
  return {
    "examples": len(tokens.images) * len(tokens.texts),
    "flops": each * int(tokens.mask.sum()),
    "padded_flops": each * tokens.mask.size,
  }


def level_info(tokens: Tokens, direction: str) -> dict[str, int]:
  """Pairs, and FLOPs per pair: without padding, and with.

  Products of all tokens, and of attention weights with the keys' Gram matrix. The Gram matrices
  themselves, made once per image or caption, are left out.
  """
  images, regions, width = tokens.images.shape

  def flops(words: np.ndarray) -> int:
    keys = {"i2t": words, "t2i": regions, "both": words + regions}[direction]
    return int((2 * images * regions * words * (width + keys)).sum())

  return {
    "examples": images * len(tokens.texts),
    "flops": flops(tokens.mask.sum(1)),
    "padded_flops": flops(np.full(*tokens.mask.shape)),
  }


def named(scores: np.ndarray) -> dict[str, float]:
  """Scores [I, T] by name, by which the two sides are compared."""
  return {f"{i} {t}": float(s) for (i, t), s in np.ndenumerate(scores)}


def _jitted(score: Callable, arrays: Any, info: dict[str, Any]) -> Form:
  """All pairs in one call, as a block of the evaluator's."""
  import jax

  arrays, score, held = jax.device_put(arrays), jax.jit(score), []

  def run():
    held[:] = [score(*arrays).block_until_ready()]

  return run, info | {
    "scores": lambda: named(np.asarray(held[0])),
    "peak_gflops_per_s": matmul_peak,
  }


def local_ours(args: argparse.Namespace) -> Forms:
  def prepare() -> Form:
    from xmodal_jax.losses import local

    tokens = local_tokens(args)
    regions = np.ones(tokens.images.shape[:2], bool)

    def score(images, texts, mask, regions):
      return SCALE * local.local_scores(images, regions, texts, mask, chunk=args.chunk)

    return _jitted(score, (*tokens, regions), local_info(tokens))

  return {"words packed": prepare}


def hierarchical_ours(args: argparse.Namespace) -> Forms:
  def prepare() -> Form:
    from xmodal_jax.losses import cross_attention

    tokens = level_tokens(args)

    def score(images, texts, mask):
      return cross_attention.attended_scores(
        images, texts, mask, SHARPNESS, args.direction, args.chunk
      )

    return _jitted(score, tuple(tokens), level_info(tokens, args.direction))

  return {"gram": prepare}


# --- torch --------------------------------------------------------------------------------------


def _torch_forms(args: argparse.Namespace, prepare: Callable, names: list[str]) -> Forms:
  import torch

  torch.set_num_threads(args.threads)
  if args.no_compile:
    names = [name for name in names if "compile" not in name.split()]
  return {name: lambda name=name: prepare(args, name.split()) for name in names}


def local_torch(args: argparse.Namespace) -> Forms:
  """expanded: the original's arithmetic, tokens expanded over all pairs of images and a shard of
  the captions; query: the same for one image at a time; einsum N: products of all images' tokens
  with those of N captions at a time, without a copy of either."""
  names = ["expanded", "query", "einsum 4", "einsum 16", "einsum 64"]
  names += ["einsum 4 compile", "einsum 16 compile", "einsum 64 compile"]
  return _torch_forms(args, _local_torch, names)


def _expanded(images: Any, regions: Any, texts: Any, mask: Any) -> Any:
  """images [I, R, D], regions bool [I, R], texts [T, W, D], mask bool [T, W] -> [I, T]."""
  import torch

  pairs = len(images), len(texts), -1, -1
  v, t = images[:, None].expand(*pairs), texts[None].expand(*pairs)
  a = torch.matmul(v, t.transpose(2, 3))  # [I, T, R, W]
  both = regions[:, None, :, None] & mask[None, :, None]
  return a.masked_fill_(~both, 0).max(2).values.sum(2)


def _einsum(images: Any, regions: Any, texts: Any, mask: Any) -> Any:
  """As `_expanded`, for images that have all their regions."""
  import torch

  del regions
  best = torch.einsum("ird,twd->irtw", images, texts).amax(1)  # [I, T, W]
  return (best * mask).sum(2)


def _local_torch(args: argparse.Namespace, name: list[str]) -> Form:
  import torch

  tokens = local_tokens(args)
  images, texts, mask = map(torch.from_numpy, tokens)
  regions = torch.ones(images.shape[:2], dtype=torch.bool)
  score = _einsum if name[0] == "einsum" else _expanded
  if "compile" in name:
    torch._dynamo.reset()
    score = torch.compile(score, dynamic=False)
  at_once = 1 if name[0] == "query" else len(images)
  queries = list(zip(images.split(at_once), regions.split(at_once), strict=True))
  size = int(name[1]) if name[0] == "einsum" else -(-len(texts) // SHARDS)
  captions = list(zip(texts.split(size), mask.split(size), strict=True))
  held = []

  def run():
    with torch.inference_mode():
      rows = [torch.cat([score(*v, *t) for t in captions], 1) for v in queries]
      held[:] = [SCALE * torch.cat(rows)]

  return run, local_info(tokens) | {"scores": lambda: named(held[0].numpy())}


def hierarchical_torch(args: argparse.Namespace) -> Forms:
  """attended: as the original, attended vectors built and compared, caption by caption without
  padding. gram: from products of tokens and Gram matrices, as ours; trimmed: caption by caption
  without padding; N: of N captions at a time."""
  names = ["attended", "gram trimmed", "gram 1", "gram 4", "gram 16"]
  names += ["gram 1 compile", "gram 4 compile", "gram 16 compile"]
  return _torch_forms(args, _hierarchical_torch, names)


def _logits(dots: Any, queries: int) -> Any:
  """Logits of the softmax: products, each key's normalised over the queries (axis `queries`)."""
  import torch

  a = torch.nn.functional.leaky_relu(dots, 0.1)
  return SHARPNESS * a / (torch.linalg.vector_norm(a, dim=queries, keepdim=True) + SMALL)


def _cosine(x: Any, y: Any) -> Any:
  import torch

  norm = functools.partial(torch.linalg.vector_norm, dim=-1)
  return (x * y).sum(-1) / (norm(x) * norm(y)).clamp(min=SMALL)


def _attended(images: Any, texts: Any, direction: str) -> Any:
  """images [I, R, D], texts [1, W, D] without padding -> [I, 1]."""
  words = texts[0]
  dots = images @ words.T  # [I, R, W]
  score = 0.0
  if direction != "t2i":
    found = _logits(dots, 1).softmax(2) @ words  # [I, R, D]
    score = score + _cosine(images, found).mean(1, keepdim=True)
  if direction != "i2t":
    found = _logits(dots, 2).softmax(1).mT @ images  # [I, W, D]
    score = score + _cosine(words[None], found).mean(1, keepdim=True)
  return score


def _gram(images: Any, texts: Any, mask: Any, norm: Any, image_gram: Any, direction: str) -> Any:
  """As `_attended`, of any number of texts; norm [I, R], image_gram [I, R, R] of the images."""
  import torch

  dots = torch.einsum("ird,twd->irtw", images, texts)
  score = 0.0
  if direction != "t2i":
    weights = _logits(dots, 1).masked_fill(~mask, HIDDEN).softmax(3)
    square = (torch.einsum("irtw,twu->irtu", weights, texts @ texts.mT) * weights).sum(3)
    length = norm[:, :, None] * square.clamp(min=0).sqrt()  # [I, R, T]
    score = score + ((weights * dots).sum(3) / length.clamp(min=SMALL)).mean(1)
  if direction != "i2t":
    weights = _logits(dots * mask, 3).softmax(1)
    square = (torch.einsum("irs,istw->irtw", image_gram, weights) * weights).sum(1)
    length = torch.linalg.vector_norm(texts, dim=-1) * square.clamp(min=0).sqrt()  # [I, T, W]
    found = (weights * dots).sum(1) / length.clamp(min=SMALL) * mask
    score = score + found.sum(2) / mask.sum(1)
  return score


def _hierarchical_torch(args: argparse.Namespace, name: list[str]) -> Form:
  import torch

  tokens = level_tokens(args)
  images, texts, mask = map(torch.from_numpy, tokens)
  kind, size = name[0], name[1] if len(name) > 1 else "trimmed"
  if size == "trimmed":
    length = mask.sum(1).tolist()
    captions = [(t[None, :n], m[None, :n]) for t, m, n in zip(texts, mask, length, strict=True)]
  else:
    captions = list(zip(texts.split(int(size)), mask.split(int(size)), strict=True))
  score = _gram
  if "compile" in name:
    torch._dynamo.reset()
    score = torch.compile(_gram, dynamic=False)
  held = []

  def scores_of(v: Any) -> Any:
    if kind == "attended":
      return torch.cat([_attended(v, t, args.direction) for t, _ in captions], 1)
    norm = torch.linalg.vector_norm(v, dim=-1)
    gram = v @ v.mT if args.direction != "i2t" else v
    return torch.cat([score(v, *t, norm, gram, args.direction) for t in captions], 1)

  def run():
    with torch.inference_mode():
      held[:] = [torch.cat([scores_of(v) for v in images.split(IMAGES)])]

  return run, level_info(tokens, args.direction) | {"scores": lambda: named(held[0].numpy())}


LOCAL_SCORES = Workload(
  help="TGDT's scores of all pairs",
  arguments=arguments(0.02, 36, 40, 1024),
  ours=local_ours,
  against={"torch": local_torch},
  by_kind=True,
)
HIERARCHICAL_SCORES = Workload(
  help="HAT's scores of all pairs, at one level",
  arguments=hierarchical_arguments,
  ours=hierarchical_ours,
  against={"torch": hierarchical_torch},
  by_kind=True,
)
