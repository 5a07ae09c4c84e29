"""The first train state: restored from the workdir, loaded from config.init, or random."""

import functools

import jax
import numpy as np
from absl import logging
from flax import nnx

from xmodal_jax.checkpoints import checkpointer, restore
from xmodal_jax.distributed import sharding
from xmodal_jax.interop import optimizer_state
from xmodal_jax.optim import train_state, transforms
from xmodal_jax.runtime import step as step_lib


def first_state(config, built, tx, shardings, checkpoints, meta):
  """(state, its step, whether its evaluation is still to be done): restored, from init, or new."""
  new = functools.partial(step_lib.init_state, built.model, tx)

  def check(step, saved):
    if saved["fingerprint"] != meta["fingerprint"]:
      raise checkpointer.CheckpointError(
        f"the training data changed since step {step}: fingerprint {saved['fingerprint'][:12]} "
        f"then, {meta['fingerprint'][:12]} now. Use the same data, or a new --workdir"
      )

  want = checkpointer.abstract_state(jax.eval_shape(new), shardings)
  if (found := checkpoints.restore_latest(want, check)) is not None:
    step, saved, state = found
    logging.info("going on from step %d", step)
    return transforms.averaged(state), step, saved["pending"]
  if config.init and (config.init_image or config.init_text):
    raise ValueError(
      "config.init is a whole model: set it, or config.init_image and config.init_text, not both"
    )
  opt_state, start = None, 0
  check = getattr(built.module, "check_start", None)
  if check is not None and not config.init and (doubt := check(config.model)):
    logging.warning("%s", doubt)
  if config.init_optimizer:
    shapes = nnx.to_pure_dict(built.params)
    opt_state, start = optimizer_state.for_init(
      config.init, config.init_optimizer, config.model.system, shapes, tx
    )
  if not config.init:
    return with_towers(config, built, jax.jit(new, out_shardings=shardings)()), 0, False
  params, stats, _ = restore.load(
    config.init, config.model.system, built.params, built.stats, config.model
  )
  if opt_state is not None:
    opt_state = transforms.restart_average(opt_state, params)
  params = restore.put(params, built.params_shardings)
  if opt_state is None:
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  else:
    opt_state = restore.put(opt_state, shardings.opt_state)
  step = sharding.place(np.int32(start), built.replicated)
  stats = restore.put(stats, built.stats_shardings)
  return train_state.TrainState(step, params, stats, opt_state), start, False


def with_towers(config, built, state):
  """A first state whose towers are those of config.init_image and config.init_text."""
  params = restore.flat(state.params)
  shardings = restore.flat(built.params_shardings)
  for side, source in (("image", config.init_image), ("text", config.init_text)):
    if source:
      half = config.init_half and side == "image"
      leaves = restore.load_tower(source, side, config.model.system, built.params, half)
      params |= {k: sharding.place(v, shardings[k]) for k, v in leaves.items()}
  params = restore.nested(params)
  opt_state = transforms.restart_average(state.opt_state, params)
  return state.replace(params=params, opt_state=opt_state)
