"""`--mode linear_probe`: a linear classifier of what a frozen image tower makes of pictures.

The tower's features, `System.probe_features`, are neither projected nor normalised. They are
computed once and kept in the workdir, or, with config.probe.augment, for every step anew from
changed pictures. The classifier is trained by LARS, or by L-BFGS to convergence.

A workdir gets `classifier.npz`: kernel float32 [D, C], bias float32 [C], and class_names str [C],
the class of each column; logits are features @ kernel + bias. The same command goes on where a run
was stopped.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import order
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import batching, cache, labels, lbfgs, tables
from xmodal_jax.evaluation.features import Features, Scorer, Tower
from xmodal_jax.losses import classification
from xmodal_jax.optim import schedules, train_state, transforms
from xmodal_jax.runtime import logs, metric_writers, preemption, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.runtime import workdir as workdir_lib

Array = jax.Array
Params = dict[str, Array]

CLASSIFIER = "classifier.npz"
_KIND = "linear probe"  # what the workdir's checkpoints call themselves


def init_classifier(key: Array, width: int, classes: int) -> Params:
  """kernel [width, classes] and bias [classes], uniform in +- 1 / sqrt(width): torch's default."""
  k_kernel, k_bias = jax.random.split(key)
  draw = functools.partial(jax.random.uniform, minval=-(width**-0.5), maxval=width**-0.5)
  return {"kernel": draw(k_kernel, (width, classes)), "bias": draw(k_bias, (classes,))}


def loss(params: Params, features: Array, label: Array) -> tuple[Array, Array]:
  """Mean cross entropy [] of features [B, D] with label int [B], and the logits [B, C]."""
  logits = lbfgs.logits(params, features)
  return classification.cross_entropy(logits, label), logits


def update(
  tx: optax.GradientTransformation,
  schedule: schedules.Schedule,
  state: train_state.TrainState,
  features: Array,
  label: Array,
) -> tuple[train_state.TrainState, dict[str, Array]]:
  """One step of the classifier on features [B, D], label int [B]; metrics of its batch, before."""
  grad = jax.value_and_grad(loss, has_aux=True)
  (value, logits), grads = grad(state.params, features, label)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  ranks = labels.class_ranks(logits, label)
  percent = lambda k: 100 * (ranks < k).mean()
  out = {
    "loss": value,
    "grad_norm": optax.tree_utils.tree_norm(grads),
    "lr": schedule(state.step),
    "top1": percent(1),
    "top5": percent(5),
  }
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), out


def make_schedule(config: Any, run: schedules.RunLength) -> schedules.Schedule:
  """The probe's learning rate: a warm-up and half a cosine to 0. config: the section `probe`."""
  own = {k: config[k] for k in ("lr", "warmup", "warmup_from")}
  default = config_lib.base().optim.to_dict()
  return schedules.make_schedule(default | own | dict(schedule="cosine", end=0.0), run)


def make_optimizer(config: Any, schedule: schedules.Schedule) -> optax.GradientTransformation:
  """config: the section `probe`."""
  keys = ("momentum", "dampening", "nesterov", "weight_decay", "eta")
  return transforms.lars(schedule, **{k: config[k] for k in keys})


class Cached:
  """Steps on features on the devices, one program for many. The order is that of `Streamed`."""

  def __init__(
    self, built: setup.Built, found: Features, run: schedules.RunLength, seed: int, update
  ):
    self.run, self.seed, self.samples = run, seed, len(found)
    self.period = run.steps_per_epoch  # a program's steps, at most
    rows = sharding.batch_sharding(built.mesh)
    self.whole = built.replicated
    shards = sharding.batch_shards(built.mesh)
    padded = batching.split_blocks(dict(features=found.features, label=found.label), shards)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    self.data = {k: sharding.place(flat(v), rows) for k, v in padded.items()}

    def steps(state, data, index):
      def one(state, i):
        batch = {k: jax.lax.with_sharding_constraint(v[i], rows) for k, v in data.items()}
        return update(state, batch["features"], batch["label"])

      state, metrics = jax.lax.scan(one, state, index)
      return state, {k: v[-1] for k, v in metrics.items()}

    self._steps = jax.jit(steps, donate_argnums=0, out_shardings=built.replicated)

  def index(self, start: int, stop: int) -> np.ndarray:
    """Rows of the features that steps start + 1 .. stop take, int32 [steps, B]."""
    size, per_epoch, parts = self.run.batch_size, self.run.steps_per_epoch, []
    while start < stop:
      epoch, done = divmod(start, per_epoch)
      count = min(per_epoch - done, stop - start)
      positions = np.arange(done * size, (done + count) * size)
      parts.append(order.permute(positions, self.samples, self.seed, epoch).reshape(count, size))
      start += count
    return np.concatenate(parts).astype(np.int32)

  def __call__(self, state: train_state.TrainState, start: int, stop: int):
    """-> (state after step `stop`, stop, metrics of the last step)."""
    state, out = self._steps(state, self.data, sharding.place(self.index(start, stop), self.whole))
    return state, stop, out

  def close(self) -> None:
    pass


