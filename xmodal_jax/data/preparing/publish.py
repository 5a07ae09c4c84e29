"""Makes the folder of a dataset appear complete, or not at all.

A dataset is written into `.VERSION.incomplete-ID` beside its folder VERSION, and renamed at the
end. A local run locks the file `.VERSION.incomplete-ID.lock` while it lives, so that the next run
can tell what a killed one has left: it removes that, and says so. In an object store there are no
locks: there, it only names what is left.

With `overwrite`, a local folder is exchanged with the new one in one system call: under its name is
always a whole dataset, the old or the new. File systems that cannot exchange (NFS, some of FUSE)
rename twice, and the next run undoes the first rename if a run was killed between them. Object
stores copy file by file: the old dataset is moved away, then the new one in, dataset_info.json
last; a run that is killed in between leaves no dataset, and the old one in `.VERSION.old-ID`.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import IO

from etils import epath

from xmodal_jax.data.preparing import summary
from xmodal_jax.data.tfrecord import DatasetError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of renameat2, linux/fs.h and fcntl.h


class OutputExistsError(DatasetError):
  """The dataset exists already."""


def dataset_dir(out_dir: epath.PathLike, name: str, version: str) -> epath.Path:
  """The folder of a dataset. Raises DatasetError for a bad name or version."""
  if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
    raise DatasetError(
      f"dataset {name!r}, version {version!r}: a name is lower-case letters, digits and "
      "underscores after a letter, a version is like 1.0.0; choose others (--name, --version)"
    )
  return epath.Path(out_dir).expanduser() / name / version


def make_way(out_dir: epath.PathLike, name: str, version: str, overwrite: bool) -> None:
  """Removes what killed runs left of the dataset, and logs it.

  Raises OutputExistsError if the dataset exists and `overwrite` is false.
  """
  final = dataset_dir(out_dir, name, version)
  _clean(final)
  if final.exists() and not overwrite:
    raise OutputExistsError(f"{final} exists; pass --overwrite to replace it, or another --name")


@contextlib.contextmanager
def publishing(
  final: epath.Path, splits: Iterable[str], overwrite: bool = False
) -> Iterator[epath.Path]:
  """A temporary folder that becomes `final`, of `dataset_dir`, at the end.

  It is removed after an error. Raises DatasetError for a bad name of a split and a full disk,
  OutputExistsError if `final` exists and `overwrite` is false.
  """
  for split in splits:
    if not _NAME.fullmatch(split):
      raise DatasetError(f"split {split!r}: a name is lower-case letters, digits and underscores")
  make_way(final.parent.parent, final.parent.name, final.name, overwrite)
  final.parent.mkdir(parents=True, exist_ok=True)
  with _claimed(final) as temporary:
    try:
      temporary.mkdir()
      yield temporary
      _publish(temporary, final, overwrite)
    except BaseException as e:
      written = _bytes(temporary)
      temporary.rmtree(missing_ok=True)
      if isinstance(e, OSError) and (text := _of_the_disk(e, written)):
        raise DatasetError(f"{final.parent}: {text}, or choose another --out") from e
      raise


def _of_the_disk(error: OSError, written: int) -> str | None:
  """The message for an error of writing; None for one of a file that has a name."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    size = summary.size(written)
    return f"no space left on the disk after {size} of the dataset, now removed; free space"
  if error.filename is None and error.strerror:
    return f"{error.strerror}; nothing is left of the dataset; check the disk"
  return None


def _is_local(path: epath.Path) -> bool:
  return "://" not in os.fspath(path)


@contextlib.contextmanager
def _claimed(final: epath.Path) -> Iterator[epath.Path]:
  """The path of a new temporary folder, whose lock is held inside of the context."""
  new = lambda: final.parent / f".{final.name}.incomplete-{uuid.uuid4().hex}"
  if not _is_local(final):
    yield new()
    return
  while True:
    temporary = new()
    path = _lock_path(temporary)
    with open(path, "w") as file:
      try:
        # Another run may have taken it for one that was left, between the two calls.
        if _lock(file) is False or not _same_file(file, path):
          continue
        yield temporary
        return
      finally:
        path.unlink(missing_ok=True)


