"""From a config to a mesh, an abstract model, its shardings, its optimizer and its train step."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.checkpoints import facts
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError, UserError
from xmodal_jax.interop import conversion, tables
from xmodal_jax.models import registry
from xmodal_jax.models.base import System
from xmodal_jax.optim import factory, schedules, train_state
from xmodal_jax.runtime import deterministic
from xmodal_jax.runtime import step as step_lib


def compute_dtype(name: str, platform: str) -> jnp.dtype:
  """ "auto" is bfloat16 on accelerators and float32 on CPU, where bfloat16 is emulated.

  platform: of the devices that the program is compiled for, which may be another machine's.
  """
  if name == "auto":
    name = "float32" if platform == "cpu" else "bfloat16"
  return jnp.dtype(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
  """An abstract model on a mesh: its structure and shapes, and the shardings of its arrays."""

  mesh: jax.sharding.Mesh
  model_config: dict[str, Any]  # config.model
  facts: dict[str, Any]  # what config.init has to agree with, see checkpoints.facts
  init_change: tuple[str, ...]  # facts that are meant to differ
  init_model: Callable[[], System]  # the model with parameters drawn from config.seed
  system: System  # the abstract model: ShapeDtypeStructs in place of arrays
  graphdef: nnx.GraphDef
  params: nnx.State  # abstract
  stats: nnx.State  # abstract; empty for a model without BatchNorm
  params_shardings: dict[str, Any]  # nested like params
  stats_shardings: dict[str, Any]
  replicated: NamedSharding
  batch_sharding: NamedSharding  # batch rows over the "data" and "fsdp" axes
  micro_shards: int  # of the reproducible train step; 0: the plain step

  @property
  def system_name(self) -> str:
    return self.model_config["system"]

  @property
  def platform(self) -> str:
    """Platform of the mesh's devices: "cpu", "tpu", "gpu"."""
    return self.mesh.devices.flat[0].platform

  def optimizer(
    self, optim: Mapping[str, Any], schedule: schedules.Schedule, steps_per_epoch: int = 0
  ) -> optax.GradientTransformation:
    """The optax chain of config.optim. steps_per_epoch converts epochs in `optim.freeze`.

    Raises ConfigError for regexes without effect, see `factory.check_rules`.
    """
    params, tensors = nnx.to_pure_dict(self.params), ()
    factory.check_rules(optim, params)
    if optim["name"] == "lamb":  # trust ratios are per tensor of the original PyTorch model
      rules = tables.rule_table(self.system_name).RULES
      tensors = conversion.tensors_of(rules, params)
    stats = nnx.to_pure_dict(self.stats)
    return factory.make_optimizer(optim, schedule, params, tensors, steps_per_epoch, stats)

  def first_steps(self, optim: Mapping[str, Any], steps_per_epoch: int = 0) -> Any:
    """See `factory.first_steps`."""
    return factory.first_steps(optim, nnx.to_pure_dict(self.params), steps_per_epoch)

  def state_shardings(self, tx: optax.GradientTransformation) -> train_state.TrainState:
    """Shardings of a whole TrainState; moments are sharded like their parameters."""
    params = nnx.to_pure_dict(self.params)
    opt = sharding.opt_shardings(tx, params, self.params_shardings, self.mesh)
    return train_state.TrainState(self.replicated, self.params_shardings, self.stats_shardings, opt)

  def train_step(
    self,
    tx: optax.GradientTransformation,
    rng: jax.Array,
    shardings: train_state.TrainState,
    schedule: schedules.Schedule,
    first_steps: Any = None,
  ) -> step_lib.TrainStep:
    """The jitted (state, batch) -> (state, metrics), reproducible if config.reproducible is set.

    first_steps: of the parameters, for a model with BatchNorm; see `first_steps`.
    """
    args = self.graphdef, tx, rng, shardings, schedule
    if not self.micro_shards:
      return step_lib.make_train_step(*args, first_steps)
    return deterministic.make_train_step(*args, self.batch_sharding, self.micro_shards)