class Streamed:
  """Steps on pictures as they come, changed and passed through the tower each time."""

  def __init__(self, tower: Tower, inputs: inputs_lib.Inputs, run, period: int, update, asked):
    self.tower, self.inputs, self.run, self.asked = tower, inputs, run, asked
    self.period, self.stream = period, None

    def step(state, params, stats, batch):
      return update(state, tower.features(params, stats, batch), batch["label"])

    self._step = jax.jit(step, donate_argnums=0, out_shardings=tower.built.replicated)

  def __call__(self, state: train_state.TrainState, start: int, stop: int):
    """-> (state, its step, metrics of the last step): `stop`, or earlier when asked to stop."""
    if self.stream is None:
      self.stream = self.inputs.labelled(self.run.batch_size, start)
    model, split = self.tower.state, self.inputs.split("train")
    while start < stop:
      batch = next(self.stream)
      labels.check_labels(split, batch["image_id"], batch["label"])
      batch = sharding.put_batch(batch, self.tower.batch_sharding)
      state, out = self._step(state, model.params, model.stats, batch)
      start += 1
      if self.asked():
        break
    return state, start, out

  def close(self) -> None:
    if self.stream is not None:
      self.stream.close()


def linear_probe(config: Any, workdir: str) -> dict[str, Any] | None:
  """Trains and tests the classifier, writes classifier.npz and results.json.

  Returns the results, None when asked to stop. Raises ValueError, DatasetError, CheckpointError,
  NonFiniteLossError for what is wrong with the config, the data, the model or the learning rate.
  """
  p, asked = config.probe, preemption.Preemption()
  if p.optim not in ("lars", "lbfgs"):
    raise ValueError(f"config.probe.optim is {p.optim!r}; there are lars, lbfgs")
  if p.optim == "lbfgs" and p.augment:
    raise ValueError("config.probe.augment needs optim='lars': lbfgs takes all features at once")
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  shards = sharding.batch_shards(built.mesh)
  for key, size in (("probe", p.batch_size), ("eval", config.eval.batch_size)):
    if size % shards:
      raise ValueError(f"config.{key}.batch_size is {size}, not a multiple of {shards} devices")
  names = labels.labelled_split(inputs, "test").class_names
  for key in () if p.classifier else ("train", config.eval.select):
    if labels.labelled_split(inputs, key).class_names != names:
      raise ValueError(
        f"the classes of splits {config.data.test!r} and {config.data[key]!r} differ: a "
        "classifier is trained and tested on the same"
      )
  inputs.check_processes("test", *(() if p.classifier else ("train", config.eval.select)))
  workdir = workdir_lib.claim(workdir, workdir_lib.flatten(config))
  with contextlib.closing(
    checkpointer.Checkpoints(workdir, keep=config.checkpoint.keep, metric="top1")
  ) as checkpoints:
    _refuse_training_run(checkpoints, workdir)
    tower = Tower(config, built)
    found: dict[str, Features] = {}

    def features(key: str) -> Features:
      mark = inputs.split(key).fingerprint
      if mark not in found:
        found[mark] = tower.extract(inputs, key, workdir, asked)
      return found[mark]

    try:
      test = features("test")
      with contextlib.closing(metric_writers.Writer(workdir)) as writer:
        if p.classifier or p.optim == "lbfgs":
          writer.jsonl.resume(0)  # these begin again
        if p.classifier:
          end = 0, _given(p.classifier, tower, test), dict(classifier=p.classifier)
        elif p.optim == "lbfgs":
          end = _regress(config, built, features, writer, asked)
        else:
          end = _train(config, tower, inputs, features, checkpoints, writer, asked)
        if end is None:
          return None
        step, params, facts = end
        report = Scorer(built.mesh, test, config.eval.batch_size)(params)
        writer.scalars(step, "test", report)
    except batching.Interrupted:
      logging.info("asked to stop: the same command goes on")
      return None
  if not p.classifier and jax.process_index() == 0:
    host = jax.device_get(params)
    cache.save_arrays(workdir / CLASSIFIER, host | {"class_names": np.array(names)})
  tables.log_accuracy(f"{_KIND}, test", report)
  protocol = dict(
    task=_KIND,
    split=config.data.test,
    images=len(test),
    classes=len(names),
    features=test.features.shape[1],
    ties="lower index first",
  )
  return workdir_lib.write_results(
    workdir,
    report,
    protocol=protocol | facts,
    dataset=workdir_lib.dataset_name(config.data),
    fingerprint=inputs.split("test").fingerprint,
    source=tower.source,
  )


