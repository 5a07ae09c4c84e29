"""The linear classifier: its logits, its accuracy on kept features, and its file."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.checkpoints.checkpointer import CheckpointError
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import batching, cache, labels
from xmodal_jax.evaluation.probe.features import Features, Tower

Array = jax.Array
Params = dict[str, Array]  # kernel float32 [D, C], bias float32 [C]

FILE = "classifier.npz"


class Fitted(NamedTuple):
  """A trained classifier, the step to log it at, and facts about its training for results.json."""

  step: int
  params: Params
  facts: dict[str, Any]


def logits(params: Params, features: Array) -> Array:
  """features [B, D] -> features @ kernel + bias, float32 [B, C]."""
  return jnp.dot(features, params["kernel"], precision="highest") + params["bias"]


class Scorer:
  """Accuracy of classifiers on features that are transferred to the devices once.

  block: rows whose logits are computed at a time; a multiple of the number of devices.

  >>> score = Scorer(mesh, features, block=256)
  >>> score(params)
  {'top1': 71.2, 'top5': 90.3, 'mean_per_class': 70.8}
  """

  def __init__(self, mesh: jax.sharding.Mesh, found: Features, block: int):
    self.label, self.count = found.label, len(found)
    to = NamedSharding(mesh, P(None, *sharding.batch_sharding(mesh).spec))
    blocks = batching.split_blocks(dict(features=found.features, label=found.label), block)
    self.blocks = {k: sharding.place(v, to) for k, v in blocks.items()}  # [S, block, ...]
    self._ranks = jax.jit(_block_ranks, out_shardings=NamedSharding(mesh, P()))

  def __call__(self, params: Params) -> dict[str, float]:
    """`metrics.accuracy`. Raises NonFiniteError."""
    ranks = jax.device_get(self._ranks(params, self.blocks)).reshape(-1)[: self.count]
    return labels.report(ranks, self.label)


def _block_ranks(params: Params, blocks: dict[str, Array]) -> Array:
  """features [S, block, D], label [S, block] -> ranks int [S, block], block by block."""

  def ranks(block):
    return labels.class_ranks(logits(params, block["features"]), block["label"])

  return jax.lax.map(ranks, blocks)


def save(workdir: epath.Path, params: Params, class_names: tuple[str, ...]) -> None:
  """Writes classifier.npz with kernel, bias, and class_names str [C]."""
  arrays = jax.device_get(params) | {"class_names": np.array(class_names)}
  cache.save_arrays(workdir / FILE, arrays)


def load(source: str, tower: Tower, test: Features) -> Params:
  """config.probe.classifier: a classifier.npz, or "model" for that of the tower's model.

  Raises CheckpointError if it does not fit the features and classes of `test`.
  """
  names = test.split.class_names
  params = _model_classifier(tower) if source == "model" else _read(source, names)
  want = (test.features.shape[1], len(names))
  if params["kernel"].shape != want:
    raise CheckpointError(
      f"config.probe.classifier: a kernel of {params['kernel'].shape}, but features and classes of "
      f"this model and dataset need {want}"
    )
  return jax.tree.map(
    lambda x: sharding.place(np.asarray(x, np.float32), tower.built.replicated), params
  )


def _model_classifier(tower: Tower) -> dict[str, np.ndarray]:
  params = tower.state.params.get("classifier")
  if params is None:
    raise CheckpointError("config.probe.classifier is 'model', but config.model has no classifier")
  return jax.device_get(params)


def _read(source: str, class_names: tuple[str, ...]) -> dict[str, Any]:
  """Kernel and bias of a classifier.npz for these classes."""
  file = epath.Path(source).expanduser()
  if not file.is_file():
    raise CheckpointError(f"config.probe.classifier: there is no file {file}")
  params = cache.load_arrays(file)
  found = tuple(params.pop("class_names", ()))
  if params.keys() != {"kernel", "bias"} or found != class_names:
    raise CheckpointError(
      f"config.probe.classifier: {file} is of {len(found)} classes, first {', '.join(found[:3])}; "
      f"expected a {FILE} of the dataset's {len(class_names)} classes, first "
      f"{', '.join(class_names[:3])}"
    )
  return params
