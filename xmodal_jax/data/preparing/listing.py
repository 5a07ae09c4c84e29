"""Which files exist, found by listing folders: a request for each folder, not for each file."""

import concurrent.futures
import os
import unicodedata
from collections.abc import Iterable
from typing import Literal

from etils import epath

Kind = Literal["file", "link", "folder"]


class Listing:
  """Answers from listings of folders, each of which is listed once."""

  def __init__(self):
    self._folders: dict[str, dict[str, Kind] | None] = {}  # None: it cannot be listed
    self._spelled: dict[str, dict[str, str]] = {}
    self._real: dict[str, str] = {}

  def load(self, paths: Iterable[epath.Path]) -> None:
    """Lists the folders of these files at the same time."""
    new = list({_split(path)[0] for path in paths} - set(self._folders))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      self._folders |= zip(new, pool.map(_listed, new), strict=True)

  def kind(self, path: epath.Path) -> Kind | None:
    """What the path is, links followed; None if there is nothing. "link": one to a file."""
    folder, name = _split(path)
    entries = self._entries(folder)
    if entries is not None and name in entries:
      return entries[name]
    # The file system may ignore case, or compose accents.
    if entries is None or name in ("", "..") or self.other_spelling(path):
      return _looked_up(path)
    return None

  def is_file(self, path: epath.Path) -> bool:
    return self.kind(path) in ("file", "link")

  def first(self, paths: Iterable[epath.Path]) -> epath.Path:
    """The first of the paths that is a file, or else the first."""
    paths = iter(paths)
    default = next(paths)
    if self.is_file(default):
      return default
    return next((path for path in paths if self.is_file(path)), default)

  def other_spelling(self, path: epath.Path) -> str | None:
    """A name in the path's folder that differs from its own in case or in composed accents only."""
    folder, name = _split(path)
    if folder not in self._spelled:
      self._spelled[folder] = {_alike(n): n for n in self._entries(folder) or ()}
    other = self._spelled[folder].get(_alike(name))
    return None if other == name else other

  def identity(self, path: epath.Path) -> str:
    """A name that all paths of one file have in common; on local disks links are followed."""
    folder, name = _split(path)
    if "://" in folder:
      return os.fspath(path)
    if self.kind(path) == "link":
      return os.path.realpath(path)
    if folder not in self._real:
      self._real[folder] = os.path.realpath(folder)
    return os.path.join(self._real[folder], name)

  def _entries(self, folder: str) -> dict[str, Kind] | None:
    if folder not in self._folders:
      self._folders[folder] = _listed(folder)
    return self._folders[folder]


def _split(path: epath.PathLike) -> tuple[str, str]:
  folder, name = os.path.split(os.fspath(path))
  return folder or ".", name


def _alike(name: str) -> str:
  return unicodedata.normalize("NFC", name).casefold()


def _listed(folder: str) -> dict[str, Kind] | None:
  try:
    if "://" in folder:
      return {path.name: "file" for path in epath.Path(folder).iterdir()}
    with os.scandir(folder) as entries:
      found = [(entry.name, _kind(entry)) for entry in entries]
    return {name: kind for name, kind in found if kind}
  except PermissionError:
    return None
  except (OSError, ValueError):  # no such folder, no folder, or no possible name of one
    return {}


def _kind(entry: os.DirEntry) -> Kind | None:
  try:
    if entry.is_dir():
      return "folder"
    if entry.is_file():  # also false for a pipe, which would be read without end
      return "link" if entry.is_symlink() else "file"
  except OSError:  # a link to itself
    pass
  return None


def _looked_up(path: epath.Path) -> Kind | None:
  try:
    return "folder" if path.is_dir() else "file" if path.exists() else None
  except (OSError, ValueError):
    return None
