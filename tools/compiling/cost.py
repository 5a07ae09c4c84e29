"""How long a compiled program takes: its schedule played through with published speeds.

The model (docs/sizing.md says what it leaves out):

- Operations run one after another in the compiler's order. One takes the longest of its matmul
  FLOPs over the chip's peak, its bytes over the HBM bandwidth, and, on TPU, the cycles that the
  compiler itself estimates. A loop takes its body's time once per iteration.
- Copies that the compiler starts early run beside the operations at the HBM bandwidth.
- Collectives run one after another on the links; between an asynchronous one's start and its end
  operations go on, all others make the operations wait.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from compiling import hlo, topologies

HOP = 1e-6  # seconds that a message needs for a link, whatever its size
COPIES = (
  *("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"),
  "fusion-start",  # on GPUs, a slice copied in or out of a loop's arrays
)


@dataclasses.dataclass
class Traffic:
  """Of one kind of collective: how many, their bytes, the seconds that they keep links busy."""

  count: float = 0
  bytes: float = 0
  seconds: float = 0


@dataclasses.dataclass
class Cost:
  """Of a program or a computation, per device. seconds: from start to end; roofline: of operations
  alone by FLOPs and bytes, without the compiler's cycles; waiting: for links, part of seconds;
  traffic: of collectives by kind; sources: the same by where in the model they come from."""

  seconds: float = 0
  roofline: float = 0
  waiting: float = 0
  flops: float = 0
  bytes: float = 0
  traffic: dict[str, Traffic] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Traffic)
  )
  sources: dict[str, Traffic] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Traffic)
  )
  unknown: list[str] = dataclasses.field(default_factory=list)  # loops whose length depends on data

  def add(self, other: "Cost", times: int = 1) -> None:
    """Everything but the seconds, which follow from the schedule."""
    for key in ("roofline", "flops", "bytes"):
      setattr(self, key, getattr(self, key) + times * getattr(other, key))
    self.unknown += other.unknown
    for mine, theirs in ((self.traffic, other.traffic), (self.sources, other.sources)):
      for kind, t in theirs.items():
        for key in ("count", "bytes", "seconds"):
          setattr(mine[kind], key, getattr(mine[kind], key) + times * getattr(t, key))

  def to_json(self) -> dict[str, Any]:
    plain = lambda table: {k: vars(t) for k, t in table.items()}
    return vars(self) | {"traffic": plain(self.traffic), "sources": plain(self.sources)}

  @property
  def busy(self) -> float:
    """Seconds that the links are busy."""
    return sum(t.seconds for t in self.traffic.values())


def of(text: str, topology: topologies.Topology, devices: Sequence[jax.Device]) -> Cost:
  """The cost of a program (`compiled.as_text()`). devices: in the order of its mesh."""
  module = hlo.Module(text)
  return _Model(module, topology, tuple(devices)).cost(module.entry)


class _Model:
  def __init__(self, module, topology, devices):
    self.module, self.topology, self.devices = module, topology, devices
    self.chip = topology.chip
    self.known: dict[str, Cost] = {}
    # Collectives that run beside fusions stand in each of these, over loops even: see `_fused`.
    self.beside = {
      channel
      for comp in module.computations.values()
      if any(_calls(o, "AsyncCollectiveStart") for o in comp.ops)
      for o in comp.ops
      if (channel := o.attribute(r"channel_id=(\d+)"))
    }

  def cost(self, name: str) -> Cost:
    if name not in self.known:
      self.known[name] = self._play(self.module.computations[name])
    return self.known[name]

  def _play(self, comp: hlo.Computation) -> Cost:
    out = Cost()
    now = link = copier = 0.0  # when the operations, the links and the copies are through
    due: dict[str, float] = {}  # name or channel of what was started -> when it is done

    def wait(until: float) -> None:
      nonlocal now
      out.waiting += max(until - now, 0)
      now = max(now, until)

    for op in comp.ops:
      if op.kind in hlo.FREE:
        continue
      if op.kind in COPIES:
        copied = self._copied(op, comp)
        out.bytes += copied
        copier = max(copier, now) + self._over(copied, "bandwidth")
        due[op.name] = copier
      elif op.kind.endswith("-done"):
        until = due.get(op.operands[0], 0.0)
        if op.kind.removesuffix("-done") in hlo.COLLECTIVES:
          wait(until)
        else:
          now = max(now, until)
      elif op.kind.removesuffix("-start") in hlo.COLLECTIVES:
        link = max(link, now) + self._collective(op, comp, out)
        if op.kind.endswith("-start"):
          due[op.name] = link
        else:
          wait(link)
      elif op.kind == "while":
        body, times = self.module.called(op, "body"), self.module.trips(op, comp)
        inner = self.cost(body.name)
        if times is None:
          out.unknown.append(op.attribute(r'op_name="([^"]*)"') or op.name)
          times = 1
        out.add(inner, times)
        out.waiting += times * inner.waiting
        now += times * inner.seconds
        link = max(link, now) if inner.busy else link
      elif op.kind == "conditional":
        inner = max(map(self.cost, (b.name for b in self.module.branches(op))), key=_seconds)
        out.add(inner)
        out.waiting += inner.waiting
        now += inner.seconds
      elif op.kind == "call":
        inner = self.cost(self.module.called(op, "to_apply").name)
        out.add(inner)
        out.waiting += inner.waiting
        now += inner.seconds
      else:
        now += self._operation(op, comp, out)
        for collective, inner, part in self._fused(op):
          channel = collective.attribute(r"channel_id=(\d+)")
          if part in ("start", "whole"):
            link = max(link, now) + self._collective(collective, inner, out)
            due[channel] = link
          if part in ("end", "whole"):
            wait(due.get(channel, 0.0))
    # However well they overlap, operations and copies share one memory.
    out.seconds = max(now, self._over(out.bytes, "bandwidth"))
    return out

  def _copied(self, op: hlo.Op, comp: hlo.Computation) -> int:
    """Bytes of HBM traffic of what is started here."""
    if op.kind == "fusion-start":
      return self.module.traffic(op, comp)
    return next((u.bytes for u in comp.users.get(op.name, ()) if u.kind.endswith("-done")), 0)

  def _over(self, amount: float, speed: str) -> float:
    return amount / getattr(self.chip, speed) if self.chip else 0.0

  def _operation(self, op: hlo.Op, comp: hlo.Computation, out: Cost) -> float:
    flops, moved = self.module.flops(op, comp), self.module.traffic(op, comp)
    roofline = max(self._over(flops, "peak"), self._over(moved, "bandwidth"))
    out.flops += flops
    out.bytes += moved
    out.roofline += roofline
    cycles = op.attribute(r'"estimated_cycles":"(\d+)"')
    if cycles and self.chip and self.chip.clock:
      return max(roofline, int(cycles) / self.chip.clock)
    return roofline

  # --- collectives ------------------------------------------------------------------------------

  def _fused(self, op: hlo.Op):
    """(collective, its computation, what happens here: "start", "end", "whole") within a fusion.

    One that runs beside fusions stands in all of them, in the first with a call of
    AsyncCollectiveStart and in the last with one of AsyncCollectiveDone.
    """
    inner = self.module.called(op) if op.kind == "fusion" else None
    for o in inner.ops if inner else ():
      if o.kind not in hlo.COLLECTIVES:
        continue
      if o.attribute(r"channel_id=(\d+)") not in self.beside:
        yield o, inner, "whole"
      elif any(_calls(other, "AsyncCollectiveStart") for other in inner.ops):
        yield o, inner, "start"
      elif any(_calls(other, "AsyncCollectiveDone") for other in inner.ops):
        yield o, inner, "end"

  def _collective(self, op: hlo.Op, comp: hlo.Computation, out: Cost) -> float:
    """Seconds on the links; adds to the traffic of its kind."""
    kind = op.kind.removesuffix("-start")
    if kind == "all-reduce" and comp.root.kind == "dynamic-slice":
      kind = "reduce-scatter"  # fused: each device keeps its part of the sum
    given = sum(s.bytes for n in op.operands if n in comp.by_name for s in comp.by_name[n].shapes)
    group = self._group(op)
    if len(group) < 2:
      return 0.0
    # The whole of it: what one device has afterwards, or had before if less is left.
    size = given * len(group) if kind == "all-gather" else given
    seconds = self._seconds(op, kind, size, group) if self.chip else 0.0
    source = op.attribute(r'op_name="([^"]*)"') or "partitioner"
    for t in (out.traffic[kind], out.sources[f"{kind} of {_place(source)}"]):
      t.count += 1
      t.bytes += size
      t.seconds += seconds
    return seconds

  def _seconds(self, op: hlo.Op, kind: str, size: int, group: list[jax.Device]) -> float:
    link = self.chip.link
    if kind == "collective-permute":
      near, far = self._distances(op)
      return size * near / link + far * HOP
    axes = self.topology.extents(group)
    n = len(group)
    # A ring passes parts both ways round. In a line they go both ways too, but the ends have one
    # neighbour, and all that they send and receive passes there. Axes work at the same time.
    speed = link * sum(2 if ring else 1 for _, ring in axes)
    hops = sum(length // 2 if ring else length - 1 for length, ring in axes)
    if self.topology.platform == "gpu":
      speed, hops = link, 1
    if kind in ("all-to-all", "ragged-all-to-all"):
      if self.topology.platform == "gpu":
        return size * (n - 1) / n / link + HOP
      # A quarter of everything passes through the middle of the longest axis, each way.
      longest, ring = max(axes)
      return size * longest / ((8 if ring else 4) * link) + hops * HOP
    times = 2 if kind == "all-reduce" else 1  # summed and scattered, then gathered
    return times * (size * (n - 1) / n / speed + hops * HOP)

  def _distances(self, op: hlo.Op) -> tuple[float, int]:
    """Mean and largest number of links between the devices that exchange something."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute(r"source_target_pairs=(\{\{.*?\}\})") or "")
    if self.topology.platform != "tpu":
      return 1.0, 1
    dims = len(self.topology.shape)
    steps = []
    for a, b in ((self.devices[int(a)], self.devices[int(b)]) for a, b in pairs):
      total = 0
      for x, y, n, ring in zip(
        a.coords[:dims], b.coords[:dims], self.topology.shape, self.topology.wraps, strict=True
      ):
        total += min(abs(x - y), n - abs(x - y)) if ring else abs(x - y)
      steps.append(total)
    return max(float(np.mean(steps)), 1.0) if steps else 1.0, max(steps, default=1)

  def _group(self, op: hlo.Op) -> list[jax.Device]:
    """The devices of the first group; all groups are alike."""
    if op.kind.startswith("collective-permute"):
      return list(self.devices)
    return [self.devices[i] for i in first_group(op.attributes, len(self.devices))]


