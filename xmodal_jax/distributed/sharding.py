"""Device mesh, sharding rules for parameters, and transfer of host batches to the mesh.

mesh = make_mesh((("data", -1), ("fsdp", 2), ("model", 1)))
rules = {"vocab": "model", "heads": "model", "mlp": "model", "embed": "fsdp"}
params_shardings = param_shardings(abstract_params, mesh, rules)
batch = put_batch({"image": images}, batch_sharding(mesh))  # images: this process's rows
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.errors import ConfigError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


MESH = (
  f"(name, size) pairs out of {', '.join(AXES)}, each at most once, 'data' among them, sizes from "
  "1 and at most one -1 for the remaining devices, such as (('data', -1), ('fsdp', 1))"
)


def is_mesh(axes: Any) -> bool:
  """Whether `make_mesh` takes it, if there are enough devices: see MESH."""
  pairs = list(axes) if isinstance(axes, tuple | list) else []
  if not pairs or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
    return False
  names, sizes = zip(*pairs, strict=True)
  named = all(name in AXES for name in names) and len(set(names)) == len(names)
  whole = all(type(size) is int and (size > 0 or size == -1) for size in sizes)
  return named and "data" in names and whole and sizes.count(-1) <= 1


def make_mesh(
  axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh with the axis "data" and perhaps "fsdp" and "model".

  axes: (name, size) pairs, such as (("data", -1), ("fsdp", 1), ("model", 1)); one size may be -1,
  for all remaining devices. Batches are sharded over "data" and "fsdp"; the sharding rules map
  parameters to any axis, by default "fsdp" and "model". devices: all by default.

  Raises ConfigError for other axes, and if the sizes do not fit the number of devices.
  """
  if not is_mesh(axes):
    raise ConfigError(f"config.mesh is {axes!r}: expected {MESH}")
  names, sizes = zip(*axes, strict=True)
  count = len(devices or jax.devices())
  try:
    sizes = np.arange(count).reshape(sizes).shape
  except ValueError as e:
    raise ConfigError(
      f"config.mesh {tuple(map(tuple, axes))} does not fit {count} devices: the product of its "
      "sizes is their number, and -1 stands for the rest"
    ) from e
  # jax.make_mesh defaults to Explicit axes, with which `z @ z.T` over a sharded batch is an error.
  types = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


def partition_spec(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh: jax.sharding.Mesh,
  rules: Mapping[str, str],
  min_size: int,
  units: Mapping[str, int] | None = None,
) -> P:
  """PartitionSpec of one array.

  Args:
    axes: logical names of its last dimensions. Leading dimensions are stacked layers, replicated.
    shape: of the array.
    mesh: device mesh.
    rules: logical name -> mesh axis.
    min_size: arrays of fewer elements are replicated, because gathering them costs more than
      storing them.
    units: logical name -> number of indivisible units of a dimension, if that is not its size, such
      as the number of attention heads.

  A dimension that its mesh axis does not divide evenly is replicated.
  """
  if np.prod(shape, dtype=np.int64) < min_size:
    return P()
  out: list[str | None] = [None] * (len(shape) - len(axes))
  for name, count in _unit_counts(axes, shape, units):
    axis = rules.get(name)
    fits = axis in mesh.shape and axis not in out and count % mesh.shape[axis] == 0
    out.append(axis if fits else None)
  return P(*out)


def indivisible_axes(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh: jax.sharding.Mesh,
  rules: Mapping[str, str],
  min_size: int,
  units: Mapping[str, int] | None = None,
) -> list[str]:
  """Axes that `partition_spec` replicates because they do not divide: "heads=12 on model=8"."""
  if np.prod(shape, dtype=np.int64) < min_size:
    return []
  return [
    f"{name}={count} on {axis}={mesh.shape[axis]}"
    for name, count in _unit_counts(axes, shape, units)
    if (axis := rules.get(name)) in mesh.shape and count % mesh.shape[axis]
  ]


def _unit_counts(axes, shape, units) -> list[tuple[str | None, int]]:
  """(name, number of units that a mesh axis must divide) of the named dimensions."""
  sizes = shape[len(shape) - len(axes) :]
  return [(name, (units or {}).get(name, size)) for name, size in zip(axes, sizes, strict=True)]


