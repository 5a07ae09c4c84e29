"""The training loop. Rerunning the same command resumes the run from its workdir."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import periodic_actions
from etils import epath

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import checks, retrieval, tables
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.optim import factory, schedules, train_state, transforms
from xmodal_jax.runtime import claims, flops, initial_state, logs, metric_writers, preemption, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.runtime import workdir as workdir_lib


def train(config: Any, workdir: str, change: Sequence[str] = ()) -> dict[str, Any] | None:
  """`--mode train`: trains, evaluates and saves as configured, then evaluates the test split.

  change: config keys that may differ from those of the run so far, see `workdir.check`.

  Returns the content of results.json; None if config.eval.test is False, or if the run was asked to
  stop, in which case its state is saved. Raises NonFiniteLossError, WorkdirError, DatasetError,
  CheckpointError, and ValueError for a config whose values do not fit each other.
  """
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(preemption.handled())
    claim = stack.enter_context(claims.hold(workdir_lib.absolute(workdir)))
    return _train(config, claim, stop, change)


def _train(
  config: Any, claim: claims.Claim, stop: Callable[[], bool], change: Sequence[str]
) -> dict[str, Any] | None:
  workdir, flat_config = claim.workdir, config_lib.flatten(config)
  changed = workdir_lib.check(workdir, flat_config, change)
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  checks.check_metric(config.eval, built.system)
  checks.check_splits(config.eval, inputs)
  inputs.check_processes("train", *checks.evaluated_splits(config.eval))
  run = _run_length(inputs, config.batch_size, config.total)
  total = run.total_steps
  eval_every = schedules.duration_to_steps(config.eval.every, run.steps_per_epoch)
  save_every = schedules.duration_to_steps(config.checkpoint.every, run.steps_per_epoch)
  schedule = schedules.make_schedule(config.optim, run)
  schedules.warn_of_unreached(config.optim, run)
  tx = built.optimizer(config.optim, schedule, run.steps_per_epoch)
  shardings = built.state_shardings(tx)
  logging.info("\n%s", factory.table(config.optim, built.params, built.params_shardings))
  fingerprint, metric = inputs.fingerprint(), config.eval.metric
  meta = dict(system=config.model.system, seed=config.seed, fingerprint=fingerprint, metric=metric)

  with contextlib.ExitStack() as stack:
    checkpoints = checkpointer.Checkpoints(workdir, keep=config.checkpoint.keep, metric=metric)
    stack.enter_context(contextlib.closing(checkpoints))
    # Entered second: a failure is reported to the other processes before closing waits for them.
    stack.enter_context(processes.report_failure())

    # Restore.
    state, start, pending = initial_state.first_state(
      built, tx, shardings, checkpoints, fingerprint, initial_state.Sources.from_config(config)
    )
    if start >= total and checkpoints.latest() is None:
      raise ConfigError(
        f"config.init_optimizer is of step {start}, and config.total={run.total!r} are {total} "
        "steps: nothing is left to train"
      )
    workdir_lib.record(workdir, flat_config, start, changed)
    writer = stack.enter_context(contextlib.closing(metric_writers.Writer(workdir)))
    writer.resume(start, drop="val" if pending else None)
    evaluator = retrieval.from_config(config, inputs, built, stop)
    stream = jax.jit(step_lib.stream, static_argnums=(0, 1), out_shardings=built.replicated)
    rng = stream(config.seed, "train")
    frozen = built.first_steps(config.optim, run.steps_per_epoch)
    train_step = built.train_step(tx, rng, shardings, schedule, frozen)
    profile = _profiler(workdir, config.profile.first_step, config.profile.steps)
    throughput = _Throughput(config)
    clock, last_finite, stopped, repeated = logs.Clock(), start, False, []

    with contextlib.closing(_host_batches(inputs, start)) as host_batches:
      # A run whose last evaluation was interrupted begins with it, before the first train step.
      for step in range(start if pending else start + 1, total + 1):
        log = _is_due(step, config.log_every, total)
        evaluate = _is_due(step, eval_every, total)
        save = _is_due(step, save_every, total)

        # Step.
        if step > start:
          host_batch = next(host_batches)
          with jax.profiler.StepTraceAnnotation("train", step_num=step):
            batch = sharding.put_batch(host_batch, built.batch_sharding)
            state, metrics = train_step(state, batch)
          clock.tick(metrics)
          profile(step)
          if not (log or evaluate or save or stop()):
            continue
          # The only wait for the devices: other steps are dispatched ahead of them.
          metrics = step_lib.check_finite(jax.device_get(metrics), last_finite, step)
          last_finite = step

          # Write.
          if log:
            seconds = clock.lap()
            with clock.paused():  # the first call traces the step
              speed = throughput(seconds, train_step, state, batch)
            writer.scalars(step, "train", {k: float(v) for k, v in metrics.items()} | speed)
            used = {k: speed.get(k) for k in ("mfu", "hfu")}
            loss = float(metrics["loss"])
            line = logs.progress_line(step, total, loss, run.batch_size, seconds, **used)
            logging.info("%s", line)
            if "same_image_rows" in metrics:
              repeated.append(float(metrics["same_image_rows"]))
              if len(repeated) == 1:
                _log_same_image(repeated, run.batch_size)

        with clock.paused():
          # Evaluate.
          averaged, report, interrupted = transforms.averaged(state), None, False
          if evaluate:
            try:
              report = evaluator(averaged, config.eval.select)
              writer.scalars(step, "val", report)
              tables.log_retrieval(f"step {step}", report, metric)
            except retrieval.Interrupted:
              interrupted = True

          claim.check()
          # Save. `pending`: a restarted run has to make up for the evaluation.
          stopped = interrupted or stop()
          if evaluate or save or stopped:
            checkpoints.save(step, averaged, meta | {"pending": interrupted}, report)
        if stopped:
          break

    _log_same_image(repeated, run.batch_size)
    checkpoints.wait()
    if stopped:
      logging.info(
        "asked to stop: saved at step %d of %d in %s; the same command goes on from there",
        checkpoints.latest(),
        total,
        workdir,
      )
      return None

    # Test.
    if not config.eval.test:
      return None
    best, state = _best_state(checkpoints, transforms.averaged(state))
    source = dict(kind="checkpoint", source=str(workdir), step=best)
    files = state_lib.files_digest(checkpoints, best)
    try:
      tested = retrieval.test(evaluator, state, workdir, source, config.data, run=True, files=files)
    except retrieval.Interrupted:
      return None
    writer.scalars(checkpoints.latest(), "test", tested["test"])
    return tested


def _run_length(inputs: inputs_lib.Inputs, batch_size: int, total: str) -> schedules.RunLength:
  run = schedules.RunLength(inputs.samples(), batch_size, total, inputs.steps_per_epoch())
  if run.total_steps < 1:
    raise ConfigError(
      f"nothing to train: {run.samples} samples in batches of config.batch_size={batch_size} for "
      f"config.total={total!r} are {run.total_steps} steps"
    )
  return run


def _host_batches(inputs: inputs_lib.Inputs, start: int) -> Iterator[Mapping[str, np.ndarray]]:
  """This process's rows of the batches after step `start`; reads nothing before the first."""
  with contextlib.closing(inputs.train(start)) as batches:
    yield from batches


