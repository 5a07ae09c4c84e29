"""Whether a program fits into a device's memory, by the compiler's analysis, and what would.

Nothing here reads the compiled program's text: the estimate of its time (`cost`) stands apart.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from compiling import programs as programs_lib
from compiling import topologies

from xmodal_jax import config as config_lib
from xmodal_jax.runtime import flops

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
  cost: Any = None  # cost.Cost, where the time was estimated
  measured: Any = None  # measure.Measured, where it was run
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


# What is added to the report of a program that compiled: its time, estimated or measured.
Examine = Callable[[Report, programs_lib.Programs, jax.stages.Compiled], None]


def compile_one(
  name: str,
  programs: programs_lib.Programs,
  hbm: int | None,
  examine: Examine = lambda report, programs, compiled: None,
) -> Report:
  """Compiles one of the programs. Lack of memory is a report; other errors are raised."""
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
  times = traced - start, done - traced
  report = Report(name, sum(parts), hbm, accumulate, *parts, *times)
  examine(report, programs, compiled)
  return report


def _needed(message: str) -> float:
  """Bytes that the compiler says it lacks; infinity where it does not say."""
  found = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of", message)
  found = found or re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
  return float(found[1]) * _UNITS[found[2]] if found else math.inf


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
  keys = flops.set_remat(weaker, policy)
  flat = config_lib.flatten(config)
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


def suggest(
  config: Any, report: Report, topology: topologies.Topology, examine: Examine
) -> tuple[dict[str, Any], Report, Any] | None:
  """(the first of `changes` that fits when compiled, its report, the config), or None."""
  for change in changes(config, report, len(topology.devices)):
    new = changed(config, change)
    try:
      programs = programs_lib.Programs(new, topology.devices)
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
    found = compile_one(report.program, programs, report.hbm, examine)
    if found.fits:
      return change, found, new
    print(f"    not {as_flags(change)}: {found.needed / MIB:,.0f} MiB", flush=True)
  return None


def _argument_bytes(programs: programs_lib.Programs) -> int:
  one = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(one, jax.tree.leaves(programs.training)))


def as_flags(change: dict[str, Any]) -> str:
  show = lambda v: f'"{v}"' if isinstance(v, tuple) else v
  return " ".join(f"--config.{key}={show(value)}" for key, value in change.items())
