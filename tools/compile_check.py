"""Compiles a config's programs for a slice of accelerators that need not be there: will it fit?

  python tools/compile_check.py --config configs/coco_ft.py:vit_l14 --topology v5e:4x4
  python tools/compile_check.py --config configs/zerovl_pretrain.py:dga --topology cpu:8 \
    --sizes 1024x1,4096x4,16384x16 --programs train

topology: v4, v5e, v5p, v6e with the chips along each axis (pip install -e '.[compile]', and
JAX_PLATFORMS=cpu beside it); gpu, the GPUs of this machine; cpu:N host devices. Prints memory,
FLOPs, bytes and collectives per device of the training step and of what evaluates, and estimates
how long a step takes: docs/sizing.md says how. sizes: batch size x accumulate, one after another;
the config's own by default. Nothing of the model's size is allocated, unless --measure=STEPS asks
to run what was compiled for the devices of this machine, and to print its memory and time beside.

Ends with status 1 where a program does not fit, and says which change makes it fit: the first, in
an order of what they cost in time, that compiled and fitted.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import compile_cost
import compile_measure
import compile_programs
import jax
import topologies
from absl import app, flags
from ml_collections import config_flags

from xmodal_jax import config as config_lib
from xmodal_jax.runtime import workdir

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", "cpu:8", f"What to compile for: {topologies.NAMES}.")
_SIZES = flags.DEFINE_list("sizes", [], "Batch size x accumulate, e.g. 1024x1,4096x4.")
_PROGRAMS = flags.DEFINE_list("programs", [], "Of train, image, text, score, rerank; default all.")
_HBM = flags.DEFINE_float("hbm", None, "Gigabytes (1e9) that a device has, where it is not known.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Look for a change that fits where one does not.")
_MEASURE = flags.DEFINE_integer("measure", 0, "Training steps to run and time; gpu and cpu:N.")
_JSON = flags.DEFINE_string("json", "", "File for the numbers, a list with an entry per program.")

MIB = 2**20
POLICIES = ("dots_with_no_batch_dims_saveable", "nothing_saveable")  # from less to more recomputed
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass
class Report:
  """Of one program; bytes, FLOPs and seconds are per device. hbm None: nothing to compare with.

  needed: what the program takes of the memory; error: the compiler's, where it gave up on that.
  """

  program: str
  needed: float
  hbm: int | None
  accumulate: int  # parts of the batch
  arguments: int = 0
  outputs: int = 0  # those that do not take the place of arguments
  temporaries: int = 0
  code: int = 0
  trace_s: float = 0.0
  compile_s: float = 0.0
  cost: compile_cost.Cost | None = None
  measured: compile_measure.Measured | None = None
  error: str = ""
  change: str = ""  # of the config that it is a report of, where it was looked for

  @property
  def fits(self) -> bool:
    return not self.error and (self.hbm is None or self.needed <= self.hbm)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(self, cost=None)) | {
      "fits": self.fits,
      "cost": self.cost and self.cost.to_json(),
    }


def compile_one(
  name: str,
  programs: compile_programs.Programs,
  topology: topologies.Topology,
  hbm: int | None,
  measure: int = 0,
) -> Report:
  """Compiles one of the programs. What does not fit is a report too; other errors are raised.

  measure: how many steps to run of a training step that fits.
  """
  accumulate = programs.config.accumulate
  start = time.perf_counter()
  lowered = programs.lower[name]()
  traced = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    state = _argument_bytes(programs) if name == "train" else 0
    return Report(name, _needed(str(e)), hbm, accumulate, state, error=str(e).splitlines()[0])
  m = compiled.memory_analysis()
  done = time.perf_counter()
  outputs = m.output_size_in_bytes - m.alias_size_in_bytes
  parts = (
    m.argument_size_in_bytes,
    outputs,
    m.temp_size_in_bytes,
    m.generated_code_size_in_bytes,
  )
  cost = compile_cost.of(compiled.as_text(), topology, list(programs.built.mesh.devices.flat))
  times = traced - start, done - traced
  report = Report(name, sum(parts), hbm, accumulate, *parts, *times, cost)
  if measure and name == "train" and report.fits:
    report.measured = compile_measure.measure(programs, compiled, measure)
  return report


def _needed(message: str) -> float:
  """Bytes that the compiler says it lacks; infinity where it does not say."""
  found = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of", message)
  found = found or re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
  return float(found[1]) * _UNITS[found[2]] if found else math.inf


# --- what is printed ----------------------------------------------------------------------------


def describe(report: Report, topology: topologies.Topology, config: Any, model_flops: int) -> str:
  """Lines for people."""
  has = f" of {report.hbm / MIB:,.0f}" if report.hbm else ""
  share = f" ({report.needed / report.hbm:.0%})" if report.hbm else ""
  if report.error:
    needs = "more memory than there is"
    if math.isfinite(report.needed):
      needs = f"{report.needed / MIB:,.0f}{has} MiB{share}"
    return f"  {report.program}: DOES NOT FIT, needs {needs}: {report.error}"
  c = report.cost
  lines = [
    f"  {report.program}: {'fits' if report.fits else 'DOES NOT FIT'}, "
    f"{report.needed / MIB:,.0f}{has} MiB{share}: arguments {report.arguments / MIB:,.0f}, outputs "
    f"beside them {report.outputs / MIB:,.0f}, temporaries {report.temporaries / MIB:,.0f}, "
    f"program {report.code / MIB:,.0f}; traced in {report.trace_s:.1f} s, compiled in "
    f"{report.compile_s:.1f} s",
    f"    {c.flops / 1e9:,.1f} GFLOP, {c.bytes / 1e9:,.2f} GB of memory traffic",
  ]
  for kind, t in sorted(c.traffic.items()):
    busy = f", {t.seconds * 1e3:.3f} ms of links" if topology.chip else ""
    lines.append(f"    {kind}: {t.count:,.0f} of {t.bytes / 1e6:,.2f} MB in all{busy}")
  if c.unknown:
    lines.append(
      f"    counted once, as their length depends on data: {', '.join(sorted(c.unknown))}"
    )
  if topology.chip:
    lines.append(
      f"    estimate {c.seconds * 1e3:,.2f} ms: waiting for links {c.waiting * 1e3:,.2f}; "
      f"operations at the published speeds alone {c.roofline * 1e3:,.2f}"
    )
    if report.program == "train":
      lines.append(f"    {speed(c.seconds, topology, config.batch_size, model_flops)}")
  if m := report.measured:
    lines.append(
      f"    measured {m.seconds * 1e3:,.2f} ms: "
      f"{speed(m.seconds, topology, config.batch_size, model_flops)}; loss {m.loss:.4f}"
    )
    if m.memory:
      off = report.needed / m.memory - 1
      lines.append(f"    measured {m.memory / MIB:,.0f} MiB: the estimate is {off:+.1%} off")
  return "\n".join(lines)


def speed(seconds: float, topology: topologies.Topology, size: int, model_flops: int) -> str:
  """Of a step. MFU: the share of the peak that the model's FLOPs, recomputation left out, are."""
  if not topology.chip:
    return f"{size / seconds:,.0f} examples/s"
  mfu = model_flops / len(topology.devices) / seconds / topology.chip.peak
  return f"{size / seconds:,.0f} examples/s, MFU {mfu:.1%}"


