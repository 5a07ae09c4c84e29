"""Mesh, and the rules that turn logical axes of parameters into mesh axes."""

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

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """axes: (("data", -1), ("fsdp", 1), ("model", 1)); one size may be -1, what is left.

  "data" and "fsdp" share the rows of a batch, "fsdp" and "model" the parameters, as the rules say;
  an axis may be left out. devices: all of them by default.

  Axis types are Auto: jax.make_mesh defaults to Explicit, where `z @ z.T` over a sharded batch is
  an error. Raises ValueError for another name, or if the sizes do not multiply to the number of
  devices.
  """
  names, sizes = zip(*axes, strict=True)
  if len(set(names)) < len(names) or not set(names) <= set(AXES):
    raise ValueError(f"config.mesh has the axes {names}; expected each of {AXES} at most once")
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
  units: Mapping[str, int] | None = None,
) -> P:
  """PartitionSpec of one array. `axes` name its last dimensions; leading ones are layers.

  A dimension that its mesh axis does not divide stays replicated, and so does an array of fewer
  than `min_size` elements: gathering it costs more than keeping it. units: of how many parts a
  dimension consists that are not to be cut, where it is not its size: of attention heads.
  """
  if np.prod(shape, dtype=np.int64) < min_size:
    return P()
  out: list[str | None] = [None] * (len(shape) - len(axes))
  for name, count in _counts(axes, shape, units):
    axis = rules.get(name)
    fits = axis in mesh.shape and axis not in out and count % mesh.shape[axis] == 0
    out.append(axis if fits else None)
  return P(*out)


def misfits(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh: jax.sharding.Mesh,
  rules: Mapping[str, str],
  min_size: int,
  units: Mapping[str, int] | None = None,
) -> list[str]:
  """The axes that `spec` leaves replicated because they do not divide: "heads=12 on model=8"."""
  if np.prod(shape, dtype=np.int64) < min_size:
    return []
  return [
    f"{name}={count} on {axis}={mesh.shape[axis]}"
    for name, count in _counts(axes, shape, units)
    if (axis := rules.get(name)) in mesh.shape and count % mesh.shape[axis]
  ]


def _counts(axes, shape, units) -> list[tuple[str | None, int]]:
  """(name, what a mesh axis has to divide) of the dimensions that have an entry in `axes`."""
  sizes = shape[len(shape) - len(axes) :]
  return [(name, (units or {}).get(name, size)) for name, size in zip(axes, sizes, strict=True)]


def param_shardings(
  abstract: nnx.State, mesh: jax.sharding.Mesh, rules: Mapping[str, str], min_size: int = 2**16
) -> dict[str, Any]:
  """Nested dict of NamedSharding for an abstract state whose variables carry `axes` metadata.

  What stays replicated because it does not divide is logged, all of it at once. Raises ValueError
  for a rule that names no axis of meshes, and for a variable whose dimensions have no names.
  """
  wrong = {k: v for k, v in rules.items() if v not in AXES}
  if wrong:
    raise ValueError(f"config.rules has {wrong}; a rule names one of {', '.join(AXES)}")
  kept: dict[str, list[str]] = {}

  def one(key_path, v):
    path, metadata = "/".join(str(k.key) for k in key_path), v.get_metadata()
    axes = metadata.get("axes")
    if axes is None or len(axes) > len(v.shape):
      raise ValueError(
        f"parameter {path} of shape {v.shape} has the axes {axes}; name each of them"
      )
    units = {name: metadata[name] for name in axes if name in metadata}
    for what in misfits(axes, v.shape, mesh, rules, min_size, units):
      kept.setdefault(what, []).append(path)
    return v.replace(NamedSharding(mesh, spec(axes, v.shape, mesh, rules, min_size, units)))

  is_variable = lambda v: isinstance(v, nnx.Variable)
  out = jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_variable)
  if kept:
    lines = "\n".join(f"  {what}: {', '.join(paths)}" for what, paths in kept.items())
    logging.warning("replicated, because the mesh does not divide them:\n%s", lines)
  return nnx.to_pure_dict(out)


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


def batch_mesh_axes(batch_sharding: NamedSharding | None) -> tuple[tuple[str, ...], int]:
  """(mesh axes of size above 1 that the batch is sharded over, number of devices along them).

  ((), 1) for a batch on one device, and without a sharding.
  """
  axes = () if batch_sharding is None else batch_sharding.spec[0]
  axes = (axes,) if isinstance(axes, str) else axes
  axes = tuple(a for a in axes if batch_sharding.mesh.shape[a] > 1)
  return axes, math.prod(batch_sharding.mesh.shape[a] for a in axes)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """The process's `local_rows` [b, ...] -> global arrays [B, ...]; an explicit transfer."""
  if sharding.is_fully_addressable:
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
  b = len(next(iter(batch.values())))
  size = b * batch_shards(sharding.mesh) // len(_local_starts(sharding))
  at = {int(row): i for i, row in enumerate(local_rows(sharding, size))}

  def one(v):
    def part(index):
      start, stop, _ = index[0].indices(size)
      return v[at[start] : at[start] + stop - start]

    return _place((size, *v.shape[1:]), sharding, part)

  return {k: one(v) for k, v in batch.items()}


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
  """int64 [b]: the rows of a batch of `size` that devices of this process hold, in order.

  They follow from the mesh, not from the number of the process: on a slice, the chips of a host
  are neighbours in two dimensions, and processes that only split the model hold the same rows.
  Raises ValueError where the batch does not divide.
  """
  if size % (shards := batch_shards(sharding.mesh)):
    raise ValueError(f"a batch of {size} rows does not divide into {shards} parts of a mesh")
  share = size // shards
  return np.concatenate([np.arange(i * share, (i + 1) * share) for i in _local_starts(sharding)])


@functools.lru_cache(maxsize=8)
def _local_starts(sharding: NamedSharding) -> tuple[int, ...]:
  """Which of the parts of a batch devices of this process hold."""
  shards = batch_shards(sharding.mesh)
  index = sharding.addressable_devices_indices_map((shards,))
  return tuple(sorted({s.indices(shards)[0] for (s,) in index.values()}))


def place(x: np.ndarray, to: NamedSharding) -> jax.Array:
  """A host array that every process has -> a global array; an explicit transfer."""
  return _place(np.shape(x), to, lambda index: x[index])


def _place(shape: Sequence[int], to: NamedSharding, part: Callable) -> jax.Array:
  """The array whose shards are part(index). `jax.make_array_from_callback` counts as implicit."""
  shape = tuple(shape)
  index = to.addressable_devices_indices_map(shape)
  shards = [jax.device_put(part(i), device) for device, i in index.items()]
  return jax.make_array_from_single_device_arrays(shape, to, shards)