def _log_same_image(rows: list[float], batch_size: int) -> None:
  """rows: of each logged batch, those that show the image of another row."""
  if any(rows):
    logging.info(
      "on average over %d logged batches, %.1f of %d rows show the image of another row; "
      "config.model.same_image says how the loss treats such pairs",
      len(rows),
      np.mean(rows),
      batch_size,
    )


def _is_due(step: int, every: int, total: int) -> bool:
  """Every `every` steps (0: never) and at the last one."""
  return step == total or (every > 0 and step % every == 0)


def _profiler(workdir: epath.Path, first_step: int, steps: int) -> Callable[[int], Any]:
  """step -> None: writes a profile of `steps` steps from first_step on; none if that is 0."""
  if not first_step:
    return lambda step: None
  return periodic_actions.Profile(
    logdir=workdir,
    first_profile=first_step,
    num_profile_steps=steps,
    profile_duration_ms=None,  # stop by steps alone; otherwise it also runs for three seconds
    every_secs=None,
  )


class _Throughput:
  """Examples per second, and MFU and HFU on devices whose peak is known; see runtime.flops."""

  def __init__(self, config: Any):
    self.config, self.flops = config, None
    self.peak = flops.device_peak(jax.devices()[0].device_kind)

  def __call__(
    self, seconds: float | None, train_step: Any, state: Any, batch: Any
  ) -> dict[str, float]:
    """seconds: per step. FLOPs are counted at the first call. hfu is left out if it is the mfu."""
    if not seconds:
      return {}
    speed = {"examples_per_second": self.config.batch_size / seconds}
    if not self.peak:
      return speed
    if self.flops is None:
      self.flops = {"mfu": flops.of_model(self.config, batch)}
      # The loops of the reproducible step have lengths that are unknown at trace time.
      if not self.config.reproducible:
        computed = flops.count(train_step.trace(state, batch).jaxpr)
        if computed != self.flops["mfu"]:
          self.flops["hfu"] = computed
    available = seconds * jax.device_count() * self.peak
    return speed | {name: n / available for name, n in self.flops.items()}


def _best_state(
  checkpoints: checkpointer.Checkpoints, state: train_state.TrainState
) -> tuple[int, train_state.TrainState]:
  """(step, state) with the parameters of the best checkpoint; `state` is of the latest."""
  best = checkpoints.best()
  if best == checkpoints.latest():
    return best, state
  model = {"params": state.params, "stats": state.stats}
  want = checkpointer.abstract_state(model, jax.tree.map(lambda x: x.sharding, model))
  best, _, model = checkpoints.restore_best(want)
  return best, state.replace(params=model["params"], stats=model.get("stats") or {})
