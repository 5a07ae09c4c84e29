"""Manifests: SHA-256 digests of all files of a checkpoint, and the checks against them.

A manifest is the file MANIFEST in the folder of a step: its own digest on the first line, then json
of the step and of every other file's size and digests. It is written last and atomically: a folder
without a manifest is incomplete. `StepFolders` lists and moves the folders of a workdir by that
rule. This module does not depend on Orbax or on what the files contain.
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

from xmodal_jax.errors import UserError

MANIFEST = "manifest"
UNFINISHED = f"{MANIFEST} is missing: it was lost, or the save was interrupted"
# Files are hashed in blocks of this size, so that threads and processes share a single large one.
BLOCK = 1 << 26
# A new manifest is not urgent, and the input pipeline needs the cores.
WRITE_THREADS = 4
READ_THREADS = min(16, os.cpu_count() or 1)
_CHUNK = 1 << 20
# This file says that steps in the same folder have manifests. It is empty until the first step is
# complete: with a text in it, a folder without a complete step has lost checkpoints.
_MARKER = "manifests"
_VERSION = 1

Files = Mapping[str, tuple[int, Sequence[str]]]  # path in the folder -> (bytes, digest per block)
Part = dict[str, dict[int, str]]  # path in the folder -> number of a block -> digest
Share = tuple[int, int]  # (process index, number of processes)


class CheckpointError(UserError):
  """A checkpoint that is missing, damaged, or of another model."""


class DamageError(CheckpointError):
  """A step whose files differ from those written. problems: lines that begin with a path."""

  def __init__(self, folder: epath.Path, step: int, problems: Sequence[str]):
    super().__init__(
      f"checkpoint of step {step} in {folder.parent} is damaged: {summarize(problems)}"
    )
    self.step, self.problems = step, list(problems)


def summarize(problems: Sequence[str], most: int = 3) -> str:
  """The first problems in one line, and the number of the others."""
  more = f", and {len(problems) - most} more" if len(problems) > most else ""
  return "; ".join(problems[:most]) + more


def sizes(folder: epath.Path) -> dict[str, int]:
  """Bytes of every file below the folder except the manifest, by its path in the folder."""
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
  """Digests of one process's share of all blocks. files: path -> bytes."""
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
  """Writes the manifest of a folder. files: path -> bytes; parts: digests from all processes."""
  digests: Part = {}
  for part in parts:
    for name, blocks in part.items():
      # json makes the keys from other processes strings.
      digests.setdefault(name, {}).update({int(i): d for i, d in blocks.items()})
  table = {n: [size, [digests[n][i] for i in range(_blocks(size))]] for n, size in files.items()}
  body = json.dumps({"version": _VERSION, "step": step, "block": BLOCK, "files": table}, indent=0)
  temporary = folder.parent / f"{folder.name}.{MANIFEST}.orbax-checkpoint-tmp"
  temporary.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
  temporary.replace(folder / MANIFEST)


def read(folder: epath.Path, step: int) -> Files:
  """The files that the manifest lists.

  Raises DamageError if it is missing, damaged or of another step, CheckpointError if another
  version of this package wrote it.
  """
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
  """Differences in names and sizes, found without reading a file."""
  try:
    have = sizes(folder)
  except OSError as e:
    return [f"{folder} is {_unreadable(e)}"]
  out = [f"{name} is missing" for name in files.keys() - have.keys()]
  out += [f"{name} does not belong to this checkpoint" for name in have.keys() - files.keys()]
  out += [
    _resized(name, have[name], files[name][0])
    for name in files.keys() & have.keys()
    if have[name] != files[name][0]
  ]
  return sorted(out)


def content_problems(
  folder: epath.Path, files: Files, share: Share = (0, 1), threads: int = READ_THREADS
) -> list[str]:
  """Files whose bytes differ from the digests, in one process's share of the blocks."""
  index, count = share
  blocks = [(name, i) for name, (size, _) in files.items() for i in range(_blocks(size))]

  def check(block: tuple[str, int]) -> str | None:
    name, i = block
    try:
      digest = _digest(folder, name, i)
    except OSError as e:
      return f"{name} is {'missing' if _missing(e) else _unreadable(e)}"
    if digest == files[name][1][i]:
      return None
    where = f", in its bytes from {i * BLOCK} on" if i else ""
    return _changed(name, digest, files[name][1][i]) + where

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return sorted(p for p in pool.map(check, blocks[index::count]) if p)


