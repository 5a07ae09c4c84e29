"""Reader of tables with a row per caption, or per image with a list of captions."""

import ast
import collections
import hashlib
import io
import itertools
import logging
import posixpath
import tokenize
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from xmodal_jax.data.preparing import coco, tables, values
from xmodal_jax.data.preparing.annotations import Splits
from xmodal_jax.data.preparing.grouping import Blank, Grouper
from xmodal_jax.data.preparing.listing import Listing
from xmodal_jax.data.tfrecord import DatasetError

# Names of columns, of which the first that exists is used. The first are this project's own; others
# are those of open_clip, of Kaggle's tables of Flickr8k and Flickr30k, and of Hugging Face's.
COLUMNS = {
  "image": ("image", "filepath", "filename", "file_name", "image_path", "image_name"),
  "caption": ("caption", "title", "raw", "text", "comment", "captions"),
  "id": ("image_id", "img_id", "imgid"),
  "split": ("split",),
}


def read_pairs(
  table: epath.PathLike,
  images: epath.PathLike,
  *,
  form: tables.Form | None = None,
  image_column: str | None = None,
  caption_column: str | None = None,
  id_column: str | None = None,
  split_column: str | None = None,
  val_fraction: float = 0.0,
  test_fraction: float = 0.0,
  split_lists: Sequence[tuple[str, epath.PathLike]] = (),
  blank: Blank = "error",
) -> Splits:
  """A table of `tables.rows` with an image and a caption, or a list of captions, in each row.

  Rows of the same image become one image. Columns: None: those of COLUMNS. A column of ids or
  splits may be absent: then ids count from 0, and the split is "train", or is drawn by a hash of
  the image's path, with the two fractions, or is that of the list with the image, of split_lists:
  (split, file with a name per line, with or without suffix). An image without a suffix (COCO-CN) is
  looked up among the files. Raises DatasetError, naming file and line.
  """
  file, images = epath.Path(table), epath.Path(images)
  given = {
    "image": image_column, "caption": caption_column, "id": id_column, "split": split_column
  }  # fmt: skip
  known = [n for role, names in COLUMNS.items() for n in (*names, given[role]) if n]
  listed = _listed(split_lists)
  drawn = _drawn(val_fraction, test_fraction)
  found = tables.rows(file, form, known)
  if (first := next(found, None)) is None:
    raise DatasetError(f"{file}: no rows; expected a row per caption after a line of column names")
  columns = _columns(*first, given)
  if sum((columns["split"] is not None, val_fraction + test_fraction > 0, bool(listed))) > 1:
    raise DatasetError(
      f"{first[0]}: splits are given twice: leave out --val_fraction and --test_fraction, or "
      "--split_list; if column 'split' gives the split, name another --split_column"
    )
  grouper, listing, counts = Grouper(blank), Listing(), collections.Counter()
  paths: dict[str, epath.Path] = {}
  for where, row in itertools.chain([first], found):
    _check_keys(where, row, columns, given)
    name, captions, split, image_id = _row(where, row, columns)
    if isinstance(captions, list):
      counts["rows hold a list of captions"] += 1
    if split is None:
      split = listed.get(_stem(name)) if listed else drawn(posixpath.normpath(name))
    if split is None:
      counts["rows are left out, as their image is in no --split_list"] += 1
      continue
    texts = captions if isinstance(captions, list) else [captions]
    if name not in paths:
      paths[name] = _path(images, name, listing)
    grouper.add(where, split, name, paths[name], texts, image_id=image_id)
  for what, count in counts.items():
    logging.info("%s: %d %s", file, count, what)
  # Includes splits without an image, for which the builder raises.
  asked = ["train"] + ["val"] * bool(val_fraction) + ["test"] * bool(test_fraction)
  asked = asked if val_fraction + test_fraction else [split for split, _ in split_lists]
  return grouper.splits(asked)


def _row(
  where: str, row: dict, columns: dict[str, str | None]
) -> tuple[str, str | list[str], str | None, int | None]:
  """(image, caption or captions, split, id) of a row; None for what it has no column of."""
  name = values.file_name(where, "the image", _cell(where, row, columns, "image"))
  captions = _captions(where, _cell(where, row, columns, "caption"))
  split = image_id = None
  if columns["split"]:
    split = values.text(where, "the split", _filled(where, row, columns, "split"))
  if columns["id"]:
    image_id = values.integer(where, "the id", _filled(where, row, columns, "id"))
  return name, captions, split, image_id


def _check_keys(where: str, row: dict, columns: dict, given: dict) -> None:
  """JSON lines need not have the same keys: ids and splits are in all or in none."""
  for role in ("id", "split"):
    if columns[role] is None and (column := given[role] or COLUMNS[role][0]) in row:
      raise DatasetError(
        f"{where}: has {column!r}, which the first row lacks; give it in all rows or in none"
      )


