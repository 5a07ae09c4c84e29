"""One workdir, one run: `claim.json` in a workdir names the process that trains in it.

Its holder rewrites the file every few seconds. A claim whose process is known to have ended, or
that does not change for a while, is taken over. Works on every storage that epath reads and writes;
several processes of one run claim once.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from xmodal_jax.distributed import processes
from xmodal_jax.runtime.workdir import WorkdirError

FILE = "claim.json"
PERIOD = 10.0  # seconds between heartbeats
STALE = 45.0  # seconds without one after which the holder counts as ended
_SETTLE = 1.0  # seconds after which the last of several writers of the same file is known


class Claim:
  """The claim of this process on a workdir, see `hold`."""

  def __init__(self, workdir: epath.Path):
    self.workdir, self.path = workdir, workdir / FILE
    self.facts = _process() | dict(token=uuid.uuid4().hex, since=time.strftime("%F %T %Z"), beat=0)
    self.lost = ""  # why this process no longer has the claim
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
    self._made = False  # whether the folder is new

  def check(self) -> None:
    """Raises WorkdirError if another run has taken over the workdir."""
    if self.lost:
      raise WorkdirError(self.lost)

  def take(self) -> None:
    """Raises WorkdirError if another run has the workdir."""
    self._made = not self.workdir.exists()
    self.workdir.mkdir(parents=True, exist_ok=True)
    taken_over = False
    while not self._create():
      text = _read(self.path)
      if text is not None:
        self._wait_for_end(text)
        self.path.unlink(missing_ok=True)
        taken_over = True
    if taken_over or _is_remote(self.path):
      # Another one may have written the file at the same time.
      time.sleep(_SETTLE)
      other = _facts(_read(self.path) or "")
      if other.get("token", self._token) != self._token:
        raise WorkdirError(_in_use(self.workdir, other))
    self._thread.start()

  @property
  def _token(self) -> str:
    return self.facts["token"]

  def _create(self) -> bool:
    """Writes the file unless it exists."""
    if _is_remote(self.path):
      if self.path.exists():
        return False
      self.path.write_text(json.dumps(self.facts))
      return True
    try:
      with open(self.path, "x") as f:
        f.write(json.dumps(self.facts))
    except FileExistsError:
      return False
    return True

  def _wait_for_end(self, text: str) -> None:
    """Returns once the holder is known to have ended. Raises WorkdirError if it has not."""
    other = _facts(text)
    alive = _is_running(other)
    if alive is None:
      logging.warning(
        "%s is claimed by %s: waiting up to %.0f s for a sign of it",
        self.workdir,
        _who(other),
        STALE,
      )
      alive = _changes(self.path, text)
    if alive:
      raise WorkdirError(_in_use(self.workdir, other))
    logging.warning(
      "taking over %s from %s, which ended without releasing it", self.workdir, _who(other)
    )

  def _beat(self) -> None:
    while not self._released.wait(PERIOD):
      try:
        text = _read(self.path)
        other = _facts(text or "")
        if other.get("token", self._token) != self._token:
          self.lost = (
            f"{_who(other)} has taken over {self.workdir}, because this process did not renew its "
            "claim in time: it stops, without saving"
          )
          logging.error("%s", self.lost)
          return
        self.facts["beat"] += 1
        self._renew()
      except Exception as e:  # storage that fails for a while must not end the heartbeat
        logging.warning("could not renew %s: %s", self.path, e)

  def _renew(self) -> None:
    if _is_remote(self.path):
      self.path.write_text(json.dumps(self.facts))
      return
    temporary = self.path.parent / f"{FILE}.{self._token}.tmp"
    temporary.write_text(json.dumps(self.facts))
    temporary.replace(self.path)

  def release(self) -> None:
    self._released.set()
    if not self._thread.is_alive():
      return
    self._thread.join()
    if self.lost:
      return
    try:
      self.path.unlink(missing_ok=True)
      if self._made and not _is_remote(self.path) and not any(self.workdir.iterdir()):
        self.workdir.rmdir()
    except OSError as e:
      logging.warning("could not remove %s: %s", self.path, e)


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Claim]:
  """Holds the claim on a workdir while the block runs; all processes of a run must enter it.

  workdir: an absolute path; the folder is made. Raises WorkdirError in all processes if another run
  has it.
  """
  claim, error = Claim(workdir), None
  if jax.process_index() == 0:
    try:
      claim.take()
    except WorkdirError as e:
      error = str(e)
  if (error := processes.broadcast("claim of the workdir", error)) is not None:
    raise WorkdirError(error)
  try:
    yield claim
  finally:
    claim.release()


def _is_remote(path: epath.Path) -> bool:
  return "://" in str(path)


def _read(path: epath.Path) -> str | None:
  try:
    return path.read_text()
  except FileNotFoundError:
    return None


def _facts(text: str) -> dict[str, Any]:
  """The content of a claim; of one that is not whole, nothing."""
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError):
    return {}


def _who(facts: dict[str, Any]) -> str:
  return f"process {facts.get('pid', '?')} on {facts.get('host', '?')}"


def _in_use(workdir: epath.Path, facts: dict[str, Any]) -> str:
  return (
    f"{workdir} is in use: {_who(facts)} has been training in it since {facts.get('since', '?')}. "
    "Wait until it ends, stop it, or use another --workdir"
  )


def _process() -> dict[str, Any]:
  """What identifies this process, also after its number was given to another one."""
  pid = os.getpid()
  return dict(host=socket.gethostname(), machine=_machine(), pid=pid, started=_started(pid))


def _machine() -> str | None:
  """Identifies the process numbers of this machine or container since its start; None: unknown."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return None


def _started(pid: int) -> str | None:
  """When a process of this machine started, in its clock's ticks; None if it does not run."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return None if fields[0] in "ZX" else fields[19]


def _is_running(facts: dict[str, Any]) -> bool | None:
  """Whether the process that wrote a claim runs; None if it is not one of this machine."""
  if facts.get("machine") is None or facts["machine"] != _machine():
    return None
  return facts.get("started") is not None and _started(facts["pid"]) == facts["started"]


def _changes(path: epath.Path, text: str) -> bool:
  """Whether the file changes within STALE seconds."""
  end = time.monotonic() + STALE
  while time.monotonic() < end:
    time.sleep(min(1.0, STALE / 10))
    now = _read(path)
    if now is None:
      return False
    if now != text:
      return True
  return False
