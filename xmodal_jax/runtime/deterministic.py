"""A train step that is bitwise reproducible on any number of devices and processes.

Floating-point sums depend on their order, and XLA chooses an order for each shape and each number
of devices. This step fixes the order. A batch always consists of M micro-shards of B / M rows,
whichever device computes them, and

- each micro-shard is encoded by itself, in the body of a loop over a device's own micro-shards;
- every device computes the objective on the features of the whole batch;
- gradients of micro-shards are summed in a binary tree over M: each device sums its own, which are
  neighbours, then devices exchange partial sums in pairs, in pairs of pairs and so on (recursive
  doubling);
- every device computes the same update.

No collective sums floats. Loops have an opaque trip count: with a constant, XLA would inline a loop
of one iteration and fuse its body with the code around it, which rounds differently. The costs are
a second forward pass of the towers, and an objective and an update that are computed redundantly.
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
from xmodal_jax.errors import ConfigError
from xmodal_jax.models.base import System
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import step as step_lib

Array = jax.Array
Batch = Mapping[str, Array]

# The algebraic simplifier turns a / b into a * (1 / b), which rounds differently, depending on the
# number of uses of b, and these differ between programs for one device and for several: duplicate
# expressions are merged at different points of the pipeline. So the pass is disabled on CPUs.
COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "algsimp"}}


def check(
  mesh: jax.sharding.Mesh, stats: Any, *, batch_size: int, micro_shards: int, accumulate: int
) -> None:
  """Raises ConfigError if the batch, the mesh or the model does not allow a reproducible step.

  stats: the model's running statistics, abstract or not.
  """
  n, devices = micro_shards, sharding.batch_shards(mesh)
  if n < 1 or n & (n - 1):
    raise ConfigError(f"config.micro_shards is {n}: set it to a power of two")
  if batch_size % n:
    raise ConfigError(
      f"config.micro_shards is {n}, which does not divide config.batch_size={batch_size}"
    )
  if split := [f"{a}={k}" for a, k in mesh.shape.items() if a != "data" and k > 1]:
    raise ConfigError(
      f"config.reproducible needs replicated parameters, but config.mesh has {', '.join(split)}: "
      "set config.mesh to (('data', -1),)"
    )
  if n % devices:
    raise ConfigError(
      f"config.reproducible is set, but config.micro_shards={n} cannot be divided among {devices} "
      f"devices: use a power of two of at most {n} devices, or start with more micro-shards"
    )
  if accumulate != 1:
    raise ConfigError(
      f"config.reproducible encodes a batch in micro-shards and ignores config.accumulate="
      f"{accumulate}: set it to 1, and raise config.micro_shards to save memory"
    )
  if jax.tree.leaves(stats):
    raise ConfigError(
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
) -> step_lib.TrainStep:
  """As `step.make_train_step`, with batches cut into `micro_shards` micro-shards; see `check`.

  Dropout draws a key per micro-shard, so its masks differ from those of the plain step.
  """
  mesh, tx = batch_sharding.mesh, optax.with_extra_args_support(tx)
  axes = tuple(a for a in sharding.BATCH_AXES if a in mesh.shape)
  model = functools.partial(_merge_model, graphdef, _one_device_sharding(mesh))
  local_step = functools.partial(
    _local_step, model=model, tx=tx, schedule=schedule, axes=axes, micro_shards=micro_shards
  )
  replicated, sharded = P(), P(axes)
  # check_vma cannot prove that outputs are replicated: they are, since all devices compute them.
  sharded_step = jax.shard_map(
    local_step,
    mesh=mesh,
    in_specs=(replicated, sharded, replicated),
    out_specs=replicated,
    check_vma=False,
  )

  def train_step(state: train_state.TrainState, batch: Batch):
    keys = jax.random.split(jax.random.fold_in(rng, state.step), 4)
    batch = model(state.params).prepare(batch, keys[0])
    return sharded_step(state, dict(batch), keys[1:])

  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
  )


def _one_device_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The batch sharding of a mesh that has only the first device of `mesh`."""
  devices = mesh.devices.flat[:1].reshape((1,) * mesh.devices.ndim)
  return sharding.batch_sharding(jax.sharding.Mesh(devices, mesh.axis_names))


