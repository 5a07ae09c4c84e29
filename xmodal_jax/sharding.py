"""Mesh, and the rules that turn logical axes of parameters into mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def make_mesh(
  axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """axes: (("data", -1), ("fsdp", 1), ("model", 1)); one size may be -1, what is left.

  devices: all of them by default.

  Axis types are Auto: jax.make_mesh defaults to Explicit, where `z @ z.T` over a sharded batch is
  an error. Raises ValueError if the sizes do not multiply to the number of devices.
  """
  names, sizes = zip(*axes, strict=True)
  count = len(devices or jax.devices())
  try:
    sizes = np.arange(count).reshape(sizes).shape
  except ValueError as e:
    raise ValueError(f"mesh {tuple(map(tuple, axes))} does not fit {count} devices") from e
  types = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


def spec(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh: jax.sharding.Mesh,
  rules: Mapping[str, str],
  min_size: int,
) -> P:
  """PartitionSpec of one array. `axes` name its last dimensions; leading ones are layers.

  A dimension that its mesh axis does not divide stays replicated, and so does an array of fewer
  than `min_size` elements: gathering it costs more than keeping it.
  """
  if np.prod(shape, dtype=np.int64) < min_size:
    return P()
  out: list[str | None] = [None] * (len(shape) - len(axes))
  for name, size in zip(axes, shape[len(out) :], strict=True):
    axis = rules.get(name)
    fits = axis in mesh.shape and axis not in out and size % mesh.shape[axis] == 0
    out.append(axis if fits else None)
  return P(*out)


def param_shardings(
  abstract: nnx.State, mesh: jax.sharding.Mesh, rules: Mapping[str, str], min_size: int = 2**16
) -> dict[str, Any]:
  """Nested dict of NamedSharding for an abstract state whose variables carry `axes` metadata."""

  def one(v):
    axes = v.get_metadata().get("axes", ())
    return v.replace(NamedSharding(mesh, spec(axes, v.shape, mesh, rules, min_size)))

  is_variable = lambda v: isinstance(v, nnx.Variable)
  return nnx.to_pure_dict(jax.tree.map(one, abstract, is_leaf=is_variable))


def opt_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, mesh) -> Any:
  """Shardings of tx.init(params): moments follow their parameter, the rest is replicated."""
  return optax.tree_utils.tree_map_params(
    tx,
    lambda _, s: s,
    jax.eval_shape(tx.init, params),
    shardings,
    transform_non_params=lambda _: NamedSharding(mesh, P()),
  )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch over every data-like axis of the mesh."""
  return NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """How many devices share the rows of a batch."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.shape)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """This process's rows [b, ...] -> global arrays [B, ...]; an explicit transfer."""
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
