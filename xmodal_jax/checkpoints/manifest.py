"""Manifests: SHA-256 of everything in the folder of a checkpoint, and what is wrong with it now.

A manifest is the file MANIFEST in the folder: its own digest on the first line, then json of the
step and of every other file's size and digests. It is written last and in one piece, so that a
folder without one is not whole. `Steps` are the folders of a workdir by that measure. Nothing here
knows what the files mean, nor Orbax.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

MANIFEST = "manifest"
UNFINISHED = f"{MANIFEST} is missing: its writer ended before it was whole"
# Files are hashed in blocks of this size: a single large one is shared out over threads and hosts.
BLOCK = 1 << 26
# Hashing for a new manifest is in no hurry, and input pipelines want the cores.
WRITE_THREADS = 4
READ_THREADS = min(16, os.cpu_count() or 1)
_CHUNK = 1 << 20
# Empty: steps beside this file have manifests. Not empty: one of them was whole once, so that a
# folder without a whole step has lost something.
_MARKER = "manifests"
_VERSION = 1

Files = Mapping[str, tuple[int, Sequence[str]]]  # path in the folder -> (bytes, digest per block)
Part = dict[str, dict[int, str]]  # path in the folder -> number of a block -> digest
Share = tuple[int, int]  # (which of, how many) processes


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged, or of another model."""


class DamageError(CheckpointError):
  """A step whose files are not those that were written. problems: lines that begin with a path."""

  def __init__(self, folder: epath.Path, step: int, problems: Sequence[str]):
    super().__init__(f"checkpoint of step {step} in {folder.parent} is damaged: {listed(problems)}")
    self.step, self.problems = step, list(problems)


def listed(problems: Sequence[str], most: int = 3) -> str:
  more = f", and {len(problems) - most} more" if len(problems) > most else ""
  return "; ".join(problems[:most]) + more


def sizes(folder: epath.Path) -> dict[str, int]:
  """Bytes of every file below the folder but the manifest, by its path in the folder."""
  out, todo = {}, [(folder, "")]
  while todo:
    parent, prefix = todo.pop()
    for path in parent.iterdir():
      name = prefix + path.name
      if path.is_dir():
        todo.append((path, f"{name}/"))
      elif name != MANIFEST:
        out[name] = path.stat().length
  return dict(sorted(out.items()))


def hashes(folder: epath.Path, files: Mapping[str, int], share: Share, threads: int) -> Part:
  """Digests of this share of all blocks of `files`, a mapping to sizes, by a pool of threads."""
  index, count = share
  blocks = [(name, i) for name, size in files.items() for i in range(_blocks(size))]
  mine = blocks[index::count]
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    digests = list(pool.map(lambda block: _digest(folder, *block), mine))
  out: Part = {}
  for (name, i), digest in zip(mine, digests, strict=True):
    out.setdefault(name, {})[i] = digest
  return out