def _refuse_training_run(checkpoints: checkpointer.Checkpoints, workdir: epath.Path) -> None:
  step = checkpoints.best()
  if step is not None and (kind := checkpoints.meta(step)["system"]) != _KIND:
    raise checkpointer.CheckpointError(
      f"{workdir} is of a training run of {kind}: give the probe a --workdir of its own, and set "
      "config.init to this one"
    )


def _given(source: str, tower: Tower, test: Features) -> Params:
  """config.probe.classifier. Raises CheckpointError where it does not fit features and classes."""
  names = test.split.class_names
  if source == "model":
    params = tower.state.params.get("classifier")
    if params is None:
      raise checkpointer.CheckpointError(
        "config.probe.classifier is 'model', but config.model has no classifier"
      )
    params = jax.device_get(params)
  else:
    file = epath.Path(source).expanduser()
    if not file.is_file():
      raise checkpointer.CheckpointError(f"config.probe.classifier: there is no file {file}")
    params = cache.load_arrays(file)
    of = tuple(params.pop("class_names", ()))
    if params.keys() != {"kernel", "bias"} or of != names:
      raise checkpointer.CheckpointError(
        f"config.probe.classifier: {file} is of {len(of)} classes, first {', '.join(of[:3])}; "
        f"expected {CLASSIFIER} of a probe of the data set's {len(names)}, first "
        f"{', '.join(names[:3])}"
      )
  want = (test.features.shape[1], len(names))
  if params["kernel"].shape != want:
    raise checkpointer.CheckpointError(
      f"config.probe.classifier: a kernel of {params['kernel'].shape}, but features and classes of "
      f"this model and data set make {want}"
    )
  return jax.tree.map(
    lambda x: sharding.place(np.asarray(x, np.float32), tower.built.replicated), params
  )


