"""What can be known before an evaluation: checks that raise before hours of work are lost."""

from typing import Any

import numpy as np
from absl import logging
from etils import epath

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import mix, records
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import coco, rerank
from xmodal_jax.evaluation import report as report_lib
from xmodal_jax.models.base import System


def evaluated_splits(options: Any) -> list[str]:
  """Keys of the splits that a training run evaluates. options: config.eval."""
  keys = {options.select} | ({"test"} if options.test else set())
  return sorted(keys | ({"val"} if options.stage_mixes else set()))


def check_splits(options: Any, inputs: inputs_lib.Inputs, keys: list[str] | None = None) -> None:
  """Opens the splits of `keys`, by default `evaluated_splits`, and checks that they can be ranked.

  Raises ConfigError, DatasetError, ValueError for files that do not fit, FileNotFoundError for
  missing ones.
  """
  keys = evaluated_splits(options) if keys is None else keys
  for key in keys:
    split = inputs.split(key)
    bare = np.flatnonzero(split.captions_per_record == 0)
    if len(bare):
      raise DatasetError(
        f"split {split.name!r}, config.data.{key}, has {len(bare)} of {len(split)} images without "
        f"a caption (records {bare[:5].tolist()}): retrieval needs a caption of every image; write "
        "the dataset without them, or choose another split"
      )
    if key == "test":
      datasets = inputs.datasets
      _check_test(options, split, from_tfds=bool(datasets.tfds and not datasets.eval_dir))
    report_lib.grades(options, split, compute=False)
  mixes = options.stage_mixes and "test" in keys
  if mixes and inputs.split("val").fingerprint == inputs.split("test").fingerprint:
    raise ConfigError(
      "config.eval.stage_mixes is chosen on config.data.val, which is the test split: set "
      "config.data.val to another one, or config.eval.stage_mix to a number"
    )


def check_metric(options: Any, system: System) -> None:
  """Raises ConfigError unless evaluations on config.eval.select report config.eval.metric.

  The best checkpoint is that of its highest value, so ranks, which are better if lower, are none.
  """
  is_test, two_stages = options.select == "test", rerank.second_stage(options, system) is not None
  known = report_lib.names(options, is_test=is_test, two_stages=two_stages)
  known = [k for k in known if not k.endswith(("_medr", "_meanr")) and k != "stage_mix"]
  of_files = is_test and options.eccv_dir and options.metric.startswith(("eccv_", "cxc_"))
  if options.metric not in known and not of_files:
    raise ConfigError(
      f"config.eval.metric is {options.metric!r}: expected a number that evaluations on "
      f"config.eval.select={options.select!r} report and that is better if higher, one of "
      + ", ".join(known)
    )


def _check_test(options: Any, split: records.Split | mix.Joined, from_tfds: bool) -> None:
  """Folds, and the files of config.eval.eccv_dir."""
  counts = report_lib.fold_counts(options)
  if counts and from_tfds:
    logging.warning(
      "TFDS stores images in its own order: the folds of split %r are not the published ones; "
      "prepare the dataset with `tools/prepare_data.py karpathy` or `coco`", split.name,
    )  # fmt: skip
  for prefix, folds in counts.items():
    if len(split) % folds:
      what, remedy = f"folds is {folds}", "0 for no folds"
      if not prefix.startswith("folds"):
        what, remedy = "eccv_dir is set", "'' if this is not the COCO 5K test split"
      raise ConfigError(
        f"config.eval.{what}, but split {split.name!r} has {len(split)} images, which do not "
        f"divide into {folds} equal folds; set it to {remedy}"
      )
  if options.eccv_dir:
    coco.check_files(epath.Path(options.eccv_dir).expanduser())
