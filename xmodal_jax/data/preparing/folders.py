"""Readers of datasets that are one folder: ZeroVL's csv files, and a folder per class."""

import logging
import os
import re
from collections.abc import Iterator, Mapping

from etils import epath

from xmodal_jax.data.preparing import values
from xmodal_jax.data.preparing.annotations import AnnotatedImage, Splits
from xmodal_jax.data.preparing.grouping import Blank, Grouper
from xmodal_jax.data.preparing.tables import rows
from xmodal_jax.data.tfrecord import DatasetError

CSV_FILES = {"train": "train_anno.csv", "valid": "valid_anno.csv"}
_CSV_COLUMNS = ("image", "image_id", "caption", "caption_id")


def read_csv(root: epath.PathLike, valid_split: str = "val", blank: Blank = "error") -> Splits:
  """ZeroVL's layout: train_anno.csv of images in train/, valid_anno.csv of images in valid/.

  Each row is a caption, with columns image, image_id, caption and caption_id. Rows of the same
  image become one image, in the place of the first row; captions keep their positions in the file.
  One of the files may be absent. valid_split: name of the split of valid_anno.csv.

  Raises DatasetError, naming file and line.
  """
  root, grouper, found = epath.Path(root), Grouper(blank, ids="split"), []
  if valid_split == "train":
    raise DatasetError("valid_split 'train' is the split of train_anno.csv; choose val or test")
  for part, name in CSV_FILES.items():
    file, split = root / name, valid_split if part == "valid" else part
    if file.exists():
      _add_csv(file, root / part, split, grouper)
      found.append(split)
    else:
      logging.info("%s does not exist: no split of it", file)
  if not found:
    raise DatasetError(f"{root}: neither {' nor '.join(CSV_FILES.values())} in it; check --root")
  return grouper.splits(found)


def _add_csv(file: epath.Path, images: epath.Path, split: str, grouper: Grouper) -> None:
  position = -1
  for position, (where, row) in enumerate(rows(file, known=_CSV_COLUMNS)):
    if missing := [c for c in _CSV_COLUMNS if not row.get(c)]:
      raise DatasetError(
        f"{where}: nothing in column {missing[0]!r}; expected the columns {list(_CSV_COLUMNS)}, "
        f"and there are {list(row)}"
      )
    name = values.file_name(where, "image", row["image"])
    image_id, caption_id = (values.integer(where, c, row[c]) for c in ("image_id", "caption_id"))
    grouper.add(
      where,
      split,
      name,
      images / name,
      [values.text(where, "caption", row["caption"])],
      image_id=image_id,
      caption_ids=[caption_id],
      positions=[position],
    )
  if position < 0:
    raise DatasetError(f"{file}: no rows; expected a row per caption after a line of column names")


TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def read_folders(
  root: epath.PathLike, names: epath.PathLike | None = None
) -> tuple[Splits, tuple[str, ...]]:
  """Images of root/train/CLASS/ and, if it exists, root/val/CLASS/; -> (splits, class names).

  Label i is the i-th folder of train/, sorted by code points. Images may be in subfolders and are
  sorted by path; ids count from 0 over both splits. Files of other types and folders whose name
  begins with a dot are left out and logged. names: a file with a line `folder<TAB>readable name`
  for each class; None: the names of the folders.

  Raises DatasetError, naming the folder or line.
  """
  root = epath.Path(root)
  if not (root / "train").is_dir():
    raise DatasetError(f"{root / 'train'}: no such folder; expected train/CLASS/ below --root")
  classes = _classes(root / "train")
  labels = {folder: label for label, folder in enumerate(classes)}
  parts = {"train": classes}
  if (root / "val").is_dir():
    parts["val"] = _val_classes(root, classes)
  else:
    logging.info("%s does not exist: no split 'val'", root / "val")
  splits = Splits()
  for part, folders in parts.items():
    first = sum(map(len, splits.values()))
    splits[part] = _labelled(root / part, folders, labels, first)
  return splits, _names(classes, names)


