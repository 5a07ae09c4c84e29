"""Two sides in processes of their own, measured in turns: what every benchmark is run by."""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# `run()` does the work once and waits for it. Callables in info are called after every run, outside
# of its time. `times` in info is the ratio of the whole work to what a run does: both clocks are
# multiplied by it.
Form = tuple[Callable[[], None], dict[str, Any]]
Forms = dict[str, Callable[[], Form]]

PACKAGES = ("jax", "jaxlib", "numpy", "tensorflow", "torch", "transformers", "eccv_caption")


@dataclasses.dataclass(frozen=True)
class Workload:
  """A subcommand: what is measured, by us and by others.

  ours, against: functions of the parsed arguments that return the forms of a side, name -> function
  that prepares it. We have one form; of several forms of the other side the fastest counts.
  by_kind: the first word of a form's name is its kind, and each kind is compared. tries: runs by
  which a form is chosen. single: one run without warm-up.
  """

  help: str
  arguments: Callable[[argparse.ArgumentParser], None]
  ours: Callable[[argparse.Namespace], Forms]
  against: Mapping[str, Callable[[argparse.Namespace], Forms]] = dataclasses.field(
    default_factory=dict
  )
  by_kind: bool = False
  tries: int = 3
  single: bool = False


class Side:
  """A process that measures one side on request."""

  def __init__(self, name: str, threads: int):
    # Set before any library starts: thread pools are sized once, from these or from the affinity.
    env = os.environ | {
      "NPROC": str(threads),
      "OMP_NUM_THREADS": str(threads),
      "MKL_NUM_THREADS": str(threads),
      "OPENBLAS_NUM_THREADS": str(threads),
      "TF_CPP_MIN_LOG_LEVEL": "2",
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both sides have room on a GPU
    }
    self.name, self.measured = name, set()
    self.process = subprocess.Popen(
      [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:], "--serve", name],
      env=env,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    self.form_names = self._read()["forms"]

  def run(self, form: str) -> dict[str, Any]:
    """Runs `form` once; the first time after another form, prepares it and warms up before."""
    self.measured.add(form)
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


def serve(workload: Workload, side: str, args: argparse.Namespace) -> None:
  """The other end of `Side`: a request per line on stdin, an answer per line on stdout."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
  # Libraries print to stdout: answers keep the real one, everything else goes to stderr.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def reply(**fields):
    print(json.dumps(fields), file=answers, flush=True)

  def cpu() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

  forms = (workload.ours if side == "ours" else workload.against[side])(args)
  reply(forms=list(forms))
  current, run, info = None, None, {}
  for line in sys.stdin:
    form = json.loads(line)["form"]
    try:
      if form != current:
        current = run = None
        gc.collect()  # one form's weights at a time
        run, info = forms[form]()
        for _ in range(args.warmup):
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    wall, used = (x * info.get("times", 1) for x in (wall, used))
    extra = {key: value() if callable(value) else value for key, value in info.items()}
    reply(wall=wall, cpu=used, peak_gb=peak, info=extra)


def environment(threads: int) -> dict[str, Any]:
  """Processor, cores, load and versions."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
  simd = next((f for f in ("avx512f", "avx2") if f in flags), "neither AVX2 nor AVX-512")
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "absent"
  return {
    "cpu": names[0] if names else "unknown CPU",
    "simd": simd,
    "cores": len(os.sched_getaffinity(0)),
    "threads": threads,
    "load": os.getloadavg()[0],
  } | versions


def run(workload: Workload, args: argparse.Namespace) -> None:
  """Measures a workload, prints the result and writes it to args.json."""
  result: dict[str, Any] = {"args": vars(args), "environment": environment(args.threads)}
  print(", ".join(f"{k} {v}" for k, v in result["environment"].items()), flush=True)
  sides, kinds = {"ours": Side("ours", args.threads)}, {"": [""]}
  if args.against:
    theirs = sides[args.against] = Side(args.against, args.threads)
    if args.form and args.form not in theirs.form_names:
      raise SystemExit(f"benchmark: --form {args.form}: there are {', '.join(theirs.form_names)}")
    kinds = {}
    for form in [args.form] if args.form else theirs.form_names:
      kinds.setdefault(form.split()[0] if workload.by_kind else "", []).append(form)
  for kind, names in kinds.items():
    part = result.setdefault("kinds", {}).setdefault(kind, {}) if kind else result
    form = {"ours": sides["ours"].form_names[0]}
    if args.against:
      form[args.against] = names[0]
      if len(names) > 1:
        form[args.against], part["forms"] = choose(sides["ours"], theirs, names, workload.tries)
      if kind and theirs.measured - {form[args.against]}:  # their peak memory is not this form's
        theirs.close()
        theirs = sides[args.against] = Side(args.against, args.threads)
    part |= measure(sides, form, args)
  for side in sides.values():
    side.close()
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def choose(ours: Side, theirs: Side, forms: list[str], tries: int) -> tuple[str, dict[str, Any]]:
  """The fastest of these forms of the other side, and what was measured of each.

  Forms are measured minutes apart, on a machine whose load changes: they are ranked by their time
  relative to ours, in pairs.
  """
  measured: dict[str, Any] = {}
  for form in forms:
    pairs = []
    for _ in range(tries):
      answer = theirs.run(form)
      if "error" in answer:
        break
      pairs.append((answer["wall"], answer["wall"] / ours.run(ours.form_names[0])["wall"]))
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


