"""TEAM's second stage on token tensors of the shape of COCO 5K, beside the same in plain torch."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from benchmarks.runner import Form, Forms, Workload
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

Call = tuple[np.ndarray, np.ndarray]  # image [N] and caption [N, M]
State = Mapping[str, Any]  # torch tensors by name


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--scale", type=float, default=0.02, help="of COCO's 5,000 images")
  parser.add_argument("--width", type=int, default=1024, help="of tokens; the heads are width/64")
  parser.add_argument("--blocks", type=int, default=6)
  parser.add_argument(
    "--rerank_block", type=int, nargs=2, default=(16, 8), help="images, captions of each in a call"
  )
  parser.add_argument(
    "--slice", type=int, default=256, help="pairs that a run of the other side scores; 0: all"
  )
  parser.add_argument("--form", help="the only form of the other side to measure")
  parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")


class Work(NamedTuple):
  """What both sides score.

  Tokens float32 [I, P, D] and [T, L, D], mask bool [T, L]; captions int [I, k] and image_indices
  [T, k] are the candidates of each image and of each text; block: captions that our side puts on
  the device at a time.
  """

  images: np.ndarray
  texts: np.ndarray
  mask: np.ndarray
  captions: np.ndarray
  image_indices: np.ndarray
  block: int

  def pairs(self) -> tuple[np.ndarray, np.ndarray]:
    """(image_index, caption), int [I k + T k], query by query: all images first, then all texts."""
    row = lambda candidates: np.repeat(np.arange(len(candidates)), candidates.shape[1])
    image_index = np.concatenate([row(self.captions), self.image_indices.ravel()])
    return image_index, np.concatenate([self.captions.ravel(), row(self.image_indices)])

  def unique(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image_index, caption) of each pair once, and the position of every pair among them."""
    image_index, caption = self.pairs()
    pair, back = np.unique(image_index * len(self.texts) + caption, return_inverse=True)
    return *np.divmod(pair, len(self.texts)), back

  def named(
    self, image_index: np.ndarray, caption: np.ndarray, scores: np.ndarray
  ) -> dict[str, float]:
    """Scores of pairs by name, by which the two sides are compared."""
    return {f"{i} {t}": float(s) for i, t, s in zip(image_index, caption, scores, strict=True)}


