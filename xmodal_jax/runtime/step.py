"""TrainState, and the jitted steps of training and evaluation, written once for every system."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xmodal_jax.optim.train_state import TrainState

Array = jax.Array


class NonFiniteLossError(ValueError):
  """The loss or the gradient is NaN or infinite; nothing was saved since the last finite step."""


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


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """(graphdef, parameters, running statistics) of a model, concrete or abstract."""
  return nnx.split(model, nnx.Param, nnx.BatchStat)


def init_state(build: Callable[[], nnx.Module], tx: optax.GradientTransformation) -> TrainState:
  """A first state. Run it under `jax.jit(..., out_shardings=...)`, so that it is born sharded."""
  _, params, stats = split(build())
  params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
  return TrainState(jnp.int32(0), params, stats, tx.init(params))


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  rng: Array,
  shardings: TrainState,
  schedule: Callable[[Array], Array],
) -> Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
  """The step: loss over the global batch, gradient, update. The state is donated.

  rng is a key of the run; a resumed run draws the same keys, because they depend on the step alone.
  Metrics are float32 scalars: loss, grad_norm, lr, and those of the system.
  """

  def train_step(state: TrainState, batch: Mapping[str, Array]):
    key = jax.random.fold_in(rng, state.step)

    def loss_fn(params):
      model = nnx.merge(graphdef, params, state.stats)
      loss, metrics = model.loss(batch, key)
      return loss, (metrics, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    (loss, (aux, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree_utils.tree_norm(grads),
      "lr": schedule(state.step),
      **aux,
    }
    return TrainState(state.step + 1, params, stats, opt_state), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_embed_step(
  graphdef: nnx.GraphDef,
  side: str,
  whole: Any,
  rows: Any,
  second_stage: Sequence[str] | None = (),
) -> Callable[..., Any]:
  """jitted (params, stats, batch) -> (first, second): features of `side` ("image" or "text").

  second: those named by second_stage, None for all, sharded as `rows`; first: the others, sharded
  as `whole`, with `valid` and `image_id` of the batch, from every process's rows.
  """

  def embed_step(params, stats, batch):
    model = nnx.merge(graphdef, params, stats)
    features = getattr(model, f"encode_{side}")(batch)
    names = list(features) if second_stage is None else second_stage
    second = {k: features.pop(k) for k in names if k in features}
    return features | {k: batch[k] for k in ("valid", "image_id")}, second

  return jax.jit(embed_step, out_shardings=(whole, rows))


def make_score_step(graphdef: nnx.GraphDef, out_sharding: Any) -> Callable[..., Array]:
  """jitted (params, stats, image features, text features) -> float32 [I, T]."""

  def score_step(params, stats, images, texts):
    return nnx.merge(graphdef, params, stats).score(images, texts).astype(jnp.float32)

  return jax.jit(score_step, out_shardings=out_sharding)