def first_group(attributes: str, count: int) -> list[int]:
  """Positions of the devices in the first of `replica_groups`, in each of the ways to write them.

  Raises ValueError for another one.
  """
  found = re.search(r"replica_groups=(.*?)(?:, [a-z_]+=|$)", attributes)
  if not found or found[1] in ("{}", "{{}}"):
    return list(range(count))
  text = found[1]
  if m := re.match(r"\{\{([\d,]*)\}", text):  # {{0,1},{2,3}}
    return [int(n) for n in m[1].split(",")]
  if m := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [2,4]<=[4,2]T(1,0)
    shape, source, order = (tuple(map(int, g.split(","))) if g else None for g in m.groups())
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids if order is None else ids.transpose(order)).reshape(shape)[0].tolist()
  if m := re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):  # mesh['a'=2,'b'=4] {'b'}
    sizes = [int(n) for n in re.findall(r"=(\d+)", m[1])]
    names = re.findall(r"'(\w+)'=", m[1])
    ids, taken = np.arange(math.prod(sizes)).reshape(sizes), [0] * len(sizes)
    for name, part in re.findall(r"'(\w+)'(:\(\d+\)\d+)?", m[2]):
      if part:
        raise ValueError(f"replica_groups over a part of an axis: {text!r}")
      taken[names.index(name)] = slice(None)
    return ids[tuple(taken)].ravel().tolist()
  raise ValueError(f"replica_groups in a form that is not known: {text!r}")


def _place(op_name: str) -> str:
  """Where an operation comes from, short: without what jit, gradient and loops add."""
  parts = [p for p in op_name.split("/") if not re.match(r"(jit|jvp|transpose|vmap)?\(|jit", p)]
  back = "gradient, " if "transpose" in op_name else ""
  skip = ("while", "body", "closed_call", "checkpoint", "cond", "remat", "shard_map")
  loop = "loop, " if "while" in parts else ""
  return back + loop + "/".join(p for p in parts if p not in skip)[-60:]


def _calls(op: hlo.Op, target: str) -> bool:
  return op.kind == "custom-call" and f'custom_call_target="{target}"' in op.attributes


def _seconds(cost: Cost) -> float:
  return cost.seconds
