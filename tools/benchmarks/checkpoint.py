"""Checkpoints at full size: what saving costs the steps beside it, verification and restoring."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import clip_model
from benchmarks.runner import Form, Workload


def arguments(parser: argparse.ArgumentParser) -> None:
  clip_model.model_arguments(parser)
  parser.add_argument("--steps", type=int, default=5, help="before the save")
  parser.add_argument("--every", type=int, default=1000, help="steps from one save to the next")
  parser.add_argument("--dir", help="where to write; a temporary folder otherwise")


def checkpoint(args: argparse.Namespace) -> Form:
  """Some steps, a save, steps until its manifest is written, a check of its bytes, a restore."""
  import jax

  from xmodal_jax.checkpoints import checkpointer, manifest

  held, advance, info = clip_model.stepper(args)
  advance()  # compiles
  folder = tempfile.TemporaryDirectory(dir=args.dir, prefix="benchmark_checkpoint")
  checkpoints = checkpointer.Checkpoints(folder.name, keep=1, metric="")
  meta = dict(system="clip", metric="", pending=False)
  shardings = jax.tree.map(lambda x: x.sharding, held[0])
  want = checkpointer.abstract_state(jax.eval_shape(lambda x: x, held[0]), shardings)
  facts: dict[str, float] = {}

  def timed(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start

  def run():
    before = statistics.median(timed(advance) for _ in range(args.steps))
    step, start = int(held[0].step), time.perf_counter()
    facts["blocked_s"] = timed(lambda: checkpoints.save(step, held[0], meta))
    meanwhile = []
    while not checkpoints.pending.done():
      meanwhile.append(timed(advance))
    checkpoints.wait()
    facts["whole_s"] = time.perf_counter() - start
    path = checkpoints.folders.path(step)
    files = manifest.read(path, step)
    size = sum(size for size, _ in files.values()) / 1e9
    facts["files"], facts["gb"] = len(files), size
    facts["write_gb_per_s"] = size / facts["whole_s"]
    facts["step_s"] = before
    facts["steps_meanwhile"] = len(meanwhile)
    facts["step_meanwhile_s"] = statistics.fmean(meanwhile) if meanwhile else before
    # The whole cost of saving: the call, and what it slows the steps beside it.
    lost = facts["blocked_s"] + sum(meanwhile) - len(meanwhile) * before
    facts["blocked_percent"] = 100 * facts["blocked_s"] / (args.every * before)
    facts["lost_percent"] = 100 * lost / (args.every * before)
    facts["check_s"] = timed(lambda: manifest.content_problems(path, files))
    facts["check_gb_per_s"] = size / facts["check_s"]
    facts["restore_s"] = timed(lambda: jax.block_until_ready(checkpoints.restore(step, want)))

  # The reference in `folder` keeps the temporary directory until the process ends.
  return run, {
    "parameters": info["parameters"],
    "folder": lambda: folder.name,
    "facts": lambda: dict(facts),
  }


CHECKPOINT = Workload(
  help="saving and restoring",
  arguments=arguments,
  ours=lambda args: {"async, with manifest": lambda: checkpoint(args)},
)
