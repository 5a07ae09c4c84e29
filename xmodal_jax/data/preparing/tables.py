"""Rows of tables: csv, tsv and their kin, JSON lines, and lists of `NAME#N<TAB>caption`.

What a file is not told about itself is found out where that is unambiguous, and logged where it
changes what is read.
"""

import csv
import dataclasses
import io
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from etils import epath

from xmodal_jax.data.preparing import values
from xmodal_jax.data.tfrecord import DatasetError

IMAGE_TYPES = (
  ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif",
)  # fmt: skip
KINDS = ("csv", "tsv", "jsonl", "token")
DELIMITERS = {"comma": ",", "semicolon": ";", "bar": "|", "tab": "\t"}
_SUFFIXES = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "token": "token"}
_SUFFIXES |= {"txt": None}  # by its first line
_TOKEN = re.compile(r"([^\t\n]+)#\d+\t")

# (file and line, for messages; the row, by column)
Row = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Form:
  """How a table is written; None or empty: to be found out.

  kind: csv and tsv differ in the delimiter that is assumed, and in quotes. delimiter: one
  character. columns: names of the columns of a file without a header line. quotes: "csv", fields in
  quotation marks are unquoted; "none", quotation marks are characters like others.
  """

  kind: str | None = None
  delimiter: str | None = None
  columns: tuple[str, ...] = ()
  quotes: Literal["csv", "none"] | None = None


def rows(file: epath.Path, form: Form | None = None, known: Sequence[str] = ()) -> Iterator[Row]:
  """The rows of a file or of a .gz of one. known: columns by which a header is recognised.

  Cells are strings, None where a row is shorter than the header; values of JSON lines are as they
  are. Raises DatasetError, naming file and line.
  """
  form = form or Form()
  suffix = file.name.removesuffix(".gz").rpartition(".")[2].lower()
  if form.kind is None and suffix not in _SUFFIXES:
    names = ", ".join(f".{s}" for s in _SUFFIXES)
    raise DatasetError(f"{file}: expected a file {names} (or .gz of one), or pass --format")
  text = values.read_text(file)
  kind = form.kind or _SUFFIXES[suffix]
  if kind is None or (kind in ("csv", "tsv") and form == Form()):
    kind = "token" if _TOKEN.match(text) else kind or _found_kind(text)
    if kind in ("token", "jsonl"):
      logging.info("%s: read as the format %s", file, kind)
  if kind in ("token", "jsonl"):
    if form.delimiter or form.columns or form.quotes:
      raise DatasetError(
        f"{file}: is read as the format {kind}, which has no delimiter, columns or quotes to say; "
        "pass --format csv or tsv too, or leave these options out"
      )
    return (_json_rows if kind == "jsonl" else _token_rows)(file, text)
  return _Table(file, text, kind, form, known).rows()


def _found_kind(text: str) -> str:
  return "jsonl" if text.lstrip()[:1] == "{" else "csv"


def _json_rows(file: epath.Path, text: str) -> Iterator[Row]:
  for i, line in enumerate(text.split("\n"), 1):  # splitlines() also splits inside of strings
    if line.strip():
      row = values.parse_json(f"{file}:{i}", line)
      if not isinstance(row, dict):
        raise DatasetError(f"{file}:{i}: expected a JSON object, got {line[:40]!r}")
      yield f"{file}:{i}", row


def _token_rows(file: epath.Path, text: str) -> Iterator[Row]:
  for i, line in enumerate(text.split("\n"), 1):
    if line.strip():
      match = _TOKEN.match(line)
      if not match:
        raise DatasetError(f"{file}:{i}: {line[:60]!r}, expected NAME#N<TAB>caption")
      yield f"{file}:{i}", {"image": match[1], "caption": line[match.end() :].removesuffix("\r")}


