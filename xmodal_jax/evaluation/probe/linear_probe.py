"""`--mode linear_probe`: a linear classifier on the features of a frozen image tower.

The features, `System.probe_features`, are neither projected nor normalised. They are computed once
and kept in the workdir; with config.probe.augment they are computed at every step from augmented
images. The classifier is trained by LARS, or by L-BFGS until it converges.

The workdir gets `classifier.npz`: kernel float32 [D, C], bias float32 [C], and class_names str [C];
logits are features @ kernel + bias. Rerunning the command resumes an interrupted run.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import batching, labels, tables
from xmodal_jax.evaluation.probe import classifier, lars, regression, training
from xmodal_jax.evaluation.probe import features as features_lib
from xmodal_jax.optim import schedules, train_state
from xmodal_jax.runtime import claims, metric_writers, preemption, results, setup
from xmodal_jax.runtime import workdir as workdir_lib

_KIND = "linear probe"  # the system name in the checkpoints of a probe


def linear_probe(config: Any, workdir: str) -> dict[str, Any] | None:
  """Trains and tests the classifier, writes classifier.npz and results.json.

  Returns the content of results.json, None if the run was asked to stop. Raises ConfigError,
  DatasetError, CheckpointError, WorkdirError, NonFiniteError, NonFiniteLossError.
  """
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(preemption.handled())
    claim = stack.enter_context(claims.hold(workdir_lib.absolute(workdir)))
    return _probe(config, claim.workdir, stop)


def _probe(config: Any, workdir: epath.Path, stop: Callable[[], bool]) -> dict[str, Any] | None:
  options = config.probe
  _check_options(options)
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  _check_batches(built, {"probe": options.batch_size, "eval": config.eval.batch_size})
  train_keys = () if options.classifier else ("train", config.eval.select)
  names = _check_classes(inputs, train_keys)
  inputs.check_processes("test", *train_keys)
  flat_config = config_lib.flatten(config)
  workdir_lib.check(workdir, flat_config)
  with contextlib.closing(
    checkpointer.Checkpoints(workdir, keep=config.checkpoint.keep, metric="top1")
  ) as checkpoints:
    _refuse_training_run(checkpoints, workdir)
    tower = features_lib.load_tower(config, built)
    workdir_lib.record(workdir, flat_config, checkpoints.latest() or 0, {})
    features = features_lib.SplitFeatures(tower, inputs, workdir, stop)
    try:
      test = features("test")
      with contextlib.closing(metric_writers.Writer(workdir)) as writer:
        fitted = _fit(config, tower, features, checkpoints, writer, stop)
        report = classifier.Scorer(built.mesh, test, config.eval.batch_size)(fitted.params)
        writer.scalars(fitted.step, "test", report)
    except batching.Interrupted:
      logging.info("asked to stop: rerun the command to resume")
      return None
  if not options.classifier and jax.process_index() == 0:
    classifier.save(workdir, fitted.params, names)
  tables.log_accuracy(f"{_KIND}, test", report)
  protocol = dict(
    task=_KIND,
    split=test.split.name,
    images=len(test),
    classes=len(names),
    features=test.features.shape[1],
    ties="lower index first",
  )
  if test.left_out:
    protocol["left_out"] = test.left_out
  return results.write(
    workdir,
    report,
    protocol=protocol | fitted.facts,
    dataset=results.dataset_name(config.data),
    fingerprint=inputs.split("test").fingerprint,
    source=tower.source,
    run=True,
  )


def _check_options(options: Any) -> None:
  """options: config.probe."""
  if options.optim not in ("lars", "lbfgs"):
    raise ConfigError(f"config.probe.optim is {options.optim!r}; expected lars or lbfgs")
  if options.optim == "lbfgs" and options.augment:
    raise ConfigError("config.probe.augment needs optim='lars': lbfgs takes all features at once")


def _check_batches(built: setup.Built, sizes: dict[str, int]) -> None:
  shards = sharding.batch_shards(built.mesh)
  for section, size in sizes.items():
    if size % shards:
      raise ConfigError(
        f"config.{section}.batch_size is {size}, not a multiple of {shards} devices"
      )


def _check_classes(inputs: inputs_lib.Inputs, train_keys: tuple[str, ...]) -> tuple[str, ...]:
  """Class names of the test split, which those of the other splits must equal."""
  test = labels.labelled_split(inputs, "test")
  for key in train_keys:
    split = labels.labelled_split(inputs, key)
    if split.class_names != test.class_names:
      raise ConfigError(
        f"splits {test.name!r} and {split.name!r} have different classes: a classifier is trained "
        "and tested on the same ones"
      )
  return test.class_names


def _refuse_training_run(checkpoints: checkpointer.Checkpoints, workdir: epath.Path) -> None:
  step = checkpoints.best()
  if step is not None and (kind := checkpoints.meta(step)["system"]) != _KIND:
    raise checkpointer.CheckpointError(
      f"{workdir} holds a training run of {kind}: give the probe a --workdir of its own, and set "
      "config.init to this one"
    )


def _fit(
  config: Any,
  tower: features_lib.Tower,
  features: features_lib.SplitFeatures,
  checkpoints: checkpointer.Checkpoints,
  writer: metric_writers.Writer,
  stop: Callable[[], bool],
) -> classifier.Fitted:
  """The classifier that config.probe asks for. Raises Interrupted."""
  options = config.probe
  if options.classifier:
    writer.resume(0)  # a single line, written again
    params = classifier.load(options.classifier, tower, features("test"))
    return classifier.Fitted(0, params, dict(classifier=options.classifier))
  if options.optim == "lbfgs":
    writer.resume(0)  # a regression starts again from the beginning
    train, select = features("train"), features(config.eval.select)
    validation = None if select is features("test") else select
    return regression.regress(
      options, tower.built, train, validation, seed=config.seed, writer=writer, stop=stop
    )
  return _train_lars(config, tower, features, checkpoints, writer, stop)


def _train_lars(
  config: Any,
  tower: features_lib.Tower,
  features: features_lib.SplitFeatures,
  checkpoints: checkpointer.Checkpoints,
  writer: metric_writers.Writer,
  stop: Callable[[], bool],
) -> classifier.Fitted:
  """Trains by LARS, from the latest checkpoint if there is one.

  Raises Interrupted, after saving a checkpoint, if `stop` returned True.
  """
  options, built, inputs = config.probe, tower.built, features.inputs
  split = inputs.split("train")
  samples = len(split) if options.augment else len(features("train"))
  run = _run_length(samples, options.batch_size, options.total)
  schedule = lars.make_schedule(options, run)
  tx = lars.make_optimizer(options, schedule)
  update = functools.partial(lars.update, tx, schedule)
  if options.augment:
    steps = lars.StreamedSteps(tower, inputs, run, config.log_every, update, stop)
  else:
    steps = lars.CachedSteps(built, features("train"), run, config.seed, update)
  scorer = classifier.Scorer(built.mesh, features(config.eval.select), config.eval.batch_size)
  width = features("test").features.shape[1]

  def new() -> train_state.TrainState:
    key = jax.random.key(config.seed)
    params = lars.init_classifier(key, width, len(split.class_names))
    return train_state.TrainState(jnp.int32(0), params, {}, tx.init(params))

  meta = dict(
    system=_KIND,
    seed=config.seed,
    fingerprint=split.fingerprint,
    metric="top1",
    of=built.system_name,
    source=workdir_lib.json_like(tower.source),
  )
  periods = training.Periods(
    log=steps.log_every,
    evaluate=schedules.duration_to_steps(options.every, run.steps_per_epoch),
    save=schedules.duration_to_steps(config.checkpoint.every, run.steps_per_epoch),
    total=run.total_steps,
  )
  state, start = training.first_state(new, checkpoints, meta, built.replicated)
  writer.resume(start)
  with contextlib.closing(steps):
    state, step = training.train(
      steps,
      state,
      start,
      periods,
      scorer=scorer,
      checkpoints=checkpoints,
      meta=meta,
      writer=writer,
      stop=stop,
    )
  if step < run.total_steps:
    logging.info("asked to stop: saved at step %d", checkpoints.latest())
    raise batching.Interrupted
  facts = dict(optim="lars", augment=options.augment, train_images=samples, steps=run.total_steps)
  return classifier.Fitted(run.total_steps, state.params, facts)


def _run_length(samples: int, batch_size: int, total: str) -> schedules.RunLength:
  run = schedules.RunLength(samples, batch_size, total)
  if run.total_steps < 1:
    raise ConfigError(
      f"nothing to train: {samples} images in batches of config.probe.batch_size={batch_size} for "
      f"config.probe.total={total!r} are {run.total_steps} steps"
    )
  return run
