"""Labels of images: splits that have them, ranks of the own class, accuracy."""

import jax
import jax.numpy as jnp
import numpy as np

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import mix, records
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.evaluation import metrics

Array = jax.Array


def labelled_split(inputs: inputs_lib.Inputs, key: str) -> records.Split | mix.Joined:
  """The split of config.data.KEY. Raises DatasetError if it has no class names."""
  split = inputs.split(key)
  if not split.class_names:
    raise DatasetError(
      f"split {split.name!r}, config.data.{key}, has no class names: classification needs labelled "
      "images, as in datasets of `tools/prepare_data.py folders` or TFDS's imagenet2012"
    )
  return split


def check_labels(
  split: records.Split | mix.Joined, image_id: np.ndarray, label: np.ndarray
) -> None:
  """Raises DatasetError if a label int [N] is none of the split's classes.

  image_id: int [N], the records that the labels are of.
  """
  wrong = image_id[(label < 0) | (label >= len(split.class_names))]
  if len(wrong):
    raise DatasetError(
      f"{len(wrong)} of {len(label)} images of split {split.name!r} have no label among its "
      f"{len(split.class_names)} classes (records {wrong[:5].tolist()}): choose another split"
    )


def class_ranks(scores: Array, label: Array) -> Array:
  """0-based rank of each row's own class: scores [B, C], label int [B] -> int [B].

  Ties go to the lower index, as in `metrics`, so that a collapsed model has the accuracy of chance.
  -1 for rows with scores that are not finite.
  """
  own = jnp.take_along_axis(scores, label[:, None], axis=1)
  before = jnp.arange(scores.shape[1]) < label[:, None]
  ahead = ((scores > own) | ((scores == own) & before)).sum(1)
  return jnp.where(jnp.isfinite(scores).all(1), ahead, -1)


def report(ranks: np.ndarray, label: np.ndarray) -> dict[str, float]:
  """`metrics.accuracy` of ranks from `class_ranks`. Raises NonFiniteError if one is -1, and
  DatasetError without a rank."""
  if not len(ranks):
    raise DatasetError("no image of the split could be read: there is nothing to classify")
  if bad := int(np.count_nonzero(ranks < 0)):
    raise metrics.NonFiniteError(f"scores of {bad} of {len(ranks)} images hold NaN or infinity")
  return metrics.accuracy(ranks, label)