def _lock_path(temporary: epath.Path) -> epath.Path:
  return temporary.with_name(temporary.name + ".lock")


def _lock(file: IO) -> bool | None:
  """True if the file is locked now, False if by another process, None if it cannot be locked."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except OSError as e:
    return False if e.errno in (errno.EWOULDBLOCK, errno.EACCES) else None


def _same_file(file: IO, path: epath.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except FileNotFoundError:
    return False


def _clean(final: epath.Path) -> None:
  """Removes what killed runs left of `final`, where that is certain; else names it."""
  if not final.parent.exists():
    return
  prefixes = tuple(f".{final.name}.{kind}-" for kind in ("incomplete", "old"))
  names = sorted({p.name.removesuffix(".lock") for p in final.parent.iterdir()})
  for path in [final.parent / name for name in names if name.startswith(prefixes)]:
    if not _is_local(path):
      logging.warning(
        "%s is of another run: remove it if none is running and nothing in it is needed", path
      )
    elif path.name.startswith(prefixes[1]):
      _undo_or_remove(path, final)
    else:
      _remove_if_left(path)


def _undo_or_remove(old: epath.Path, final: epath.Path) -> None:
  """`old`: a dataset that was moved away for another."""
  if final.exists():
    _remove(old)
    return
  os.rename(old, final)
  logging.warning("%s was moved away by a run that was killed; it is back in its place", final)


def _remove_if_left(temporary: epath.Path) -> None:
  lock = _lock_path(temporary)
  if not lock.exists():  # of a version without locks
    _remove(temporary)
    return
  try:
    with open(lock, "r+") as file:
      locked = _lock(file)
      if locked:
        _remove(temporary)
        lock.unlink(missing_ok=True)
  except FileNotFoundError:  # its run has ended in this moment
    return
  if locked is False:
    logging.warning("%s is being written by another run", temporary)
  elif locked is None:
    text = "%s cannot be locked here: remove its folder if no other run writes it"
    logging.warning(text, lock)


def _remove(folder: epath.Path) -> None:
  if not folder.exists():
    return
  size = summary.size(_bytes(folder))
  folder.rmtree(missing_ok=True)
  logging.warning("removed %s (%s), left by a run that was killed", folder, size)


def _bytes(folder: epath.Path) -> int:
  if not _is_local(folder):
    return 0
  files = (p for p in pathlib.Path(folder).rglob("*") if p.is_file())
  return sum(p.stat().st_size for p in files)


def _publish(temporary: epath.Path, final: epath.Path, overwrite: bool) -> None:
  if not _is_local(final):
    _publish_remote(temporary, final, overwrite)
    return
  if overwrite and final.exists():
    if not _exchange(temporary, final):
      old = final.parent / f".{final.name}.old-{uuid.uuid4().hex}"
      os.rename(final, old)
      os.rename(temporary, final)
      temporary = old
    if os.path.islink(temporary):
      temporary.unlink()
    else:
      temporary.rmtree(missing_ok=True)
    return
  try:
    os.rename(temporary, final)
  except OSError as e:
    if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
      raise
    raise OutputExistsError(f"{final} was written by another process in the meantime") from e


def _exchange(a: epath.Path, b: epath.Path) -> bool:
  """Exchanges two folders atomically; False where the system or the file system cannot."""
  call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
  if call is None:
    return False
  paths = (os.fsencode(os.fspath(a)), os.fsencode(os.fspath(b)))
  return call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _publish_remote(temporary: epath.Path, final: epath.Path, overwrite: bool) -> None:
  old = None
  if overwrite and final.exists():
    old = final.parent / f".{final.name}.old-{uuid.uuid4().hex}"
    logging.warning("replacing %s: until that is done, the old dataset is in %s", final, old)
    final.rename(old)
  final.mkdir()
  for path in sorted(temporary.iterdir(), key=lambda p: p.name == "dataset_info.json"):
    path.rename(final / path.name)
  temporary.rmtree(missing_ok=True)
  if old is not None:
    old.rmtree()
