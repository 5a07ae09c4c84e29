"""What a frozen image tower makes of labelled pictures: computed once, kept, and classified."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import records
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.evaluation import batching, cache, labels, lbfgs, metrics, retrieval
from xmodal_jax.interop import torch_files
from xmodal_jax.interop.local import local_copy
from xmodal_jax.runtime import initial_state, setup
from xmodal_jax.runtime import step as step_lib

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Features:
  """Of the pictures of a split that could be read: features float32 [N, D], label int32 [N]."""

  split: records.Split
  features: np.ndarray
  label: np.ndarray

  def __len__(self) -> int:
    return len(self.label)


class Tower:
  """The frozen image tower on the devices. source: where its parameters came from."""

  def __init__(self, config: Any, built: setup.Built):
    self.config, self.built, self.batch_sharding = (
      config,
      built,
      sharding.batch_sharding(built.mesh),
    )
    self.state, self.source = _load(config, built)
    self._step = jax.jit(self._features, out_shardings=built.replicated)

  def features(self, params: Any, stats: Any, batch: Mapping[str, Array]) -> Array:
    """batch -> float32 [B, D]; to be traced."""
    model = nnx.merge(self.built.graphdef, params, stats)
    return model.probe_features(batch)

  def _features(self, params, stats, batch):
    ids = {k: batch[k] for k in ("label", "valid", "image_id")}
    return ids | {"features": self.features(params, stats, batch)}

  def extract(
    self, inputs: inputs_lib.Inputs, key: str, folder: epath.Path, stop: Callable[[], bool]
  ) -> Features:
    """Features of a split, from the folder where they were computed before, else into it.

    Raises DatasetError for pictures without labels, NonFiniteError, Interrupted.
    """
    split = labels.labelled_split(inputs, key)
    sections = ("model", "dtype", "precision", "data.image")
    keys = cache.config_keys(self.config, sections)
    file = cache.cache_file(folder, "features", keys, split.fingerprint, self.source)
    if processes.visible_everywhere(file):
      found = cache.load_arrays(file)
    else:
      logging.info("features of %d pictures of split %r", len(split), split.name)
      run = lambda b: self._step(
        self.state.params, self.state.stats, sharding.put_batch(b, self.batch_sharding)
      )
      batches = inputs.images(split, training=key == "train")
      found, image_id = batching.collect(run, batches, stop)
      labels.check_labels(split, image_id, found["label"])
      metrics.check_finite(f"features of split {split.name!r}", found["features"])
      if jax.process_index() == 0:
        cache.save_arrays(file, found)
    return Features(split, found["features"], found["label"])


def _load(config: Any, built: setup.Built) -> tuple[Any, dict[str, Any]]:
  """The model of config.init, else of its seed with the tower of config.init_image."""
  if config.init and config.init_image:
    raise ValueError("config.init is a whole model: set it or config.init_image, not both")
  if config.init:
    return retrieval.load_state(built, config.init)
  tx = optax.identity()
  new = functools.partial(step_lib.init_state, built.init_model, tx)
  state = jax.jit(new, out_shardings=built.state_shardings(tx))()
  if config.init_image:
    sources = initial_state.Sources.from_config(config)
    with local_copy(epath.Path(config.init_image).expanduser()) as local:
      source = dict(kind="image tower", source=local.name, sha256=torch_files.sha256(local))
    return initial_state.with_towers(sources, built, state), source
  logging.warning("config.init is empty: the classifier is of a random tower")
  return state, dict(kind="random weights", seed=config.seed)


class Scorer:
  """Accuracy of classifiers on features that are put on the devices once."""

  def __init__(self, mesh: jax.sharding.Mesh, found: Features, block: int):
    self.label, self.count = found.label, len(found)
    to = NamedSharding(mesh, P(None, *sharding.batch_sharding(mesh).spec))
    blocks = batching.split_blocks(dict(features=found.features, label=found.label), block)
    self.blocks = {k: sharding.place(v, to) for k, v in blocks.items()}  # [S, block, ...]

    def ranks(params, blocks):
      one = lambda b: labels.class_ranks(lbfgs.logits(params, b["features"]), b["label"])
      return jax.lax.map(one, blocks)

    self._ranks = jax.jit(ranks, out_shardings=NamedSharding(mesh, P()))

  def __call__(self, params: dict[str, Array]) -> dict[str, float]:
    """See `classify.report`."""
    ranks = jax.device_get(self._ranks(params, self.blocks)).reshape(-1)[: self.count]
    return labels.report(ranks, self.label)
