"""Stacks of blocks along a leading layer axis, and the scan over their layers."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from xmodal_jax.models.layers.blocks import Block
from xmodal_jax.models.layers.partitioning import constrain_batch


def stack(depth: int, *args, rngs: nnx.Rngs, block: type = Block, **kwargs) -> nnx.Module:
  """`depth` blocks as one module whose arrays have a leading layer axis."""

  def make(key):
    return block(*args, rngs=nnx.Rngs(key), **kwargs)

  return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def depth_of(blocks: nnx.Module) -> int:
  """The number of blocks of a stack."""
  return len(jax.tree.leaves(blocks)[0])


def scan(
  blocks: nnx.Module,
  x: Float[Array, "b l d"],
  *args,
  key: PRNGKeyArray | None = None,
  remat: str = "",
  unroll: int = 1,
  collect: bool = False,
  batch_sharding: NamedSharding | None = None,
) -> Float[Array, "*n b l d"]:
  """Applies stacked blocks in turn: x = block(x, *args). Returns the last output [B, L, D].

  key: split into one per block, passed as `key`.
  remat: name of a `jax.checkpoint_policies` entry, "" for no rematerialization.
  unroll: layers per scan iteration; parameters do not depend on it.
  collect: return every block's output, [N, B, L, D].
  batch_sharding: see `constrain_batch`.
  """

  def step(x, layer):
    block, k = layer
    x = constrain_batch(block(x, *args) if k is None else block(x, *args, key=k), batch_sharding)
    return x, x if collect else None

  keys = None if key is None else jax.random.split(key, depth_of(blocks))
  body, start = rematerialize(step, remat), constrain_batch(x, batch_sharding)
  last, each = jax.lax.scan(body, start, (blocks, keys), unroll=unroll)
  return constrain_batch(each, batch_sharding, stacked=True) if collect else last


def rematerialize(body: Callable, policy: str, *, once: bool = False) -> Callable:
  """`jax.checkpoint` of a scan's body by the name of a policy, "" for none.

  once: the body runs outside of a loop, or in a loop of one iteration, which XLA unrolls. Common
  subexpression elimination would then merge the recomputation with the forward pass, and keep its
  activations; a barrier prevents it.
  """
  if not policy:
    return body
  return jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=once)