def _val_classes(root: epath.Path, classes: list[str]) -> list[str]:
  """The folders of val/, which must be among the classes of train/."""
  found = _classes(root / "val")
  if unknown := [folder for folder in found if folder not in classes]:
    raise DatasetError(
      f"{root / 'val' / unknown[0]}: no such class in {root / 'train'} ({len(unknown)} such "
      "folders); the classes are those of train/"
    )
  if absent := [folder for folder in classes if folder not in found]:
    logging.info("%s has no images of %d classes, first %s", root / "val", len(absent), absent[0])
  return found


def _labelled(
  root: epath.Path, folders: list[str], labels: Mapping[str, int], first: int
) -> list[AnnotatedImage]:
  """The images of root/FOLDER for each folder, with ids from `first`."""
  images: list[AnnotatedImage] = []
  others: list[epath.Path] = []
  for folder in folders:
    paths = list(_files(root / folder, others))
    if not paths:
      raise DatasetError(
        f"{root / folder}: no image in it, expected files of {', '.join(TYPES)}; "
        "add some or remove the folder"
      )
    for path in paths:
      name, image_id = str(path.relative_to(root)), first + len(images)
      if not values.is_utf8(name):
        raise DatasetError(f"{root}: the name {name!r} is not UTF-8; rename it (convmv does)")
      images.append(AnnotatedImage(name, path, image_id, (), label=labels[folder]))
  if others:
    text = "%s: left out %d files of other types, first %s"
    logging.info(text, root, len(others), others[0])
  return images


def _classes(folder: epath.Path) -> list[str]:
  found = sorted(p.name for p in folder.iterdir() if p.is_dir())
  if hidden := [name for name in found if name.startswith(".")]:
    logging.info("%s: left out the hidden folders %s", folder, hidden)
  if not (found := [name for name in found if not name.startswith(".")]):
    raise DatasetError(f"{folder}: no folder in it; expected one per class")
  return found


def _files(
  folder: epath.Path, others: list[epath.Path], above: tuple[str, ...] = ()
) -> Iterator[epath.Path]:
  """Images at any depth, sorted by path; other files are appended to `others`.

  above: the real paths of the folders above, into which a link must not lead.
  """
  above = (*above, os.path.realpath(folder))
  for path in sorted(folder.iterdir(), key=lambda p: p.name):
    # Hidden .jpg files may be something else. The suffix is checked first: is_dir() costs a call to
    # the disk.
    hidden = path.name.startswith(".")
    if path.suffix.lower() in TYPES and not hidden:
      yield path
    elif hidden or not path.is_dir():
      others.append(path)
    elif os.path.realpath(path) in above:
      raise DatasetError(f"{path}: a link to a folder that it is in; remove it")
    else:
      yield from _files(path, others, above)


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
    logging.info("%s: %d lines are of folders that do not exist", file, extra)
  owner: dict[str, str] = {}
  for folder in classes:
    if (first := owner.setdefault(given[folder], folder)) != folder:
      raise DatasetError(
        f"{file}: classes {first!r} and {folder!r} are both called {given[folder]!r}; give each "
        "its own name"
      )
  return tuple(given[folder] for folder in classes)


def _name_lines(file: epath.Path) -> Mapping[str, str]:
  given: dict[str, str] = {}
  for number, line in enumerate(re.split(r"\r?\n", values.read_text(file, "--names")), 1):
    if not line.strip():
      continue
    folder, tab, name = (part.strip(" ") for part in line.partition("\t"))
    if not (folder and tab and name):
      raise DatasetError(f"{file}:{number}: {line!r}, expected 'folder<TAB>readable name'")
    if given.setdefault(folder, name) != name:
      raise DatasetError(f"{file}:{number}: {folder!r} has another name in an earlier line")
  return given