def param_shardings(
  abstract: nnx.State, mesh: jax.sharding.Mesh, rules: Mapping[str, str], min_size: int = 2**16
) -> dict[str, Any]:
  """Nested dict of NamedShardings for an abstract state whose variables have `axes` metadata.

  Logs one warning with all dimensions that are replicated because they do not divide. Raises
  ValueError for a rule with an unknown mesh axis, and for a variable without names for its
  dimensions.
  """
  wrong = {k: v for k, v in rules.items() if v not in AXES}
  if wrong:
    raise ConfigError(f"config.rules has {wrong}; a rule names one of {', '.join(AXES)}")
  replicated: dict[str, list[str]] = {}  # axis that does not divide -> parameter paths

  def variable_sharding(key_path, v):
    path, metadata = "/".join(str(k.key) for k in key_path), v.get_metadata()
    axes = metadata.get("axes")
    if axes is None or len(axes) > len(v.shape):
      raise ValueError(
        f"parameter {path} of shape {v.shape} has the axes {axes}; name each of them"
      )
    units = {name: metadata[name] for name in axes if name in metadata}
    for axis in indivisible_axes(axes, v.shape, mesh, rules, min_size, units):
      replicated.setdefault(axis, []).append(path)
    spec = partition_spec(axes, v.shape, mesh, rules, min_size, units)
    return v.replace(NamedSharding(mesh, spec))

  is_variable = lambda v: isinstance(v, nnx.Variable)
  out = jax.tree_util.tree_map_with_path(variable_sharding, abstract, is_leaf=is_variable)
  if replicated:
    lines = "\n".join(f"  {axis}: {', '.join(paths)}" for axis, paths in replicated.items())
    logging.warning("replicated, because the mesh does not divide them:\n%s", lines)
  return nnx.to_pure_dict(out)


def opt_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, mesh) -> Any:
  """Shardings of tx.init(params): moments follow their parameter, the rest is replicated."""
  return optax.tree_utils.tree_map_params(
    tx,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, params),
    shardings,
    transform_non_params=lambda _: NamedSharding(mesh, P()),
  )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Shards the rows of a batch over the mesh axes "data" and "fsdp"."""
  return NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Number of shards that the rows of a batch are split into."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.shape)


def batch_mesh_axes(batch_sharding: NamedSharding | None) -> tuple[tuple[str, ...], int]:
  """(mesh axes of size above 1 that the batch is sharded over, number of devices along them).

  ((), 1) for a batch on one device, and without a sharding.
  """
  axes = () if batch_sharding is None else batch_sharding.spec[0]
  axes = (axes,) if isinstance(axes, str) else axes
  axes = tuple(a for a in axes if batch_sharding.mesh.shape[a] > 1)
  return axes, math.prod(batch_sharding.mesh.shape[a] for a in axes)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Global arrays [B, ...] from the `local_rows` [b, ...] of each process; an explicit transfer."""
  if sharding.is_fully_addressable:
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
  b = len(next(iter(batch.values())))
  size = b * batch_shards(sharding.mesh) // len(_local_shards(sharding))
  position = {int(row): i for i, row in enumerate(local_rows(sharding, size))}

  def put(v):
    def shard(index):
      start, stop, _ = index[0].indices(size)
      return v[position[start] : position[start] + stop - start]

    return _place_shards((size, *v.shape[1:]), sharding, shard)

  return {k: put(v) for k, v in batch.items()}


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
  """int64 [b]: the rows of a batch of `size` that this process's devices hold, in order.

  They depend on the mesh, not on the process index: on a TPU slice the chips of a host are
  neighbours in two dimensions, and processes that differ only along "model" hold the same rows.
  Raises ConfigError if the batch does not divide evenly.
  """
  if size % (shards := batch_shards(sharding.mesh)):
    raise ValueError(f"a batch of {size} rows does not divide into {shards} parts of a mesh")
  share = size // shards
  return np.concatenate([np.arange(i * share, (i + 1) * share) for i in _local_shards(sharding)])


@functools.lru_cache(maxsize=8)
def _local_shards(sharding: NamedSharding) -> tuple[int, ...]:
  """Indices of the batch shards that this process's devices hold."""
  shards = batch_shards(sharding.mesh)
  index = sharding.addressable_devices_indices_map((shards,))
  return tuple(sorted({s.indices(shards)[0] for (s,) in index.values()}))


def place(x: np.ndarray, to: NamedSharding) -> jax.Array:
  """A global array from a host array that all processes have; an explicit transfer."""
  return _place_shards(np.shape(x), to, lambda index: x[index])


def _place_shards(shape: Sequence[int], to: NamedSharding, shard: Callable) -> jax.Array:
  """Like jax.make_array_from_callback, which jax.transfer_guard counts as an implicit transfer."""
  shape = tuple(shape)
  index = to.addressable_devices_indices_map(shape)
  shards = [jax.device_put(shard(i), device) for device, i in index.items()]
  return jax.make_array_from_single_device_arrays(shape, to, shards)
