"""From the `data` and `text` sections of a config to splits, tokenizer and batches."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from xmodal_jax.data import augment, image, order, pipeline, records, shapes, text
from xmodal_jax.data.tfrecord import DatasetError

# The keys of config.data that change training pictures.
AUGMENT = (
  "crop", "crop_scale", "crop_ratio", "jitter", "jitter_p", "grayscale", "blur", "blur_radius",
  "flip", "rand_augment", "rand_augment_mode",
)  # fmt: skip


def data_home() -> epath.Path:
  """Where the embedded data set is written: $XMODAL_DATA, else ~/.cache/xmodal_jax."""
  return epath.Path(os.environ.get("XMODAL_DATA", "~/.cache/xmodal_jax")).expanduser()


class Inputs:
  """Everything that a run reads. Splits open when they are first asked for.

  Raises DatasetError for a data set or split that is not there, ValueError for a bad config.
  """

  def __init__(self, config: Any):
    self.config, self._splits = config, {}
    self.tokenizer = text.tokenizer_from(config.text)
    vocab = config.model.text.vocab
    if self.tokenizer.vocab_size > vocab:
      raise ValueError(
        f"config.model.text.vocab is {vocab}, but the tokenizer {config.text.tokenizer!r} makes "
        f"{self.tokenizer.vocab_size} different ids: set them to agree"
      )
    size, keep = config.model.image.size, config.data.image
    self.transform = image.Transform(
      keep.size or size, size, keep.resize, keep.interpolation, keep.rgb_first, keep.exif
    )

  def split(self, name: str) -> records.Split:
    """An open split by its key in the config's data section: "train", "val" or "test"."""
    if name not in self._splits:
      self._splits[name] = self._open(self.config.data[name])
    return self._splits[name]

  def _open(self, split: str) -> records.Split:
    data = self.config.data
    if not data.dir and data.tfds:
      return records.open_tfds(data.tfds, split, max_captions=data.tfds_captions or None)
    if not data.dir:
      raise DatasetError(
        "config.data.dir is empty: name the folder of a data set written by tools/prepare_data.py, "
        "or set config.data.tfds to the name of a TFDS data set"
      )
    folder = shapes.ensure(data_home()) if data.dir == "shapes" else data.dir
    return records.open_split(folder, split)

  def samples(self) -> int:
    """Training samples per epoch."""
    split = self.split("train")
    return order.samples_per_epoch(split.captions_per_record, self.config.data.captions)

  def fingerprint(self) -> str:
    """Of the training split: what a resumed run must find unchanged."""
    return self.split("train").fingerprint

  def _augment(self) -> image.Augment | None:
    try:
      return augment.build(self.transform, **{k: self.config.data[k] for k in AUGMENT})
    except ValueError as e:
      raise ValueError(f"config.data.{e}") from None

  def train(self, step: int) -> Iterator[Mapping[str, np.ndarray]]:
    """This process's rows of global batches step, step + 1, ... without end."""
    c = self.config
    return pipeline.train_batches(
      self.split("train"),
      batch_size=c.batch_size,
      image_transform=self.transform,
      augment=self._augment(),
      tokenizer=self.tokenizer,
      text_length=c.text.length,
      truncate=c.text.truncate,
      captions=c.data.captions,
      seed=c.seed,
      step=step,
      max_bad_fraction=c.data.max_bad_fraction,
      threads=c.data.threads or None,
      **_process(),
    )

  def images(self, split: records.Split) -> Iterator[Mapping[str, np.ndarray]]:
    return pipeline.eval_images(
      split,
      batch_size=self.config.eval.batch_size,
      image_transform=self.transform,
      max_bad_fraction=self.config.data.eval_max_bad_fraction,
      threads=self.config.data.threads or None,
      **_process(),
    )

  def texts(self, split: records.Split) -> Iterator[Mapping[str, np.ndarray]]:
    return pipeline.eval_texts(
      split,
      batch_size=self.config.eval.batch_size,
      tokenizer=self.tokenizer,
      text_length=self.config.text.length,
      truncate=self.config.text.truncate,
      max_bad_fraction=self.config.data.eval_max_bad_fraction,
      **_process(),
    )


def _process() -> dict[str, int]:
  return dict(process_index=jax.process_index(), process_count=jax.process_count())
