"""The jitted steps of training and evaluation, the same for every system."""

import functools
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.errors import UserError
from xmodal_jax.optim import transforms
from xmodal_jax.optim.train_state import TrainState

Array = jax.Array
Batch = Mapping[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


class NonFiniteLossError(UserError):
  """The loss or the gradient is NaN or infinite. Saved checkpoints are all from finite steps."""


def stream(seed: int, name: str) -> Array:
  """The key of a named stream of random numbers, "train" for the train steps of a run.

  Initialisation draws its keys as `nnx.Rngs(seed)` does, by folding 0, 1, 2 ... into the seed's
  key. The key of step n, folded from that of a stream, is none of them.
  """
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def check_finite(metrics: Mapping[str, np.ndarray], last: int, step: int) -> Mapping[str, Any]:
  """Returns the metrics of `step`, on the host; raises NonFiniteLossError.

  last: the last step whose metrics were checked; the error names the steps in between.
  """
  bad = [k for k in ("loss", "grad_norm") if not np.isfinite(metrics[k])]
  if bad:
    raise NonFiniteLossError(
      f"{' and '.join(bad)} not finite at step {step}; the first bad step is one of "
      f"{last + 1}..{step}. Checkpoints up to step {last} are untouched. Lower config.optim.lr, "
      "lengthen config.optim.warmup, or set config.optim.grad_clip, and run again; if a step was "
      "saved, with --change=optim.lr, or with the other keys that you changed"
    )
  return metrics


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """(graphdef, parameters, running statistics) of a model, concrete or abstract."""
  return nnx.split(model, nnx.Param, nnx.BatchStat)


def set_batch_sharding(model: nnx.Module, batch_sharding: NamedSharding) -> None:
  """Sets the sharding of batch rows in every module that constrains its activations."""
  for _, module in nnx.iter_modules(model):
    if hasattr(module, "batch_sharding"):
      module.batch_sharding = batch_sharding


def init_state(
  init_model: Callable[[], nnx.Module], tx: optax.GradientTransformation
) -> TrainState:
  """The state of step 0: `init_model`'s parameters and a fresh optimizer state.

  Call it under jit, so that every array is created with its sharding:

  ```
  new = functools.partial(step.init_state, built.init_model, tx)
  state = jax.jit(new, out_shardings=built.state_shardings(tx))()
  ```
  """
  _, params, stats = split(init_model())
  params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
  opt_state = transforms.restart_average(tx.init(params), params, stats)
  return TrainState(jnp.int32(0), params, stats, opt_state)


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  rng: Array,
  shardings: TrainState,
  schedule: Callable[[Array], Array],
  first_steps: Any = None,
) -> TrainStep:
  """The jitted train step: loss over the global batch, gradient, update. The state is donated.

  first_steps: see `optim.factory.first_steps`; BatchNorm is frozen with its parameters.
  rng: the run's key, see `stream`. The key of a step is folded from it and `state.step` alone, so a
  resumed run draws the same keys. Metrics are float32 scalars: loss, grad_norm, lr, and the
  system's own.
  """

  tx = optax.with_extra_args_support(tx)

  def train_step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(rng, state.step)

    def loss_fn(params):
      model = nnx.merge(graphdef, params, state.stats)
      if first_steps is not None:
        _hold_statistics(model, first_steps, state.step)
      loss, metrics = model.loss(batch, key)
      return loss, (metrics, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    (loss, (aux, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, stats=stats, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree_utils.tree_norm(grads),
      "lr": schedule(state.step),
      **aux,
    }
    return TrainState(state.step + 1, params, stats, opt_state), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _hold_statistics(model: nnx.Module, first_steps: Any, step: Array) -> None:
  """Makes BatchNorm whose scale and bias are frozen at `step` compute as in evaluation."""
  for path, module in nnx.iter_modules(model):
    if hasattr(module, "held"):
      first = max(jax.tree.leaves(functools.reduce(operator.getitem, path, first_steps)))
      layers = module.mean.shape[:-1]  # of a stack
      module.held = nnx.data(jnp.broadcast_to(step < first, layers))


def make_embed_step(
  graphdef: nnx.GraphDef,
  side: str,
  replicated: NamedSharding,
  batch_sharding: NamedSharding,
  second_stage: Sequence[str] | None = (),
) -> Callable[..., Any]:
  """jitted (params, stats, batch) -> (first, second): features of `side` ("image" or "text").

  second: the features named by second_stage (None: all), which stay sharded as the batch; first:
  the others with the batch's `valid` and `image_id`, replicated on every device.
  """

  def embed_step(params, stats, batch):
    model = nnx.merge(graphdef, params, stats)
    features = getattr(model, f"encode_{side}")(batch)
    names = list(features) if second_stage is None else second_stage
    second = {k: features.pop(k) for k in names if k in features}
    return features | {k: batch[k] for k in ("valid", "image_id")}, second

  return jax.jit(embed_step, out_shardings=(replicated, batch_sharding))


def make_score_step(graphdef: nnx.GraphDef, out_sharding: NamedSharding) -> Callable[..., Array]:
  """jitted (params, stats, image features, text features) -> first-stage scores float32 [I, T]."""

  def score_step(params, stats, images, texts):
    return nnx.merge(graphdef, params, stats).score(images, texts).astype(jnp.float32)

  return jax.jit(score_step, out_shardings=out_sharding)
