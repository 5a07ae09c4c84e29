"""The inputs of a run: its datasets, tokenizer, transforms and batches, made from a config."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.data import augment, image, mix, order, pipeline, records, text
from xmodal_jax.data.preparing import shapes
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.models import registry

SPLITS = ("train", "val", "test")

# The keys of config.data that augment training images: arguments of `augment.build`.
AUGMENT = (
  "crop", "crop_scale", "crop_ratio", "jitter", "jitter_p", "grayscale", "blur", "blur_radius",
  "flip", "rand_augment", "rand_augment_mode", "auto_augment", "erase", "erase_mode", "erase_count",
)  # fmt: skip


def data_home() -> epath.Path:
  """Where the embedded dataset is written: $XMODAL_DATA, else ~/.cache/xmodal_jax."""
  return epath.Path(os.environ.get("XMODAL_DATA", "~/.cache/xmodal_jax")).expanduser()


def from_config(config: Any, batch_sharding: NamedSharding | None = None) -> "Inputs":
  """The inputs that the sections `data` and `text` describe, for the model of `model`.

  Args:
    config: a resolved config. It is read here and not kept.
    batch_sharding: of a batch over the devices. Each process reads the rows of its own devices;
      None: one process reads all of them.

  Raises:
    ValueError: for keys that are wrong or do not fit together.

  Example::

    inputs = from_config(config)
    for batch in inputs.images(inputs.split("test")):
      ...
  """
  data, model = config.data, config.model
  regions = _regions(data, model)
  transform = None if regions else _transform(data.image, model)
  return Inputs(
    datasets=Datasets(
      train_dir=data.dir,
      eval_dir=data.eval_dir or data.dir,
      tfds=data.tfds,
      tfds_captions=data.tfds_captions,
      names={key: data[key] for key in SPLITS},
      region_dim=regions.width if regions else None,
    ),
    tokenizer=_tokenizer(config.text, model.text.vocab) if model.get("text") else None,
    text_length=config.text.length,
    truncate=config.text.truncate,
    transform=transform,
    augment=_augment(data, model, transform) if transform else None,
    regions=regions,
    batch_size=config.batch_size,
    eval_batch_size=config.eval.batch_size,
    seed=config.seed,
    captions=data.captions,
    mix=data.mix,
    max_bad_fraction=data.max_bad_fraction,
    eval_max_bad_fraction=data.eval_max_bad_fraction,
    max_pixels=data.max_pixels,
    threads=data.threads or None,
    batch_sharding=batch_sharding,
  )


@dataclasses.dataclass(frozen=True)
class Datasets:
  """Where the splits of a run are.

  train_dir, eval_dir: folders of datasets, or "shapes" for the embedded one; train_dir may name
  several with commas between them. Where the folder is empty, `tfds` is the name of a TFDS dataset
  and tfds_captions the number of captions of an image that are used; 0: all of them.
  names: "train", "val", "test" -> the split's name in its dataset. region_dim: number of features
  of a region; None for a model of pixels.
  """

  train_dir: str
  eval_dir: str
  tfds: str
  tfds_captions: int
  names: Mapping[str, str]
  region_dim: int | None = None

  def open(self, key: str) -> records.Split | mix.Joined:
    """Opens "train", "val" or "test". Raises DatasetError, ValueError."""
    folders = _folders(self.train_dir if key == "train" else self.eval_dir)
    if len(folders) == 1:
      return self._open(folders[0], self.names[key])
    if key == "train":
      return mix.Joined([self._open(folder, self.names[key]) for folder in folders], folders)
    raise DatasetError(
      f"config.data.dir and eval_dir name several datasets to evaluate: {', '.join(folders)}; set "
      f"config.data.eval_dir to the one whose split {self.names[key]!r} is used as {key}"
    )

  def _open(self, folder: str, split: str) -> records.Split:
    if not folder and self.tfds:
      return records.open_tfds(self.tfds, split, max_captions=self.tfds_captions or None)
    if not folder:
      raise DatasetError(
        "config.data.dir is empty: name the folder of a dataset written by tools/prepare_data.py, "
        "or set config.data.tfds to the name of a TFDS dataset"
      )
    path = shapes.ensure(data_home()) if folder == "shapes" else folder
    found = records.open_split(path, split)
    if self.region_dim and found.region_dim != self.region_dim:
      has = f"regions of {found.region_dim} numbers" if found.region_dim else "no regions"
      raise DatasetError(
        f"{path}: split {found.name!r} has {has}, and config.model.image.features is "
        f"{self.region_dim}: write it with `python tools/prepare_data.py regions`, or set the two "
        "to agree"
      )
    return found


@dataclasses.dataclass(eq=False, kw_only=True)
class Inputs:
  """What a run reads. Splits are opened on first use, which raises DatasetError or ValueError.

  Either `regions` is set, or `transform` with `augment` (None: training images are transformed as
  in evaluation). batch_size and eval_batch_size are global. max_bad_fraction: fraction of the
  training records that may be unreadable; eval_max_bad_fraction: of an evaluated split. The other
  fields are the arguments of `pipeline.train_batches`.
  """

  datasets: Datasets
  tokenizer: text.Tokenizer | None  # None for a model without texts
  text_length: int
  truncate: bool
  transform: image.Transform | None
  augment: image.Augment | None
  regions: pipeline.Regions | None
  batch_size: int
  eval_batch_size: int
  seed: int
  captions: order.Captions
  mix: order.Mix
  max_bad_fraction: float
  eval_max_bad_fraction: float
  max_pixels: int
  threads: int | None
  batch_sharding: NamedSharding | None
  _splits: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  def split(self, name: str) -> records.Split | mix.Joined:
    """The open split "train", "val" or "test".

    "train" is joined where config.data.dir names several datasets; the others are of eval_dir.
    """
    if name not in self._splits:
      self._splits[name] = self.datasets.open(name)
    return self._splits[name]

  def samples(self) -> int:
    """Training samples of all datasets."""
    return sum(mix.sample_counts(self.split("train"), self.captions))

  def steps_per_epoch(self) -> int:
    """Whole batches of an epoch. Raises ConfigError if one of several datasets has none."""
    if self.samples() < self.batch_size:
      return 0
    mixture = mix.mixture(self.split("train"), self.captions, self.mix, self.batch_size, self.seed)
    return mixture.steps_per_epoch

  def fingerprint(self) -> str:
    """Hash of the training data and of how they are mixed; a resumed run must find the same."""
    split = self.split("train")
    if not isinstance(split, mix.Joined):
      return split.fingerprint
    return hashlib.sha256(f"{self.mix}\n{split.fingerprint}".encode()).hexdigest()

  def check_processes(self, *keys: str) -> None:
    """Raises ProcessError if the processes of a run see different data in these splits."""
    found = {f"split {self.datasets.names[key]!r}": self.split(key).fingerprint for key in keys}
    processes.check_equal("data", found)

  def train(self, step: int) -> Iterator[Mapping[str, np.ndarray]]:
    """This process's rows of global batches step, step + 1, ... without end."""
    return self._train_batches(
      step,
      self.batch_size,
      tokenizer=self.tokenizer,
      text_length=self.text_length,
      truncate=self.truncate,
      captions=self.captions,
      mix=self.mix,
    )

  def labelled(self, batch_size: int, step: int) -> Iterator[Mapping[str, np.ndarray]]:
    """`train` for supervised learning: batches of images with `label` instead of captions."""
    return self._train_batches(step, batch_size, tokenizer=None, text_length=0, captions="none")

  def _train_batches(self, step: int, batch_size: int, **texts) -> pipeline.Stream:
    return pipeline.train_batches(
      self.split("train"),
      batch_size=batch_size,
      image_transform=self.transform,
      augment=self.augment,
      regions=self.regions,
      seed=self.seed,
      step=step,
      max_bad_fraction=self.max_bad_fraction,
      max_pixels=self.max_pixels,
      threads=self.threads,
      rows=self.local_rows(batch_size),
      **texts,
    )

  def local_rows(self, batch_size: int) -> np.ndarray | None:
    """int [b]: rows of a global batch that this process reads; None: all."""
    if self.batch_sharding is None:
      return None
    return sharding.local_rows(self.batch_sharding, batch_size)

  def images(
    self, split: records.Split, training: bool = False
  ) -> Iterator[Mapping[str, np.ndarray]]:
    """All images of a split in order. training: allows max_bad_fraction of them to be bad."""
    return pipeline.eval_images(
      split,
      batch_size=self.eval_batch_size,
      image_transform=self.transform,
      regions=self.regions,
      max_bad_fraction=self.max_bad_fraction if training else self.eval_max_bad_fraction,
      max_bad_key=f"data.{'' if training else 'eval_'}max_bad_fraction",
      max_pixels=self.max_pixels,
      threads=self.threads,
      rows=self.local_rows(self.eval_batch_size),
    )

  def texts(self, split: records.Split) -> Iterator[Mapping[str, np.ndarray]]:
    """All captions of a split in order."""
    return pipeline.eval_texts(
      split,
      batch_size=self.eval_batch_size,
      tokenizer=self.tokenizer,
      text_length=self.text_length,
      truncate=self.truncate,
      max_bad_fraction=self.eval_max_bad_fraction,
      rows=self.local_rows(self.eval_batch_size),
    )


