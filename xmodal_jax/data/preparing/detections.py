"""Readers of a detector's output files: features and boxes of the regions of images.

`open_reader` reads these layouts. R: regions of an image, F: features of a region; boxes are
x1 y1 x2 y2 in pixels.

  folder       bu_att/ID.npz (array `feat` [R, F]) or bu_att/ID.npy, and bu_box/ID.npy [R, 4]; the
               features may be in the folder itself, the boxes in another one
  tables       of bottom-up attention, a line per image, tab-separated and without a header:
               image_id, image_w, image_h, num_boxes, boxes, features; the last two are base64 of
               little-endian float32
  .h5, .hdf5   `image_features` [N, R, F] with `image_bb` [N, R, 4]; or, for varying R,
               [T, F] with [T, 4] and `pos_boxes` [N, 2], the first and last + 1 row of an image.
               Ids are `image_id` [N], or in a file FILE_imgid2idx.pkl, {id: row}

Pickles are read by `torch_files.pickles`, which executes no code of them.
"""

import base64
import dataclasses
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from xmodal_jax.data.preparing import values
from xmodal_jax.data.preparing.annotations import AnnotatedImage
from xmodal_jax.data.preparing.tables import rows
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.interop.torch_files import FileFormatError, pickles

Size = tuple[int, int]  # width and height in pixels

_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


@dataclasses.dataclass(frozen=True)
class Detected:
  """The regions of one image as stored, unchecked. features: [R, F]; boxes: [R, 4]."""

  features: np.ndarray
  boxes: np.ndarray
  size: Size | None = None  # if the file has it


class Reader(Protocol):
  """Random access to a detector's output. ids: of the images with features."""

  ids: frozenset[str]

  def where(self, key: str) -> str:
    """The file of an image, for messages; it need not exist."""

  def read(self, key: str) -> Detected:
    """The regions of an image. Raises DatasetError, naming the file, if it is damaged."""


def _array(path: epath.Path, name: str | None = None) -> np.ndarray:
  """The array of an .npy file, or array `name` of an .npz file."""
  if not path.exists():
    raise DatasetError(f"{path}: no such file; each image has one of features and one of boxes")
  try:
    loaded = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
      return loaded
    found = {k: loaded[k] for k in loaded.files}
  except Exception as e:  # NumPy raises ValueError, EOFError, BadZipFile and others
    raise DatasetError(f"{path}: no readable NumPy file ({e}); fetch or make it again") from e
  if name not in found:
    raise DatasetError(f"{path}: arrays {sorted(found)}, expected one called {name!r}")
  return found[name]


class Folder:
  """The layout `folder`: files named by the images' ids."""

  def __init__(self, root: epath.PathLike, boxes: epath.PathLike | None = None):
    root = epath.Path(root)
    features = root / "bu_att" if (root / "bu_att").is_dir() else root
    self._boxes = epath.Path(boxes) if boxes else root / "bu_box"
    self._files: dict[str, epath.Path] = {}
    for path in features.iterdir():
      if path.suffix in (".npz", ".npy") and self._files.setdefault(path.stem, path) != path:
        raise DatasetError(f"{path}: there is {self._files[path.stem].name} too; keep one of them")
    self._default = features / "ID.npz"
    if not self._files:
      raise DatasetError(f"{features}: no .npz or .npy files; expected ID.npz with an array `feat`")
    if not self._boxes.is_dir():
      raise DatasetError(
        f"{self._boxes}: no such folder of boxes; expected ID.npy [R, 4] in pixels for every "
        "image in it, or in the folder given with --boxes"
      )
    self.ids = frozenset(self._files)

  def where(self, key: str) -> str:
    return str(self._files.get(key, self._default.with_name(f"{key}.npz")))

  def read(self, key: str) -> Detected:
    return Detected(_array(self._files[key], "feat"), _array(self._boxes / f"{key}.npy"))


