"""Measures the pieces: ranks, input pipeline, towers, a training step, second stage, token scores.

  python tools/benchmark.py ranks --data DIR [--against eccv_caption]
  python tools/benchmark.py data --data_dir DIR --split train [--against torch]
  python tools/benchmark.py encode --model vit_b32 --batch 32 [--against torch]
  python tools/benchmark.py step --model vit_b32 --batch 32 [--against torch | reproducible]
  python tools/benchmark.py step --model vit_l14 --dtype bfloat16 --batch 128 --run_steps 20 \
    --data_dir DIR --against torch     # pictures and captions of DIR in place of noise
  python tools/benchmark.py checkpoint --model vit_b32 --batch 32
  python tools/benchmark.py rerank --scale 0.02 [--against torch]
  python tools/benchmark.py local_scores --scale 0.02 [--against torch]
  python tools/benchmark.py hierarchical_scores --scale 0.004 [--against torch]

Every side runs in a process of its own that stays alive, on the same cores with the same number of
threads, and on the GPU of the machine where there is one (JAX_PLATFORMS=cpu: not). Sides take turns
(ours, theirs, ours, ...), so that a busy machine is as busy for both, and the ratio is reported
pair by pair. The waiting side sleeps; its CPU time is reported to prove it (that of a DataLoader's
processes is in neither).
Of several forms of the other side (attention, memory format, compilation) the fastest counts;
those of `rerank` are of three kinds (query by query, in batches, on our plan), those of
`local_scores` too (expanded over all pairs, over a picture's, not expanded), those of
`hierarchical_scores` of two (with attended vectors, without), each compared.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# Side -> the file beside this one with its `forms(args)`: name -> function that prepares that form
# and returns (run, info). `run()` does the work once and waits for it; what is callable in info is
# called after every run, outside of its time.
# `times` in info says how often a run's work is in all of it: both clocks are multiplied by it.
SIDES = {
  "ours": "benchmark_ours",
  "torch": "benchmark_torch",
  "reproducible": "benchmark_reproducible",
  "torch rerank": "benchmark_rerank_torch",
  "torch local_scores": "benchmark_local_torch",
  "torch hierarchical_scores": "benchmark_hierarchical_torch",
  "eccv_caption": "benchmark_ranks",
}
# Commands whose forms have a kind, their first word.
OF_KINDS = ("rerank", "local_scores", "hierarchical_scores")
PACKAGES = ("jax", "jaxlib", "numpy", "tensorflow", "torch", "transformers", "eccv_caption")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  common.add_argument("--repeats", type=int, default=7, help="timed runs (pairs) after warm-up")
  common.add_argument("--warmup", type=int, default=2, help="runs before the timed ones")
  common.add_argument("--json", help="write the result here")
  common.add_argument("--serve", help=argparse.SUPPRESS)
  commands = parser.add_subparsers(dest="command", required=True)
  ranks = commands.add_parser("ranks", parents=[common], help="COCO 5K, 1K, CxC and ECCV Caption")
  ranks.add_argument("--data", required=True, help="folder with coco_splits/")
  ranks.add_argument("--against", choices=["eccv_caption"])
  data = commands.add_parser("data", parents=[common], help="host examples/s of the input pipeline")
  data.add_argument("--data_dir", required=True)
  data.add_argument("--split", default="train")
  data.add_argument("--size", type=int, default=224, help="side of the pictures")
  data.add_argument("--batch", type=int, default=32)
  data.add_argument("--batches", type=int, default=20, help="batches per timed run")
  data.add_argument("--against", choices=["torch"])
  for name, text in (("encode", "both towers forward"), ("step", "a training step")):
    command = commands.add_parser(name, parents=[common], help=text)
    command.add_argument("--model", default="vit_b32", help="a preset of the clip system")
    command.add_argument("--batch", type=int, default=32)
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    command.add_argument("--unroll", type=int, default=1, help="layers per scan iteration (ours)")
    command.add_argument(
      "--remat", default="dots_with_no_batch_dims_saveable", help="a jax.checkpoint policy (ours)"
    )
    if name == "step":
      command.add_argument("--run_steps", type=int, default=1, help="of a timed run; one wait")
      command.add_argument("--data_dir", help="a data set to train on; otherwise noise")
      command.add_argument("--split", default="train")
    against = ["torch"] + ["reproducible"] * (name == "step")
    command.add_argument("--against", choices=against)
    command.add_argument("--micro_shards", type=int, default=8, help="of the reproducible side")
    command.add_argument("--form", help="the only form of the other side to measure")
    command.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
  command = commands.add_parser("checkpoint", parents=[common], help="saving and restoring")
  command.add_argument("--model", default="vit_b32", help="a preset of the clip system")
  command.add_argument("--batch", type=int, default=32, help="of the steps beside the save")
  command.add_argument("--steps", type=int, default=5, help="before the save")
  command.add_argument("--every", type=int, default=1000, help="steps from one save to the next")
  command.add_argument("--dir", help="where to write; a temporary folder otherwise")
  command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  command.set_defaults(unroll=1, remat="dots_with_no_batch_dims_saveable")
  command = commands.add_parser("rerank", parents=[common], help="TEAM's second stage")
  command.add_argument("--scale", type=float, default=0.02, help="of COCO's 5,000 images")
  command.add_argument("--width", type=int, default=1024, help="of tokens; the heads are width/64")
  command.add_argument("--blocks", type=int, default=6)
  command.add_argument(
    "--rerank_block", type=int, nargs=2, default=(16, 8), help="images, captions of each in a call"
  )
  command.add_argument("--against", choices=["torch"])
  command.add_argument("--form", help="the only form of the other side to measure")
  command.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
  command.add_argument(
    "--slice", type=int, default=256, help="pairs that a run of the other side scores; 0: all"
  )
  command = commands.add_parser("local_scores", parents=[common], help="TGDT's scores of all pairs")
  command.add_argument("--scale", type=float, default=0.02, help="of the pictures and captions")
  command.add_argument("--images", type=int, default=5000)
  command.add_argument("--captions", type=int, default=25000)
  command.add_argument("--regions", type=int, default=36, help="tokens of a picture")
  command.add_argument("--words", type=int, default=40, help="tokens of a caption, with padding")
  command.add_argument("--width", type=int, default=1024, help="of tokens")
  command.add_argument("--chunk", type=int, default=0, help="captions at a time (ours); 0: its own")
  command.add_argument("--against", choices=["torch"])
  command.add_argument("--form", help="the only form of the other side to measure")
  command.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
  command = commands.add_parser(
    "hierarchical_scores", parents=[common], help="HAT's scores of all pairs, at one level"
  )
  command.add_argument("--scale", type=float, default=0.004, help="of the pictures and captions")
  command.add_argument("--images", type=int, default=5000)
  command.add_argument("--captions", type=int, default=25000)
  command.add_argument("--regions", type=int, default=784, help="tokens of a picture")
  command.add_argument("--words", type=int, default=32, help="tokens of a caption, with padding")
  command.add_argument("--width", type=int, default=768, help="of tokens")
  command.add_argument("--direction", default="i2t", choices=["i2t", "t2i", "both"])
  command.add_argument("--chunk", type=int, default=0, help="captions at a time (ours); 0: its own")
  command.add_argument("--against", choices=["torch"])
  command.add_argument("--form", help="the only form of the other side to measure")
  command.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
  args = parser.parse_args(argv)
  for name in ("against", "form", "data_dir"):
    setattr(args, name, getattr(args, name, None))
  args.run_steps = getattr(args, "run_steps", 1)
  if args.command == "ranks":
    args.repeats, args.warmup = 1, 0
  return args


class Side:
  """A process that measures one side when asked."""

  def __init__(self, name: str):
    # Set before any library starts: thread pools are sized once, from these or from the affinity.
    threads = str(ARGS.threads)
    env = os.environ | {
      "NPROC": threads,
      "OMP_NUM_THREADS": threads,
      "MKL_NUM_THREADS": threads,
      "OPENBLAS_NUM_THREADS": threads,
      "TF_CPP_MIN_LOG_LEVEL": "2",
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both sides have room on a GPU
    }
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--serve", name]
    self.name, self.asked = name, set()
    self.process = subprocess.Popen(
      command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    self.form_names = self._read()["forms"]

  def ask(self, form: str) -> dict[str, Any]:
    """Runs `form` once; the first time after another form, prepares it and warms up before."""
    self.asked.add(form)
    self.process.stdin.write(json.dumps({"form": form}) + "\n")
    self.process.stdin.flush()
    return self._read()

  def _read(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"benchmark: the process of {self.name} ended with {self.process.wait()}")
    return json.loads(line)

  def cpu_seconds(self) -> float:
    fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def serve(side: str) -> None:
  """The other end of `Side`: a request per line on stdin, an answer per line on stdout."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ARGS.threads])
  # Libraries print where they like: answers keep the real stdout, everything else goes to stderr.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
  reply = lambda **kw: print(json.dumps(kw), file=answers, flush=True)
  file = SIDES.get(f"{side} {ARGS.command}", SIDES[side])
  forms = importlib.import_module(file).forms(ARGS)
  reply(forms=list(forms))
  current, run, info = None, None, {}
  for line in sys.stdin:
    form = json.loads(line)["form"]
    try:
      if form != current:
        current = run = None
        gc.collect()  # one form's weights at a time
        run, info = forms[form]()
        for _ in range(ARGS.warmup):
          run()
        current = form
      cpu_start, start = cpu(), time.perf_counter()
      run()
      wall, used = time.perf_counter() - start, cpu() - cpu_start
    except Exception as error:
      if side == "ours":
        raise
      current = run = None
      reply(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
      continue
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, used = (x * info.get("times", 1) for x in (wall, used))
    extra = {key: value() if callable(value) else value for key, value in info.items()}
    reply(wall=wall, cpu=used, peak_gb=peak, info=extra)


def environment() -> dict[str, Any]:
  cpu = next(
    (
      line.partition(":")[2].strip()
      for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
      if line.startswith("model name")
    ),
    "unknown CPU",
  )
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "absent"
  cores = len(os.sched_getaffinity(0))
  return {
    "cpu": cpu,
    "cores": cores,
    "threads": ARGS.threads,
    "load": os.getloadavg()[0],
  } | versions


def kinds(forms: list[str]) -> dict[str, list[str]]:
  """Forms of the other side by kind: of one kind unless the command is in OF_KINDS."""
  out: dict[str, list[str]] = {}
  for form in forms:
    out.setdefault(form.split()[0] if ARGS.command in OF_KINDS else "", []).append(form)
  return out


def choose(ours: Side, theirs: Side, forms: list[str]) -> tuple[str, dict[str, Any]]:
  """The fastest of these forms of the other side, and what was measured of each.

  Forms are measured minutes apart, on a machine that may be busier for one than for another: they
  are ranked by their time over ours, in pairs.
  """
  measured: dict[str, Any] = {}
  tries = 1 if ARGS.command == "rerank" else 3
  for form in forms:
    pairs = []
    for _ in range(tries):
      answer = theirs.ask(form)
      if "error" in answer:
        break
      pairs.append((answer["wall"], answer["wall"] / ours.ask(ours.form_names[0])["wall"]))
    if len(pairs) < tries:
      measured[form] = answer
      print(f"  {theirs.name} {form}: {answer['error']}", flush=True)
      continue
    wall, ratio = (statistics.median(values) for values in zip(*pairs, strict=True))
    measured[form] = {"wall": wall, "ratio": ratio}
    print(f"  {theirs.name} {form}: {wall * 1e3:.1f} ms, {ratio:.2f}x ours", flush=True)
  working = [form for form in measured if "ratio" in measured[form]]
  if not working:
    raise SystemExit(f"benchmark: no form of {theirs.name} works")
  return min(working, key=lambda form: measured[form]["ratio"]), measured


def main() -> None:
  result: dict[str, Any] = {"args": vars(ARGS), "environment": environment()}
  print(", ".join(f"{k} {v}" for k, v in result["environment"].items()), flush=True)
  sides, forms = {"ours": Side("ours")}, {"": [""]}
  if ARGS.against:
    theirs = sides[ARGS.against] = Side(ARGS.against)
    if ARGS.form and ARGS.form not in theirs.form_names:
      raise SystemExit(f"benchmark: --form {ARGS.form}: there are {', '.join(theirs.form_names)}")
    forms = kinds([ARGS.form] if ARGS.form else theirs.form_names)
  for kind, names in forms.items():
    part = result.setdefault("kinds", {}).setdefault(kind, {}) if kind else result
    form = {"ours": sides["ours"].form_names[0]}
    if ARGS.against:
      form[ARGS.against] = names[0]
      if len(names) > 1:
        form[ARGS.against], part["forms"] = choose(sides["ours"], theirs, names)
      if kind and theirs.asked - {form[ARGS.against]}:  # their peak of memory is not this form's
        theirs.close()
        theirs = sides[ARGS.against] = Side(ARGS.against)
    part |= measure(sides, form)
  for side in sides.values():
    side.close()
  if ARGS.json:
    pathlib.Path(ARGS.json).write_text(json.dumps(result, indent=1) + "\n")


def measure(sides: dict[str, Side], form: dict[str, str]) -> dict[str, Any]:
  """The sides take turns, each in its form. Prints and returns what came out."""
  runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
  # One run of each is thrown away: it is where a side prepares its form.
  for turn in range(-1 if ARGS.warmup else 0, ARGS.repeats):
    for name, side in sides.items():
      waiting = {other: s.cpu_seconds() for other, s in sides.items() if other != name}
      answer = side.ask(form[name])
      if "error" in answer:
        raise SystemExit(f"benchmark: {name} {form[name]}: {answer['error']}")
      answer["idle_cpu"] = sum(sides[o].cpu_seconds() - before for o, before in waiting.items())
      if turn >= 0:
        runs[name].append(answer)
      # Thread pools spin for a moment after work, and buffers of pictures are filled again: not on
      # the other side's time.
      time.sleep(3 if ARGS.data_dir else 0.05)
  result: dict[str, Any] = {}
  result["sides"] = {name: describe(name, form[name], answers) for name, answers in runs.items()}
  if ARGS.against:
    # Both clocks: other work on the machine takes wall time from either side, but not CPU time.
    for clock in ("wall", "cpu"):
      pairs = [t[clock] / o[clock] for o, t in zip(runs["ours"], runs[ARGS.against], strict=True)]
      ratio = dict(median=statistics.median(pairs), min=min(pairs), max=max(pairs))
      result[f"{clock}_ratio"] = ratio | {"pairs": pairs}
      print(f"{clock} time of {ARGS.against} / ours, {len(pairs)} pairs: {numbers(ratio, 'x')}")
    compare(result)
  return result


def describe(name: str, form: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
  """Medians of a side's runs, printed and returned, with what the work amounts to per second."""
  median = lambda key: statistics.median(answer[key] for answer in answers)
  info = dict(answers[-1]["info"])
  if "peak_gflops_per_s" in info:
    info["peak_gflops_per_s"] = max(answer["info"]["peak_gflops_per_s"] for answer in answers)
  out = {"form": form, "wall": median("wall"), "cpu": median("cpu"), "info": info}
  out |= {"peak_gb": max(a["peak_gb"] for a in answers), "idle_cpu": median("idle_cpu")}
  out["walls"] = [answer["wall"] for answer in answers]
  line = f"{name:>13} {form:<22} {out['wall'] * 1e3:9.1f} ms  {out['cpu']:7.2f} CPU s"
  line += f"  peak {out['peak_gb']:.2f} GB  other side idle {out['idle_cpu']:.2f} CPU s"
  if info.get("device_gb"):
    line += f"  {info['device']} peak {info['device_gb']:.1f} GB"
  if "examples" in info:
    out["examples_per_s"] = info["examples"] / out["wall"]
    line += f"  {out['examples_per_s']:.1f} {'pairs' if 'scores' in info else 'examples'}/s"
  if "unique" in info:
    line += f" of {info['examples']} ({info['unique'] / out['wall']:.1f} different ones/s, "
    line += f"calls filled to {100 * info['filled']:.0f} %)"
  if "times" in info:
    line += f" (1/{info['times']:.1f} of the work measured)"
  if "flops" in info:
    out["gflops_per_s"] = info["flops"] / out["wall"] / 1e9
    if "padded_flops" in info:
      out["padded_gflops_per_s"] = info["padded_flops"] / out["wall"] / 1e9
    line += f"  {out['gflops_per_s']:.1f} GFLOP/s"
    if info.get("peak_gflops_per_s"):
      out["peak_share"] = out["gflops_per_s"] / info["peak_gflops_per_s"]
      line += f" ({100 * out['peak_share']:.0f} % of a matmul's {info['peak_gflops_per_s']:.0f})"
    if info.get("published_peak"):
      out["mfu"] = info["flops"] / out["wall"] / info["published_peak"]
      line += f", MFU {out['mfu']:.1%}"
  if "padded_flops" in info:
    line += f", {out['padded_gflops_per_s']:.1f} if padding counts"
    if "peak_share" in out:
      share = out["padded_gflops_per_s"] / info["peak_gflops_per_s"]
      line += f" ({100 * share:.0f} %)"
  print(line, flush=True)
  if "facts" in info:
    every = [answer["info"]["facts"] for answer in answers]
    out["facts"] = {key: statistics.median(facts[key] for facts in every) for key in every[0]}
    print("\n".join(f"{key:>20} {value:.4g}" for key, value in out["facts"].items()), flush=True)
  return out


def compare(result: dict[str, Any]) -> None:
  """Says whether both sides did the same: metrics, second-stage scores, numbers of parameters."""
  ours, theirs = (result["sides"][name]["info"] for name in ("ours", ARGS.against))
  if "metrics" in theirs:
    off = {k: abs(v - ours["metrics"][k]) for k, v in theirs["metrics"].items()}
    result["largest_difference"] = max(off.values())
    print(f"{len(off)} metrics in common, largest difference {max(off.values()):.1e} of 100")
  if "scores" in theirs:
    mine, scores = ours.pop("scores"), theirs.pop("scores")
    common = mine.keys() & scores.keys()  # `shared` fills calls up with pairs that nobody asked for
    off = max(abs(scores[k] - mine[k]) for k in common)
    result["largest_difference"] = off
    print(f"{len(common)} scores in common, largest difference {off:.1e}")
    if not off < 1e-4:
      raise SystemExit("benchmark: the two sides do not compute the same scores")
  if "parameters" in theirs:
    result["same_parameters"] = ours["parameters"] == theirs["parameters"]
    print(f"parameters: ours {ours['parameters']:,}, theirs {theirs['parameters']:,}")


def numbers(values: dict[str, float], unit: str) -> str:
  return ", ".join(f"{name} {value:.2f}{unit}" for name, value in values.items())


if __name__ == "__main__":
  ARGS = parse()
  if ARGS.serve:
    serve(ARGS.serve)
  else:
    main()