def build(config: Any, devices: Sequence[jax.Device] | None = None) -> Built:
  """Builds the model of a config abstractly on a mesh of `devices` (default: all).

  Raises ConfigError for an unknown precision, ValueError for a mesh, batch size, accumulate,
  loss_chunk or micro_shards that do not fit each other.

  ```
  built = setup.build(config)
  params = jax.jit(
    lambda: nnx.to_pure_dict(nnx.state(built.init_model(), nnx.Param)),
    out_shardings=built.params_shardings,
  )()
  ```
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  batch_sharding = sharding.batch_sharding(mesh)
  module = registry.system_module(config.model.system)
  model_config = config.model.to_dict()
  init_model = functools.partial(
    _init_model,
    module,
    model_config,
    dtype=compute_dtype(config.dtype, mesh.devices.flat[0].platform),
    seed=config.seed,
    batch_sharding=batch_sharding,
    accumulate=config.accumulate,
    loss_chunk=config.loss_chunk,
    precision=_precision(config.precision),
  )
  system = _abstract(init_model, config.model.system)
  graphdef, params, stats = step_lib.split(system)
  shardings_of = functools.partial(
    sharding.param_shardings,
    mesh=mesh,
    rules=config.rules.to_dict(),
    min_size=config.min_shard,
  )
  params_shardings, stats_shardings = shardings_of(params), shardings_of(stats)
  _check_accumulate(config.accumulate, config.batch_size, mesh, stats)
  if system.ring:
    system.ring.tile_size(config.batch_size)  # raises ConfigError if loss_chunk does not divide it
  if config.reproducible:
    deterministic.check(
      mesh,
      stats,
      batch_size=config.batch_size,
      micro_shards=config.micro_shards,
      accumulate=config.accumulate,
    )
  return Built(
    mesh=mesh,
    model_config=model_config,
    facts=facts.of(config),
    init_change=tuple(filter(None, config.init_change.replace(" ", "").split(","))),
    init_model=init_model,
    system=system,
    graphdef=graphdef,
    params=params,
    stats=stats,
    params_shardings=params_shardings,
    stats_shardings=stats_shardings,
    replicated=NamedSharding(mesh, P()),
    batch_sharding=batch_sharding,
    micro_shards=config.micro_shards if config.reproducible else 0,
  )


def _abstract(init_model: Callable[[], System], name: str) -> System:
  """The abstract model. What its constructor refuses is a fault of config.model: ConfigError."""
  try:
    return nnx.eval_shape(init_model)
  except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:
    text = str(e).split("\n-----")[0]  # JAX appends a note about its traceback
    if isinstance(e, UserError) and text.startswith(("model.", "config.")):
      raise ConfigError(f"config.{text.removeprefix('config.')}") from e
    kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
    raise ConfigError(f"config.model is no {name}: {kind}{text}") from e


def _init_model(
  module: types.ModuleType,
  model_config: Mapping[str, Any],
  *,
  dtype: jnp.dtype,
  seed: int,
  batch_sharding: NamedSharding,
  accumulate: int,
  loss_chunk: int,
  precision: str | None,
) -> System:
  model = module.build(model_config, dtype=dtype, rngs=nnx.Rngs(seed))
  step_lib.set_batch_sharding(model, batch_sharding)
  model.accumulate, model.loss_chunk, model.precision = accumulate, loss_chunk, precision
  return model


def _precision(name: str) -> str | None:
  """config.precision as System.precision. Raises ConfigError for a name that JAX does not know."""
  if name == "default":
    return None
  try:
    jax.default_matmul_precision(name)
  except ValueError as e:
    raise ConfigError(
      f"config.precision is {name!r}: expected default, high, highest, or another name that "
      "jax.default_matmul_precision takes"
    ) from e
  return name


def _check_accumulate(n: int, batch_size: int, mesh: jax.sharding.Mesh, stats: nnx.State) -> None:
  shards = sharding.batch_shards(mesh)
  if n < 1 or (n > 1 and batch_size % (n * shards)):
    raise ConfigError(
      f"config.accumulate is {n}: config.batch_size={batch_size} does not divide into {n} equal "
      f"parts on each of {shards} devices"
    )
  if n > 1 and jax.tree.leaves(stats):
    raise ConfigError(
      f"config.accumulate is {n}, but this model has BatchNorm, whose statistics need the whole "
      "batch: set it to 1"
    )
