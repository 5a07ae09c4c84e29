"""The training loop. A workdir is its own state: the same command again goes on where it was."""

import contextlib
import functools
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import periodic_actions
from flax import nnx

from xmodal_jax import build as build_lib
from xmodal_jax import checkpoint, flops, hosts, init, logs, optim, sharding, torch_optim
from xmodal_jax import evaluate as evaluate_lib
from xmodal_jax import inputs as inputs_lib
from xmodal_jax import step as step_lib
from xmodal_jax import workdir as workdir_lib


class NonFiniteLossError(ValueError):
  """The loss or the gradient is NaN or infinite; nothing was saved since the last finite step."""


class Preemption:
  """Turns SIGTERM into a question that the loop asks after every step.

  Of several processes any may get it: the answer becomes yes in all of them, at the same question.
  """

  def __init__(self):
    self.asked = False
    self.vote = hosts.Vote(lambda: self.asked)
    signal.signal(signal.SIGTERM, self._note)

  def _note(self, signum, frame):
    del signum, frame
    self.asked = True

  def __call__(self) -> bool:
    return self.vote()


def check_finite(metrics: Mapping[str, np.ndarray], last: int, step: int) -> Mapping[str, Any]:
  """metrics of `step`; `last` is the last step known to be finite. Raises NonFiniteLossError."""
  bad = [k for k in ("loss", "grad_norm") if not np.isfinite(metrics[k])]
  if bad:
    raise NonFiniteLossError(
      f"{' and '.join(bad)} not finite at step {step}; the first bad step is one of "
      f"{last + 1}..{step}. Checkpoints up to step {last} are untouched. Lower config.optim.lr, "
      "lengthen config.optim.warmup, or set config.optim.grad_clip, and run again"
    )
  return metrics


def train(config: Any, workdir: str) -> dict[str, Any] | None:
  """Trains, evaluates and writes results.json. Returns the results, None when asked to stop.

  Raises NonFiniteLossError, and what the workdir, the data and the checkpoints have to complain of.
  """
  stop = Preemption()
  workdir = workdir_lib.claim(workdir, config)
  built = build_lib.Built(config)
  inputs = inputs_lib.Inputs(config, built.rows)
  evaluate_lib.check_splits(config, inputs)
  inputs.check_processes("train", *evaluate_lib.splits(config))
  per_epoch = inputs.steps_per_epoch()
  run = optim.Run(inputs.samples(), config.batch_size, config.total, per_epoch)
  if run.total_steps < 1:
    raise ValueError(
      f"nothing to train: {run.samples} samples in batches of config.batch_size={run.batch_size} "
      f"for config.total={run.total!r} are {run.total_steps} steps"
    )
  schedule = optim.make_schedule(config.optim, run)
  tx = built.optimizer(schedule, run.steps_per_epoch)
  shardings = built.state_shardings(tx)
  logging.info("\n%s", optim.table(config.optim, built.params, built.params_shardings))
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      contextlib.closing(
        checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, metric=config.eval.metric)
      )
    )
    stack.enter_context(hosts.telling())  # of a failure before the checkpoints wait for all
    meta = dict(
      system=config.model.system,
      seed=config.seed,
      fingerprint=inputs.fingerprint(),
      metric=config.eval.metric,
    )
    state, start, pending = _first_state(config, built, tx, shardings, checkpoints, meta)
    if start >= run.total_steps and checkpoints.latest() is None:
      raise ValueError(
        f"config.init_optimizer is of step {start}, and config.total={run.total!r} are "
        f"{run.total_steps} steps: nothing is left to train"
      )
    writer = stack.enter_context(contextlib.closing(logs.Writer(workdir)))
    writer.jsonl.resume(start, drop="val" if pending else None)
    evaluator = evaluate_lib.Evaluator(config, inputs, built, stop)
    rng = jax.jit(jax.random.key, static_argnums=0, out_shardings=built.replicated)(config.seed)
    train_step = built.train_step(tx, rng, shardings, schedule)
    boundary = _Boundary(config, evaluator, checkpoints, writer, meta, stop)
    if pending and not boundary(start, state, evaluate=True, save=True):
      return None
    state = _loop(
      config, run, inputs, built.rows, state, start, train_step, boundary, writer, workdir
    )
    checkpoints.wait()
    if boundary.stopped:
      logging.info("asked to stop: saved at step %d", checkpoints.latest())
      return None
    return _test(config, evaluator, checkpoints, state, writer, workdir)


def _loop(config, run, inputs, rows, state, start, train_step, boundary, writer, workdir):
  """Steps start + 1 .. total, or until the boundary of one says stop. Returns the last state."""
  total, last_good, per_step = run.total_steps, start, None
  clock = logs.Clock()
  # The loops of a reproducible step have lengths that cannot be counted.
  peak = None if config.reproducible else flops.device_peak(jax.devices()[0].device_kind)
  due = lambda every, step: (n := optim.steps(every, run.steps_per_epoch)) > 0 and step % n == 0
  profile = _profile(config, workdir)
  if start >= total:
    return state
  with contextlib.closing(inputs.train(start)) as stream:
    for step, host_batch in zip(range(start + 1, total + 1), stream, strict=False):
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        batch = sharding.put_batch(host_batch, rows)
        if peak and per_step is None:
          per_step = flops.count(train_step.trace(state, batch).jaxpr)
        state, metrics = train_step(state, batch)
      clock.tick()
      profile(step)
      log = step % config.log_every == 0 or step == total
      evaluate = due(config.eval.every, step) or step == total
      save = due(config.checkpoint.every, step) or step == total
      if not (log or evaluate or save or boundary.stop()):
        continue
      host = check_finite(jax.device_get(metrics), last_good, step)  # the only wait in the loop
      last_good = step
      if log:
        seconds = clock.lap()
        mfu = per_step / seconds / jax.device_count() / peak if peak and seconds else None
        speed = {"examples_per_second": run.batch_size / seconds} if seconds else {}
        speed |= {"mfu": mfu} if mfu else {}
        writer.scalars(step, "train", {k: float(v) for k, v in host.items()} | speed)
        loss = float(host["loss"])
        line = logs.progress_line(step, total, loss, run.batch_size, seconds, mfu)
        logging.info("%s", line)
      if evaluate or save or boundary.stop():
        with clock.paused():
          if not boundary(step, state, evaluate, save):
            break
  return state


