"""The training loop. A workdir is its own state: the same command again goes on where it was."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from clu import periodic_actions

from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.evaluation import retrieval
from xmodal_jax.optim import factory, schedules, transforms
from xmodal_jax.runtime import flops, initial_state, logs, preemption, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.runtime import workdir as workdir_lib


def train(config: Any, workdir: str) -> dict[str, Any] | None:
  """Trains, evaluates and writes results.json. Returns the results, None when asked to stop.

  Raises NonFiniteLossError, and what the workdir, the data and the checkpoints have to complain of.
  """
  stop = preemption.Preemption()
  workdir = workdir_lib.claim(workdir, config)
  built = setup.Built(config)
  inputs = inputs_lib.Inputs(config, built.batch_sharding)
  retrieval.check_splits(config, inputs)
  inputs.check_processes("train", *retrieval.splits(config))
  per_epoch = inputs.steps_per_epoch()
  run = schedules.RunLength(inputs.samples(), config.batch_size, config.total, per_epoch)
  if run.total_steps < 1:
    raise ValueError(
      f"nothing to train: {run.samples} samples in batches of config.batch_size={run.batch_size} "
      f"for config.total={run.total!r} are {run.total_steps} steps"
    )
  schedule = schedules.make_schedule(config.optim, run)
  tx = built.optimizer(schedule, run.steps_per_epoch)
  shardings = built.state_shardings(tx)
  logging.info("\n%s", factory.table(config.optim, built.params, built.params_shardings))
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      contextlib.closing(
        checkpointer.Checkpoints(workdir, keep=config.checkpoint.keep, metric=config.eval.metric)
      )
    )
    # Report a failure before the checkpoint writer waits for the other processes.
    stack.enter_context(processes.report_failure())
    meta = dict(
      system=config.model.system,
      seed=config.seed,
      fingerprint=inputs.fingerprint(),
      metric=config.eval.metric,
    )
    state, start, pending = initial_state.first_state(
      config, built, tx, shardings, checkpoints, meta
    )
    if start >= run.total_steps and checkpoints.latest() is None:
      raise ValueError(
        f"config.init_optimizer is of step {start}, and config.total={run.total!r} are "
        f"{run.total_steps} steps: nothing is left to train"
      )
    writer = stack.enter_context(contextlib.closing(logs.Writer(workdir)))
    writer.jsonl.resume(start, drop="val" if pending else None)
    evaluator = retrieval.Evaluator(config, inputs, built, stop)
    rng = jax.jit(jax.random.key, static_argnums=0, out_shardings=built.replicated)(config.seed)
    train_step = built.train_step(tx, rng, shardings, schedule)
    boundary = _Boundary(config, evaluator, checkpoints, writer, meta, stop)
    if pending and not boundary(start, state, evaluate=True, save=True):
      return None
    state = _loop(
      config, run, inputs, built.batch_sharding, state, start, train_step, boundary, writer, workdir
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
  due = lambda every, step: (
    (n := schedules.duration_to_steps(every, run.steps_per_epoch)) > 0 and step % n == 0
  )
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
      host = step_lib.check_finite(
        jax.device_get(metrics), last_good, step
      )  # the only wait in the loop
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
    state = transforms.averaged(state)
    if evaluate:
      try:
        report = self.evaluator(state, self.config.eval.select)
        self.writer.scalars(step, "val", report)
        retrieval.log_table(f"step {step}", report)
      except retrieval.Interrupted:
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


def _test(config, evaluator, checkpoints, state, writer, workdir) -> dict[str, Any] | None:
  """The test split once, with the best checkpoint."""
  if not config.eval.test:
    return None
  state = transforms.averaged(state)
  best, last = checkpoints.best(), checkpoints.latest()
  if best != last:
    model = {"params": state.params, "stats": state.stats}
    want = checkpointer.abstract_state(model, jax.tree.map(lambda x: x.sharding, model))
    best, _, model = checkpoints.restore_best(want)
    state = state.replace(params=model["params"], stats=model.get("stats") or {})
  source = dict(kind="checkpoint", source=str(workdir), step=best)
  cache = evaluator.cache_path(workdir, evaluator.inputs.split("test"), source)
  try:
    report = evaluator(state, "test", cache)
  except retrieval.Interrupted:
    return None
  writer.scalars(last, "test", report)
  retrieval.log_table(f"test, step {best}", report)
  return workdir_lib.write_results(workdir, config, evaluator.inputs, report, source)
