"""Matmul FLOPs of a traced program, and the peak of known devices: what MFU is made of."""

import math
from typing import Any

from jax.extend import core

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
  """Peak of `jax.devices()[0].device_kind`; None where it is not known (CPUs)."""
  matches = [name for name in PEAK if kind.startswith(name)]
  return PEAK[max(matches, key=len)] if matches else None


def count(jaxpr: Any) -> int:
  """FLOPs of dot_general and convolutions in a jaxpr; a scan's body counts once per iteration.

  `compiled.cost_analysis()` counts a scan's body once, which hides all layers but one.
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
      # platform_dependent lowers to one branch; they do the same matmuls.
      total += max(count(b) for b in eqn.params["branches"])
    else:
      times = eqn.params["length"] if name == "scan" else 1
      total += times * sum(count(j) for j in core.jaxprs_in_params(eqn.params))
  return total
