"""Sharding constraints on activations."""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array


def constrain_batch(
  x: Array, batch_sharding: NamedSharding | None, *, stacked: bool = False
) -> Array:
  """[B, ...], or [N, B, ...] where stacked, with B over the devices as `rows` says, the rest whole.

  Where parameters are sharded, compilers otherwise follow these: activations were cut along their
  width and added up over the devices behind every matmul, which moves more than the parameters do
  (ZeRO; Rajbhandari et al., 2020). The identity without `rows`, on one device, and inside of what
  each device does for itself.
  """
  return constrain(x, batch_sharding, lambda spec: (None, *spec) if stacked else spec)


def constrain(x: Array, batch_sharding: NamedSharding | None, of: Callable) -> Array:
  """x with the entries of a spec that `of` makes of those of the rows."""
  if (
    batch_sharding is None
    or batch_sharding.mesh.size == 1
    or jax.sharding.get_abstract_mesh().manual_axes
  ):
    return x
  spec = of(batch_sharding.spec)
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(batch_sharding.mesh, PartitionSpec(*spec))
  )