def _merge_model(
  graphdef: nnx.GraphDef, batch_sharding: NamedSharding, params: Any, accumulate: int = 1
) -> System:
  model = nnx.merge(graphdef, params, {})
  step_lib.set_batch_sharding(model, batch_sharding)
  model.accumulate = accumulate
  return model


def _local_step(state, batch, keys, *, model, tx, schedule, axes, micro_shards):
  """One device's part of a train step; `batch` has its rows -> (state, metrics), equal on all."""
  devices, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  own = micro_shards // devices  # micro-shards of each device
  # Trip counts 1 and `own`, which the compiler cannot prove.
  once, each = (jnp.where(state.step < 0, 0, n) for n in (1, own))
  k_image, k_text, k_objective = keys
  gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
  micro = {k: x.reshape(own, -1, *x.shape[1:]) for k, x in batch.items()}
  rows = len(next(iter(batch.values())))  # of this device

  def encode(params, i, micro):
    """Features of micro-shard i of this device, split by `_split_inexact`."""
    fields = {k: x[i] for k, x in micro.items()}
    key = lambda k: jax.random.fold_in(k, device * own + i)
    system = model(params)
    image, text = system.encode_image(fields, key(k_image)), system.encode_text(fields, key(k_text))
    return _split_inexact(image, text)

  def objective(params, inexact, other, fields):
    sides = (a | b for a, b in zip(inexact, other, strict=True))
    return model(params, micro_shards).objective(*sides, fields, k_objective)

  features = _encode_all(encode, state.params, micro, own, each)
  features = jax.tree.map(lambda x: gather(x.reshape(-1, *x.shape[2:])), features)
  loss, metrics, objective_grads, cotangents = _differentiate_objective(
    objective, state.params, features, batch, gather, once
  )
  first = device * rows
  mine = lambda x: jax.lax.dynamic_slice_in_dim(x, first, len(x) // devices)
  cotangents = jax.tree.map(lambda x: mine(x).reshape(own, -1, *x.shape[1:]), cotangents)
  tower_grads = _differentiate_towers(encode, state.params, micro, cotangents, own, each)
  tower_grads = _sum_over_devices(tower_grads, axes, devices)
  return _update(tx, schedule, state, (tower_grads, objective_grads), loss, metrics, once)


def _split_inexact(image, text):
  """-> ((image, text) features of inexact dtypes, which have gradients, (image, text) others)."""

  def select(features, inexact):
    is_inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return {k: x for k, x in features.items() if is_inexact(x) == inexact}

  return tuple(tuple(select(side, inexact) for side in (image, text)) for inexact in (True, False))


def _encode_all(encode, params, micro, own: int, times: Array):
  """Features of this device's micro-shards, [own, rows, ...]."""

  def body(i, out, rest):
    params, micro = rest
    return jax.tree.map(lambda all, x: _put(all, x, i), out, encode(params, i, micro))

  shapes = jax.eval_shape(encode, params, 0, micro)
  return _repeat(times, body, _zeros(shapes, own), (params, micro))


def _differentiate_objective(objective, params, features, batch, gather, times: Array):
  """-> (loss, metrics, gradient of the parameters, gradient of the inexact features).

  features: of the whole batch. Only the batch fields that the objective reads are gathered.
  """
  names, shapes = _trace(objective, params, *features, batch)
  fields = {k: gather(batch[k]) for k in names}
  body = lambda i, out, rest: jax.value_and_grad(objective, (0, 1), has_aux=True)(*rest)
  zeros = _zeros((shapes, (params, features[0])))
  (loss, metrics), grads = _repeat(times, body, zeros, (params, *features, fields))
  return loss, metrics, *grads


def _differentiate_towers(encode, params, micro, cotangents, own: int, times: Array):
  """Parameter gradient of the towers, summed over this device's micro-shards.

  cotangents: gradient of their inexact features, [own, rows, ...]. Encodes a second time.
  """

  def body(i, sums, rest):
    params, micro, cotangents = rest
    _, vjp, _ = jax.vjp(lambda params: encode(params, i, micro), params, has_aux=True)
    return _add_to_tree(sums, i, *vjp(jax.tree.map(lambda x: x[i], cotangents)))

  sums = _zeros(params, own.bit_length())
  sums = _repeat(times, body, sums, (params, micro, cotangents))
  return jax.tree.map(lambda x: x[-1], sums)


def _update(tx, schedule, state, grads, loss, metrics, times: Array):
  """The new state and the metrics of a step. grads: (of the towers, of the objective)."""

  def body(i, carry, rest):
    del i
    params, opt_state, _ = carry
    grads, loss, step, metrics = jax.tree.map(jnp.add, *rest[:2]), *rest[2:]
    updates, opt_state = tx.update(grads, opt_state, params, step=step)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree_utils.tree_norm(grads),
      "lr": jnp.asarray(schedule(step), jnp.float32),
      **metrics,
    }
    return optax.apply_updates(params, updates), opt_state, metrics

  zeros = {k: jnp.float32(0) for k in ("loss", "grad_norm", "lr")} | _zeros(metrics)
  carry, rest = (state.params, state.opt_state, zeros), (*grads, loss, state.step, metrics)
  params, opt_state, metrics = _repeat(times, body, carry, rest)
  return train_state.TrainState(state.step + 1, params, state.stats, opt_state), metrics


