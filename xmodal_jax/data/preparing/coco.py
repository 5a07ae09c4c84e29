"""Readers of COCO's captions: with the id lists of VSE++, or with a split for each file."""

import dataclasses
import io
import logging
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from xmodal_jax.data.preparing import values
from xmodal_jax.data.preparing.annotations import Splits
from xmodal_jax.data.preparing.grouping import Blank, Grouper
from xmodal_jax.data.preparing.listing import Listing
from xmodal_jax.data.tfrecord import DatasetError

LAYOUTS = (
  "captions_{train,val}2014.json with coco_{train,restval,dev,test}_ids.npy; captions_*.json "
  "alone, a split of each, like those of 2017; or such a file itself. With a Karpathy json use the "
  "source karpathy, whose images may be those of 2017"
)
_LISTS = (("train", "train"), ("restval", "restval"), ("dev", "val"), ("test", "test"))
_LAYOUT = "COCO's {'images': [{'id', 'file_name'}], 'annotations': [{'id', 'image_id', 'caption'}]}"
_NAME = re.compile(r"COCO_(train|val|test)2014_(\d{12}\..+)")


def places(name: str, folder: str | None = None) -> Iterator[str]:
  """Where an image of COCO may be below the folder of the images, the likeliest place first.

  name: like COCO_val2014_000000391895.jpg; others have one place, or two with a folder. The files
  of 2017 are the same pictures without the first part of their name.
  """
  yield name
  if folder:
    yield f"{folder}/{name}"
  if match := _NAME.fullmatch(name):
    yield f"{match[1]}2014/{name}"
    yield from (match[2], f"train2017/{match[2]}", f"val2017/{match[2]}")


@dataclasses.dataclass(frozen=True)
class _Image:
  name: str
  path: epath.Path
  size: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class _Caption:
  where: str
  image: int
  text: str


class _Files:
  """The images and captions of captions_*.json files, by their ids."""

  def __init__(self, images: epath.Path):
    self._folder, self._listing = images, Listing()
    self.images: dict[int, _Image] = {}
    self.captions: dict[int, _Caption] = {}

  def read(self, file: epath.Path, subfolder: str) -> list[int]:
    """Adds a file, and returns the ids of its captions. subfolder: where its images may be, too."""
    data = values.read_json(file)
    values.keys(f"{file}", data, ("images", "annotations"), _LAYOUT)
    own = self._folder / subfolder
    folders = (self._folder, own) if subfolder and own.is_dir() else (self._folder,)
    for i, item in enumerate(values.entries(f"{file}: images", data["images"], _LAYOUT)):
      self._add_image(f"{file}: images[{i}]", item, folders)
    found = []
    listed = values.entries(f"{file}: annotations", data["annotations"], _LAYOUT)
    for i, item in enumerate(listed):
      found.append(self._add_caption(f"{file}: annotations[{i}]", item))
    return found

  def _add_image(self, where: str, item: object, folders: tuple[epath.Path, ...]) -> None:
    values.keys(where, item, ("id", "file_name"), _LAYOUT)
    number = values.integer(where, "id", item["id"])
    name = values.file_name(where, "file_name", item["file_name"])
    paths = [folder / name for folder in folders]
    if len(folders) > 1:
      # An image of the folder itself is preferred, one of the subfolder is the likeliest.
      path = paths[0] if self._listing.is_file(paths[0]) else paths[1]
    else:
      path = self._listing.first(self._folder / place for place in places(name))
    new = _Image(name, path, size_of(item))
    if (old := self.images.setdefault(number, new)) != new:
      raise DatasetError(f"{where}: id {number} is of {name}, and also of {old.name}; correct it")

  def _add_caption(self, where: str, item: object) -> int:
    values.keys(where, item, ("id", "image_id", "caption"), _LAYOUT)
    number, image = (values.integer(where, key, item[key]) for key in ("id", "image_id"))
    if image not in self.images:
      raise DatasetError(f"{where} is of image {image}, not in 'images'")
    new = _Caption(where, image, values.text(where, "caption", item["caption"]))
    if (old := self.captions.setdefault(number, new)) is not new:
      raise DatasetError(f"{where}: id {number} is also that of {old.where}; ids must differ")
    return number

  def add(
    self, grouper: Grouper, split: str, ids: list[int], positions: bool, file: epath.Path
  ) -> None:
    """Adds captions to `grouper`, in the order of the list `ids` of `file`."""
    for position, number in enumerate(ids):
      caption = self.captions[number]
      image = self.images[caption.image]
      grouper.add(
        f"{file}: caption {number}",
        split,
        image.name,
        image.path,
        [caption.text],
        image_id=caption.image,
        caption_ids=[number],
        positions=[position] if positions else (),
        size=image.size,
      )


