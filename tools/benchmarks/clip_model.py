"""CLIP at full size: encoding and a training step, beside transformers on torch."""

import argparse
import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from benchmarks import data
from benchmarks.runner import Form, Forms, Workload, matmul_peak

REMAT = "dots_with_no_batch_dims_saveable"


def model_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", default="vit_b32", help="a preset of the clip system")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--unroll", type=int, default=1, help="layers per scan iteration (ours)")
  parser.add_argument("--remat", default=REMAT, help="a jax.checkpoint policy (ours)")


def torch_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--form", help="the only form of the other side to measure")
  parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")


def encode_arguments(parser: argparse.ArgumentParser) -> None:
  model_arguments(parser)
  torch_arguments(parser)


def step_arguments(parser: argparse.ArgumentParser) -> None:
  encode_arguments(parser)
  parser.add_argument("--run_steps", type=int, default=1, help="of a timed run; one wait")
  parser.add_argument("--data_dir", help="a dataset to train on; otherwise noise")
  parser.add_argument("--split", default="train")
  parser.add_argument("--micro_shards", type=int, default=8, help="of the reproducible side")


def noise(args: argparse.Namespace, size: int, vocab: int) -> dict[str, np.ndarray]:
  """A batch: image float32 [B, S, S, 3], text_ids int32 [B, 77] with the end of text at 40."""
  rng = np.random.default_rng(0)
  ids = rng.integers(1, vocab - 2, (args.batch, 77), np.int32)
  ids[:, 0], ids[:, 40], ids[:, 41:] = vocab - 2, vocab - 1, 0
  return {
    "image": rng.standard_normal((args.batch, size, size, 3), np.float32),
    "text_ids": ids,
    "image_id": np.arange(args.batch, dtype=np.int32),
    "valid": np.ones(args.batch, bool),
  }


# --- ours ---------------------------------------------------------------------------------------


def about(args: argparse.Namespace, params: Any, flops: int) -> dict[str, Any]:
  """The info of a program of this many FLOPs."""
  import jax

  from xmodal_jax.runtime.flops import device_peak

  device = jax.devices()[0]
  return {
    "examples": args.batch * args.run_steps,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "flops": flops,
    "peak_gflops_per_s": lambda: matmul_peak(args.dtype),
    "published_peak": device_peak(device.device_kind),
    "device": device.device_kind,
    "device_gb": lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
  }


def model_config(args: argparse.Namespace) -> dict[str, Any]:
  from xmodal_jax.models import clip

  return clip.preset(args.model) | {"remat": args.remat, "unroll": args.unroll}


def build(args: argparse.Namespace) -> Callable[[], Any]:
  """() -> the model, with random weights from a fixed seed."""
  import jax
  from flax import nnx

  from xmodal_jax.models import clip

  config = model_config(args)
  return lambda: clip.build(config, dtype=args.dtype, rngs=nnx.Rngs(jax.random.key(0)))


def encode(args: argparse.Namespace) -> Form:
  """Both towers, pooled, projected and normalised, through the embed steps of evaluation."""
  import jax
  from flax import nnx

  from xmodal_jax.distributed import sharding
  from xmodal_jax.runtime import flops, step

  config = model_config(args)
  graphdef, params, stats = step.split(jax.jit(build(args))())
  params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
  batch = jax.device_put(noise(args, config["image"]["size"], config["text"]["vocab"]))
  batch_sharding = sharding.batch_sharding(sharding.make_mesh((("data", 1),), jax.devices()[:1]))
  whole = jax.sharding.NamedSharding(batch_sharding.mesh, jax.sharding.PartitionSpec())
  steps = [
    step.make_embed_step(graphdef, side, whole, batch_sharding) for side in ("image", "text")
  ]
  rest = {"valid": batch["valid"], "image_id": batch["image_id"]}
  sides = [{key: batch[key]} | rest for key in ("image", "text_ids")]

  def run():
    jax.block_until_ready([f(params, stats, b) for f, b in zip(steps, sides, strict=True)])

  programs = (jax.make_jaxpr(f)(params, stats, b) for f, b in zip(steps, sides, strict=True))
  return run, about(args, params, sum(map(flops.count, programs)))