def _repeat(times: Array, body: Callable[[Array, Any, Any], Any], carry: Any, rest: Any) -> Any:
  """carry = body(i, carry, rest) for i in range(times), with a body that is compiled by itself.

  times: int32 [], not a constant, so that XLA cannot unroll the loop. The barriers keep XLA from
  moving what depends on `rest` alone out of the loop.
  """

  def fenced_body(i, carry):
    i, carry, fixed = jax.lax.optimization_barrier((i, carry, rest))
    return jax.lax.optimization_barrier(body(i, carry, fixed))

  return jax.lax.fori_loop(0, times, fenced_body, carry)


def _put(x: Array, row: Array, i: Array) -> Array:
  return jax.lax.dynamic_update_index_in_dim(x, row, i, 0)


def _zeros(tree: Any, *leading: int) -> Any:
  """Zeros like the leaves of `tree`, with leading axes."""
  return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)


def _add_to_tree(sums: Any, i: Array, new: Any) -> Any:
  """Adds item i, a pytree, to a binary summation tree. Items have to come in order.

  sums: leaves [levels, ...]; sums[l] holds a sum of 2**l items. As in adding 1 to the binary number
  i, a new sum is combined with those of the levels whose bits are set, up to the first unset one.
  """

  def combine(carry):
    level, new = carry
    return level + 1, jax.tree.map(lambda s, x: s[level] + x, sums, new)

  is_set = lambda carry: (i >> carry[0]) & 1 == 1
  level, new = jax.lax.while_loop(is_set, combine, (jnp.int32(0), new))
  return jax.tree.map(lambda s, x: _put(s, x, level), sums, new)


def _sum_over_devices(x: Any, axes: tuple[str, ...], devices: int) -> Any:
  """Sum over devices by recursive doubling, equal on all of them because a + b == b + a."""
  distance = 1
  while distance < devices:
    pairs = [(i, i ^ distance) for i in range(devices)]
    x = jax.tree.map(lambda a: a + jax.lax.ppermute(a, axes, pairs), x)
    distance *= 2
  return x


def _trace(
  objective: Callable[..., Any], params: Any, inexact: Any, other: Any, batch: Batch
) -> tuple[list[str], Any]:
  """(names of the batch fields that the objective reads, shapes of its outputs)."""
  rows = len(next(iter(inexact[0].values())))
  whole = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in batch.items()}
  names: set[str] = set()

  def recorded(params, inexact, other, batch):
    return objective(params, inexact, other, _RecordingBatch(batch, names))

  shapes = jax.eval_shape(recorded, params, inexact, other, whole)
  return sorted(names), shapes


class _RecordingBatch(Mapping[str, Array]):
  """A batch that records in `names` which of its fields are read."""

  def __init__(self, batch: Batch, names: set[str]):
    self.batch, self.names = batch, names

  def __getitem__(self, name: str) -> Array:
    self.names.add(name)
    return self.batch[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.batch)

  def __len__(self) -> int:
    return len(self.batch)
