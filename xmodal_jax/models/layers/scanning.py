"""Blocks stacked along a layer axis, and the scan over them."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models.layers.blocks import Block
from xmodal_jax.models.layers.partitioning import constrain_batch

Array = jax.Array


def stack(depth: int, *args, rngs: nnx.Rngs, block: type = Block, **kwargs) -> nnx.Module:
  """`depth` blocks held as one whose arrays lead with a layer axis."""
  make = lambda key: block(*args, rngs=nnx.Rngs(key), **kwargs)
  return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def depth_of(blocks: nnx.Module) -> int:
  """How many blocks a stack holds."""
  return len(jax.tree.leaves(blocks)[0])


def scan(
  blocks: nnx.Module,
  x: Array,
  *args,
  key: Array | None = None,
  remat: str = "",
  unroll: int = 1,
  collect: bool = False,
  batch_sharding: NamedSharding | None = None,
) -> Array:
  """Applies stacked blocks in turn, x = block(x, *args). x [B, L, D] -> [B, L, D].

  key: split over the blocks, which then get theirs as `key`. remat: name of a
  `jax.checkpoint_policies` entry, "" for none. unroll: layers per scan iteration; the parameters
  are the same however the loop is compiled. collect: every block's output instead, [N, B, L, D].
  rows: see `constrain_batch`.
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
  """The body of a scan whose activations are kept or computed again as the policy says.

  once: it runs outside of a loop, or in one of a single iteration, which compilers unroll: they
  would find there that the same is computed twice, and keep it.
  """
  if not policy:
    return body
  return jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=once)