def describe_topology(topology: topologies.Topology) -> str:
  n, chip = len(topology.devices), topology.chip
  if chip is None:
    return f"{topology.name}: {n} x {topology.devices[0].device_kind}, of unknown speed"
  axes = " x ".join(
    f"{n} ({'ring' if ring else 'line'})"
    for n, ring in zip(topology.shape, topology.wraps, strict=True)
  )
  return (
    f"{topology.name}: {n} x {topology.devices[0].device_kind}, axes {axes}; per chip "
    f"{chip.peak / 1e12:.0f} TFLOP/s bfloat16, {chip.bandwidth / 1e9:,.0f} GB/s and "
    f"{chip.hbm / 2**30:.2f} GiB of HBM, {chip.link / 1e9:.0f} GB/s per link and direction, "
    f"{chip.clock / 1e9:.2f} GHz; {compile_cost.HOP * 1e6:.0f} us per link"
  )


# --- what would fit -----------------------------------------------------------------------------


def changes(config: Any, report: Report, devices: int) -> Iterator[dict[str, Any]]:
  """Changes {dotted key: value} that take less memory, those that cost less time first.

  Of training: products kept, everything else computed again (a few percent); everything computed
  again, and parts (either a third, one more forward pass); the state cut over fsdp, which costs
  gathers in every layer; then together. Where the state alone is too large, fsdp comes first.
  """
  e = config.eval
  if report.program != "train":
    key = {"score": "block", "rerank": "rerank_block"}.get(report.program, "batch_size")
    value = e[key]
    for _ in range(6):
      value = tuple(max(v // 2, 1) for v in value) if key != "batch_size" else value // 2
      yield {f"eval.{key}": value}
    return
  remats = [_remat(config, policy) for policy in POLICIES]
  weaker = [r for r in remats if r]
  parts, n = [], 2
  while config.batch_size // (config.accumulate * n) >= devices and n <= 64:
    parts.append({"accumulate": config.accumulate * n})
    n *= 2
  sizes = [s for s in (4, 16, 64, 256) if s < devices and devices % s == 0] + [devices]
  fsdp = [{"mesh": (("data", -1), ("fsdp", s), ("model", 1))} for s in sizes if s > 1]
  most = weaker[-1] if weaker else {}
  one = [*weaker, *parts[:1], *(most | p for p in parts[:2] if most), *parts[1:]]
  both = [f | c for c in one for f in fsdp[-1:]]
  cut = [*fsdp, *both]
  state_alone = report.hbm is not None and report.arguments > 0.8 * report.hbm
  yield from ([*cut, *one] if state_alone else [*one, *cut])


def _remat(config: Any, policy: str) -> dict[str, str]:
  """The stacks that keep more than this policy does."""
  order = ["", *POLICIES]
  weaker = config.copy_and_resolve_references()
  keys = compile_programs.set_remat(weaker, policy)
  flat = workdir.flatten(config)
  keys = [k.removeprefix("config.") for k in keys]
  known = [k for k in keys if flat[k] in order]
  return {k: policy for k in known if order.index(flat[k]) < order.index(policy)}


def changed(config: Any, change: dict[str, Any]) -> Any:
  """A copy of the config with {dotted key: value}."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    for key, value in change.items():
      *parents, last = key.split(".")
      node = config
      for name in parents:
        node = node[name]
      node[last] = value
  return config


def suggest(config: Any, report: Report, topology: topologies.Topology):
  """(the first of `changes` that fits when compiled, its report, the config), or None."""
  for change in changes(config, report, len(topology.devices)):
    new = changed(config, change)
    try:
      programs = compile_programs.Programs(new, topology.devices)
    except ValueError as e:  # e.g. BatchNorm, whose batch cannot be cut
      print(f"    not {as_flags(change)}: {e}", flush=True)
      continue
    if report.hbm and report.program == "train":
      state = _argument_bytes(programs)
      parts = new.accumulate / config.accumulate
      # Were everything else cut into so many parts, and half of it saved besides.
      least = state + (report.needed - state) / parts / 2 if parts > 1 else state
      if math.isfinite(least) and least > report.hbm:
        print(f"    not {as_flags(change)}: {least / MIB:,.0f} MiB or more", flush=True)
        continue
    found = compile_one(report.program, programs, topology, report.hbm)
    if found.fits:
      return change, found, new
    print(f"    not {as_flags(change)}: {found.needed / MIB:,.0f} MiB", flush=True)
  return None


def _argument_bytes(programs: compile_programs.Programs) -> int:
  one = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(one, jax.tree.leaves(programs.training)))


def as_flags(change: dict[str, Any]) -> str:
  show = lambda v: f'"{v}"' if isinstance(v, tuple) else v
  return " ".join(f"--config.{key}={show(value)}" for key, value in change.items())


# --- the tool -----------------------------------------------------------------------------------


def check(
  config: Any,
  topology: topologies.Topology,
  names: list[str],
  hbm: int | None,
  look: bool,
  measure: int = 0,
):
  """Compiles and prints. Returns (reports, FLOPs of the model, whether all of them fit)."""
  programs = compile_programs.Programs(config, topology.devices)
  unknown = set(names) - set(programs.lower)
  if unknown:
    raise app.UsageError(f"no programs {sorted(unknown)}; this config has {list(programs.lower)}")
  mesh = ", ".join(f"{k} {v}" for k, v in programs.built.mesh.shape.items())
  print(f"batch {config.batch_size} in {config.accumulate} parts on {mesh}", flush=True)
  names = names or list(programs.lower)
  model_flops = compile_programs.model_flops(config) if "train" in names else 0
  reports = []
  for name in names:
    report = compile_one(name, programs, topology, hbm, measure)
    reports.append(report)
    print(describe(report, topology, config, model_flops), flush=True)
    if report.fits or not look:
      continue
    found = suggest(config, report, topology)
    if found is None:
      print("    no change that is known here makes it fit: take more or larger chips")
      continue
    change, better, new = found
    better.change = as_flags(change)
    reports.append(better)
    print(f"    it fits with {better.change}:")
    print(describe(better, topology, new, model_flops), flush=True)
  return reports, model_flops, all(r.fits for r in reports)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are --config.key=value")
  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  config = config_lib.resolve(_CONFIG.value, overrides)
  if _TOPOLOGY.value != "gpu" and "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
  if _MEASURE.value and _TOPOLOGY.value.partition(":")[0] not in ("gpu", "cpu"):
    raise app.UsageError(f"--measure runs on this machine, which has no {_TOPOLOGY.value}")
  try:
    topology = topologies.get(_TOPOLOGY.value)
  except (ValueError, RuntimeError) as e:
    raise app.UsageError(str(e)) from e
  hbm = int(_HBM.value * 1e9) if _HBM.value else topology.chip and topology.chip.hbm
  print(describe_topology(topology), flush=True)
  sizes = [tuple(map(int, size.split("x"))) for size in _SIZES.value]
  fits, entries = True, []
  for size, accumulate in sizes or [(config.batch_size, config.accumulate)]:
    config.batch_size, config.accumulate = size, accumulate
    try:
      reports, model_flops, good = check(
        config, topology, _PROGRAMS.value, hbm, _SUGGEST.value, _MEASURE.value
      )
    except ValueError as e:
      print(f"  does not run on {topology.name}: {e}", flush=True)
      fits = False
      continue
    fits = fits and good
    about = dict(topology=topology.name, devices=len(topology.devices), batch_size=size)
    about |= dict(model_flops=model_flops, peak=topology.chip and topology.chip.peak)
    entries += [about | r.to_json() for r in reports]
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(entries, indent=1))
  return 0 if fits else 1


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