def _listed(files: Sequence[tuple[str, epath.PathLike]]) -> dict[str, str]:
  """The split of each image, by its name without a suffix."""
  owner: dict[str, str] = {}
  for split, file in files:
    lines = values.read_text(epath.Path(file), "--split_list").split("\n")
    if not any(map(str.strip, lines)):
      raise DatasetError(f"{file}: no names; expected the name of an image in each line")
    for i, line in enumerate(lines, 1):
      if (name := line.strip()) and owner.setdefault(_stem(name), split) != split:
        raise DatasetError(
          f"{file}:{i}: {name!r} is also in a list of split {owner[_stem(name)]!r}; splits must "
          "not share images"
        )
  return owner


def _stem(name: str) -> str:
  name = posixpath.normpath(name)
  return name[: -len(s)] if (s := tables.image_type(name)) else name


def _columns(where: str, row: dict, given: dict[str, str | None]) -> dict[str, str | None]:
  """The column of each role by the first row; None for a column of ids or splits that is absent."""
  out = {}
  for role, names in COLUMNS.items():
    found = [name for name in names if name in row]
    if given[role] is not None:
      out[role] = given[role] if given[role] in row else None
    elif len(found) > 1 and found[0] != names[0]:
      raise DatasetError(f"{where}: which of {found} is the column? name it with --{role}_column")
    else:
      out[role] = found[0] if found else None
    if out[role] is None and role in ("image", "caption"):
      raise DatasetError(
        f"{where}: nothing in column {given[role] or names[0]!r}; the columns are {list(row)} "
        "(name others with --image_column, --caption_column)"
      )
  used = [column for column in out.values() if column]
  logging.info("columns: %s; not used: %s", used, [column for column in row if column not in used])
  return out


def _cell(where: str, row: dict, columns: dict, role: str) -> Any:
  """The value of a column that each row must have."""
  if row.get(columns[role]) is None:
    raise DatasetError(
      f"{where}: nothing in column {columns[role]!r}; the columns are {list(row)} "
      "(name others with --image_column, --caption_column)"
    )
  return row[columns[role]]


def _filled(where: str, row: dict, columns: dict, role: str) -> Any:
  value = row.get(columns[role])
  if value is None or (isinstance(value, str) and not value.strip()):
    raise DatasetError(
      f"{where}: nothing in column {columns[role]!r}, which other rows have; fill it in, or name "
      f"a column that does not exist as --{role}_column to do without"
    )
  return value


def _captions(where: str, cell: Any) -> str | list[str]:
  """A caption, or the list of captions that a cell is or spells in JSON or in Python."""
  if isinstance(cell, str) and cell.lstrip().startswith(('["', "['")) and cell.rstrip()[-1] == "]":
    try:
      cell = values.parse_json(where, cell)
    except DatasetError:
      cell = _python_list(where, cell.strip())
  if not isinstance(cell, list):
    return values.text(where, "the caption", cell)
  if not cell:
    raise DatasetError(f"{where}: an empty list of captions; add some or take the row out")
  return [values.text(where, "a caption of the list", caption) for caption in cell]


def _python_list(where: str, cell: str) -> list:
  """The list that a cell spells as Python prints it, which is how pandas writes lists."""
  try:
    out = ast.literal_eval(cell)
    found = [t.type for t in tokenize.generate_tokens(io.StringIO(cell).readline)]
    strings = found.count(tokenize.STRING)
  except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as e:
    raise DatasetError(
      f"{where}: {cell!r:.60} looks like a list of captions, but is none ({e}); correct it"
    ) from e
  if not isinstance(out, list) or len(out) != strings:  # a NumPy array prints without commas
    raise DatasetError(
      f"{where}: {cell!r:.60} is no list of texts with commas between them; write the lists as JSON"
    )
  return out


def _path(images: epath.Path, name: str, listing: Listing) -> epath.Path:
  """The file images/name, also without the suffix of its type and at the places of COCO's."""
  if tables.image_type(name):
    return listing.first(images / place for place in coco.places(name))
  suffixes = ("", *tables.IMAGE_TYPES)
  return listing.first(images / p for s in suffixes for p in coco.places(name + s))


def _drawn(val: float, test: float) -> Callable[[str], str]:
  """name -> split, drawn by a hash of the name."""
  if not (val >= 0 and test >= 0 and val + test < 1):
    raise DatasetError(
      f"val_fraction {val} and test_fraction {test}: expected two numbers of at least 0, together "
      "below 1"
    )

  def split(name: str) -> str:
    u = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if u < val else "test" if u < val + test else "train"

  return split