def stepper(
  args: argparse.Namespace, micro_shards: int = 0
) -> tuple[list[Any], Callable[[], None], dict[str, Any]]:
  """The training step: both towers, InfoNCE, gradient, AdamW, metrics; the state is donated.

  Returns ([state], a function that runs args.run_steps steps and stores the new state there, info).
  micro_shards: that of config.reproducible; 0: the ordinary step.
  """
  import jax
  from flax import nnx

  from xmodal_jax import config as config_lib
  from xmodal_jax.distributed import sharding
  from xmodal_jax.optim import factory, schedules
  from xmodal_jax.runtime import deterministic, flops, step

  model, settings, make = model_config(args), config_lib.base().optim, build(args)
  graphdef, abstract, _ = step.split(nnx.eval_shape(make))
  length = schedules.RunLength(samples=args.batch * 1000, batch_size=args.batch, total="1 epochs")
  schedule = schedules.make_schedule(settings, length)
  tx = factory.make_optimizer(settings, schedule, nnx.to_pure_dict(abstract))
  mesh = sharding.make_mesh((("data", -1),))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def init():
    return step.init_state(make, tx)

  shardings = jax.tree.map(lambda _: replicated, jax.eval_shape(init))
  held = [jax.jit(init, out_shardings=shardings)()]
  common = graphdef, tx, jax.random.key(1), shardings, schedule
  batch_sharding = sharding.batch_sharding(mesh)
  plain = train = step.make_train_step(*common)
  if micro_shards:
    train = deterministic.make_train_step(*common, batch_sharding, micro_shards)
  size = model["image"]["size"]
  if args.data_dir:
    stream = data.batches(args, size)
    following = lambda: sharding.put_batch(next(stream), batch_sharding)
  else:
    batch = sharding.put_batch(noise(args, size, model["text"]["vocab"]), batch_sharding)
    following = lambda: batch
  info = about(args, held[0].params, flops.count(jax.make_jaxpr(plain)(held[0], following())))
  info["flops"] *= args.run_steps

  def run():
    for _ in range(args.run_steps):
      held[0], metrics = train(held[0], following())
    jax.block_until_ready((held[0], metrics))
    info["loss"] = float(metrics["loss"])

  return held, run, info


def reproducible_step(args: argparse.Namespace) -> Forms:
  """The step of config.reproducible, for the same model, batch and optimizer."""
  name = f"{args.micro_shards} micro-shards"
  return {name: lambda: stepper(args, args.micro_shards)[1:]}


# --- torch --------------------------------------------------------------------------------------


def _torch_device() -> Any:
  """The device that our side uses too: JAX takes the GPU unless it is told not to."""
  import torch

  gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
  return torch.device("cuda" if gpu else "cpu")


def _torch_forms(args: argparse.Namespace, prepare: Callable, names: list[str]) -> Forms:
  import torch

  torch.set_num_threads(args.threads)
  if args.no_compile:
    names = [name for name in names if "compile" not in name.split()]
  return {name: lambda name=name: prepare(args, frozenset(name.split())) for name in names}


def encode_with_torch(args: argparse.Namespace) -> Forms:
  """sdpa or eager attention; channels_last for the patch convolution; compile; freeze: inductor's
  packing of constant weights."""
  names = ["sdpa", "eager", "sdpa channels_last", "compile sdpa", "compile eager"]
  names += ["compile sdpa channels_last", "compile freeze sdpa"]
  return _torch_forms(args, _torch_encode, names)


def step_with_torch(args: argparse.Namespace) -> Forms:
  """As `encode_with_torch`; AdamW fused or foreach."""
  names = ["sdpa fused", "sdpa foreach", "eager fused", "sdpa channels_last fused"]
  return _torch_forms(args, _torch_step, [*names, "compile sdpa fused", "compile eager fused"])


def _torch_model(args: argparse.Namespace, names: frozenset[str]) -> Any:
  """transformers' CLIPModel of the size of one of our ViT presets, random weights."""
  import torch
  import transformers

  from xmodal_jax.models import clip

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
  return model.to(_torch_device())