def size_of(item: dict) -> tuple[int, int] | None:
  """(width, height) of an image's entry, if it has them."""
  size = item.get("width"), item.get("height")
  return size if all(type(side) is int and 0 < side < 2**31 for side in size) else None


def read_coco(
  annotations: epath.PathLike,
  images: epath.PathLike,
  dev_captions: int | None = None,
  blank: Blank = "keep",
) -> Splits:
  """COCO's captions_*.json, in one of these layouts.

  A folder with captions_{train,val}2014.json and VSE++'s coco_{train,restval,dev,test}_ids.npy: all
  captions of an image make one image, in the place of the first of them in the id list; captions
  keep their positions in the list, and dev becomes "val". A folder with other captions_*.json, or
  one such file: the split of a file is the word train, val or test in its name, else "train".

  The image is images/file_name, else in a subfolder of the name of its part, like train2014.
  dev_captions: number of captions of dev to use; None for all. Raises DatasetError, naming file and
  entry.
  """
  path, images = epath.Path(annotations), epath.Path(images)
  if dev_captions is not None and dev_captions < 1:
    raise DatasetError(f"dev_captions {dev_captions}: expected 1 or more, or all")
  if path.is_file():
    return _by_file([path], images, dev_captions, blank)
  if not path.is_dir():
    raise DatasetError(f"{path}: no such file or folder; expected one with {LAYOUTS}")
  names = {p.name for p in path.iterdir()}
  lists = [name for name in names if re.fullmatch(r"coco_\w+_ids\.npy", name)]
  files = sorted(n for n in names if re.fullmatch(r"captions_.*\.json(\.gz)?", n))
  if not lists and not any("2014" in name for name in files):
    if not files:
      raise DatasetError(f"{path}: no captions_*.json in it; expected {LAYOUTS}")
    return _by_file([path / name for name in files], images, dev_captions, blank)
  return _by_lists(path, images, dev_captions, blank)


def _by_lists(folder: epath.Path, images: epath.Path, dev: int | None, blank: Blank) -> Splits:
  files, grouper = _Files(images), Grouper(blank)
  for part in ("train2014", "val2014"):
    files.read(folder / f"captions_{part}.json", part)
  for stem, split in _LISTS:
    file = folder / f"coco_{stem}_ids.npy"
    ids = _id_list(file, files.captions)[: dev if stem == "dev" else None]
    files.add(grouper, split, ids, True, file)
  return grouper.splits(split for _, split in _LISTS)


def _by_file(paths: list[epath.Path], images: epath.Path, dev: int | None, blank: Blank) -> Splits:
  if dev is not None:
    raise DatasetError(
      f"--dev_captions is for a folder with id lists, but {paths[0]} is read without them"
    )
  grouper = Grouper(blank, ids="split")  # files of one's own may each count from 0
  for path in paths:
    part = path.name.removesuffix(".gz").removesuffix(".json").removeprefix("captions_")
    split = next((s for s in ("train", "val", "test") if s in part), "train")
    logging.info("%s: all of it is split %r, as there are no id lists", path, split)
    files = _Files(images)
    ids = files.read(path, part)
    if not ids:
      raise DatasetError(f"{path}: the list 'annotations' is empty; expected {_LAYOUT}")
    files.add(grouper, split, ids, False, path)
    if left := len(files.images) - len({caption.image for caption in files.captions.values()}):
      logging.info("%s: %d images have no captions and are left out", path, left)
  return grouper.splits()


def _id_list(file: epath.Path, captions: dict) -> list[int]:
  """The caption ids [C] of an .npy file; each must be a key of `captions`."""
  remedy = "expected an integer array [C] of distinct caption ids; take the file of the release"
  if not file.exists():
    raise DatasetError(f"{file}: no such file; {remedy}, or one of these layouts: {LAYOUTS}")
  try:
    ids = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
  except Exception as e:  # NumPy raises ValueError, EOFError and others
    raise DatasetError(f"{file}: not an npy file ({e}); {remedy}") from e
  if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
    shape = f"shape {ids.shape} of {ids.dtype}" if isinstance(ids, np.ndarray) else "several arrays"
    raise DatasetError(f"{file}: has {shape}; {remedy}")
  found, counts = np.unique(ids, return_counts=True)
  if (counts > 1).any():
    raise DatasetError(f"{file}: id {found[counts > 1][0]} occurs twice or more; {remedy}")
  ids = ids.tolist()
  if unknown := [i for i in ids if i not in captions]:
    raise DatasetError(
      f"{file}: {len(unknown)} of {len(ids)} ids are in neither captions_train2014.json nor "
      f"captions_val2014.json, first {unknown[:5]}; {remedy}"
    )
  return ids