class _Table:
  """A text of lines with delimiters."""

  def __init__(self, file: epath.Path, text: str, kind: str, form: Form, known: Sequence[str]):
    self._file, self._text, self._known = file, text, set(known)
    self._physical: list[str] = []  # lines of the text, once they are needed
    said = "\t" if form.kind == "tsv" else None
    self._delimiter = form.delimiter or said or self._found_delimiter(kind)
    self._columns = list(form.columns)
    quotes = form.quotes or ("csv" if self._delimiter != "\t" else None)
    first = next((cells for _, _, cells in self._records(quotes != "none", strict=False)), [])
    self._headed = not self._columns
    if self._headed:
      self._headed, self._columns = self._header(first)
    self._quoted = self._found_quotes() if quotes is None else quotes == "csv"

  def rows(self) -> Iterator[Row]:
    count = len(self._columns)
    for line, lines, cells in itertools.islice(self._records(self._quoted), self._headed, None):
      where = f"{self._file}:{line}"
      if len(cells) > count:
        raise DatasetError(
          f"{where}: {len(cells)} fields, expected {count} ({self._columns}); quote fields that "
          "hold the separator"
        )
      if lines > 1:
        self._check_lines(line, lines)
      yield where, dict(itertools.zip_longest(self._columns, cells))

  def _records(self, quoted: bool, strict: bool = True) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, number of lines, cells) of each record; blank lines are none."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than some captions
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(self._text, newline="")
    reader = csv.reader(lines, delimiter=self._delimiter, quoting=quoting, strict=strict)
    while True:
      line = reader.line_num + 1
      try:
        cells = next(reader, None)
      except csv.Error as e:
        raise DatasetError(
          f"{self._file}:{line}: a quotation mark in the row that begins here is not closed, or "
          f"stands alone ({e}); write a quotation mark inside of a quoted field twice, or pass "
          "--quotes none if none has a meaning"
        ) from e
      if cells is None:
        return
      if cells:
        yield line, reader.line_num + 1 - line, cells

  def _found_delimiter(self, kind: str) -> str:
    """The delimiter that splits the first line into known columns, or the usual one."""
    line = next((s for s in io.StringIO(self._text, newline="") if s.strip()), "")
    split = {d: next(csv.reader([line], delimiter=d), []) for d in DELIMITERS.values()}
    named = {d: len(self._known & {c.strip() for c in cells}) for d, cells in split.items()}
    usual = {"csv": ",", "tsv": "\t"}[kind]
    best = max(named, key=lambda d: (named[d], d == usual))
    if named[best] < 2:
      # Without a header: the delimiter that parts an image from its caption.
      pairs = [d for d, cells in split.items() if self._known and _is_pair(cells)]
      best = pairs[0] if len(pairs) == 1 and len(split[usual]) < 2 else usual
    if best != usual:
      logging.info("%s: the delimiter is %r", self._file, best)
    return best

  def _header(self, first: list[str]) -> tuple[bool, list[str]]:
    """(whether the first row is a header, the columns)."""
    names = [name.strip() for name in first]
    if not self._known & set(names) and self._known and any(map(_is_image, names)):
      if not _is_pair(names):
        raise DatasetError(
          f"{self._file}: the first line {names} is no line of column names; name them with "
          "--columns, separated by commas"
        )
      columns = ["image", "caption"] if _is_image(names[0]) else ["caption", "image"]
      logging.info("%s has no line of column names: they are taken as %s", self._file, columns)
      return False, columns
    if twice := [name for name in names if name and names.count(name) > 1]:
      raise DatasetError(f"{self._file}: column {twice[0]!r} occurs twice; rename one of them")
    return True, names

  def _found_quotes(self) -> bool:
    """Whether a table with tabs has quoted fields, as pandas writes them."""
    begun = re.compile(r'(?:^|[\t\r\n])"')
    if not begun.search(self._text):
      return False
    fault = None
    try:
      for line, _, cells in self._records(quoted=True):
        if len(cells) > len(self._columns):
          fault = fault or f"line {line} then has {len(cells)} fields"
    except DatasetError as e:
      fault = str(e)
    plain = [
      (line, cell)
      for line, _, cells in self._records(quoted=False)
      for cell in cells
      if cell.startswith('"')
    ]
    if fault is None:
      text = (
        "%s: %d fields begin with a quotation mark, first line %d, and are unquoted as by pandas "
      )
      text += "(--quotes none keeps the marks)"
      logging.info(text, self._file, len(plain), plain[0][0])
      return True
    doubled = [line for line, cell in plain if _is_quoted(cell)]
    if doubled:
      raise DatasetError(
        f"{self._file}: line {doubled[0]} has a field in quotation marks, but not all such fields "
        f"are well formed ({fault}); correct them, or pass --quotes none to keep all marks"
      )
    text = "%s: %d fields begin with a quotation mark, first line %d, which is kept: as a quoted "
    logging.info(text + "table the file is malformed", self._file, len(plain), plain[0][0])
    return False

  def _check_lines(self, line: int, lines: int) -> None:
    """Raises DatasetError if a line inside of a row looks like a row of its own."""
    if not self._physical:
      self._physical = re.split(r"\r\n|\r|\n", self._text)
      text = "%s: fields in quotation marks go over several lines, first from line %d on"
      logging.info(text, self._file, line)
    for number in range(line, line + lines - 1):
      cells = self._physical[number].split(self._delimiter)
      if len(cells) == len(self._columns) and any(map(_is_image, cells)):
        raise DatasetError(
          f"{self._file}:{line}: a quotation mark opens in this row and closes in line "
          f"{line + lines - 1}, but line {number + 1} looks like a row of its own; take stray "
          "quotation marks out, or pass --quotes none if none has a meaning"
        )


def _is_quoted(cell: str) -> bool:
  """Whether a cell stands in quotation marks and has others, doubled."""
  inner = cell[1:-1]
  return cell[0] + cell[-1] == '""' and '""' in inner and '"' not in inner.replace('""', "")


def image_type(name: str) -> str:
  """The suffix of a file's name if it is that of a type of images, else ""."""
  return next((s for s in IMAGE_TYPES if name.lower().endswith(s)), "")


def _is_image(cell: str) -> bool:
  return bool(image_type(cell.strip().strip('"')))


def _is_pair(cells: list[str]) -> bool:
  return len(cells) == 2 and _is_image(cells[0]) != _is_image(cells[1])
