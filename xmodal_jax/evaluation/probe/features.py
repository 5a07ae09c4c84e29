"""Features of labelled images from a frozen image tower, computed once and kept in the workdir."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import mix, records
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import batching, cache, labels, metrics, scored
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.interop import torch_files
from xmodal_jax.interop.local import local_copy
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import initial_state, setup
from xmodal_jax.runtime import step as step_lib

Array = jax.Array

# Sections of the config that features depend on.
_CACHE_SECTIONS = ("model", "dtype", "precision", "data.image")


@dataclasses.dataclass(frozen=True)
class Features:
  """features float32 [N, D] and label int32 [N] of the readable images of a split."""

  split: records.Split | mix.Joined
  features: np.ndarray
  label: np.ndarray
  left_out: scored.LeftOut = dataclasses.field(default_factory=list)

  def __len__(self) -> int:
    return len(self.label)


class Tower:
  """The frozen image tower on the devices.

  state: its model's parameters. source: where they came from. cache_keys: the config keys that
  features depend on, part of their file's name.
  """

  def __init__(
    self,
    built: setup.Built,
    state: train_state.TrainState,
    source: Mapping[str, Any],
    cache_keys: Mapping[str, Any],
  ):
    self.built, self.state, self.source, self.cache_keys = built, state, source, cache_keys
    self._step = jax.jit(self._batch_features, out_shardings=built.replicated)

  def features(self, params: Any, stats: Any, batch: Mapping[str, Array]) -> Array:
    """`System.probe_features` of a batch, float32 [B, D]; can be traced."""
    model = nnx.merge(self.built.graphdef, params, stats)
    return model.probe_features(batch)

  def _batch_features(self, params, stats, batch):
    ids = {k: batch[k] for k in ("label", "valid", "image_id")}
    return ids | {"features": self.features(params, stats, batch)}

  def extract(
    self, inputs: inputs_lib.Inputs, key: str, folder: epath.Path, stop: Callable[[], bool]
  ) -> Features:
    """Features of the split of config.data.KEY, read from `folder` or computed and written there.

    Raises DatasetError for images without labels, NonFiniteError, and Interrupted when `stop`
    returns True.
    """
    split = labels.labelled_split(inputs, key)
    file = cache.cache_file(folder, "features", self.cache_keys, split.fingerprint, self.source)
    if processes.visible_everywhere(file):
      found = cache.load_arrays(file)
    else:
      logging.info("features of %d images of split %r", len(split), split.name)
      found = self._compute(split, inputs.images(split, training=key == "train"), stop)
      if jax.process_index() == 0:
        cache.save_arrays(file, found)
    left_out = json.loads(str(found["left_out"]))
    return Features(split, found["features"], found["label"], left_out)

  def _compute(self, split, batches, stop) -> dict[str, np.ndarray]:
    def step(batch):
      batch = sharding.put_batch(batch, self.built.batch_sharding)
      return self._step(self.state.params, self.state.stats, batch)

    found, image_id = batching.collect(step, batches, stop)
    labels.check_labels(split, image_id, found["label"])
    metrics.check_finite(f"features of split {split.name!r}", found["features"])
    left_out = scored.left_out(split, image_id, batches.bad)
    return found | {"left_out": np.array(json.dumps(left_out))}


class SplitFeatures:
  """Features by split key, extracted at first use; splits of the same data share them."""

  def __init__(
    self, tower: Tower, inputs: inputs_lib.Inputs, folder: epath.Path, stop: Callable[[], bool]
  ):
    self.tower, self.inputs, self.folder, self.stop = tower, inputs, folder, stop
    self._found: dict[str, Features] = {}

  def __call__(self, key: str) -> Features:
    """See `Tower.extract`."""
    fingerprint = self.inputs.split(key).fingerprint
    if fingerprint not in self._found:
      self._found[fingerprint] = self.tower.extract(self.inputs, key, self.folder, self.stop)
    return self._found[fingerprint]


def load_tower(config: Any, built: setup.Built) -> Tower:
  """The tower of the whole config: from config.init, config.init_image, or random with a warning.

  Raises ConfigError if both are set, CheckpointError, ConversionError.
  """
  if config.init and config.init_image:
    raise ConfigError("config.init is a whole model: set it or config.init_image, not both")
  if config.init:
    state, source = state_lib.load_state(built, config.init)
  else:
    tx = optax.identity()
    new = functools.partial(step_lib.init_state, built.init_model, tx)
    state = jax.jit(new, out_shardings=built.state_shardings(tx))()
    source = dict(kind="random weights", seed=config.seed)
    if config.init_image:
      state = initial_state.with_towers(initial_state.Sources.from_config(config), built, state)
      with local_copy(epath.Path(config.init_image).expanduser()) as local:
        source = dict(kind="image tower", source=local.name, sha256=torch_files.sha256(local))
      if config.init_half:  # its matrices are then rounded to float16
        source["init_half"] = True
    else:
      logging.warning("config.init is empty: the tower has random weights")
  return Tower(built, state, source, cache.config_keys(config, _CACHE_SECTIONS, built.platform))
