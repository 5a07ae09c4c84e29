"""One step of the classifier by LARS, on kept features or on augmented images."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import order
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import batching, labels
from xmodal_jax.evaluation.probe.classifier import Params, logits
from xmodal_jax.evaluation.probe.features import Features, Tower
from xmodal_jax.losses import classification
from xmodal_jax.optim import schedules, train_state, transforms
from xmodal_jax.runtime import setup

Array = jax.Array
TrainState = train_state.TrainState
# (state, features [B, D], label int [B]) -> (state, metrics)
Update = Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]


def init_classifier(key: Array, width: int, classes: int) -> Params:
  """kernel [width, classes] and bias [classes], uniform in +- 1 / sqrt(width): torch's default."""
  k_kernel, k_bias = jax.random.split(key)
  draw = functools.partial(jax.random.uniform, minval=-(width**-0.5), maxval=width**-0.5)
  return {"kernel": draw(k_kernel, (width, classes)), "bias": draw(k_bias, (classes,))}


def loss(params: Params, features: Array, label: Array) -> tuple[Array, Array]:
  """Mean cross entropy [] of features [B, D] with label int [B], and the logits [B, C]."""
  out = logits(params, features)
  return classification.cross_entropy(out, label), out


def update(
  tx: optax.GradientTransformation,
  schedule: schedules.Schedule,
  state: TrainState,
  features: Array,
  label: Array,
) -> tuple[TrainState, dict[str, Array]]:
  """One step on features [B, D] and label int [B]; metrics of the batch before the update."""
  grad_fn = jax.value_and_grad(loss, has_aux=True)
  (value, scores), grads = grad_fn(state.params, features, label)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  ranks = labels.class_ranks(scores, label)
  metrics = {
    "loss": value,
    "grad_norm": optax.tree_utils.tree_norm(grads),
    "lr": schedule(state.step),
    "top1": 100 * (ranks < 1).mean(),
    "top5": 100 * (ranks < 5).mean(),
  }
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def make_schedule(options: Any, run: schedules.RunLength) -> schedules.Schedule:
  """Warm-up and half a cosine to 0. options: config.probe."""
  own = {k: options[k] for k in ("lr", "warmup", "warmup_from")}
  unused = dict(step_every="1 epochs", step_factor=1.0, milestones=())
  optim = own | unused | dict(schedule="cosine", cycles=0.5, end=0.0)
  schedules.warn_of_unreached(optim, run, "probe")
  return schedules.make_schedule(optim, run)


def make_optimizer(options: Any, schedule: schedules.Schedule) -> optax.GradientTransformation:
  """LARS. options: config.probe."""
  keys = ("momentum", "dampening", "nesterov", "weight_decay", "eta")
  return transforms.lars(schedule, **{k: options[k] for k in keys})


class CachedSteps:
  """Steps on features that stay on the devices, scanned in one program.

  Batches are those of `StreamedSteps`. log_every: steps between logs, here an epoch.
  """

  def __init__(
    self,
    built: setup.Built,
    found: Features,
    run: schedules.RunLength,
    seed: int,
    update: Update,
  ):
    self.run, self.seed, self.samples = run, seed, len(found)
    self.log_every, self.replicated = run.steps_per_epoch, built.replicated
    padded = batching.split_blocks(
      dict(features=found.features, label=found.label), sharding.batch_shards(built.mesh)
    )
    self.data = {
      k: sharding.place(v.reshape(-1, *v.shape[2:]), built.batch_sharding)
      for k, v in padded.items()
    }

    def steps(state, data, index):
      def step(state, rows):
        batch = {k: v[rows] for k, v in data.items()}
        batch = jax.lax.with_sharding_constraint(batch, built.batch_sharding)
        return update(state, batch["features"], batch["label"])

      state, metrics = jax.lax.scan(step, state, index)
      return state, {k: v[-1] for k, v in metrics.items()}

    self._steps = jax.jit(steps, donate_argnums=0, out_shardings=built.replicated)

  def index(self, start: int, stop: int) -> np.ndarray:
    """Rows of the features in the batches of steps start + 1 .. stop, int32 [steps, B]."""
    size, per_epoch, parts = self.run.batch_size, self.run.steps_per_epoch, []
    while start < stop:
      epoch, done = divmod(start, per_epoch)
      count = min(per_epoch - done, stop - start)
      positions = np.arange(done * size, (done + count) * size)
      parts.append(order.permute(positions, self.samples, self.seed, epoch).reshape(count, size))
      start += count
    return np.concatenate(parts).astype(np.int32)

  def __call__(
    self, state: TrainState, start: int, stop: int
  ) -> tuple[TrainState, int, dict[str, Array]]:
    """Steps start + 1 .. stop -> (state, stop, metrics of the last step)."""
    index = sharding.place(self.index(start, stop), self.replicated)
    state, metrics = self._steps(state, self.data, index)
    return state, stop, metrics

  def close(self) -> None:
    """Nothing to close."""


class StreamedSteps:
  """Steps on augmented images, which pass through the tower every time.

  log_every: steps between logs. should_stop: asked after every step.
  """

  def __init__(
    self,
    tower: Tower,
    inputs: inputs_lib.Inputs,
    run: schedules.RunLength,
    log_every: int,
    update: Update,
    should_stop: Callable[[], bool],
  ):
    self.tower, self.inputs, self.run = tower, inputs, run
    self.log_every, self.should_stop, self.stream = log_every, should_stop, None

    def step(state, params, stats, batch):
      return update(state, tower.features(params, stats, batch), batch["label"])

    self._step = jax.jit(step, donate_argnums=0, out_shardings=tower.built.replicated)

  def __call__(
    self, state: TrainState, start: int, stop: int
  ) -> tuple[TrainState, int, dict[str, Array]]:
    """Steps start + 1 .. stop, fewer if asked to stop -> (state, its step, its metrics)."""
    if self.stream is None:
      self.stream = self.inputs.labelled(self.run.batch_size, start)
    model, split = self.tower.state, self.inputs.split("train")
    while start < stop:
      batch = next(self.stream)
      labels.check_labels(split, batch["image_id"], batch["label"])
      batch = sharding.put_batch(batch, self.tower.built.batch_sharding)
      state, metrics = self._step(state, model.params, model.stats, batch)
      start += 1
      if self.should_stop():
        break
    return state, start, metrics

  def close(self) -> None:
    """Closes the stream of images."""
    if self.stream is not None:
      self.stream.close()