def _blocks(size: int) -> int:
  return max(1, -(-size // BLOCK))


def _digest(folder: epath.Path, name: str, block: int) -> str:
  digest, left = hashlib.sha256(), BLOCK
  with (folder / name).open("rb") as f:
    f.seek(block * BLOCK)
    while left and (data := f.read(min(_CHUNK, left))):
      digest.update(data)
      left -= len(data)
  return digest.hexdigest()


def write(folder: epath.Path, step: int, files: Mapping[str, int], parts: Iterable[Part]) -> None:
  """The manifest of a folder, from the sizes of its files and the shares of all processes."""
  digests: Part = {}
  for part in parts:
    for name, blocks in part.items():
      # Keys that came from another process through json are strings.
      digests.setdefault(name, {}).update({int(i): d for i, d in blocks.items()})
  table = {n: [size, [digests[n][i] for i in range(_blocks(size))]] for n, size in files.items()}
  body = json.dumps({"version": _VERSION, "step": step, "block": BLOCK, "files": table}, indent=0)
  temporary = folder.parent / f"{folder.name}.{MANIFEST}.orbax-checkpoint-tmp"
  temporary.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
  temporary.replace(folder / MANIFEST)


def read(folder: epath.Path, step: int) -> Files:
  """What the manifest lists. Raises DamageError where it is missing, damaged, or of another."""
  try:
    digest, _, body = (folder / MANIFEST).read_bytes().partition(b"\n")
  except OSError as e:
    problem = UNFINISHED if _missing(e) else f"{MANIFEST} is {_unreadable(e)}"
    raise DamageError(folder, step, [problem]) from None
  if hashlib.sha256(body).hexdigest().encode() != digest:
    problem = f"{MANIFEST} does not have the digest on its own first line"
    raise DamageError(folder, step, [problem])
  content = json.loads(body)
  if (content["version"], content["block"]) != (_VERSION, BLOCK):
    raise CheckpointError(
      f"{folder / MANIFEST} is of version {content['version']}, with blocks of {content['block']} "
      f"bytes; this version of xmodal_jax reads {_VERSION}, with {BLOCK}: use the one that wrote it"
    )
  if content["step"] != step:
    raise DamageError(folder, step, [f"{MANIFEST} is that of step {content['step']}"])
  return {name: (size, digests) for name, (size, digests) in content["files"].items()}


def listing_problems(folder: epath.Path, files: Files) -> list[str]:
  """What is wrong with names and sizes, without reading a file."""
  try:
    have = sizes(folder)
  except OSError as e:
    return [f"{folder} is {_unreadable(e)}"]
  out = [f"{name} is missing" for name in files.keys() - have.keys()]
  out += [f"{name} is not of this checkpoint" for name in have.keys() - files.keys()]
  out += [
    _resized(name, have[name], files[name][0])
    for name in files.keys() & have.keys()
    if have[name] != files[name][0]
  ]
  return sorted(out)


def content_problems(
  folder: epath.Path, files: Files, share: Share = (0, 1), threads: int = READ_THREADS
) -> list[str]:
  """What is wrong with this share of the bytes of `files`."""
  index, count = share
  blocks = [(name, i) for name, (size, _) in files.items() for i in range(_blocks(size))]

  def one(block: tuple[str, int]) -> str | None:
    name, i = block
    try:
      digest = _digest(folder, name, i)
    except OSError as e:
      return f"{name} is {'missing' if _missing(e) else _unreadable(e)}"
    if digest == files[name][1][i]:
      return None
    where = f" in its bytes from {i * BLOCK} on" if i else ""
    return _changed(name, digest, files[name][1][i]) + where

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return sorted(p for p in pool.map(one, blocks[index::count]) if p)


def read_json(folder: epath.Path, step: int, files: Files, name: str) -> Any:
  """The content of a file that the manifest lists; None where it lists none of this name.

  Raises DamageError where its bytes are not those that were written.
  """
  if name not in files:
    return None
  try:
    data = (folder / name).read_bytes()
  except OSError as e:
    what = "missing" if _missing(e) else _unreadable(e)
    raise DamageError(folder, step, [f"{name} is {what}"]) from None
  size, digests = files[name]
  if len(data) != size:
    raise DamageError(folder, step, [_resized(name, len(data), size)])
  if [digest := hashlib.sha256(data).hexdigest()] != list(digests):
    raise DamageError(folder, step, [_changed(name, digest, digests[0])])
  return json.loads(data)


def _resized(name: str, have: int, size: int) -> str:
  return f"{name} has {have} bytes, {size} were written"


def _changed(name: str, have: str, digest: str) -> str:
  return f"{name} is not what was written: SHA-256 {have[:12]}, not {digest[:12]}"


def _missing(error: OSError) -> bool:
  return isinstance(error, FileNotFoundError | NotADirectoryError)


def _unreadable(error: OSError) -> str:
  return f"unreadable ({type(error).__name__}: {error})"


class Steps:
  """The folders of steps in `checkpoints/`. read_only: nothing is moved, cleaned or removed."""

  def __init__(self, directory: epath.Path, *, read_only: bool):
    self.directory, self.read_only = directory, read_only
    self.unproven = self._unproven()  # written before there were manifests, all of them

  def _unproven(self) -> bool:
    marked = (self.directory / _MARKER).exists() or self.aside()
    steps = self.listed()
    return bool(steps) and not marked and not any(map(self._has_manifest, steps))

  def folder(self, step: int) -> epath.Path:
    return self.directory / str(step)

  def _has_manifest(self, step: int) -> bool:
    return (self.folder(step) / MANIFEST).exists()

  def listed(self) -> list[int]:
    """Steps that have a folder, whole or not, in order."""
    paths = self.directory.iterdir() if self.directory.exists() else ()
    return sorted(int(p.name) for p in paths if p.name.isdigit() and p.is_dir())

  def whole(self) -> list[int]:
    """Steps with a manifest that is in order; not one that is still being written."""
    out = []
    for step in self.listed():
      with contextlib.suppress(DamageError):
        self.files(step)
        out.append(step)
    return out

  def aside(self) -> list[str]:
    """Names of the folders of damaged steps."""
    return sorted(p.name for p in self.directory.glob("*.damaged"))

  def once_whole(self) -> bool:
    """Whether there ever was a whole step."""
    marker = self.directory / _MARKER
    return marker.exists() and bool(marker.read_text())

  def files(self, step: int) -> Files:
    """What belongs to a step. Raises DamageError for its manifest."""
    folder = self.folder(step)
    if self.unproven:
      return {name: (size, ()) for name, size in sizes(folder).items()}
    return read(folder, step)

  def json(self, step: int, name: str) -> Any:
    """The content of a file of a step, None where it has none of this name; see `read_json`."""
    files, folder = self.files(step), self.folder(step)
    if self.unproven:
      return json.loads((folder / name).read_text()) if name in files else None
    return read_json(folder, step, files, name)

  def complete(self, step: int, files: Mapping[str, int], parts: Iterable[Part]) -> None:
    """Makes a step whole; one that it replaces goes."""
    write(self.folder(step), step, files, parts)
    (self.directory / _MARKER).write_text("whole\n")
    if (old := _beside(self.folder(step), "replaced")).exists():
      _remove(old)

  def remove(self, step: int) -> None:
    _remove(self.folder(step))

  def make_room(self, step: int) -> None:
    """Moves a step away that comes again; until the new one is whole, it is not lost."""
    self.folder(step).replace(_beside(self.folder(step), "replaced"))

  def set_aside(self, step: int, problems: Sequence[str]) -> None:
    """Says that a step is damaged, and moves it out of the way."""
    text = "checkpoint of step %d is damaged and not used: %s. %s"
    if self.read_only:
      logging.warning(text, step, listed(problems), f"It stays in {self.directory}")
      return
    aside = _beside(self.folder(step), "damaged")
    if aside.exists():
      aside.rmtree()
    self.folder(step).replace(aside)
    logging.warning(text, step, listed(problems), f"It is kept as {aside}; remove it when you like")

  def tidy(self) -> None:
    """Before writing: removes what interrupted saves left, sets steps aside that are not whole."""
    self.directory.mkdir(parents=True, exist_ok=True)
    for path in list(self.directory.iterdir()):
      if ".orbax-checkpoint-tmp" in path.name:
        logging.info("removing %s, which an interrupted save left", path)
        path.rmtree() if path.is_dir() else path.unlink()
    for old in list(self.directory.glob("*.replaced")):
      step = int(old.stem)
      if self._has_manifest(step):
        _remove(old)
        continue
      if self.folder(step).exists():
        self.remove(step)
      old.replace(self.folder(step))
    if self.unproven:
      self._adopt()
    whole = any(map(self._has_manifest, self.listed()))
    marker = self.directory / _MARKER
    if whole or not marker.exists():
      marker.write_text("whole\n" if whole else "")
    for step in self.listed():
      if not self._has_manifest(step):
        self.set_aside(step, [UNFINISHED])

  def _adopt(self) -> None:
    logging.warning(
      "the checkpoints of steps %s in %s were written before there were manifests: they are taken "
      "as they are, and get manifests now. Damage that they have already cannot be found",
      self.listed(),
      self.directory,
    )
    for step in self.listed():
      files = sizes(self.folder(step))
      self.complete(step, files, [hashes(self.folder(step), files, (0, 1), READ_THREADS)])
    self.unproven = False


def _beside(folder: epath.Path, ending: str) -> epath.Path:
  return folder.parent / f"{folder.name}.{ending}"


def _remove(folder: epath.Path) -> None:
  """In two steps, so that being killed in between leaves nothing that looks like a checkpoint."""
  if "://" in str(folder):  # renaming copies every object there
    (folder / MANIFEST).unlink(missing_ok=True)
  else:
    folder = folder.replace(_beside(folder, "removed.orbax-checkpoint-tmp"))
  folder.rmtree()
