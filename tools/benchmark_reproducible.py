"""The training step of config.reproducible, the other side of `benchmark.py step`."""

import argparse
from collections.abc import Callable

import benchmark_ours


def forms(args: argparse.Namespace) -> dict[str, Callable[[], benchmark_ours.Form]]:
  """The same model, batch and optimizer as of our step, in micro-shards."""
  name = f"{args.micro_shards} micro-shards"
  return {name: lambda: benchmark_ours.train_step(args, args.micro_shards)}
