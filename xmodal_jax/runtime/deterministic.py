"""A train step whose result is the same to the last bit on any number of devices and processes.

Sums of floats depend on their order, and compilers choose an order for each shape and each number
of devices. Here a batch is always M micro-shards of B / M rows, whoever computes them, and four
things have one order:

- a micro-shard goes through the towers alone, in the body of a loop that every device runs over its
  own micro-shards;
- the objective is computed on the features of the whole batch, by every device for itself;
- gradients of the micro-shards are added up in a binary tree over M: a device adds those of its
  own, which are neighbours, and devices exchange what they have, in pairs, then in pairs of pairs;
- the update is computed by every device for itself.

No float is ever summed by a collective. A loop's length is a number that the compiler cannot know,
so that it compiles the body by itself: otherwise a loop that is run once would be fused with what
is around it, which is another program and rounds differently. The price is the towers' forward pass
once more, and an objective and an update that are not shared among devices.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.optim import train_state

Array = jax.Array
Batch = Mapping[str, Array]

# Whether a / b becomes a * (1 / b), which rounds differently, depends on how often the simplifier
# finds b used; and programs for one device reach it on another way than those for several, with
# what is computed twice not yet merged. So it is left out.
OPTIONS = {"cpu": {"xla_disable_hlo_passes": "algsimp"}}


def check(
  mesh: jax.sharding.Mesh, stats: Any, *, batch_size: int, micro_shards: int, accumulate: int
) -> None:
  """Raises ValueError if the batch, the mesh or the model does not allow a reproducible step.

  stats: the model's running statistics, abstract or not.
  """
  n, devices = micro_shards, sharding.batch_shards(mesh)
  if n < 1 or n & (n - 1):
    raise ValueError(f"config.micro_shards is {n}: set it to a power of two")
  if batch_size % n:
    raise ValueError(
      f"config.micro_shards is {n}, which does not divide config.batch_size={batch_size}"
    )
  if split := [f"{a}={k}" for a, k in mesh.shape.items() if a != "data" and k > 1]:
    raise ValueError(
      f"config.reproducible needs replicated parameters, but config.mesh has {', '.join(split)}: "
      "set config.mesh to (('data', -1),)"
    )
  if n % devices:
    raise ValueError(
      f"config.reproducible is set, but config.micro_shards={n} cannot be divided among {devices} "
      f"devices: use a power of two of at most {n} devices, or start with more micro-shards"
    )
  if accumulate != 1:
    raise ValueError(
      f"config.reproducible encodes a batch in micro-shards and ignores config.accumulate="
      f"{accumulate}: set it to 1, and raise config.micro_shards to save memory"
    )
  if jax.tree.leaves(stats):
    raise ValueError(
      "config.reproducible is set, but this model has BatchNorm, whose statistics need the whole "
      "batch: set it to False"
    )


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  rng: Array,
  shardings: train_state.TrainState,
  schedule: Callable[[Array], Array],
  batch_sharding: NamedSharding,
  micro_shards: int,
) -> Callable[[train_state.TrainState, Batch], tuple[train_state.TrainState, dict[str, Array]]]:
  """As `step.make_train_step`, for batches sharded as `rows` and cut into so many micro-shards.

  Dropout has a key for each micro-shard, so that its masks are not those of the other step.
  """
  axes = tuple(a for a in sharding.BATCH_AXES if a in batch_sharding.mesh.shape)
  model = functools.partial(_model, graphdef, _alone(batch_sharding.mesh))
  local = functools.partial(
    _local_step, model=model, tx=tx, schedule=schedule, axes=axes, micro_shards=micro_shards
  )
  whole, cut = P(), P(axes)
  # Unchecked: what comes out is whole because every device computes the same.
  everywhere = jax.shard_map(
    local, mesh=batch_sharding.mesh, in_specs=(whole, cut, whole), out_specs=whole, check_vma=False
  )

  def train_step(state: train_state.TrainState, batch: Batch):
    keys = jax.random.split(jax.random.fold_in(rng, state.step), 4)
    batch = model(state.params).prepare(batch, keys[0])
    return everywhere(state, dict(batch), keys[1:])

  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options=OPTIONS.get(batch_sharding.mesh.devices.flat[0].platform),
  )


def _alone(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch on one device of the mesh."""
  devices = mesh.devices.flat[:1].reshape((1,) * mesh.devices.ndim)
  return sharding.batch_sharding(jax.sharding.Mesh(devices, mesh.axis_names))


def _model(
  graphdef: nnx.GraphDef, batch_sharding: NamedSharding, params: Any, parts: int = 1
) -> nnx.Module:
  """With rows on one device; parts: what its objective computes of rows apart is cut into."""
  model = nnx.merge(graphdef, params, {})
  for _, module in nnx.iter_modules(model):
    if hasattr(module, "batch_sharding"):
      module.batch_sharding = batch_sharding
  model.accumulate = parts
  return model