def _tokenizer(section: Any, vocab: int) -> text.Tokenizer:
  """The tokenizer of config.text. Raises ConfigError if its vocabulary exceeds the model's."""
  tokenizer = text.tokenizer_from(section)
  if tokenizer.vocab_size > vocab:
    raise ConfigError(
      f"config.model.text.vocab is {vocab}, but the tokenizer {section.tokenizer!r} has "
      f"{tokenizer.vocab_size} ids: set them to agree"
    )
  return tokenizer


def _transform(section: Any, model: Any) -> image.Transform:
  """The evaluation transform of config.data.image for a model of pixels."""
  if not (size := model.image.get("size")):
    raise ConfigError(
      f"the model {model.system!r} reads regions: set config.data.regions to the largest number of "
      "regions of an image"
    )
  return image.Transform(
    size=section.size or size,
    crop=size,
    resize=section.resize,
    interpolation=section.interpolation,
    rgb_first=section.rgb_first,
    exif=section.exif,
  )


def _augment(data: Any, model: Any, transform: image.Transform) -> image.Augment | None:
  """The augmentation of config.data; None if nothing is on."""
  options = {key: data[key] for key in AUGMENT}
  if data.erase:
    options |= _pixel_statistics(model)
  try:
    return augment.build(transform, **options)
  except ValueError as e:
    raise ConfigError(f"config.data.{e}") from None


