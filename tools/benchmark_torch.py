"""The other side of tools/benchmark.py: transformers' CLIPModel on torch, random weights."""

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import benchmark_ours
import torch
import torch._inductor.config
import transformers

from xmodal_jax.models import clip

Form = tuple[Callable[[], None], dict[str, Any]]

# Where our side is too: JAX takes the GPU unless it is told not to.
_GPU = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
DEVICE = torch.device("cuda" if _GPU else "cpu")


def forms(args: argparse.Namespace) -> dict[str, Callable[[], Form]]:
  """What is worth measuring: name -> function that prepares it.

  sdpa or eager attention; channels_last, which concerns the patch convolution; AdamW fused or
  foreach; compile, and freeze, inductor's packing of constant weights for inference.
  """
  torch.set_num_threads(args.threads)
  if args.command == "data":
    return {"DataLoader": lambda: pipeline(args)}
  if args.command == "encode":
    prepare, plain = encode, ["sdpa", "eager", "sdpa channels_last"]
    compiled = [
      "compile sdpa",
      "compile eager",
      "compile sdpa channels_last",
      "compile freeze sdpa",
    ]
  else:
    prepare = train_step
    plain = ["sdpa fused", "sdpa foreach", "eager fused", "sdpa channels_last fused"]
    compiled = ["compile sdpa fused", "compile eager fused"]
  names = plain if args.no_compile else plain + compiled
  return {name: lambda name=name: prepare(args, frozenset(name.split())) for name in names}


def build(args: argparse.Namespace, names: frozenset[str]) -> transformers.CLIPModel:
  """CLIPModel of the size of one of our ViT presets."""
  ours = clip.preset(args.model)
  image, text = ours["image"], ours["text"]
  if image["kind"] != "vit":
    raise SystemExit(f"benchmark: transformers has no CLIP with the image tower of {args.model}")
  vision = dict(
    hidden_size=image["width"],
    intermediate_size=4 * image["width"],
    num_hidden_layers=image["depth"],
    num_attention_heads=image["heads"],
    image_size=image["size"],
    patch_size=image["patch"],
  )
  words = dict(
    hidden_size=text["width"],
    intermediate_size=4 * text["width"],
    num_hidden_layers=text["depth"],
    num_attention_heads=text["heads"],
    vocab_size=text["vocab"],
    max_position_embeddings=text["context"],
    eos_token_id=text["vocab"] - 1,
  )
  config = transformers.CLIPConfig(
    vision_config=vision, text_config=words, projection_dim=ours["embed"]
  )
  config._attn_implementation = "eager" if "eager" in names else "sdpa"
  torch.manual_seed(0)
  model = transformers.CLIPModel(config)
  assert model.vision_model.config._attn_implementation == config._attn_implementation
  if "channels_last" in names:
    model = model.to(memory_format=torch.channels_last)
  return model.to(DEVICE)


class Pictures(torch.utils.data.Dataset):
  """Each picture of a split with its first caption: float32 [3, S, S], int64 [77]."""

  def __init__(self, args: argparse.Namespace, size: int):
    from xmodal_jax.data import image as image_lib
    from xmodal_jax.data import records
    from xmodal_jax.data import text as text_lib

    self.split = records.open_split(args.data_dir, args.split)
    self.transform, self.tokenize = (
      image_lib.clip_transform(size),
      text_lib.make_tokenizer("clip_bpe"),
    )
    self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (clip.MEAN, clip.STD))

  def __len__(self) -> int:
    return len(self.split)

  def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    from xmodal_jax.data import image as image_lib

    found = self.split.read(i)
    pixels = torch.tensor(image_lib.load(found.image, self.transform)).permute(2, 0, 1)
    ids, _ = self.tokenize(found.captions[:1], 77)
    return (pixels.float() / 255 - self.mean) / self.std, torch.from_numpy(ids[0]).long()


def batches(args: argparse.Namespace, size: int):
  """Of the data set, without end, from as many processes as our side has threads."""
  pictures = Pictures(args, size)
  # A batch may be larger than the data set.
  sampler = torch.utils.data.RandomSampler(pictures, replacement=True, num_samples=2**40)
  loader = torch.utils.data.DataLoader(
    pictures,
    args.batch,
    sampler=sampler,
    num_workers=args.threads,
    pin_memory=_GPU,
    drop_last=True,
  )
  return iter(loader)


