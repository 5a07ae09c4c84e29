"""Matmul FLOPs of models and of traced programs, and peak FLOP/s of devices, for MFU and HFU.

MFU is the share of the peak that the model's own FLOPs take, HFU that of all FLOPs computed, with
those of rematerialization (PaLM, Chowdhery et al., 2022, appendix B).
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.extend import core

from xmodal_jax.runtime import setup

# Dense bf16 FLOP/s per device, from the vendors' data sheets.
PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def device_peak(kind: str) -> float | None:
  """Peak bf16 FLOP/s of a `jax.Device.device_kind`; None if unknown, as for CPUs.

  >>> device_peak("NVIDIA H100 80GB HBM3")
  989000000000000.0
  """
  matches = [name for name in PEAK if kind.startswith(name)]
  return PEAK[max(matches, key=len)] if matches else None


def of_model(config: Any, batch: Mapping[str, Any]) -> int:
  """FLOPs of the loss and its gradient, without what a train step computes again.

  batch: global arrays or ShapeDtypeStructs. Traces the model of `plain(config)`.
  """
  built = setup.build(plain(config), _cpu_or_any()[:1])
  arrays = nnx.to_pure_dict(built.params), nnx.to_pure_dict(built.stats), dict(batch)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

  def loss(params, stats, batch):
    return nnx.merge(built.graphdef, params, stats).loss(batch, jax.random.key(0))[0]

  return count(jax.make_jaxpr(jax.grad(loss))(*shapes))


def _cpu_or_any() -> list[jax.Device]:
  """On CPU devices no product is inside of a kernel, where `count` would not see it."""
  try:
    return jax.local_devices(backend="cpu")
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return jax.local_devices()


def plain(config: Any) -> Any:
  """The config on one device, without parts, rings and recomputation: it computes the same."""
  config = config.copy_and_resolve_references()
  config.mesh = (("data", -1), ("fsdp", 1), ("model", 1))
  config.accumulate, config.loss_chunk, config.reproducible = 1, 0, False
  set_remat(config, "")
  return config


def set_remat(config: Any, policy: str) -> list[str]:
  """Gives every stack of blocks this policy; names of the keys. See models.layers.rematerialize."""
  keys, queue = [], collections.deque([("config.model", config.model)])
  while queue:
    name, node = queue.popleft()
    for key in node:
      if key == "remat":
        node[key] = policy
        keys.append(f"{name}.{key}")
      elif hasattr(node[key], "items"):
        queue.append((f"{name}.{key}", node[key]))
  return keys


def count(jaxpr: Any) -> int:
  """FLOPs of the dot_generals and convolutions in a jaxpr, a multiply-add as two.

  A scan's body is counted once per iteration, unlike in `compiled.cost_analysis()`, which counts
  one layer of a scanned stack. A while loop's body is counted once: its length is unknown.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0
  for eqn in jaxpr.eqns:
    name, out = eqn.primitive.name, [v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape")]
    if name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += 2 * math.prod(out[0]) * math.prod(lhs[i] for i in contract)
    elif name == "conv_general_dilated":
      dims = eqn.params["dimension_numbers"]
      kernel = eqn.invars[1].aval.shape
      per_output = math.prod(kernel) // kernel[dims.rhs_spec[0]]
      total += 2 * math.prod(out[0]) * per_output
    elif name == "cond":
      # jax.lax.platform_dependent is a cond whose branches do the same matmuls.
      total += max(count(b) for b in eqn.params["branches"])
    else:
      times = eqn.params["length"] if name == "scan" else 1
      total += times * sum(count(j) for j in core.jaxprs_in_params(eqn.params))
  return total
