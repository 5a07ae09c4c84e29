"""Readers of datasets that come as one folder: ZeroVL's csv files, and a folder per class."""

import logging
import re
from collections.abc import Iterator, Mapping

from etils import epath

from xmodal_jax.data.preparing.annotations import AnnotatedImage, Splits
from xmodal_jax.data.preparing.sources import rows
from xmodal_jax.data.tfrecord import DatasetError

CSV_FILES = {"train": "train_anno.csv", "valid": "valid_anno.csv"}
_CSV_COLUMNS = ("image", "image_id", "caption", "caption_id")


def read_csv(root: epath.PathLike, valid_split: str = "val") -> Splits:
  """ZeroVL's layout: train_anno.csv of images in train/, valid_anno.csv of images in valid/.

  A row per caption, with columns image, image_id, caption and caption_id. The rows of an image
  make one, at the place of the first, and each caption keeps its place in the file. One of the
  files may be absent. valid_split: what the split of valid_anno.csv is called here.
  """
  root, splits = epath.Path(root), {}
  if valid_split == "train":
    raise DatasetError("valid_split 'train' is the split of train_anno.csv; choose val or test")
  for part, name in CSV_FILES.items():
    file = root / name
    if file.exists():
      splits[valid_split if part == "valid" else part] = _csv_images(file, root / part)
    else:
      logging.info("%s is not there: no split of it", file)
  if not splits:
    raise DatasetError(f"{root}: neither {' nor '.join(CSV_FILES.values())} in it; check --root")
  return splits


def _csv_images(file: epath.Path, images: epath.Path) -> list[AnnotatedImage]:
  found: dict[str, dict] = {}
  owner: dict[int, str] = {}  # image_id -> image
  for position, (where, row) in enumerate(rows(file)):
    if missing := [c for c in _CSV_COLUMNS if not row.get(c)]:
      raise DatasetError(
        f"{where}: nothing in column {missing[0]!r}; expected the columns {list(_CSV_COLUMNS)}, "
        f"and there are {list(row)}"
      )
    name = row["image"]
    image_id, caption_id = (_int64(where, row, c) for c in ("image_id", "caption_id"))
    entry = found.setdefault(name, {"id": image_id, "where": where, "captions": []})
    other = found[owner.setdefault(image_id, name)]
    if entry["id"] != image_id:
      raise DatasetError(
        f"{where}: image {name} has image_id {image_id}, but {entry['id']} at {entry['where']}; "
        "all rows of an image have the same"
      )
    if other is not entry:
      raise DatasetError(
        f"{where}: image_id {image_id} is of image {name}, but of {owner[image_id]} at "
        f"{other['where']}; each image has its own"
      )
    entry["captions"].append((row["caption"], caption_id, position))
  if not found:
    raise DatasetError(f"{file}: no rows; expected a row per caption after a line of column names")
  return [
    AnnotatedImage(name, images / name, entry["id"], *zip(*entry["captions"], strict=True))
    for name, entry in found.items()
  ]


def _int64(where: str, row: dict, column: str) -> int:
  try:
    value = int(row[column])
  except ValueError:
    value = None
  if value is None or not -(2**63) <= value < 2**63:
    raise DatasetError(f"{where}: {column} is {row[column]!r}, expected an integer of 64 bits")
  return value


TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def read_folders(
  root: epath.PathLike, names: epath.PathLike | None = None
) -> tuple[Splits, tuple[str, ...]]:
  """Images of root/train/CLASS/ and, if it is there, root/val/CLASS/; -> splits, class names.

  Label i is the i-th folder of train/ in alphabetical order, by code points. Images may lie in
  folders inside, and are ordered by their paths; ids count from 0 over both splits. Files of other
  types and folders whose name begins with a dot are left out and reported. names: a file with a
  line `folder<TAB>readable name` for each class; without it the names are those of the folders.
  """
  root = epath.Path(root)
  if not (root / "train").is_dir():
    raise DatasetError(f"{root / 'train'}: no such folder; expected train/CLASS/ below --root")
  classes = _classes(root / "train")
  labels = {folder: label for label, folder in enumerate(classes)}
  if not (root / "val").is_dir():
    logging.info("%s is not there: no split 'val'", root / "val")
    parts = {"train": classes}
  else:
    given = _classes(root / "val")
    parts = {"train": classes, "val": given}
    if unknown := [folder for folder in given if folder not in labels]:
      raise DatasetError(
        f"{root / 'val' / unknown[0]}: no such class in {root / 'train'} ({len(unknown)} such "
        "folders); the classes are those of train/"
      )
    if absent := [folder for folder in classes if folder not in given]:
      logging.info("%s has no images of %d classes, first %s", root / "val", len(absent), absent[0])
  splits: Splits = {}
  for part, present in parts.items():
    images = splits[part] = []
    others: list[epath.Path] = []
    for folder in present:
      before, first = len(images), sum(map(len, splits.values()))
      for i, path in enumerate(_files(root / part / folder, others)):
        name = str(path.relative_to(root / part))
        images.append(AnnotatedImage(name, path, first + i, (), label=labels[folder]))
      if len(images) == before:
        raise DatasetError(
          f"{root / part / folder}: no image in it, expected files of {', '.join(TYPES)}; "
          "add some or remove the folder"
        )
    if others:
      text = "%s: left out %d files of other types, first %s"
      logging.info(text, root / part, len(others), others[0])
  return splits, _names(classes, names)


def _classes(folder: epath.Path) -> list[str]:
  found = sorted(p.name for p in folder.iterdir() if p.is_dir())
  if hidden := [name for name in found if name.startswith(".")]:
    logging.info("%s: left out the hidden folders %s", folder, hidden)
  if not (found := [name for name in found if not name.startswith(".")]):
    raise DatasetError(f"{folder}: no folder in it; expected one per class")
  return found


def _files(folder: epath.Path, others: list[epath.Path]) -> Iterator[epath.Path]:
  """Images at any depth in the order of their paths; what is no image is added to `others`."""
  for path in sorted(folder.iterdir(), key=lambda p: p.name):
    # Hidden files may be called .jpg and be none. The type comes first: asking whether it is a
    # folder costs a call to the disk.
    hidden = path.name.startswith(".")
    if path.suffix.lower() in TYPES and not hidden:
      yield path
    elif not hidden and path.is_dir():
      yield from _files(path, others)
    else:
      others.append(path)


def _names(classes: list[str], file: epath.PathLike | None) -> tuple[str, ...]:
  if file is None:
    return tuple(classes)
  given = _name_lines(epath.Path(file))
  if absent := [folder for folder in classes if folder not in given]:
    raise DatasetError(
      f"{file}: no line for {len(absent)} of {len(classes)} classes, first {absent[0]!r}; expected "
      "'folder<TAB>readable name' for each"
    )
  if extra := len(given) - len(classes):
    logging.info("%s: %d lines are of folders that are not there", file, extra)
  owner: dict[str, str] = {}
  for folder in classes:
    if (first := owner.setdefault(given[folder], folder)) != folder:
      raise DatasetError(
        f"{file}: classes {first!r} and {folder!r} are both called {given[folder]!r}; give each a "
        "name of its own"
      )
  return tuple(given[folder] for folder in classes)


def _name_lines(file: epath.Path) -> Mapping[str, str]:
  if not file.exists():
    raise DatasetError(f"{file}: no such file; check --names")
  given: dict[str, str] = {}
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise DatasetError(f"{file}: not UTF-8 text ({e}); save it so") from e
  for number, line in enumerate(re.split(r"\r?\n", text), 1):
    if not line.strip():
      continue
    folder, tab, name = (part.strip(" ") for part in line.partition("\t"))
    if not (folder and tab and name):
      raise DatasetError(f"{file}:{number}: {line!r}, expected 'folder<TAB>readable name'")
    if given.setdefault(folder, name) != name:
      raise DatasetError(f"{file}:{number}: {folder!r} has another name in an earlier line")
  return given