class _Boundary:
  """What happens between two steps: evaluation, checkpoint, and the question whether to stop."""

  def __init__(self, config, evaluator, checkpoints, writer, meta, stop):
    self.config, self.evaluator, self.checkpoints = config, evaluator, checkpoints
    self.writer, self.meta, self.stop, self.stopped = writer, meta, stop, False

  def __call__(self, step: int, state: Any, evaluate: bool, save: bool) -> bool:
    """False when the run was asked to stop; the state is saved then."""
    report, interrupted = None, False
    state = optim.averaged(state)
    if evaluate:
      try:
        report = self.evaluator(state, self.config.eval.select)
        self.writer.scalars(step, "val", report)
        evaluate_lib.log_table(f"step {step}", report)
      except evaluate_lib.Interrupted:
        interrupted = True
    self.stopped = interrupted or self.stop()
    if save or evaluate or self.stopped:
      # A restarted run has to know that this state was not evaluated.
      self.checkpoints.save(step, state, self.meta | {"pending": interrupted}, report)
    return not self.stopped


def _profile(config, workdir) -> Callable[[int], Any]:
  if not config.profile.first_step:
    return lambda step: None
  return periodic_actions.Profile(
    logdir=workdir,
    first_profile=config.profile.first_step,
    num_profile_steps=config.profile.steps,
    profile_duration_ms=None,  # else it also waits for three seconds
    every_secs=None,
  )


def _first_state(config, built, tx, shardings, checkpoints, meta):
  """(state, its step, whether its evaluation is still to be done): restored, from init, or new."""
  new = functools.partial(step_lib.init_state, built.model, tx)

  def check(step, saved):
    if saved["fingerprint"] != meta["fingerprint"]:
      raise checkpoint.CheckpointError(
        f"the training data changed since step {step}: fingerprint {saved['fingerprint'][:12]} "
        f"then, {meta['fingerprint'][:12]} now. Use the same data, or a new --workdir"
      )

  want = checkpoint.abstract_state(jax.eval_shape(new), shardings)
  if (found := checkpoints.restore_latest(want, check)) is not None:
    step, saved, state = found
    logging.info("going on from step %d", step)
    return optim.averaged(state), step, saved["pending"]
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
    opt_state, start = torch_optim.for_init(
      config.init, config.init_optimizer, config.model.system, shapes, tx
    )
  if not config.init:
    return with_towers(config, built, jax.jit(new, out_shardings=shardings)()), 0, False
  params, stats, _ = init.load(
    config.init, config.model.system, built.params, built.stats, config.model
  )
  if opt_state is not None:
    opt_state = optim.restart_average(opt_state, params)
  params = init.put(params, built.params_shardings)
  if opt_state is None:
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  else:
    opt_state = init.put(opt_state, shardings.opt_state)
  step = sharding.place(np.int32(start), built.replicated)
  stats = init.put(stats, built.stats_shardings)
  return step_lib.TrainState(step, params, stats, opt_state), start, False


def with_towers(config, built, state):
  """A first state whose towers are those of config.init_image and config.init_text."""
  params = init.flat(state.params)
  shardings = init.flat(built.params_shardings)
  for side, source in (("image", config.init_image), ("text", config.init_text)):
    if source:
      half = config.init_half and side == "image"
      leaves = init.load_tower(source, side, config.model.system, built.params, half)
      params |= {k: sharding.place(v, shardings[k]) for k, v in leaves.items()}
  params = init.nested(params)
  opt_state = optim.restart_average(state.opt_state, params)
  return state.replace(params=params, opt_state=opt_state)


def _test(config, evaluator, checkpoints, state, writer, workdir) -> dict[str, Any] | None:
  """The test split once, with the best checkpoint."""
  if not config.eval.test:
    return None
  state = optim.averaged(state)
  best, last = checkpoints.best(), checkpoints.latest()
  if best != last:
    model = {"params": state.params, "stats": state.stats}
    want = checkpoint.abstract_state(model, jax.tree.map(lambda x: x.sharding, model))
    best, _, model = checkpoints.restore_best(want)
    state = state.replace(params=model["params"], stats=model.get("stats") or {})
  source = dict(kind="checkpoint", source=str(workdir), step=best)
  cache = evaluator.cache_path(workdir, evaluator.inputs.split("test"), source)
  try:
    report = evaluator(state, "test", cache)
  except evaluate_lib.Interrupted:
    return None
  writer.scalars(last, "test", report)
  evaluate_lib.log_table(f"test, step {best}", report)
  return workdir_lib.write_results(workdir, config, evaluator.inputs, report, source)
