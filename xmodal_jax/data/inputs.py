"""From the `data` and `text` sections of a config to splits, tokenizer and batches."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.data import augment, image, mix, pipeline, records, text
from xmodal_jax.data.preparing import shapes
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.models import registry

# The keys of config.data that change training pictures.
AUGMENT = (
  "crop", "crop_scale", "crop_ratio", "jitter", "jitter_p", "grayscale", "blur", "blur_radius",
  "flip", "rand_augment", "rand_augment_mode", "auto_augment", "erase", "erase_mode", "erase_count",
)  # fmt: skip


def data_home() -> epath.Path:
  """Where the embedded data set is written: $XMODAL_DATA, else ~/.cache/xmodal_jax."""
  return epath.Path(os.environ.get("XMODAL_DATA", "~/.cache/xmodal_jax")).expanduser()


class Inputs:
  """Everything that a run reads. Splits open when they are first asked for.

  Raises DatasetError for a data set or split that is not there, ValueError for a bad config.
  """

  def __init__(self, config: Any, batch_sharding: NamedSharding | None = None):
    """rows: of a batch over the devices. This process reads what its own hold; None: all of it."""
    self.config, self._splits, self._rows = config, {}, batch_sharding
    # None for a model of pictures alone.
    self.tokenizer = text.tokenizer_from(config.text) if config.model.get("text") else None
    if self.tokenizer and self.tokenizer.vocab_size > (vocab := config.model.text.vocab):
      raise ValueError(
        f"config.model.text.vocab is {vocab}, but the tokenizer {config.text.tokenizer!r} makes "
        f"{self.tokenizer.vocab_size} different ids: set them to agree"
      )
    # One of the two is None: how pictures become pixels, or how many regions stand for one.
    self.regions = _regions(config)
    self.transform = None if self.regions else _transform(config)

  def split(self, name: str) -> records.Split | mix.Joined:
    """An open split by its key in the config's data section: "train", "val" or "test".

    "train" is joined where config.data.dir names several data sets; the others are of eval_dir.
    """
    if name not in self._splits:
      data = self.config.data
      where = data.eval_dir if name != "train" and data.eval_dir else data.dir
      self._splits[name] = self._open(name, where)
    return self._splits[name]

  def _open(self, name: str, where: str) -> records.Split | mix.Joined:
    folders = _folders(where)
    if len(folders) < 2:
      return self._open_one(self.config.data[name], folders[0])
    if name == "train":
      splits = [self._open_one(self.config.data.train, folder) for folder in folders]
      return mix.Joined(splits, folders)
    raise DatasetError(
      f"config.data.dir and eval_dir leave open which of {', '.join(folders)} is evaluated: set "
      f"config.data.eval_dir to the one whose split {self.config.data[name]!r} counts as {name}"
    )

  def _open_one(self, split: str, folder: str) -> records.Split:
    data = self.config.data
    if not folder and data.tfds:
      return records.open_tfds(data.tfds, split, max_captions=data.tfds_captions or None)
    if not folder:
      raise DatasetError(
        "config.data.dir is empty: name the folder of a data set written by tools/prepare_data.py, "
        "or set config.data.tfds to the name of a TFDS data set"
      )
    where = shapes.ensure(data_home()) if folder == "shapes" else folder
    return self._fitting(records.open_split(where, split), where)

  def _fitting(self, split: records.Split, where: epath.PathLike) -> records.Split:
    """The split. Raises DatasetError where the model reads regions and it has none that fit."""
    if self.regions and split.region_dim != self.regions.width:
      has = f"has regions of {split.region_dim} numbers" if split.region_dim else "has no regions"
      raise DatasetError(
        f"{where}: split {split.name!r} {has}, and config.model.image.features is "
        f"{self.regions.width}: write it with `python tools/prepare_data.py regions`, or set the "
        "two to agree"
      )
    return split

  def samples(self) -> int:
    """Training samples of all data sets."""
    return sum(mix.sample_counts(self.split("train"), self.config.data.captions))

  def steps_per_epoch(self) -> int:
    """Whole batches of an epoch. Raises ValueError where a data set alone has none."""
    c = self.config
    if self.samples() < c.batch_size:
      return 0
    split = self.split("train")
    return mix.mixture(split, c.data.captions, c.data.mix, c.batch_size, c.seed).steps_per_epoch

  def fingerprint(self) -> str:
    """Of the training data and how they are mixed: what a resumed run must find unchanged."""
    split = self.split("train")
    if not isinstance(split, mix.Joined):
      return split.fingerprint
    return hashlib.sha256(f"{self.config.data.mix}\n{split.fingerprint}".encode()).hexdigest()

  def check_processes(self, *keys: str) -> None:
    """Raises ProcessError where processes of a run see different data in these splits."""
    found = {f"split {self.config.data[key]!r}": self.split(key).fingerprint for key in keys}
    processes.check_equal("data", found)

  def _augment(self) -> image.Augment | None:
    if self.regions:
      return None
    options = {k: self.config.data[k] for k in AUGMENT}
    if self.config.data.erase:
      options |= self._statistics()
    try:
      return augment.build(self.transform, **options)
    except ValueError as e:
      raise ValueError(f"config.data.{e}") from None

  def _statistics(self) -> dict[str, tuple[float, ...]]:
    """mean and std of pixels, as the model has them, which normalises on the device."""
    section = self.config.model
    build = registry.system_module(section.system).build
    model = nnx.eval_shape(lambda: build(section.to_dict(), rngs=nnx.Rngs(0)))
    return {"mean": model.mean, "std": model.std}

  def train(self, step: int) -> Iterator[Mapping[str, np.ndarray]]:
    """This process's rows of global batches step, step + 1, ... without end."""
    c = self.config
    return pipeline.train_batches(
      self.split("train"),
      batch_size=c.batch_size,
      image_transform=self.transform,
      augment=self._augment(),
      regions=self.regions,
      tokenizer=self.tokenizer,
      text_length=c.text.length,
      truncate=c.text.truncate,
      captions=c.data.captions,
      mix=c.data.mix,
      seed=c.seed,
      step=step,
      max_bad_fraction=c.data.max_bad_fraction,
      threads=c.data.threads or None,
      rows=self.local_rows(c.batch_size),
    )

  def labelled(self, batch_size: int, step: int) -> Iterator[Mapping[str, np.ndarray]]:
    """`train` for learning from labels: batches of pictures with label in place of captions."""
    c = self.config
    return pipeline.train_batches(
      self.split("train"),
      batch_size=batch_size,
      image_transform=self.transform,
      augment=self._augment(),
      regions=self.regions,
      tokenizer=None,
      text_length=0,
      captions="none",
      seed=c.seed,
      step=step,
      max_bad_fraction=c.data.max_bad_fraction,
      threads=c.data.threads or None,
      rows=self.local_rows(batch_size),
    )

  def local_rows(self, batch_size: int) -> np.ndarray | None:
    """int [b]: places in a global batch that this process reads; None: all."""
    return None if self._rows is None else sharding.local_rows(self._rows, batch_size)

  def images(
    self, split: records.Split, training: bool = False
  ) -> Iterator[Mapping[str, np.ndarray]]:
    """All pictures of a split in order. training: as many may be bad as training survives."""
    data = self.config.data
    return pipeline.eval_images(
      split,
      batch_size=self.config.eval.batch_size,
      image_transform=self.transform,
      regions=self.regions,
      max_bad_fraction=data.max_bad_fraction if training else data.eval_max_bad_fraction,
      threads=self.config.data.threads or None,
      rows=self.local_rows(self.config.eval.batch_size),
    )

  def texts(self, split: records.Split) -> Iterator[Mapping[str, np.ndarray]]:
    return pipeline.eval_texts(
      split,
      batch_size=self.config.eval.batch_size,
      tokenizer=self.tokenizer,
      text_length=self.config.text.length,
      truncate=self.config.text.truncate,
      max_bad_fraction=self.config.data.eval_max_bad_fraction,
      rows=self.local_rows(self.config.eval.batch_size),
    )


