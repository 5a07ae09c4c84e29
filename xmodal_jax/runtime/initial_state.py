"""The first train state: restored from the workdir, loaded from config.init, or random."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from flax import nnx

from xmodal_jax.checkpoints import checkpointer, restore
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.interop import optimizer_state
from xmodal_jax.models import registry
from xmodal_jax.optim import train_state, transforms
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

TrainState = train_state.TrainState


@dataclasses.dataclass(frozen=True)
class Sources:
  """Files that a new run starts from: the init keys of a config, which documents them."""

  init: str = ""
  init_image: str = ""
  init_text: str = ""
  init_half: bool = False
  init_optimizer: str = ""
  init_missing: str = ""

  @classmethod
  def from_config(cls, config: Any) -> "Sources":
    return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


def first_state(
  built: setup.Built,
  tx: optax.GradientTransformation,
  shardings: TrainState,
  checkpoints: checkpointer.Checkpoints,
  fingerprint: str,
  sources: Sources,
) -> tuple[TrainState, int, bool]:
  """Returns (state, its step, pending): pending if its evaluation was interrupted.

  The workdir's latest checkpoint takes precedence over `sources`. fingerprint: of the training
  data. Raises CheckpointError if the checkpoint was trained on other data, ValueError for sources
  that exclude each other, and what loading them raises.
  """
  new = functools.partial(step_lib.init_state, built.init_model, tx)

  def check_data(step: int, meta: Mapping[str, Any]) -> None:
    if meta["fingerprint"] != fingerprint:
      raise checkpointer.CheckpointError(
        f"the training data changed since step {step}: its fingerprint was "
        f"{meta['fingerprint'][:12]} and is now {fingerprint[:12]}. Use the same data, or a new "
        "--workdir"
      )

  want = checkpointer.abstract_state(jax.eval_shape(new), shardings)
  if (found := checkpoints.restore_latest(want, check_data)) is not None:
    step, meta, state = found
    logging.info("resuming from step %d", step)
    return transforms.averaged(state), step, meta["pending"]
  if sources.init and (sources.init_image or sources.init_text):
    raise ConfigError(
      "config.init is a whole model: set it, or config.init_image and config.init_text, not both"
    )
  if sources.init and sources.init_half:
    raise ConfigError("config.init_half is for config.init_image, not for config.init")
  if sources.init_half and not sources.init_image:
    raise ConfigError("config.init_half rounds config.init_image, which is empty: set it to False")
  if sources.init or sources.init_optimizer:
    return *_load(built, tx, shardings, sources), False
  check_start = getattr(registry.system_module(built.system_name), "check_start", None)
  if check_start is not None and (warning := check_start(built.model_config)):
    logging.warning("%s", warning)
  return with_towers(sources, built, jax.jit(new, out_shardings=shardings)()), 0, False


def _load(
  built: setup.Built, tx: optax.GradientTransformation, shardings: TrainState, sources: Sources
) -> tuple[TrainState, int]:
  """(state, step) with the parameters of sources.init and the moments of init_optimizer."""
  system, opt_state, start = built.system_name, None, 0
  if sources.init_optimizer:
    shapes = nnx.to_pure_dict(built.params)
    opt_state, start = optimizer_state.for_init(
      sources.init, sources.init_optimizer, system, shapes, tx
    )
  params, stats, _ = restore.load(
    sources.init,
    system,
    built.params,
    built.stats,
    built.facts,
    built.init_change,
    sources.init_missing,
  )
  if sources.init_missing:
    params, stats = _complete(built, params, stats)
  if opt_state is not None:
    opt_state = transforms.restart_average(opt_state, params, stats)
  params = restore.put(params, built.params_shardings)
  stats = restore.put(stats, built.stats_shardings)
  if opt_state is None:
    init = lambda params, stats: transforms.restart_average(tx.init(params), params, stats)
    opt_state = jax.jit(init, out_shardings=shardings.opt_state)(params, stats)
  else:
    opt_state = restore.put(opt_state, shardings.opt_state)
  step = sharding.place(np.int32(start), built.replicated)
  return TrainState(step, params, stats, opt_state), start


def _complete(built: setup.Built, params: Any, stats: Any) -> tuple[Any, Any]:
  """Host arrays with the initial values of the paths that are missing."""
  initial = jax.jit(lambda: step_lib.split(built.init_model())[1:])()
  return tuple(
    restore.nested(jax.device_get(restore.flat(nnx.to_pure_dict(new))) | restore.flat(given))
    for new, given in zip(initial, (params, stats), strict=True)
  )


def with_towers(sources: Sources, built: setup.Built, state: TrainState) -> TrainState:
  """The state with the towers of sources.init_image and sources.init_text, where given."""
  params = restore.flat(state.params)
  shardings = restore.flat(built.params_shardings)
  for side, source in (("image", sources.init_image), ("text", sources.init_text)):
    if source:
      half = sources.init_half and side == "image"
      leaves = restore.load_tower(
        source, side, built.system_name, built.params, half, built.facts, built.init_change
      )
      params |= {k: sharding.place(v, shardings[k]) for k, v in leaves.items()}
  params = restore.nested(params)
  opt_state = transforms.restart_average(state.opt_state, params, state.stats)
  return state.replace(params=params, opt_state=opt_state)
