"""Sharding constraints on activations."""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped


def constrain_batch(
  x: Shaped[Array, "..."], batch_sharding: NamedSharding | None, *, stacked: bool = False
) -> Shaped[Array, "..."]:
  """Shards [B, ...], or [N, B, ...] if stacked, along B as `batch_sharding`, other axes whole.

  Where parameters are sharded, compilers otherwise shard activations like them: along their width,
  with a sum over devices after every matmul, which moves more bytes than gathering the parameters
  (ZeRO; Rajbhandari et al., 2020). The identity without `batch_sharding`, on one device and inside
  of `shard_map`.
  """
  return constrain(x, batch_sharding, lambda spec: (None, *spec) if stacked else spec)


def constrain(
  x: Shaped[Array, "..."], batch_sharding: NamedSharding | None, make_spec: Callable
) -> Shaped[Array, "..."]:
  """Shards x by `make_spec` of the batch's PartitionSpec; see `constrain_batch`."""
  if (
    batch_sharding is None
    or batch_sharding.mesh.size == 1
    or jax.sharding.get_abstract_mesh().manual_axes
  ):
    return x
  spec = PartitionSpec(*make_spec(batch_sharding.spec))
  return jax.lax.with_sharding_constraint(x, NamedSharding(batch_sharding.mesh, spec))
