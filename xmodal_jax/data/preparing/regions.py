"""Joins region features to the captions of their images, and checks them."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from etils import epath

from xmodal_jax.data import image as image_lib
from xmodal_jax.data.preparing import detections
from xmodal_jax.data.preparing.annotations import AnnotatedImage, Splits, fields
from xmodal_jax.data.preparing.builder import Example
from xmodal_jax.data.tfrecord import DatasetError

_NAMED = 5  # images that a report names for each kind of fault

Key = Literal["auto", "id", "stem"]


def key_of(image: AnnotatedImage, key: Key) -> str:
  """The name of an image in a detector's files.

  "id": its id in the annotations. "stem": its file name without suffix. "auto": its position in the
  list of annotations if these number images so (Flickr30K), else its id.
  """
  if key == "stem":
    return epath.Path(image.filename).stem
  number = image.image_id if key == "id" or image.position is None else image.position
  return str(number)


class Report:
  """Counts, errors and warnings, with the first images of each kind."""

  def __init__(self):
    self.images: dict[str, int] = {}  # of each split
    self.captions = self.records = self.regions = 0
    self.fewest, self.most = math.inf, 0  # regions of an image
    self.kinds: collections.Counter[str] = collections.Counter()  # shapes and types of features
    self.errors: dict[str, list[str]] = {}
    self.warnings: dict[str, list[str]] = {}
    self.counts: collections.Counter[str] = collections.Counter()

  def add(self, kind: str, name: str, warning: bool = False) -> None:
    self.counts[kind] += 1
    named = (self.warnings if warning else self.errors).setdefault(kind, [])
    if len(named) < _NAMED:
      named.append(name)

  def _listed(self, found: Mapping[str, list[str]]) -> str:
    out = ""
    for kind, names in found.items():
      more = self.counts[kind] - len(names)
      out += f"\n  {self.counts[kind]} x {kind}:" + "".join(f"\n    {n}" for n in names)
      out += f"\n    and {more} more" if more else ""
    return out

  def __str__(self) -> str:
    splits = ", ".join(f"{name} {n}" for name, n in self.images.items())
    out = f"{sum(self.images.values())} images ({splits}), {self.captions} captions"
    if self.records:
      kinds = ", ".join(f"{kind} x {n}" for kind, n in self.kinds.items())
      out += f"\n{self.records} read: {self.regions} regions, {self.fewest} to {self.most} of an "
      out += f"image; features of {kinds}"
    out += f"\nwarnings:{self._listed(self.warnings) or ' none'}"
    return f"{out}\nerrors:{self._listed(self.errors) or ' none'}"

  def check(self) -> None:
    """Raises DatasetError if there are errors."""
    if self.errors:
      total = sum(self.counts[kind] for kind in self.errors)
      raise DatasetError(f"{total} errors in the region features:{self._listed(self.errors)}")


@dataclasses.dataclass(frozen=True)
class _Item:
  image: AnnotatedImage
  key: str
  size: detections.Size | None  # None: that of the detector's file


class RegionDataset:
  """Images with captions and regions.

  The constructor finds missing images, `examples` and `check` read the features. All faults are
  added to `report`.
  """

  def __init__(
    self,
    splits: Splits,
    reader: detections.Reader,
    *,
    sizes: detections.Sizes | None = None,
    read_images: bool = False,
    key: Key = "auto",
    dtype: npt.DTypeLike = np.float32,
  ):
    """sizes: of the images; None: those of the annotations, of the detector's files, or, with
    read_images, of the image files. dtype: stored dtype of the features."""
    self._reader, self._read_images, self._dtype = reader, read_images, np.dtype(dtype)
    self.report, self._width, used = Report(), None, set()
    self._items: dict[str, list[_Item]] = {}
    for split, images in splits.items():
      self.report.images[split] = len(images)
      self.report.captions += sum(len(image.captions) for image in images)
      self._items[split] = [
        self._item(image, key_of(image, key), split, sizes, used) for image in images
      ]
    unused = reader.ids - used
    for name in sorted(unused)[:_NAMED]:
      self.report.add("ids without captions, left out", name, warning=True)
    if unused:
      self.report.counts["ids without captions, left out"] = len(unused)

  def _item(
    self,
    image: AnnotatedImage,
    key: str,
    split: str,
    sizes: detections.Sizes | None,
    used: set[str],
  ) -> _Item:
    name = f"{image.filename} of split {split!r}: id {key} in {self._reader.where(key)}"
    if key in used:
      self.report.add("ids of two images", name)
    used.add(key)
    if key not in self._reader.ids:
      self.report.add("missing ids", name)
    size = sizes.of(image, key) if sizes else image.size
    if sizes and size is None:
      self.report.add("images without a size in --sizes", name)
    return _Item(image, key, size)

  @property
  def region_dim(self) -> int:
    """F, the number of features of a region; the first image determines it."""
    self.report.check()
    if self._width is None:
      item = next(item for items in self._items.values() for item in items)
      features = self._reader.read(item.key).features
      if features.ndim != 2:
        where = self._reader.where(item.key)
        raise DatasetError(f"{where}: features of the shape {features.shape}, expected [R, F]")
      self._width = features.shape[1]
    return self._width

  def check(self) -> Report:
    """Reads all features, without stopping at errors, and returns the report."""
    for items in self._items.values():
      for item in items:
        if item.key in self._reader.ids:
          try:
            self._read(item)
          except DatasetError as e:
            self.report.add("unreadable files", str(e))
    return self.report

  def examples(self, split: str) -> Iterator[Example]:
    """Examples for `builder`. Raises DatasetError, naming file and id, at the first bad image."""
    self.report.check()
    for item in self._items[split]:
      detected, size = self._read(item)
      self.report.check()
      example = fields(item.image)
      example |= {"regions": detected.features, "boxes": detected.boxes.astype(np.float32)}
      yield example | {"image_width": size[0], "image_height": size[1]}

  def _read(self, item: _Item) -> tuple[detections.Detected, detections.Size | None]:
    """The regions of an image and its size. Adds their faults to the report."""
    detected = self._reader.read(item.key)
    size, name = item.size or detected.size, f"{self._reader.where(item.key)}, id {item.key}"
    if not size and self._read_images:
      size = _image_size(item.image.path)
    faults = _faults(detected, size, self._width, self._dtype)
    if size and detected.size and size != detected.size:
      faults.append(("sizes that differ", f"{detected.size} there, {size} elsewhere", False))
    for kind, detail, warning in faults:
      self.report.add(kind, f"{name}: {detail}", warning)
    report, features = self.report, detected.features
    report.kinds[f"{features.dtype}, width {features.shape[-1] if features.ndim else 0}"] += 1
    if features.ndim == 2:
      self._width = self._width or features.shape[1]
      report.records, report.regions = report.records + 1, report.regions + len(features)
      report.fewest = min(report.fewest, len(features))
      report.most = max(report.most, len(features))
    return detected, size


def _faults(
  found: detections.Detected, size: detections.Size | None, width: int | None, dtype: np.dtype
) -> list[tuple[str, str, bool]]:
  """(kind, detail, whether it is a warning) of each fault of an image's regions.

  width: expected number of features; None: any.
  """
  features, boxes = found.features, found.boxes
  wrong = features.ndim != 2 or features.dtype.kind != "f" or not features.size
  if wrong or features.shape[1] != (width or features.shape[1]):
    want = f"float [R, {width or 'F'}] with R of at least 1"
    return [("features of another shape", f"{features.dtype} {features.shape}, not {want}", False)]
  if boxes.shape != (len(features), 4) or boxes.dtype.kind not in "fiu":
    detail = f"{boxes.dtype} {boxes.shape}, not numbers ({len(features)}, 4)"
    return [("boxes of another shape", detail, False)]
  if not size:
    detail = "neither in the annotations nor there; pass --sizes or --images"
    return [("images of unknown size", detail, False)]
  out = []
  finite = np.isfinite(features).all(1)
  if not finite.all():
    out.append(("features that are not finite", f"region {finite.argmin()}", False))
  elif (largest := np.abs(features).max()) > np.finfo(dtype).max:
    out.append((f"features beyond {dtype}", f"{largest:g}; pass --dtype float32", False))
  if not np.isfinite(boxes).all():
    return [
      *out,
      ("boxes that are not finite", f"region {np.isfinite(boxes).all(1).argmin()}", False),
    ]
  order = (boxes[:, :2] < boxes[:, 2:]).all(1)
  if not order.all():
    row = order.argmin()
    detail = f"region {row} is {boxes[row].tolist()}, expected x1 < x2 and y1 < y2"
    out.append(("boxes out of order", detail, False))
  if boxes.max() <= 1 and min(size) > 1:
    out.append(("boxes in parts of the image", "expected pixels", False))
  # Pixels by which each box exceeds an edge.
  beyond = np.maximum(-boxes[:, :2], boxes[:, 2:] - np.array(size)).max(1)
  if (far := beyond.max()) > 0:
    row = beyond.argmax()
    detail = f"region {row} is {boxes[row].tolist()} in {size[0]} x {size[1]} pixels"
    kind = "boxes outside of the image" if far >= 1 else "boxes less than a pixel outside"
    out.append((kind, detail, bool(far < 1)))
  return out


def _image_size(path: epath.Path) -> detections.Size:
  try:
    with path.open("rb") as f:
      return image_lib.size(f)
  except (image_lib.DecodeError, OSError) as e:
    raise DatasetError(f"{path}: no image to take the size from ({e}); check --images") from e