def _pixel_statistics(model: Any) -> dict[str, tuple[float, ...]]:
  """mean and std by which the model normalises pixels on the device."""
  build = registry.system_module(model.system).build
  abstract = nnx.eval_shape(lambda: build(model.to_dict(), rngs=nnx.Rngs(0)))
  return {"mean": abstract.mean, "std": abstract.std}


def _regions(data: Any, model: Any) -> pipeline.Regions | None:
  """None for a model of pixels. Raises ConfigError for keys that do not fit together."""
  width = model.image.get("features")
  if not data.regions:
    return None
  if data.regions < 0 or not width:
    raise ConfigError(
      f"config.data.regions is {data.regions}: expected a number above 0 for a model of regions "
      f"(config.model.image.features), 0 for one of pixels; the model is {model.system!r}"
    )
  changes = {key: data[key] for key in ("grayscale", "blur", "flip", "auto_augment", "erase")}
  changes |= {"jitter": any(data.jitter), "rand_augment": data.rand_augment[0]}
  changes["crop"] = data.crop != "center"
  if on := [key for key, value in changes.items() if value]:
    raise ConfigError(
      f"config.data.{on[0]} is {data[on[0]]!r}, which changes pixels, and config.data.regions is "
      f"{data.regions}: region features are not augmented; leave it at its default"
    )
  return pipeline.Regions(data.regions, width, data.truncate_regions)


def _folders(names: str) -> list[str]:
  """config.data.dir or eval_dir, split at commas. Raises ConfigError."""
  found = [name.strip() for name in os.fspath(names).split(",")]
  if len(found) > 1 and ("" in found or len(set(found)) < len(found)):
    raise ConfigError(
      f"config.data.dir or eval_dir is {names!r}: expected names of different datasets with a "
      "comma between them"
    )
  return found