class Table:
  """The layout `tables`. A first pass records the offset of each line: files may be very large."""

  def __init__(self, paths: Iterable[epath.PathLike]):
    self._places: dict[str, tuple[epath.Path, int, int, int]] = {}  # file, line, offset, length
    self._paths = [epath.Path(p) for p in paths]
    self._open = functools.lru_cache(16)(lambda path: path.open("rb"))
    for path in self._paths:
      if not path.exists():
        raise DatasetError(f"{path}: no such file; check --features")
      offset = 0
      with path.open("rb") as f:
        for number, line in enumerate(f, 1):
          self._note(line, (path, number, offset, len(line)))
          offset += len(line)
    if not self._places:
      raise DatasetError(f"{self._paths[0]}: empty; expected a line per image: {_COLUMNS}")
    self.ids = frozenset(self._places)

  def _note(self, line: bytes, place: tuple[epath.Path, int, int, int]) -> None:
    path, number, *_ = place
    if (fields := line.count(b"\t") + 1) != len(_COLUMNS):
      raise DatasetError(
        f"{path}:{number}: {fields} fields, expected {len(_COLUMNS)} with tabs between them: "
        f"{', '.join(_COLUMNS)}; or is --features of another layout?"
      )
    key = line[: line.index(b"\t")].decode("utf-8", "replace")
    # The parts of the published tables overlap; only lines that differ are an error.
    if (known := self._places.setdefault(key, place)) != place and self._line(known) != line:
      raise DatasetError(
        f"{path}:{number}: image_id {key} is also in {known[0]}:{known[1]}, with other contents; "
        "take one of them out"
      )

  def _line(self, place: tuple[epath.Path, int, int, int]) -> bytes:
    path, _, offset, length = place
    self._open(path).seek(offset)
    return self._open(path).read(length)

  def where(self, key: str) -> str:
    if key in self._places:
      path, number, *_ = self._places[key]
      return f"{path}:{number}"
    return ", ".join(map(str, self._paths))

  def read(self, key: str) -> Detected:
    _, width, height, count, boxes, features = self._line(self._places[key]).split(b"\t")
    try:
      rows = int(count)
      return Detected(
        _decoded(features).reshape(rows, -1),
        _decoded(boxes).reshape(rows, 4),
        (int(width), int(height)),
      )
    except ValueError as e:  # of int, of base64 and of the shapes
      raise DatasetError(f"{self.where(key)}: image_id {key} is damaged: {e}") from e


def _decoded(field: bytes) -> np.ndarray:
  """base64 of little-endian float32 -> array [N]."""
  return np.frombuffer(base64.b64decode(field.strip(), validate=True), "<f4")


class Hdf5:
  """The layout of .h5 files: arrays over all images."""

  def __init__(self, path: epath.PathLike):
    self._path = path = epath.Path(path)
    try:
      import h5py
    except ImportError as e:
      raise DatasetError(f"{path}: needs the package h5py: pip install h5py") from e
    if not path.exists():
      raise DatasetError(f"{path}: no such file; check --features")
    try:
      self._file = file = h5py.File(path.open("rb"), "r")
    except OSError as e:
      raise DatasetError(f"{path}: no HDF5 file ({e}); fetch it again") from e
    layout = "expected image_features [N, R, F] and image_bb [N, R, 4], or [T, F], [T, 4] and "
    layout += "pos_boxes [N, 2]; write them into a folder or table otherwise"
    if missing := [k for k in ("image_features", "image_bb") if k not in file]:
      raise DatasetError(f"{path}: no dataset {missing[0]!r} among {sorted(file)}; {layout}")
    self._spans = file["pos_boxes"][:] if "pos_boxes" in file else None
    if file["image_features"].ndim != (3 if self._spans is None else 2):
      shape = file["image_features"].shape
      raise DatasetError(f"{path}: image_features has the shape {shape}; {layout}")
    self._rows = self._numbered()
    self.ids = frozenset(self._rows)
    count = len(file["image_features"]) if self._spans is None else len(self._spans)
    if bad := [key for key, row in self._rows.items() if not 0 <= row < count]:
      raise DatasetError(f"{path}: image {bad[0]} has row {self._rows[bad[0]]} of {count}")

  def _numbered(self) -> dict[str, int]:
    if "image_id" in self._file:
      ids = self._file["image_id"][:].tolist()
      keys = [i.decode() if isinstance(i, bytes) else str(i) for i in ids]
      if len(set(keys)) < len(keys):
        raise DatasetError(f"{self._path}: an id occurs twice in image_id; take one of them out")
      return {key: row for row, key in enumerate(keys)}
    path = self._path.with_name(f"{self._path.stem}_imgid2idx.pkl")
    if not path.exists():
      raise DatasetError(f"{self._path}: no dataset 'image_id' in it and no {path.name} beside it")
    rows = _unpickled(path)
    if not isinstance(rows, dict) or not all(type(v) is int for v in rows.values()):
      raise DatasetError(f"{path}: expected a pickled dict {{image id: row}} of {self._path.name}")
    return {str(key): row for key, row in rows.items()}

  def where(self, key: str) -> str:
    return f"{self._path}, row {self._rows[key]}" if key in self._rows else str(self._path)

  def read(self, key: str) -> Detected:
    row = self._rows[key]
    at = row if self._spans is None else slice(*map(int, self._spans[row][:2]))
    try:
      return Detected(self._file["image_features"][at], self._file["image_bb"][at])
    except (OSError, ValueError, IndexError) as e:
      raise DatasetError(f"{self.where(key)}: cannot be read ({e})") from e