def _transform(config: Any) -> image.Transform:
  keep = config.data.image
  if not (size := config.model.image.get("size")):
    raise ValueError(
      f"the model {config.model.system!r} reads regions: set config.data.regions to how many a "
      "picture has at most"
    )
  return image.Transform(
    keep.size or size, size, keep.resize, keep.interpolation, keep.rgb_first, keep.exif
  )


def _regions(config: Any) -> pipeline.Regions | None:
  """None for a model of pixels. Raises ValueError for keys that do not go together."""
  data, width = config.data, config.model.image.get("features")
  if not data.regions:
    return None
  if data.regions < 0 or not width:
    raise ValueError(
      f"config.data.regions is {data.regions}: expected a number above 0 for a model of regions "
      f"(config.model.image.features), 0 for one of pixels; the model is {config.model.system!r}"
    )
  changes = {k: data[k] for k in ("grayscale", "blur", "flip", "auto_augment", "erase")}
  changes |= {"jitter": any(data.jitter), "rand_augment": data.rand_augment[0]}
  changes["crop"] = data.crop != "center"
  if on := [key for key, value in changes.items() if value]:
    raise ValueError(
      f"config.data.{on[0]} is {data[on[0]]!r}, which changes pixels, and config.data.regions is "
      f"{data.regions}: regions are used as they are; leave it at its default"
    )
  return pipeline.Regions(data.regions, width, data.truncate_regions)


def _folders(where: str) -> list[str]:
  """config.data.dir or eval_dir, names with commas between them. Raises ValueError."""
  names = [name.strip() for name in os.fspath(where).split(",")]
  if len(names) > 1 and ("" in names or len(set(names)) < len(names)):
    raise ValueError(
      f"config.data.dir or eval_dir is {where!r}: expected names of different data sets with a "
      "comma between them"
    )
  return names
