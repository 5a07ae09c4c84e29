"""The programs of a config, made as training and evaluation make them, but for shapes alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.evaluation import retrieval
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import flops, setup
from xmodal_jax.runtime import step as step_lib

IMAGES, CAPTIONS = 5000, 25000  # of a split that is ranked: COCO 5K
Arrays = dict[str, jax.ShapeDtypeStruct]


def batch(config: Any, size: int, rows: Any, side: str | None = None) -> Arrays:
  """A batch of the config: of training, or of one side ("image", "text") in evaluation."""
  length = config.text.length
  text = {"text_ids": ((length,), jnp.int32), "text_mask": ((length,), bool)}
  if n := config.data.regions:
    image = {"regions": ((n, config.model.image.features), jnp.float32)}
    image |= {"boxes": ((n, 4), jnp.float32), "region_mask": ((n,), bool)}
  else:
    pixels = config.model.image.size
    image = {"image": ((pixels, pixels, 3), jnp.uint8)}
  if side is None:
    fields = image | text | {"image_id": ((), jnp.int32), "caption_id": ((), jnp.int32)}
  else:
    fields = (image if side == "image" else text) | {
      "image_id": ((), jnp.int32),
      "valid": ((), bool),
    }
  make = lambda shape, dtype: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)
  return {name: make(*field) for name, field in fields.items()}


class Programs:
  """step: name of a program -> what lowers it; "train" and, unless it cannot, what evaluates."""

  def __init__(self, config: Any, devices: Sequence[jax.Device]):
    self.config, self.built = config, setup.build(config, devices)
    self.lower: dict[str, Callable[[], Any]] = {"train": lambda: self.train().lower(*self.training)}
    run = schedules.RunLength(1000 * config.batch_size, config.batch_size, config.total)
    self.schedule = schedules.make_schedule(config.optim, run)
    self.tx = self.built.optimizer(config.optim, self.schedule, run.steps_per_epoch)
    self.first_steps = self.built.first_steps(config.optim, run.steps_per_epoch)
    self.shardings = self.built.state_shardings(self.tx)
    state = jax.eval_shape(lambda: step_lib.init_state(self.built.init_model, self.tx))
    self.state = jax.tree.map(_placed, state, self.shardings)
    self.training = self.state, batch(config, config.batch_size, self.built.batch_sharding)
    self._evaluation()

  def train(self) -> Any:
    # Not on a device: a key on one could not go into a program for others.
    key = step_lib.stream(self.config.seed, "train")
    return self.built.train_step(self.tx, key, self.shardings, self.schedule, self.first_steps)

  def _evaluation(self) -> None:
    """Encoding a batch of either side, scoring a block of all pairs, and the second stage."""
    e = self.config.eval
    evaluator = retrieval.from_config(self.config, None, self.built)
    rows, whole = evaluator.batch_sharding, evaluator.replicated
    model = self.state.params, self.state.stats
    sides = {side: batch(self.config, e.batch_size, rows, side) for side in ("image", "text")}
    first, second = {}, {}
    for side, given in sides.items():
      keep = side == "image" and evaluator.streams
      step = evaluator.embed_sharded if keep else evaluator.embed[side]
      self.lower[side] = lambda step=step, given=given: step.lower(*model, given)
      out = jax.eval_shape(step, *model, given)
      first[side], second[side] = out if not keep else (out[1], {})
    texts = first["text"]
    if evaluator.streams:
      texts = jax.eval_shape(evaluator.to_token_dtype, texts)
    features = lambda tree: {k: v for k, v in tree.items() if k not in ("valid", "image_id")}
    block_i, block_t = (e.batch_size, e.block[1]) if evaluator.streams else e.block
    blocks = _resized(features(first["image"]), block_i, rows)
    texts = _resized(features(texts), block_t, whole)
    self.lower["score"] = lambda: evaluator.score.lower(*model, blocks, texts)
    if evaluator.second is not None:
      self._second_stage(evaluator, model, second)

  def _second_stage(self, evaluator: Any, model: Any, features: dict[str, Any]) -> None:
    e, rows = self.config.eval, evaluator.batch_sharding
    banked = NamedSharding(rows.mesh, P(None, *rows.spec))

    def bank(side, count):
      steps = -(-count // e.batch_size)
      kind = lambda t: evaluator.token_dtype if jnp.issubdtype(t, jnp.floating) else t
      make = lambda x: jax.ShapeDtypeStruct((steps, *x.shape), kind(x.dtype), sharding=banked)
      return jax.tree.map(make, features[side])

    texts = bank("text", CAPTIONS)
    drop = lambda x: jax.ShapeDtypeStruct(
      (e.block[1], *x.shape[2:]), x.dtype, sharding=evaluator.replicated
    )
    per_call, width = e.rerank_block
    n = per_call * (e.batch_size // rows.shard_shape((e.batch_size,))[0])
    index = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    given = bank("image", IMAGES), jax.tree.map(drop, texts), index(n), index(n, width)
    self.lower["rerank"] = lambda: evaluator.reranker.step.lower(*model, *given)


def model_flops(config: Any) -> int:
  """FLOPs of a training step's matmuls on all devices together, without what is computed again."""
  return flops.of_model(config, batch(config, config.batch_size, None))


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _resized(tree: Any, size: int, sharding: Any) -> Any:
  make = lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)
  return jax.tree.map(make, tree)
