"""Measures the pieces: ranks, input pipeline, towers, a training step, second stage, token scores.

  python tools/benchmark.py ranks --data DIR [--against eccv_caption]
  python tools/benchmark.py data --data_dir DIR --split train [--against torch]
  python tools/benchmark.py encode --model vit_b32 --batch 32 [--against torch]
  python tools/benchmark.py step --model vit_b32 --batch 32 [--against torch | reproducible]
  python tools/benchmark.py step --model vit_l14 --dtype bfloat16 --batch 128 --run_steps 20 \
    --data_dir DIR --against torch     # images and captions of DIR in place of noise
  python tools/benchmark.py checkpoint --model vit_b32 --batch 32
  python tools/benchmark.py rerank --scale 0.02 [--against torch]
  python tools/benchmark.py local_scores --scale 0.02 [--against torch]
  python tools/benchmark.py hierarchical_scores --scale 0.004 [--against torch]

Each side runs in a process of its own, on the same cores with the same number of threads, and on
the GPU if there is one (unless JAX_PLATFORMS=cpu). Sides take turns (ours, theirs, ours,
...), so that load on the machine affects both, and the ratio is reported pair by pair. The CPU time
of the idle side is reported (that of a DataLoader's worker processes is in neither).
Of several forms of the other side (attention, memory format, compilation) the fastest counts. Those
of `rerank` are of three kinds (query by query, in batches, our calls), those of `local_scores` too
(expanded over all pairs, over one image's, not expanded), those of `hierarchical_scores` of two
(with attended vectors, without); each kind is compared.
"""

import argparse
import os

from benchmarks import checkpoint, clip_model, data, ranks, rerank, runner, token_scores

from xmodal_jax.runtime import cli

WORKLOADS = {
  "ranks": ranks.RANKS,
  "data": data.DATA,
  "encode": clip_model.ENCODE,
  "step": clip_model.STEP,
  "checkpoint": checkpoint.CHECKPOINT,
  "rerank": rerank.RERANK,
  "local_scores": token_scores.LOCAL_SCORES,
  "hierarchical_scores": token_scores.HIERARCHICAL_SCORES,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest="command", required=True)
  for name, workload in WORKLOADS.items():
    command = commands.add_parser(name, help=workload.help)
    workload.arguments(command)
    command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    repeats, warmup = (1, 0) if workload.single else (7, 2)
    command.add_argument("--repeats", type=int, default=repeats, help="timed runs (pairs)")
    command.add_argument("--warmup", type=int, default=warmup, help="runs before the timed ones")
    if workload.against:
      command.add_argument("--against", choices=list(workload.against))
    command.add_argument("--json", help="write the result here")
    command.add_argument("--serve", help=argparse.SUPPRESS)
    # Read by the runner and by all sides, whether the workload has the option or not.
    given = {action.dest for action in command._actions}
    absent = {"against": None, "form": None, "data_dir": None, "run_steps": 1, "no_compile": True}
    command.set_defaults(**{k: v for k, v in absent.items() if k not in given})
  return parser.parse_args(argv)


@cli.program
def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  workload = WORKLOADS[args.command]
  if args.serve:
    runner.serve(workload, args.serve, args)
  else:
    runner.run(workload, args)


if __name__ == "__main__":
  main()