def candidates(images: int) -> tuple[np.ndarray, np.ndarray]:
  """(int [I, k], int [T, k]) by the cosines of random unit vectors, captions near their image.

  Some directions weigh more than others, so that a few images are chosen by many captions. Of
  the pairs that images select, captions select 84 % too at 5,000 images, 99 % at 100.
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
  image_index, caption, _ = work.unique()
  return rerank.schedule(
    image_index,
    caption,
    batch=len(work.images),
    devices=1,
    block=work.block,
    shape=tuple(args.rerank_block),
  )


def model_config(args: argparse.Namespace) -> dict[str, Any]:
  """TEAM with CLIP ViT-L/14, its towers as small as possible: they are not measured."""
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
  """Features [N, ...] on the device, in batches of `batch` rows the last one padded."""
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


def ours(args: argparse.Namespace) -> Form:
  """From candidates to scores as in the evaluator: each pair once, scheduled, scored."""
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
  image_index, caption, back = work.unique()
  found, places = np.empty(0), [x.pair for x in plan(args, work).values()]

  def run():
    nonlocal found
    image_index, caption, _ = work.unique()
    found = reranker.scores(
      state, images, texts, images.places[image_index], texts.places[caption], lambda: None
    )

  return run, {
    "examples": len(back),
    "unique": len(image_index),
    "filled": len(image_index) / sum(x.size for x in places),  # share of the slots of all calls
    "parameters": sum(x.size for path, x in flat.items() if path.startswith("matching/")),
    "scores": lambda: work.named(image_index, caption, found),
  }


# --- torch --------------------------------------------------------------------------------------


def with_torch(args: argparse.Namespace) -> Forms:
  """query: the 16 candidates of one query at a time, as the original evaluates; an image's keys and
  values are computed for each of its pairs. batch N: N pairs at a time, across queries. shared: our
  calls, each pair once and several captions to an image, whose keys and values are computed once.
  """
  import torch

  torch.set_num_threads(args.threads)
  names = ["query", "batch 8", "batch 32", "batch 64", "shared"]
  if not args.no_compile:
    names += ["query compile", "batch 8 compile", "batch 32 compile", "shared compile"]
  return {name: lambda name=name: torch_form(args, name.split()) for name in names}


def torch_state(args: argparse.Namespace) -> State:
  """Our weights, through the rules by which released files are converted."""
  import torch

  from xmodal_jax.interop import conversion
  from xmodal_jax.interop import team as team_rules

  _, flat = parameters(args)
  state = conversion.arrays(conversion.to_torch(flat, team_rules.RULES))
  parts = ("team_block_list.", "image_tensor_fc.", "text_tensor_fc.")
  return {k: torch.from_numpy(np.array(x)) for k, x in state if k.startswith(parts)}


def _linear(state: State, name: str, x: Any) -> Any:
  from torch.nn import functional as F

  return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Any) -> Any:
  from torch.nn import functional as F

  return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def _project(state: State, name: str, x: Any, first: int, last: int, heads: int) -> Any:
  """Parts first .. last of the fused query, key, value projection of x [B, L, D], each
  [B, H, L, D/H]."""
  from torch.nn import functional as F

  part = slice(first * x.shape[-1], last * x.shape[-1])
  y = F.linear(x, state[f"{name}.in_proj_weight"][part], state[f"{name}.in_proj_bias"][part])
  return y.unflatten(-1, (last - first, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attention(state: State, name: str, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
  from torch.nn import functional as F

  y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
  return _linear(state, f"{name}.out_proj", y.transpose(1, 2).flatten(2))


def _block(state: State, name: str, heads: int, r: Any, texts: Any, mask: Any, images: Any) -> Any:
  """r, texts [N M, L, D], mask bool [N M, 1, 1, L], images [N, P, D] -> [N M, L, D]."""
  from torch.nn import functional as F

  own, cross = f"{name}.self_attn", f"{name}.cross_attn"
  y = _norm(state, f"{name}.norm1", r)
  q, k = _project(state, own, texts + y, 0, 2, heads)
  (v,) = _project(state, own, y, 2, 3, heads)
  r = r + _attention(state, own, q, k, v, mask)
  q = (texts + _norm(state, f"{name}.norm2", r)).reshape(len(images), -1, r.shape[-1])
  (q,) = _project(state, cross, q, 0, 1, heads)
  k, v = _project(state, cross, images, 1, 3, heads)
  r = r + _attention(state, cross, q, k, v).reshape(r.shape)
  y = F.gelu(_linear(state, f"{name}.ffn.fc1", _norm(state, f"{name}.norm3", r)))
  return r + _linear(state, f"{name}.ffn.fc2", y)


def _matching(state: State, depth: int, heads: int, images: Any, texts: Any, mask: Any) -> Any:
  """images [N, P, D], texts [N, M, L, D], mask bool [N, M, L] -> [N, M]."""
  import torch
  from torch.nn import functional as F

  shape, texts, mask = mask.shape, texts.flatten(0, 1), mask.flatten(0, 1)
  target = F.normalize(_linear(state, "text_tensor_fc", texts), dim=-1)
  r, total = torch.zeros_like(texts), 0.0
  for i in range(depth):
    r = _block(state, f"team_block_list.{i}", heads, r, texts, mask[:, None, None], images)
    cosine = (F.normalize(_linear(state, "image_tensor_fc", r), dim=-1) * target).sum(-1)
    total = total + (cosine * mask).sum(-1) / mask.sum(-1).clamp(min=1)
  return total.reshape(shape[:2])


def calls_of(args: argparse.Namespace, kind: str, work: Work) -> list[Call]:
  """All calls of a form that makes one call per query, or of `shared`."""
  if kind == "query":
    return [(np.array([i]), row[None]) for i, row in enumerate(work.captions)] + [
      (row, np.full((len(row), 1), t)) for t, row in enumerate(work.image_indices)
    ]
  return [
    (p, c + n * work.block)
    for n, calls in plan(args, work).items()
    for p, c in zip(calls.image, calls.caption, strict=True)
  ]


def evenly(items: list, count: int) -> list:
  """`count` of the items, evenly spaced; all of them if there are not more."""
  return [items[i] for i in np.arange(count) * len(items) // count] if count < len(items) else items


def _one_image_per_pair(image_index: np.ndarray, caption: np.ndarray) -> Call:
  """A call of N images with M captions each -> one of N M images with one caption each."""
  return np.broadcast_to(image_index[:, None], caption.shape).flatten(), caption.reshape(-1, 1)


def torch_form(args: argparse.Namespace, name: list[str]) -> Form:
  """A slice of the work; `times` is the ratio of the whole to it."""
  import torch

  work, state, kind = make(args), torch_state(args), name[0]
  every = calls_of(args, "shared" if kind == "shared" else "query", work)
  calls = evenly(every, -(-args.slice // every[0][1].size) if args.slice else len(every))
  times = len(every) / len(calls)
  if kind != "shared":
    calls = [_one_image_per_pair(*call) for call in calls]
  if kind == "batch":
    image_index, caption = (np.concatenate(x) for x in zip(*calls, strict=True))
    size = min(int(name[1]), len(image_index))
    whole = len(image_index) // size * size  # a smaller last batch would be compiled apart
    times *= len(image_index) / whole
    cut = (np.split(x[:whole], whole // size) for x in (image_index, caption))
    calls = list(zip(*cut, strict=True))
  images, texts, mask = (torch.from_numpy(x) for x in (work.images, work.texts, work.mask))
  forward = _matching
  if "compile" in name:
    torch._dynamo.reset()
    forward = torch.compile(_matching, dynamic=False)
  matching = model_config(args)["matching"]
  found = []

  def scores() -> Iterator[Any]:
    for image_index, caption in calls:
      p, c = torch.from_numpy(image_index), torch.from_numpy(caption)
      yield forward(state, matching["depth"], matching["heads"], images[p], texts[c], mask[c])

  def run():
    with torch.inference_mode():
      found[:] = scores()

  def compared() -> dict[str, float]:
    pairs = [_one_image_per_pair(*call) for call in calls]
    image_index, caption = (np.concatenate(x) for x in zip(*pairs, strict=True))
    return work.named(image_index, caption.ravel(), torch.cat([x.ravel() for x in found]).numpy())

  return run, {
    "examples": len(work.pairs()[0]),
    "times": times,
    "parameters": sum(x.numel() for x in state.values()),
    "scores": compared,
  }


RERANK = Workload(
  help="TEAM's second stage",
  arguments=arguments,
  ours=lambda args: {"pairs once, scheduled": lambda: ours(args)},
  against={"torch": with_torch},
  by_kind=True,
  tries=1,
)
