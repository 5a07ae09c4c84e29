"""From a config to a mesh, an abstract model and its shardings."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.interop import conversion, tables
from xmodal_jax.models import registry
from xmodal_jax.optim import factory, schedules, train_state
from xmodal_jax.runtime import deterministic
from xmodal_jax.runtime import step as step_lib


def compute_dtype(name: str, platform: str) -> jnp.dtype:
  """ "auto" is bfloat16 on accelerators and float32 on CPU, where bfloat16 is emulated.

  platform: of the devices that the program is for, which need not be those of this process.
  """
  if name == "auto":
    name = "float32" if platform == "cpu" else "bfloat16"
  return jnp.dtype(name)


class Built:
  """mesh; platform: of its devices; system: the model without values; graphdef; params, stats:
  abstract nnx.States; *_shardings: nested dicts like them."""

  def __init__(self, config: Any, devices: Sequence[jax.Device] | None = None):
    if config.precision != "default":
      jax.config.update("jax_default_matmul_precision", config.precision)
    self.config = config
    self.mesh = sharding.make_mesh(config.mesh, devices)
    self.platform = self.mesh.devices.flat[0].platform
    self.module = registry.system_module(config.model.system)
    model = nnx.eval_shape(self.model)
    self.system = model
    self.graphdef, self.params, self.stats = step_lib.split(model)
    place = functools.partial(
      sharding.param_shardings,
      mesh=self.mesh,
      rules=config.rules.to_dict(),
      min_size=config.min_shard,
    )
    self.params_shardings, self.stats_shardings = place(self.params), place(self.stats)
    self._check_accumulate()
    if self.system.ring:
      self.system.ring.tile(config.batch_size)  # raises where it does not divide
    if config.reproducible:
      deterministic.check(config, self.mesh, self.stats)
    self.replicated = NamedSharding(self.mesh, P())
    self.batch_sharding = sharding.batch_sharding(self.mesh)

  def model(self) -> nnx.Module:
    """The model with fresh parameters, drawn from config.seed."""
    config = self.config.model.to_dict()
    dtype = compute_dtype(self.config.dtype, self.platform)
    model = self.module.build(config, dtype=dtype, rngs=nnx.Rngs(self.config.seed))
    for _, module in nnx.iter_modules(model):
      if hasattr(module, "batch_sharding"):  # the system, and what has activations to spread
        module.batch_sharding = sharding.batch_sharding(self.mesh)
    model.accumulate, model.loss_chunk = self.config.accumulate, self.config.loss_chunk
    return model

  def _check_accumulate(self) -> None:
    n, size = self.config.accumulate, self.config.batch_size
    shards = math.prod(self.mesh.shape[a] for a in sharding.BATCH_AXES if a in self.mesh.shape)
    if n < 1 or (n > 1 and size % (n * shards)):
      raise ValueError(
        f"config.accumulate is {n}: config.batch_size={size} does not divide into so many parts on "
        f"each of {shards} devices"
      )
    if n > 1 and jax.tree.leaves(self.stats):
      raise ValueError(
        f"config.accumulate is {n}, but this model has BatchNorm, whose statistics are those of "
        "the whole batch; set it to 1"
      )

  def train_step(self, tx, rng: jax.Array, shardings: train_state.TrainState, schedule):
    """The jitted (state, batch) -> (state, metrics) that config.reproducible asks for."""
    args = self.graphdef, tx, rng, shardings, schedule
    if not self.config.reproducible:
      return step_lib.make_train_step(*args)
    return deterministic.make_train_step(*args, self.batch_sharding, self.config.micro_shards)

  def optimizer(self, schedule: schedules.Schedule, steps_per_epoch: int = 0):
    """The optax chain; steps_per_epoch: of the run, where config.optim.freeze counts epochs."""
    params, config = nnx.to_pure_dict(self.params), self.config
    tensors = ()
    if config.optim.name == "lamb":  # norms are taken of the tensors of the published optimizer
      rules = tables.rule_table(config.model.system).RULES
      tensors = conversion.tensors_of(rules, params)
    return factory.make_optimizer(config.optim, schedule, params, tensors, steps_per_epoch)

  def state_shardings(self, tx) -> train_state.TrainState:
    params = nnx.to_pure_dict(self.params)
    opt = sharding.opt_shardings(tx, params, self.params_shardings, self.mesh)
    return train_state.TrainState(self.replicated, self.params_shardings, self.stats_shardings, opt)
