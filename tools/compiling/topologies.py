"""Slices of accelerators: devices to compile for, and what their makers publish of them."""

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence

import jax

from xmodal_jax.runtime import flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """peak: dense bfloat16 FLOP/s; bandwidth: of HBM, bytes/s; hbm: bytes that a program may use;
  link: bytes/s of one link between chips in one direction; wraps: an axis of a slice is a ring
  where its length is a multiple of this; clock: Hz, what the compiler's cycles are counted in."""

  peak: float
  bandwidth: float
  hbm: int
  link: float
  wraps: int
  clock: float


# Google Cloud's pages on each TPU ("System architecture"): HBM bandwidth and interconnect per chip
# (v5e 400 GB/s both ways over 4 links: 50 GB/s each way; v4 and v5p have 6 links, v6e 4). hbm is
# what libtpu leaves of it, as its own out-of-memory message says. clock is peak over FLOPs per
# cycle, 2 x 128 x 128 x matrix units, which the compiler's cycles of a large matmul confirm within
# 4 %. On v5e and v6e only axes of 16 wrap around, on v4 and v5p multiples of 4 in slices of 64.
CHIPS = {
  "v4": Chip(275e12, 1.2288e12, int(30.75 * GIB), 50e9, 4, 275e12 / 2**18),
  "v5e": Chip(197e12, 0.819e12, int(15.75 * GIB), 50e9, 16, 197e12 / 2**17),
  "v5p": Chip(459e12, 2.765e12, int(95.74 * GIB), 100e9, 4, 459e12 / 2**18),
  "v6e": Chip(918e12, 1.638e12, int(31.25 * GIB), 100e9, 16, 918e12 / 2**19),
}
# NVIDIA's data sheets. NVLink joins all GPUs of a node alike: link is what one has into the switch.
GPUS = {
  "NVIDIA A100": Chip(312e12, 2.039e12, 80 * 10**9, 300e9, 1, 0.0),
  "NVIDIA H100": Chip(989e12, 3.35e12, 80 * 10**9, 450e9, 1, 0.0),
  "NVIDIA H200": Chip(989e12, 4.8e12, 141 * 10**9, 450e9, 1, 0.0),
}
NAMES = "v4:2x2x4, v5e:4x4, v5p:2x4x4, v6e:8x8 and so on, cpu:8, or gpu"


@dataclasses.dataclass(frozen=True)
class Topology:
  """name; devices; chip, None where nothing is published (CPUs); shape of the slice in chips."""

  name: str
  devices: tuple[jax.Device, ...]
  chip: Chip | None
  shape: tuple[int, ...]

  @property
  def platform(self) -> str:
    return self.devices[0].platform

  @functools.cached_property
  def wraps(self) -> tuple[bool, ...]:
    """Which axes of the slice are rings."""
    if self.chip is None:
      return (False,) * len(self.shape)
    cubes = len(self.shape) < 3 or min(self.shape) >= self.chip.wraps
    return tuple(n > 2 and cubes and n % self.chip.wraps == 0 for n in self.shape)

  def extents(self, group: Sequence[jax.Device]) -> tuple[tuple[int, bool], ...]:
    """(chips, whether they are a ring) along each axis of the slice that the devices span."""
    if self.platform != "tpu":
      return ((len(group), True),)
    places = [d.coords[: len(self.shape)] for d in group]
    counts = [len(set(axis)) for axis in zip(*places, strict=True)]
    return tuple(
      (n, wrap and n == whole)
      for n, whole, wrap in zip(counts, self.shape, self.wraps, strict=True)
      if n > 1
    )


def get(name: str) -> Topology:
  """The topology of this name. Raises ValueError for an unknown one, RuntimeError without libtpu.

  cpu:N makes N host devices, which it can before the first use of one in the process.
  """
  kind, _, size = name.partition(":")
  if kind == "cpu":
    return _cpus(name, int(size or 8))
  if kind == "gpu":
    return _gpus(name)
  axes = 3 if kind in ("v4", "v5p") else 2
  if kind not in CHIPS or not re.fullmatch(r"\d+" + r"x\d+" * (axes - 1), size):
    raise ValueError(f"there is no topology {name!r}; there are {NAMES}")
  shape = tuple(map(int, size.split("x")))
  devices = _tpus(name, "megacore" if kind == "v4" else "default")
  if len(devices) != math.prod(shape):
    raise ValueError(f"{name} has {len(devices)} devices, not one for each of its chips")
  if CHIPS[kind].peak != flops.device_peak(devices[0].device_kind):
    raise ValueError(f"{name} has devices of kind {devices[0].device_kind!r}, not {kind}")
  return Topology(name, devices, CHIPS[kind], shape)


def _cpus(name: str, count: int) -> Topology:
  with contextlib.suppress(RuntimeError):  # of devices that are there already
    jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")[:count]
  if len(devices) < count:
    raise RuntimeError(f"topology {name}: this process has {len(devices)} host devices already")
  return Topology(name, tuple(devices), None, (count,))


def _tpus(name: str, chip_config: str) -> tuple[jax.Device, ...]:
  # libtpu would ask the metadata server of a cloud machine what it is part of, and wait for it, and
  # complain; and it lets one process load it at a time, which matters to chips alone.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, chip_config_name=chip_config
    )
  except Exception as e:
    if "support not installed" in str(e):
      raise RuntimeError(f"topology {name} needs libtpu: pip install -e '.[compile]'") from e
    raise ValueError(f"libtpu does not know a topology {name!r}: {e}") from e
  return tuple(found.devices)


def _gpus(name: str) -> Topology:
  try:
    devices = tuple(jax.devices("gpu"))
  except RuntimeError as e:
    raise RuntimeError(
      f"topology gpu compiles for the GPUs of this machine, and JAX finds none: {e}. Is "
      "'.[cuda12]' installed, and JAX_PLATFORMS not cpu?"
    ) from e
  kind = devices[0].device_kind
  known = [v for k, v in GPUS.items() if kind.startswith(k)]
  chip = known[0] if known else None
  stats = devices[0].memory_stats() or {}
  if chip and stats.get("bytes_limit"):
    chip = dataclasses.replace(chip, hbm=stats["bytes_limit"])
  return Topology(name, devices, chip, (len(devices),))
