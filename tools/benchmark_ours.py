"""Our side of tools/benchmark.py."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Form = tuple[Callable[[], None], dict[str, Any]]


def forms(args: argparse.Namespace) -> dict[str, Callable[[], Form]]:
  """The one form of a sub-command: name -> function that prepares it."""
  if args.command == "ranks":
    import benchmark_ranks

    return {"coco_protocol": lambda: benchmark_ranks.ours(args)}
  if args.command == "rerank":
    import benchmark_rerank

    return {"pairs once, scheduled": lambda: benchmark_rerank.ours(args)}
  if args.command == "local_scores":
    import benchmark_local

    return {"words packed": lambda: benchmark_local.ours(args)}
  if args.command == "hierarchical_scores":
    import benchmark_hierarchical

    return {"gram": lambda: benchmark_hierarchical.ours(args)}
  if args.command == "checkpoint":
    import benchmark_checkpoint

    return {"async, with manifest": lambda: benchmark_checkpoint.ours(args)}
  prepare = {"data": pipeline, "encode": encode, "step": train_step}[args.command]
  return {args.command: lambda: prepare(args)}


def batches(args: argparse.Namespace, size: int):
  """Of the data set, without end: read, decode, resize, crop, tokenize. No device."""
  from xmodal_jax.data import image, records, text
  from xmodal_jax.data import pipeline as pipeline_lib

  split = records.open_split(args.data_dir, args.split)
  return pipeline_lib.train_batches(
    split,
    batch_size=args.batch,
    image_transform=image.clip_transform(size),
    tokenizer=text.make_tokenizer("clip_bpe"),
    text_length=77,
    seed=0,
    step=0,
    threads=args.threads,
  )


def pipeline(args: argparse.Namespace) -> Form:
  """Batches from disk to numpy."""
  stream = batches(args, args.size)

  def run():
    for _ in range(args.batches):
      next(stream)

  return run, {"examples": args.batch * args.batches}


def inputs(args: argparse.Namespace, size: int, vocab: int) -> dict[str, np.ndarray]:
  """A batch of noise: image float32 [B, S, S, 3], text_ids int32 [B, 77] with the end at 40."""
  rng = np.random.default_rng(0)
  ids = rng.integers(1, vocab - 2, (args.batch, 77), np.int32)
  ids[:, 0], ids[:, 40], ids[:, 41:] = vocab - 2, vocab - 1, 0
  return {
    "image": rng.standard_normal((args.batch, size, size, 3), np.float32),
    "text_ids": ids,
    "image_id": np.arange(args.batch, dtype=np.int32),
    "valid": np.ones(args.batch, bool),
  }


def matmul_peak(dtype: str = "float32") -> float:
  """GFLOP/s of a matmul of 2048 x 2048, on an accelerator 8192 x 8192, best of a few: what the
  cores can do now."""
  import jax

  n = 2048 if jax.default_backend() == "cpu" else 8192
  a = jax.random.normal(jax.random.key(0), (n, n), dtype)
  dot = jax.jit(lambda a: a @ a)
  best = 0.0
  for _ in range(6):
    start = time.perf_counter()
    dot(a).block_until_ready()
    best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
  return best


def about(args: argparse.Namespace, params: Any, flops: int) -> dict[str, Any]:
  """What there is to say of a program of this many FLOPs besides its time."""
  import jax

  from xmodal_jax.runtime.flops import device_peak

  device = jax.devices()[0]
  memory = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
  return {
    "examples": args.batch * args.run_steps,
    "parameters": size_of(params),
    "flops": flops,
    "peak_gflops_per_s": lambda: matmul_peak(args.dtype),
    "published_peak": device_peak(device.device_kind),
    "device": device.device_kind,
    "device_gb": memory,
  }


def model_config(args: argparse.Namespace) -> dict[str, Any]:
  from xmodal_jax.models import clip

  return clip.preset(args.model) | {"remat": args.remat, "unroll": args.unroll}


def build(args: argparse.Namespace):
  """() -> the model, with random weights from a fixed seed."""
  import jax
  from flax import nnx

  from xmodal_jax.models import clip

  config = model_config(args)
  return lambda: clip.build(config, dtype=args.dtype, rngs=nnx.Rngs(jax.random.key(0)))


def size_of(params: Any) -> int:
  import jax

  return sum(x.size for x in jax.tree.leaves(params))


def encode(args: argparse.Namespace) -> Form:
  """Both towers, pooled, projected and normalised, through the embed steps of evaluation."""
  import jax
  from flax import nnx

  from xmodal_jax.runtime import flops as flops_lib
  from xmodal_jax.runtime import step

  config = model_config(args)
  graphdef, params, stats = step.split(jax.jit(build(args))())
  params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
  batch = jax.device_put(inputs(args, config["image"]["size"], config["text"]["vocab"]))
  steps = [step.make_embed_step(graphdef, side, None) for side in ("image", "text")]
  rest = {"valid": batch["valid"], "image_id": batch["image_id"]}
  sides = [{key: batch[key]} | rest for key in ("image", "text_ids")]

  def run():
    jax.block_until_ready([f(params, stats, b) for f, b in zip(steps, sides, strict=True)])

  count = sum(
    flops_lib.count(jax.make_jaxpr(f)(params, stats, b)) for f, b in zip(steps, sides, strict=True)
  )
  return run, about(args, params, count)


def train_step(args: argparse.Namespace, micro_shards: int = 0) -> Form:
  """The step of training: both towers, InfoNCE, gradient, AdamW, metrics; the state is donated.

  micro_shards: that of config.reproducible.
  """
  return stepper(args, micro_shards)[1:]


def stepper(
  args: argparse.Namespace, micro_shards: int = 0
) -> tuple[list[Any], Callable[[], None], dict[str, Any]]:
  """([state], what does a step and puts the new state there, what there is to say of it)."""
  import jax
  from flax import nnx

  from xmodal_jax import config as config_lib
  from xmodal_jax.distributed import sharding
  from xmodal_jax.optim import factory, schedules
  from xmodal_jax.runtime import deterministic, step
  from xmodal_jax.runtime import flops as flops_lib

  model = model_config(args)
  settings = config_lib.base().optim
  make = build(args)
  graphdef, abstract, _ = step.split(nnx.eval_shape(make))
  run_length = schedules.RunLength(
    samples=args.batch * 1000, batch_size=args.batch, total="1 epochs"
  )
  schedule = schedules.make_schedule(settings, run_length)
  tx = factory.make_optimizer(settings, schedule, nnx.to_pure_dict(abstract))
  mesh = sharding.make_mesh((("data", -1),))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  init = lambda: step.init_state(make, tx)
  shardings = jax.tree.map(lambda _: replicated, jax.eval_shape(init))
  state = jax.jit(init, out_shardings=shardings)()
  common = graphdef, tx, jax.random.key(1), shardings, schedule
  rows = sharding.batch_sharding(mesh)
  plain = train = step.make_train_step(*common)
  if micro_shards:
    train = deterministic.make_train_step(*common, rows, micro_shards)
  size = model["image"]["size"]
  if args.data_dir:
    stream = batches(args, size)
    following = lambda: sharding.put_batch(next(stream), rows)
  else:
    batch = sharding.put_batch(inputs(args, size, model["text"]["vocab"]), rows)
    following = lambda: batch
  info = about(args, state.params, flops_lib.count(jax.make_jaxpr(plain)(state, following())))
  info["flops"] *= args.run_steps
  held = [state]
  del state

  def run():
    for _ in range(args.run_steps):
      held[0], metrics = train(held[0], following())
    jax.block_until_ready((held[0], metrics))
    info["loss"] = float(metrics["loss"])

  return held, run, info