def _torch_batch(args: argparse.Namespace, names: frozenset[str]) -> tuple[Any, Any]:
  """pixels float32 [B, 3, S, S] and ids int64 [B, 77]: the batch of our side."""
  import torch

  config = model_config(args)
  batch = noise(args, config["image"]["size"], config["text"]["vocab"])
  pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous()
  if "channels_last" in names:
    pixels = pixels.contiguous(memory_format=torch.channels_last)
  device = _torch_device()
  return pixels.to(device), torch.from_numpy(batch["text_ids"]).long().to(device)


def _torch_embed(model: Any, pixels: Any, ids: Any) -> tuple[Any, Any]:
  """Unit rows [B, E] of both towers."""
  import torch

  images = model.get_image_features(pixel_values=pixels).pooler_output
  texts = model.get_text_features(input_ids=ids).pooler_output
  normalize = torch.nn.functional.normalize
  return normalize(images, dim=-1), normalize(texts, dim=-1)


def _maybe_compile(function: Callable, names: frozenset[str]) -> Callable:
  import torch
  import torch._inductor.config

  if "compile" not in names:
    return function
  torch._dynamo.reset()
  # Not an option of torch.compile: tracing reads it too.
  torch._inductor.config.freezing = "freeze" in names
  return torch.compile(function)


def _autocast(args: argparse.Namespace) -> Any:
  import torch

  if args.dtype == "float32":
    return contextlib.nullcontext()
  return torch.autocast(_torch_device().type, dtype=getattr(torch, args.dtype))


def _torch_info(args: argparse.Namespace, model: Any) -> dict[str, Any]:
  import torch

  gpu = _torch_device().type == "cuda"
  return {
    "examples": args.batch * args.run_steps,
    "parameters": sum(p.numel() for p in model.parameters()),
    "device": torch.cuda.get_device_name() if gpu else "cpu",
    "device_gb": lambda: torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
  }


def _torch_encode(args: argparse.Namespace, names: frozenset[str]) -> Form:
  import torch

  model, (pixels, ids) = _torch_model(args, names).eval(), _torch_batch(args, names)
  forward = _maybe_compile(lambda pixels, ids: _torch_embed(model, pixels, ids), names)

  def run():
    with torch.inference_mode(), _autocast(args):
      forward(pixels, ids)
    if pixels.is_cuda:
      torch.cuda.synchronize()

  return run, _torch_info(args, model)


def _torch_step(args: argparse.Namespace, names: frozenset[str]) -> Form:
  """Both towers, symmetric InfoNCE, gradient, AdamW as in our default recipe."""
  import torch

  model, device = _torch_model(args, names).train(), _torch_device()
  if args.data_dir:
    size = model_config(args)["image"]["size"]
    stream = data.torch_batches(args, size, pin_memory=device.type == "cuda")
    following = lambda: (x.to(device, non_blocking=True) for x in next(stream))
  else:
    batch = _torch_batch(args, names)
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
  labels = torch.arange(args.batch, device=device)

  def loss_fn(pixels, ids):
    images, texts = _torch_embed(model, pixels, ids)
    logits = model.logit_scale.exp() * images.float() @ texts.float().T
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

  loss_fn = _maybe_compile(loss_fn, names)
  info = _torch_info(args, model)

  def run():
    for _ in range(args.run_steps):
      pixels, ids = following()
      optimizer.zero_grad(set_to_none=True)
      with _autocast(args):
        loss = loss_fn(pixels, ids)
      loss.backward()
      optimizer.step()
    info["loss"] = loss.item()  # waits

  return run, info


ENCODE = Workload(
  help="both towers forward",
  arguments=encode_arguments,
  ours=lambda args: {"encode": lambda: encode(args)},
  against={"torch": encode_with_torch},
)
STEP = Workload(
  help="a training step",
  arguments=step_arguments,
  ours=lambda args: {"step": lambda: stepper(args)[1:]},
  against={"torch": step_with_torch, "reproducible": reproducible_step},
)