def measure(
  sides: dict[str, Side], form: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
  """The sides take turns, each in its form. Prints and returns the result."""
  runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
  # The first run of each is discarded: it is where a side prepares its form.
  for turn in range(-1 if args.warmup else 0, args.repeats):
    for name, side in sides.items():
      waiting = {other: s.cpu_seconds() for other, s in sides.items() if other != name}
      answer = side.run(form[name])
      if "error" in answer:
        raise SystemExit(f"benchmark: {name} {form[name]}: {answer['error']}")
      answer["idle_cpu"] = sum(sides[o].cpu_seconds() - before for o, before in waiting.items())
      if turn >= 0:
        runs[name].append(answer)
      # Thread pools spin for a moment after work, and input buffers are filled again: not in the
      # other side's time.
      time.sleep(3 if args.data_dir else 0.05)
  result: dict[str, Any] = {}
  result["sides"] = {name: describe(name, form[name], answers) for name, answers in runs.items()}
  if args.against:
    # Both clocks: other work on the machine takes wall time from either side, but not CPU time.
    for clock in ("wall", "cpu"):
      pairs = [t[clock] / o[clock] for o, t in zip(runs["ours"], runs[args.against], strict=True)]
      ratio = dict(median=statistics.median(pairs), min=min(pairs), max=max(pairs))
      result[f"{clock}_ratio"] = ratio | {"pairs": pairs}
      shown = ", ".join(f"{name} {value:.2f}x" for name, value in ratio.items())
      print(f"{clock} time of {args.against} / ours, {len(pairs)} pairs: {shown}")
    compare(result, args.against)
  return result


def describe(name: str, form: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
  """Medians of a side's runs, printed and returned, with rates per second."""

  def median(key: str) -> float:
    return statistics.median(answer[key] for answer in answers)

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
    line += f" of {info['examples']} ({info['unique'] / out['wall']:.1f} distinct/s, "
    line += f"calls filled to {100 * info['filled']:.0f} %)"
  if "times" in info:
    line += f" (1/{info['times']:.1f} of the work measured)"
  print(line + _rates(out, info), flush=True)
  if "facts" in info:
    every = [answer["info"]["facts"] for answer in answers]
    out["facts"] = {key: statistics.median(facts[key] for facts in every) for key in every[0]}
    print("\n".join(f"{key:>20} {value:.4g}" for key, value in out["facts"].items()), flush=True)
  return out


def _rates(out: dict[str, Any], info: dict[str, Any]) -> str:
  """FLOP/s of a side, added to `out`, in words."""
  if "flops" not in info:
    return ""
  out["gflops_per_s"] = info["flops"] / out["wall"] / 1e9
  line = f"  {out['gflops_per_s']:.1f} GFLOP/s"
  peak = info.get("peak_gflops_per_s")
  if peak:
    out["peak_share"] = out["gflops_per_s"] / peak
    line += f" ({100 * out['peak_share']:.0f} % of a matmul's {peak:.0f})"
  if info.get("published_peak"):
    out["mfu"] = info["flops"] / out["wall"] / info["published_peak"]
    line += f", MFU {out['mfu']:.1%}"
  if "padded_flops" in info:
    out["padded_gflops_per_s"] = info["padded_flops"] / out["wall"] / 1e9
    line += f", {out['padded_gflops_per_s']:.1f} with padding"
    if peak:
      line += f" ({100 * out['padded_gflops_per_s'] / peak:.0f} %)"
  return line


def compare(result: dict[str, Any], against: str) -> None:
  """Whether both sides did the same work: metrics, second-stage scores, numbers of parameters."""
  ours, theirs = (result["sides"][name]["info"] for name in ("ours", against))
  if "metrics" in theirs:
    off = {k: abs(v - ours["metrics"][k]) for k, v in theirs["metrics"].items()}
    result["largest_difference"] = max(off.values())
    print(f"{len(off)} metrics in common, largest difference {max(off.values()):.1e} of 100")
  if "scores" in theirs:
    mine, scores = ours.pop("scores"), theirs.pop("scores")
    common = mine.keys() & scores.keys()  # `shared` pads calls with pairs that are no candidates
    off = max(abs(scores[k] - mine[k]) for k in common)
    result["largest_difference"] = off
    print(f"{len(common)} scores in common, largest difference {off:.1e}")
    if not off < 1e-4:
      raise SystemExit("benchmark: the two sides do not compute the same scores")
  if "parameters" in theirs:
    result["same_parameters"] = ours["parameters"] == theirs["parameters"]
    print(f"parameters: ours {ours['parameters']:,}, theirs {theirs['parameters']:,}")


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