def _local_step(state, batch, keys, *, model, tx, schedule, axes, micro_shards):
  """What each device does with its rows of a batch -> (state, metrics), the same on each."""
  devices = jax.lax.axis_size(axes)
  own, here = micro_shards // devices, jax.lax.axis_index(axes)
  # 1 and `own`, but for all that the compiler knows it could be 0.
  once, each = (jnp.where(state.step < 0, 0, n) for n in (1, own))
  k_image, k_text, k_align = keys
  micro = {k: x.reshape(own, -1, *x.shape[1:]) for k, x in batch.items()}

  def encode(params, i, micro):
    """Features of micro-shard i of this device, ((pictures, texts) with a gradient, without)."""
    part = {k: x[i] for k, x in micro.items()}
    key = lambda k: jax.random.fold_in(k, here * own + i)
    system = model(params)
    sides = system.encode_image(part, key(k_image)), system.encode_text(part, key(k_text))
    return tuple(
      tuple({k: x for k, x in side.items() if _is_real(x) == real} for side in sides)
      for real in (True, False)
    )

  def forward(i, out, rest):
    return jax.tree.map(lambda all, x: _put(all, x, i), out, encode(rest[0], i, rest[1]))

  features = jax.eval_shape(encode, state.params, 0, micro)
  features = _repeat(each, forward, _zeros(features, own), (state.params, micro))
  gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
  features = jax.tree.map(lambda x: gather(x.reshape(-1, *x.shape[2:])), features)

  def objective(params, real, other, fields):
    sides = (a | b for a, b in zip(real, other, strict=True))
    return model(params, micro_shards).objective(*sides, fields, k_align)

  read, value = _trace(objective, state.params, *features, batch)
  fields = {k: gather(batch[k]) for k in read}
  align = lambda i, out, rest: jax.value_and_grad(objective, (0, 1), has_aux=True)(*rest)
  nothing, rest = (value, (state.params, features[0])), (state.params, *features, fields)
  (loss, metrics), (of_align, towards) = _repeat(once, align, _zeros(nothing), rest)
  first = here * len(next(iter(batch.values())))
  mine = lambda x: jax.lax.dynamic_slice_in_dim(x, first, len(x) // devices)
  towards = jax.tree.map(lambda x: mine(x).reshape(own, -1, *x.shape[1:]), towards)

  def backward(i, sums, rest):
    params, micro, towards = rest
    _, pull, _ = jax.vjp(lambda params: encode(params, i, micro), params, has_aux=True)
    return _count_up(sums, i, *pull(jax.tree.map(lambda x: x[i], towards)))

  # sums[l] is that of 2 ** l micro-shards, next to each other.
  sums = _zeros(state.params, own.bit_length())
  sums = _repeat(each, backward, sums, (state.params, micro, towards))
  of_towers = _exchange(jax.tree.map(lambda x: x[-1], sums), axes, devices)

  def update(i, carry, rest):
    del i
    params, opt_state, _ = carry
    grads, loss, step, metrics = jax.tree.map(jnp.add, *rest[:2]), *rest[2:]
    updates, opt_state = tx.update(grads, opt_state, params)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree_utils.tree_norm(grads),
      "lr": jnp.asarray(schedule(step), jnp.float32),
      **metrics,
    }
    return optax.apply_updates(params, updates), opt_state, metrics

  none = {k: jnp.float32(0) for k in ("loss", "grad_norm", "lr")} | _zeros(metrics)
  carry, rest = (state.params, state.opt_state, none), (of_towers, of_align, loss, state.step)
  params, opt_state, metrics = _repeat(once, update, carry, (*rest, metrics))
  return train_state.TrainState(state.step + 1, params, state.stats, opt_state), metrics


def _is_real(x: Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _put(x: Array, row: Array, i: Array) -> Array:
  return jax.lax.dynamic_update_index_in_dim(x, row, i, 0)


def _zeros(tree: Any, *leading: int) -> Any:
  """Of the shapes in a tree, with axes before them."""
  return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)


def _repeat(times: Array, body: Callable[[Array, Any, Any], Any], carry: Any, rest: Any) -> Any:
  """carry = body(i, carry, rest) for i in 0 .. times - 1, with a body that is compiled by itself.

  times int32 []: no constant, or the loop could be unrolled. The barriers keep what only depends
  on `rest` from being moved out of the loop.
  """

  def one(i, carry):
    i, carry, fixed = jax.lax.optimization_barrier((i, carry, rest))
    return jax.lax.optimization_barrier(body(i, carry, fixed))

  return jax.lax.fori_loop(0, times, one, carry)


def _count_up(sums: Any, i: Array, new: Any) -> Any:
  """Adds the i-th of a row of trees as 1 is added to the binary number i: pairs of equal size."""

  def carry_over(place):
    level, new = place
    return level + 1, jax.tree.map(lambda s, x: s[level] + x, sums, new)

  full = lambda place: (i >> place[0]) & 1 == 1
  level, new = jax.lax.while_loop(full, carry_over, (jnp.int32(0), new))
  return jax.tree.map(lambda s, x: _put(s, x, level), sums, new)


def _exchange(x: Any, axes: tuple[str, ...], devices: int) -> Any:
  """The sum over devices, on each: of pairs, of pairs of pairs and so on; a + b is b + a."""
  distance = 1
  while distance < devices:
    pairs = [(i, i ^ distance) for i in range(devices)]
    x = jax.tree.map(lambda a: a + jax.lax.ppermute(a, axes, pairs), x)
    distance *= 2
  return x


def _trace(objective: Callable[..., Any], params: Any, real: Any, other: Any, batch: Batch):
  """(names of the fields of a batch that the objective reads, shapes of what it gives)."""
  rows = len(next(iter(real[0].values())))
  whole = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in batch.items()}
  names: set[str] = set()
  noting = lambda *args: objective(*args[:-1], _Noting(args[-1], names))
  shapes = jax.eval_shape(noting, params, real, other, whole)
  return sorted(names), shapes


class _Noting(Mapping[str, Array]):
  """A batch that notes in `names` which of its fields are read."""

  def __init__(self, batch: Batch, names: set[str]):
    self.batch, self.names = batch, names

  def __getitem__(self, name: str) -> Array:
    self.names.add(name)
    return self.batch[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.batch)

  def __len__(self) -> int:
    return len(self.batch)
