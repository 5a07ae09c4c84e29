"""Checks of what annotation files hold: their text, their JSON, and single values of it.

`where` is the file and the line or entry that messages name. All raise DatasetError.
"""

import gzip
import json
import zlib
from typing import Any

from etils import epath

from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.interop.torch_files.safetensors import unique

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip archive or .xlsx"}
_MARKS |= {b"PAR1": "a parquet file", b"version https://git-lfs": "a Git LFS pointer"}


def read_text(path: epath.Path, option: str = "--annotations") -> str:
  """The text of a UTF-8 file, or of a gzip file of one. option: where the user named it."""
  if not path.exists():
    raise DatasetError(f"{path}: no such file; check {option}")
  try:
    data = path.read_bytes()
  except OSError as e:
    raise DatasetError(f"{path}: cannot be read as a file ({e}); check {option}") from e
  if data[:2] == b"\x1f\x8b":
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
      raise DatasetError(f"{path}: no whole gzip file ({e}); fetch it again") from e
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    for mark, kind in _MARKS.items():
      if data.startswith(mark):
        raise DatasetError(f"{path}: {kind}, expected UTF-8 text; export or save it so") from e
    line = data.count(b"\n", 0, e.start) + 1
    raise DatasetError(
      f"{path}:{line}: not UTF-8 text (byte 0x{data[e.start]:02x}); save the file as UTF-8, for "
      "instance by iconv -f cp1252 -t utf-8, or fetch it again"
    ) from e


def read_json(path: epath.Path, option: str = "--annotations") -> Any:
  return parse_json(f"{path}", read_text(path, option))


def parse_json(where: str, text: str | bytes) -> Any:
  """JSON whose objects have each key once."""
  try:
    return json.loads(text, object_pairs_hook=unique)
  except RecursionError as e:
    raise DatasetError(f"{where}: not JSON of a data set (nested too deeply)") from e
  except ValueError as e:  # also of integers of thousands of digits
    raise DatasetError(f"{where}: not JSON ({e}); fetch or write it again") from e


def keys(where: str, item: object, wanted: tuple[str, ...], layout: str) -> None:
  """Checks that `item` is an object with these keys. layout: what was expected."""
  if missing := [k for k in wanted if not isinstance(item, dict) or k not in item]:
    raise DatasetError(f"{where}: no key {missing[0]!r}; expected {layout}")


def entries(where: str, value: object, layout: str) -> list:
  """The value, a list."""
  if not isinstance(value, list):
    raise DatasetError(f"{where} is {value!r:.60}, expected a list, as in {layout}")
  return value


def text(where: str, what: str, value: object) -> str:
  """The value, a text that UTF-8 can hold."""
  if not isinstance(value, str):
    raise DatasetError(f"{where}: {what} is {value!r:.60}, expected text")
  if not is_utf8(value):
    raise DatasetError(
      f"{where}: {what} {value!r:.80} has half of a surrogate pair, which UTF-8 cannot hold; "
      "correct it or take it out"
    )
  return value


def is_utf8(value: str) -> bool:
  """False for text with lone surrogates: from JSON escapes, or from file names of other bytes."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def file_name(where: str, what: str, value: object) -> str:
  """The value, the path of a file."""
  if not isinstance(value, str) or not value.strip() or "\0" in value:
    raise DatasetError(f"{where}: {what} {value!r:.60} is not a path; expected that of an image")
  return text(where, what, value)


def integer(where: str, what: str, value: object) -> int:
  """The value, an integer of 64 bits or the decimal digits of one."""
  number = as_integer(value)
  if number is None or not -(2**63) <= number < 2**63:
    raise DatasetError(f"{where}: {what} is {value!r:.60}, expected an integer of 64 bits")
  return number


def as_integer(value: object) -> int | None:
  """An integer, also from its digits; None for everything else, like 1.0, True, "1_0" or "x"."""
  if type(value) is int:
    return value
  if isinstance(value, str) and len(value) < 100:
    digits = value.strip()
    if digits.isascii() and digits.removeprefix("-").removeprefix("+").isdecimal():
      try:
        return int(digits)
      except ValueError:  # "-+1"
        return None
  return None
