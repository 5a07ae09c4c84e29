"""Checkpoints at full size, for tools/benchmark.py: what saving costs the steps, and reading."""

import argparse
import statistics
import tempfile
import time

import benchmark_ours


def ours(args: argparse.Namespace) -> benchmark_ours.Form:
  """A run: some steps, a save, steps until it is whole on disk, a check of its bytes, a restore."""
  import jax

  from xmodal_jax.checkpoints import checkpointer, manifest

  held, advance, about = benchmark_ours.stepper(args)
  advance()  # compiles
  folder = tempfile.TemporaryDirectory(dir=args.dir, prefix="benchmark_checkpoint")
  checkpoints = checkpointer.Checkpoints(folder.name, keep=1, metric="")
  meta = dict(system="clip", metric="", pending=False)
  shardings = jax.tree.map(lambda x: x.sharding, held[0])
  want = checkpointer.abstract_state(jax.eval_shape(lambda x: x, held[0]), shardings)
  facts: dict[str, float] = {}

  def timed(do) -> float:
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
    path = checkpoints.steps.folder(step)
    files = manifest.read(path, step)
    size = sum(size for size, _ in files.values()) / 1e9
    facts["files"], facts["gb"] = len(files), size
    facts["write_gb_per_s"] = size / facts["whole_s"]
    facts["step_s"] = before
    facts["steps_meanwhile"] = len(meanwhile)
    facts["step_meanwhile_s"] = statistics.fmean(meanwhile) if meanwhile else before
    # All that saving costs: the call, and what the steps beside it take longer.
    lost = facts["blocked_s"] + sum(meanwhile) - len(meanwhile) * before
    facts["blocked_percent"] = 100 * facts["blocked_s"] / (args.every * before)
    facts["lost_percent"] = 100 * lost / (args.every * before)
    facts["check_s"] = timed(lambda: manifest.content_problems(path, files))
    facts["check_gb_per_s"] = size / facts["check_s"]
    facts["restore_s"] = timed(lambda: jax.block_until_ready(checkpoints.restore(step, want)))

  # The folder goes when nothing refers to it any more.
  info = {"parameters": about["parameters"], "folder": lambda: folder.name}
  return run, info | {"facts": lambda: dict(facts)}