def _regress(config: Any, built: setup.Built, features, writer: metric_writers.Writer, asked):
  """(steps, classifier, facts) of logistic regression. Raises Interrupted."""
  p, train, select = config.probe, features("train"), features(config.eval.select)
  x, y, held = train.features, train.label, np.zeros(len(train), bool)
  if p.l2 is None and select is features("test"):
    held = lbfgs.held_out(
      len(train), p.holdout, lambda i: order.permute(i, len(train), config.seed, 0)
    )
  elif p.l2 is None:
    x, y = np.concatenate([x, select.features]), np.concatenate([y, select.label])
    held = np.arange(len(y)) >= len(train)
  shards = sharding.batch_shards(built.mesh)
  block = min(p.batch_size, -(-len(y) // shards) * shards)
  to = NamedSharding(built.mesh, P(None, *sharding.batch_sharding(built.mesh).spec))
  put = lambda x: sharding.place(batching.split_blocks(x, block), to)
  data = put(x), put(y)
  fit = lbfgs.make_fit(len(train.split.class_names), p.max_steps, built.replicated)
  seen, everything = (put(np.asarray(w, np.float32)) for w in (~held, np.ones(len(y))))

  def run(l2: float, weight: Array) -> tuple[Params, dict[str, float]]:
    if asked():
      raise batching.Interrupted
    params, facts = fit(*data, weight, sharding.place(np.float32(l2), built.replicated))
    facts = {"l2": l2} | {k: v.item() for k, v in jax.device_get(facts).items()}
    if not facts["gradient"] <= lbfgs.TOLERANCE:
      text = "l2 %g: stopped after %d steps with a gradient of %.1e; see config.probe.max_steps"
      logging.warning(text, l2, facts["steps"], facts["gradient"])
    return params, facts

  tries, l2 = itertools.count(1), p.l2
  if l2 is None:
    chosen_on = dataclasses.replace(train, features=x[held], label=y[held])
    scorer = Scorer(built.mesh, chosen_on, block)

    def score(l2: float) -> float:
      params, facts = run(l2, seen)
      report = scorer(params)
      writer.scalars(next(tries), "val", report | facts)
      logging.info("l2 %g: top-1 %.2f after %d steps", l2, report["top1"], facts["steps"])
      return report["top1"]

    l2 = lbfgs.search(score)
  params, facts = run(l2, everything)
  return next(tries), params, facts | dict(optim="lbfgs", train_images=len(y))


def _train(config, tower: Tower, inputs: inputs_lib.Inputs, features, checkpoints, writer, asked):
  """(steps, classifier, facts) of training by LARS; None when asked to stop, with a checkpoint."""
  p, built, split = config.probe, tower.built, inputs.split("train")
  samples = len(split) if p.augment else len(features("train"))
  run = schedules.RunLength(samples, p.batch_size, p.total)
  if run.total_steps < 1:
    raise ValueError(
      f"nothing to train: {samples} pictures in batches of config.probe.batch_size={p.batch_size} "
      f"for config.probe.total={p.total!r} are {run.total_steps} steps"
    )
  schedule = make_schedule(p, run)
  tx = make_optimizer(p, schedule)
  step = functools.partial(update, tx, schedule)
  if p.augment:
    advance = Streamed(tower, inputs, run, config.log_every, step, asked)
  else:
    advance = Cached(built, features("train"), run, config.seed, step)
  scorer = Scorer(built.mesh, features(config.eval.select), config.eval.batch_size)
  width = features("test").features.shape[1]

  def new() -> train_state.TrainState:
    params = init_classifier(jax.random.key(config.seed), width, len(split.class_names))
    return train_state.TrainState(jnp.int32(0), params, {}, tx.init(params))

  meta = dict(system=_KIND, seed=config.seed, fingerprint=split.fingerprint, metric="top1")
  meta |= dict(of=config.model.system, source=workdir_lib.json_like(tower.source))
  state, start = _first_state(new, checkpoints, meta, built.replicated)
  writer.jsonl.resume(start)
  with contextlib.closing(advance):
    at = state, start, scorer, checkpoints, writer, meta, asked
    state, stopped = _loop(config, run, advance, *at)
  checkpoints.wait()
  if stopped:
    logging.info("asked to stop: saved at step %d", checkpoints.latest())
    return None
  facts = dict(optim="lars", augment=p.augment, train_images=samples, steps=run.total_steps)
  return run.total_steps, state.params, facts


def _first_state(new, checkpoints, meta, replicated) -> tuple[train_state.TrainState, int]:
  def check(step, saved):
    for key, what in (("fingerprint", "training data"), ("source", "model")):
      if saved[key] != meta[key]:
        raise checkpointer.CheckpointError(
          f"the {what} changed since step {step}: {saved[key]} then, {meta[key]} now. Use the "
          "same, or a new --workdir"
        )

  shapes = jax.eval_shape(new)
  want = checkpointer.abstract_state(shapes, jax.tree.map(lambda _: replicated, shapes))
  if (found := checkpoints.restore_latest(want, check)) is None:
    return jax.jit(new, out_shardings=replicated)(), 0
  step, _, state = found
  logging.info("resuming from step %d", step)
  return state, step


def _loop(config, run, advance, state, start, scorer, checkpoints, writer, meta, asked):
  """Steps start + 1 .. total -> (last state, whether it was asked to stop before)."""
  total, per_epoch, step = run.total_steps, run.steps_per_epoch, start
  every = {
    "log": advance.period,
    "evaluate": schedules.duration_to_steps(config.probe.every, per_epoch),
    "save": schedules.duration_to_steps(config.checkpoint.every, per_epoch),
  }
  while step < total:
    before, clock = step, time.monotonic()
    goal = min([total, *((step // n + 1) * n for n in every.values() if n > 0)])
    state, step, out = advance(state, step, goal)
    out = {k: float(v) for k, v in jax.device_get(out).items()}  # the only wait
    if not (np.isfinite(out["loss"]) and np.isfinite(out["grad_norm"])):
      raise step_lib.NonFiniteLossError(
        f"the classifier's loss or gradient is not finite at one of steps {before + 1}..{step}: "
        "lower config.probe.lr"
      )
    due = {k for k, n in every.items() if step == total or (n > 0 and step % n == 0)}
    if "log" in due:
      seconds = (time.monotonic() - clock) / (step - before)
      writer.scalars(step, "train", out | {"examples_per_second": run.batch_size / seconds})
      line = logs.progress_line(step, total, out["loss"], run.batch_size, seconds, None)
      logging.info("%s  top-1 %.2f", line, out["top1"])
    report = None
    if "evaluate" in due:
      report = scorer(state.params)
      writer.scalars(step, "val", report)
      logging.info("step %d: val top-1 %.2f, top-5 %.2f", step, report["top1"], report["top5"])
    stopped = asked()
    if stopped or "save" in due:
      checkpoints.save(step, state, meta, report)
    if stopped and step < total:
      return state, True
  return state, False