def read_json(folder: epath.Path, step: int, files: Files, name: str) -> Any:
  """The content of a json file; None if the manifest does not list it.

  Raises DamageError if its bytes differ from those written.
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


class StepFolders:
  """The folders `checkpoints/<step>` of a workdir, and which of them are complete.

  A step is complete if it has a valid manifest. Beside them: `<step>.damaged` (kept for the user;
  more of the same step are `<step>.damaged-2` and so on), `<step>.replaced` (the earlier version of
  a step that is being rewritten), the file `<step>.saving` (until a step is complete), and
  temporary ones. With read_only nothing is moved or removed.
  """

  def __init__(self, directory: epath.Path, *, read_only: bool):
    self.directory, self.read_only = directory, read_only
    # A version of this package without manifests wrote all steps.
    self.without_manifests = self._are_without_manifests()

  def _are_without_manifests(self) -> bool:
    if (self.directory / _MARKER).exists() or self.damaged():
      return False
    steps = self.all_steps()
    return bool(steps) and not any(map(self._has_manifest, steps))

  def path(self, step: int) -> epath.Path:
    return self.directory / str(step)

  def _has_manifest(self, step: int) -> bool:
    return (self.path(step) / MANIFEST).exists()

  def all_steps(self) -> list[int]:
    """Steps that have a folder, complete or not, in ascending order."""
    paths = self.directory.iterdir() if self.directory.exists() else ()
    return sorted(int(p.name) for p in paths if p.name.isdigit() and p.is_dir())

  def complete_steps(self) -> list[int]:
    """Steps with a valid manifest, in ascending order; a step that is being written has none."""
    out = []
    for step in self.all_steps():
      with contextlib.suppress(DamageError):
        self.files(step)
        out.append(step)
    return out

  def damaged(self) -> list[str]:
    """Names of the folders that `set_aside` has renamed."""
    return sorted(p.name for p in self.directory.glob("*.damaged*"))

  def ever_complete(self) -> bool:
    """Whether a step has ever been complete in this workdir."""
    marker = self.directory / _MARKER
    return marker.exists() and bool(marker.read_text())

  def files(self, step: int) -> Files:
    """The files of a step. Raises DamageError if its manifest is missing or damaged."""
    folder = self.path(step)
    if self.without_manifests:
      return {name: (size, ()) for name, size in sizes(folder).items()}
    return read(folder, step)

  def json(self, step: int, name: str) -> Any:
    """The content of a json file of a step; None if the step does not have it. See `read_json`."""
    files, folder = self.files(step), self.path(step)
    if self.without_manifests:
      return json.loads((folder / name).read_text()) if name in files else None
    return read_json(folder, step, files, name)

  def complete(self, step: int, files: Mapping[str, int], parts: Iterable[Part]) -> None:
    """Writes the manifest of a step, then removes the version that the step replaces."""
    write(self.path(step), step, files, parts)
    (self.directory / _MARKER).write_text("whole\n")
    self._saving(step).unlink(missing_ok=True)
    if (old := _beside(self.path(step), "replaced")).exists():
      _remove(old)

  def begin(self, step: int) -> None:
    """Before a step is written: until it is complete, `clean_up` may remove it."""
    self._saving(step).write_text("")

  def _saving(self, step: int) -> epath.Path:
    return _beside(self.path(step), "saving")

  def remove(self, step: int) -> None:
    _remove(self.path(step))

  def make_room(self, step: int) -> None:
    """Renames a step that is to be written again; `complete` removes it, `clean_up` restores it."""
    self.path(step).replace(_beside(self.path(step), "replaced"))

  def set_aside(self, step: int, problems: Sequence[str]) -> None:
    """Warns that a step is damaged, and renames its folder unless read_only."""
    text = "checkpoint of step %d is damaged and not used: %s. %s"
    if self.read_only:
      logging.warning(text, step, summarize(problems), f"It stays in {self.directory}")
      return
    aside, count = _beside(self.path(step), "damaged"), 1
    while aside.exists():
      count += 1
      aside = _beside(self.path(step), f"damaged-{count}")
    self.path(step).replace(aside)
    done = f"It is kept as {aside}, which you may remove"
    logging.warning(text, step, summarize(problems), done)

  def clean_up(self) -> None:
    """Before writing: removes what interrupted saves left, and sets damaged steps aside."""
    self.directory.mkdir(parents=True, exist_ok=True)
    for path in list(self.directory.iterdir()):
      if ".orbax-checkpoint-tmp" in path.name:
        logging.warning("removing %s, left by an interrupted save", path)
        path.rmtree() if path.is_dir() else path.unlink()
    for old in list(self.directory.glob("*.replaced")):
      step = int(old.stem)
      if self._has_manifest(step):
        _remove(old)
        continue
      if self.path(step).exists():
        self.remove(step)
      old.replace(self.path(step))
    if self.without_manifests:
      self._write_manifests()
    complete = any(map(self._has_manifest, self.all_steps()))
    marker = self.directory / _MARKER
    if complete or not marker.exists():
      marker.write_text("whole\n" if complete else "")
    for step in self.all_steps():
      if self._has_manifest(step):
        continue
      if self._saving(step).exists():
        text = "removing %s: the save was interrupted before it was complete"
        logging.warning(text, self.path(step))
        self.remove(step)
      else:
        self.set_aside(step, [UNFINISHED])
    for saving in list(self.directory.glob("*.saving")):
      saving.unlink()

  def _write_manifests(self) -> None:
    """Gives the steps of a workdir without manifests their manifests."""
    logging.warning(
      "the checkpoints of steps %s in %s have no manifests, because an earlier version wrote them: "
      "they get manifests now, as they are. Damage from before cannot be detected",
      self.all_steps(),
      self.directory,
    )
    for step in self.all_steps():
      files = sizes(self.path(step))
      self.complete(step, files, [hashes(self.path(step), files, (0, 1), READ_THREADS)])
    self.without_manifests = False


def _beside(folder: epath.Path, ending: str) -> epath.Path:
  return folder.parent / f"{folder.name}.{ending}"


def _remove(folder: epath.Path) -> None:
  """Renames a folder, then deletes it: a process killed meanwhile leaves no partial checkpoint."""
  if "://" in str(folder):  # object stores copy every object to rename it
    (folder / MANIFEST).unlink(missing_ok=True)
  else:
    folder = folder.replace(_beside(folder, "removed.orbax-checkpoint-tmp"))
  folder.rmtree()
