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

import json
import math
import os
import pathlib
from typing import Any

import jax
from absl import flags
from compiling import cost, fit, measure, topologies
from compiling import programs as programs_lib
from compiling.fit import MIB, Report
from ml_collections import config_flags

from xmodal_jax import config as config_lib
from xmodal_jax.errors import UserError
from xmodal_jax.runtime import cli

_CONFIG = config_lib.define_flag()
_TOPOLOGY = flags.DEFINE_string("topology", "cpu:8", f"What to compile for: {topologies.NAMES}.")
_SIZES = flags.DEFINE_list("sizes", [], "Batch size x accumulate, e.g. 1024x1,4096x4.")
_PROGRAMS = flags.DEFINE_list("programs", [], "Of train, image, text, score, rerank; default all.")
_HBM = flags.DEFINE_float("hbm", None, "Gigabytes (1e9) that a device has, where it is not known.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Look for a change that fits where one does not.")
_MEASURE = flags.DEFINE_integer("measure", 0, "Training steps to run and time; gpu and cpu:N.")
_JSON = flags.DEFINE_string("json", "", "File for the numbers, a list with an entry per program.")

# --- what is printed ----------------------------------------------------------------------------


def describe(report: Report, topology: topologies.Topology, config: Any, model_flops: int) -> str:
  """The lines that are printed about a program."""
  has = f" of {report.hbm / MIB:,.0f}" if report.hbm else ""
  share = f" ({report.needed / report.hbm:.0%})" if report.hbm else ""
  if report.error:
    needs = "more memory than there is"
    if math.isfinite(report.needed):
      needs = f"{report.needed / MIB:,.0f}{has} MiB{share}"
    return f"  {report.program}: DOES NOT FIT, needs {needs}: {report.error}"
  lines = [
    f"  {report.program}: {'fits' if report.fits else 'DOES NOT FIT'}, "
    f"{report.needed / MIB:,.0f}{has} MiB{share}: arguments {report.arguments / MIB:,.0f}, outputs "
    f"beside them {report.outputs / MIB:,.0f}, temporaries {report.temporaries / MIB:,.0f}, "
    f"program {report.code / MIB:,.0f}; traced in {report.trace_s:.1f} s, compiled in "
    f"{report.compile_s:.1f} s"
  ]
  if report.cost is not None:
    lines += describe_cost(report, topology, config.batch_size, model_flops)
  if m := report.measured:
    lines.append(
      f"    measured {m.seconds * 1e3:,.2f} ms: "
      f"{speed(m.seconds, topology, config.batch_size, model_flops)}; loss {m.loss:.4f}"
    )
    if m.memory:
      off = report.needed / m.memory - 1
      lines.append(f"    measured {m.memory / MIB:,.0f} MiB: the estimate is {off:+.1%} off")
  return "\n".join(lines)


def describe_cost(
  report: Report, topology: topologies.Topology, size: int, model_flops: int
) -> list[str]:
  """Lines about the estimate of a program's time."""
  c = report.cost
  lines = [f"    {c.flops / 1e9:,.1f} GFLOP, {c.bytes / 1e9:,.2f} GB of memory traffic"]
  for kind, t in sorted(c.traffic.items()):
    busy = f", {t.seconds * 1e3:.3f} ms of links" if topology.chip else ""
    lines.append(f"    {kind}: {t.count:,.0f} of {t.bytes / 1e6:,.2f} MB in all{busy}")
  if c.unknown:
    loops = ", ".join(sorted(c.unknown))
    lines.append(f"    counted once, because their trip count depends on data: {loops}")
  if topology.chip:
    lines.append(
      f"    estimate {c.seconds * 1e3:,.2f} ms: waiting for links {c.waiting * 1e3:,.2f}; "
      f"operations at the published speeds alone {c.roofline * 1e3:,.2f}"
    )
    if report.program == "train":
      lines.append(f"    {speed(c.seconds, topology, size, model_flops)}")
  return lines


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
    f"{chip.clock / 1e9:.2f} GHz; {cost.HOP * 1e6:.0f} us per link"
  )


# --- the tool -----------------------------------------------------------------------------------


def examiner(topology: topologies.Topology, steps: int = 0) -> fit.Examine:
  """Adds the estimate of time to a report, and the time of `steps` training steps that ran."""

  def examine(report: Report, programs: programs_lib.Programs, compiled: jax.stages.Compiled):
    try:
      report.cost = cost.of(compiled.as_text(), topology, list(programs.built.mesh.devices.flat))
    except Exception as e:  # the text of compiled programs is no interface: XLA may change it
      print(f"    no estimate of the time of {report.program}: {type(e).__name__}: {e}", flush=True)
    if steps and report.program == "train" and report.fits:
      report.measured = measure.measure(programs, compiled, steps)

  return examine


def check(
  config: Any,
  topology: topologies.Topology,
  names: list[str],
  hbm: int | None,
  look: bool,
  steps: int = 0,
):
  """Compiles and prints. Returns (reports, FLOPs of the model, whether all of them fit).

  look: search for a change that fits. steps: training steps to run and time, of one that fits.
  """
  programs = programs_lib.Programs(config, topology.devices)
  unknown = set(names) - set(programs.lower)
  if unknown:
    raise cli.UsageError(f"no programs {sorted(unknown)}; this config has {list(programs.lower)}")
  mesh = ", ".join(f"{k} {v}" for k, v in programs.built.mesh.shape.items())
  print(f"batch {config.batch_size} in {config.accumulate} parts on {mesh}", flush=True)
  names = names or list(programs.lower)
  model_flops = programs_lib.model_flops(config) if "train" in names else 0
  reports = []
  examine = examiner(topology, steps)
  for name in names:
    report = fit.compile_one(name, programs, hbm, examine)
    reports.append(report)
    print(describe(report, topology, config, model_flops), flush=True)
    if report.fits or not look:
      continue
    found = fit.suggest(config, report, topology, examine)
    if found is None:
      print("    no change that is known here makes it fit: take more or larger chips")
      continue
    change, better, new = found
    better.change = fit.as_flags(change)
    reports.append(better)
    print(f"    it fits with {better.change}:")
    print(describe(better, topology, new, model_flops), flush=True)
  return reports, model_flops, all(r.fits for r in reports)


def main(argv: list[str]) -> int:
  del argv
  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  config = config_lib.resolve(_CONFIG.value, overrides)
  if _TOPOLOGY.value != "gpu" and "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
  if _MEASURE.value and _TOPOLOGY.value.partition(":")[0] not in ("gpu", "cpu"):
    raise cli.UsageError(f"--measure runs on this machine, which has no {_TOPOLOGY.value}")
  try:
    topology = topologies.get(_TOPOLOGY.value)
  except (ValueError, RuntimeError) as e:
    raise UserError(str(e)) from e
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
  cli.run_with_flags(main)