def pipeline(args: argparse.Namespace) -> Form:
  """Batches from disk to normalised pixels and ids in the memory of the host."""
  stream = batches(args, args.size)

  def run():
    for _ in itertools.islice(stream, args.batches):
      pass

  return run, {"examples": args.batch * args.batches}


def batch_of(args: argparse.Namespace, names: frozenset[str]) -> tuple[torch.Tensor, torch.Tensor]:
  """pixels float32 [B, 3, S, S] and ids int64 [B, 77]: the batch of our side."""
  ours = clip.preset(args.model)
  batch = benchmark_ours.inputs(args, ours["image"]["size"], ours["text"]["vocab"])
  pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous()
  if "channels_last" in names:
    pixels = pixels.contiguous(memory_format=torch.channels_last)
  return pixels.to(DEVICE), torch.from_numpy(batch["text_ids"]).long().to(DEVICE)


def embed(model: transformers.CLIPModel, pixels: torch.Tensor, ids: torch.Tensor):
  """Unit rows [B, E] of both towers."""
  images = model.get_image_features(pixel_values=pixels).pooler_output
  texts = model.get_text_features(input_ids=ids).pooler_output
  normalize = torch.nn.functional.normalize
  return normalize(images, dim=-1), normalize(texts, dim=-1)


def maybe_compile(function: Callable, names: frozenset[str]) -> Callable:
  if "compile" not in names:
    return function
  torch._dynamo.reset()
  # Not an option of torch.compile: tracing looks at it too.
  torch._inductor.config.freezing = "freeze" in names
  return torch.compile(function)


def autocast(args: argparse.Namespace):
  if args.dtype == "float32":
    return contextlib.nullcontext()
  return torch.autocast(DEVICE.type, dtype=getattr(torch, args.dtype))


def info_of(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
  memory = lambda: torch.cuda.max_memory_allocated() / 1e9 if _GPU else 0.0
  return {
    "examples": args.batch * args.run_steps,
    "parameters": sum(p.numel() for p in model.parameters()),
    "device": torch.cuda.get_device_name() if _GPU else "cpu",
    "device_gb": memory,
  }


def encode(args: argparse.Namespace, names: frozenset[str]) -> Form:
  model, (pixels, ids) = build(args, names).eval(), batch_of(args, names)
  forward = maybe_compile(lambda pixels, ids: embed(model, pixels, ids), names)

  def run():
    with torch.inference_mode(), autocast(args):
      forward(pixels, ids)
    if _GPU:
      torch.cuda.synchronize()

  return run, info_of(args, model)


def train_step(args: argparse.Namespace, names: frozenset[str]) -> Form:
  """Both towers, symmetric InfoNCE, gradient, AdamW as in our default recipe."""
  model = build(args, names).train()
  if args.data_dir:
    stream = batches(args, clip.preset(args.model)["image"]["size"])
    following = lambda: (x.to(DEVICE, non_blocking=True) for x in next(stream))
  else:
    batch = batch_of(args, names)
    following = lambda: batch
  kernels = [p for p in model.parameters() if p.ndim > 1]
  others = [p for p in model.parameters() if p.ndim <= 1]
  optimizer = torch.optim.AdamW(
    [{"params": kernels, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
    lr=1e-5,
    betas=(0.9, 0.98),
    eps=1e-6,
    fused="fused" in names,
    foreach="foreach" in names,
  )
  labels = torch.arange(args.batch, device=DEVICE)

  def loss_fn(pixels, ids):
    images, texts = embed(model, pixels, ids)
    logits = model.logit_scale.exp() * images.float() @ texts.float().T
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

  loss_fn = maybe_compile(loss_fn, names)
  info = info_of(args, model)

  def run():
    for _ in range(args.run_steps):
      pixels, ids = following()
      optimizer.zero_grad(set_to_none=True)
      with autocast(args):
        loss = loss_fn(pixels, ids)
      loss.backward()
      optimizer.step()
    info["loss"] = loss.item()  # waits

  return run, info