def open_reader(paths: Sequence[epath.PathLike], boxes: epath.PathLike | None = None) -> Reader:
  """Opens a folder, one or more tables, or an HDF5 file. boxes: folder of boxes, if not bu_box.

  Raises DatasetError, naming the file, for anything else.
  """
  first = epath.Path(paths[0])
  if not first.exists():
    raise DatasetError(f"{first}: no such file or folder; check --features")
  if boxes and not first.is_dir():
    raise DatasetError(f"{boxes}: only a folder of features has separate boxes; drop --boxes")
  tables = not first.is_dir() and first.suffix not in (".h5", ".hdf5")
  if tables:
    return Table(paths)
  if len(paths) > 1:
    raise DatasetError(f"{paths[1]}: only tables come in several files; give one --features")
  return Folder(first, boxes) if first.is_dir() else Hdf5(first)


def _unpickled(path: epath.Path) -> Any:
  try:
    return pickles.Unpickler(path.read_bytes()).load()
  except FileFormatError as e:
    raise DatasetError(f"{path}: cannot be read safely as plain data ({e})") from e


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Widths and heights by keys of images, or by positions in the list of annotations."""

  by_key: Mapping[str, Size]
  by_position: bool

  def of(self, image: AnnotatedImage, key: str) -> Size | None:
    return self.by_key.get(str(image.position) if self.by_position else key)


def read_sizes(file: epath.PathLike) -> Sizes:
  """Reads sizes of images: a .pkl or .json with a list of [width, height] in the order of the
  annotations, a .json of {id: [width, height]}, or a .csv or .tsv with columns id, width, height.

  Raises DatasetError, naming the entry, for anything else.
  """
  path = epath.Path(file)
  if not path.exists():
    raise DatasetError(f"{path}: no such file; check --sizes")
  if path.suffix in (".csv", ".tsv"):
    columns = ("width", "height")
    found = {row.get("id"): [row.get(c) for c in columns] for _, row in rows(path)}
  elif path.suffix == ".pkl":
    found = _unpickled(path)
  else:
    found = values.read_json(path, "--sizes")
  by_position = isinstance(found, list)
  if not by_position and not isinstance(found, dict):
    raise DatasetError(f"{path}: a {type(found).__name__}, expected a list or dict of sizes")
  out = {}
  for key, value in enumerate(found) if by_position else found.items():
    try:
      width, height = map(int, value)
      if min(width, height) < 1 or [width, height] != [float(side) for side in value]:
        raise ValueError
    except (TypeError, ValueError, OverflowError):
      raise DatasetError(
        f"{path}: entry {key} is {value!r:.60}, expected a width and a height in pixels"
      ) from None
    out[str(key)] = width, height
  return Sizes(out, by_position)
