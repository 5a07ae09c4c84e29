"""The heartbeat thread of a process in a run of several."""

import contextlib
import os
import sys
import threading
import time
from typing import Protocol

import jax
from absl import logging
from jax._src import distributed  # its state has no public API

from xmodal_jax.distributed import store

EXIT_GRACE = 6.0  # seconds a process has to exit by itself after another one failed
COORDINATOR_GRACE = 3.0  # extra seconds of process 0, whose store the others still read from
_PERIOD = 0.5  # seconds


class Flag(Protocol):
  """What the thread tells of other processes: see `processes.ConsensusFlag`."""

  id: str

  def on_set(self) -> None: ...


class Heartbeat(threading.Thread):
  """Publishes that this process is alive and ends it if its main thread cannot after a failure."""

  def __init__(self, timeout: float):
    super().__init__(name="heartbeat", daemon=True)
    self.lock = threading.Lock()
    self.timeout, self.stopped = timeout, threading.Event()
    self.flags: dict[str, Flag] = {}
    state = distributed.global_state
    self.index, self.count = state.process_id, state.num_processes
    # Bounds the load of the coordinator to some hundred messages a second.
    self.period = max(_PERIOD, self.count / 256)
    self.beats = 0
    # In process 0 only: index -> (last heartbeat, time when it changed).
    self.last_beats: dict[int, tuple[str, float]] = {}
    self.failed: dict[int, str] = {}  # reported by the failing process itself
    self.dead: dict[int, str] = {}  # reported by process 0 after missing heartbeats
    self.deadline: float | None = None  # set once a failure is known

  def register(self, flag: Flag) -> None:
    with self.lock:
      self.flags[flag.id] = flag

  def run(self) -> None:
    while not self.stopped.wait(self.period):
      try:
        self._tick()
      except jax.errors.JaxRuntimeError as e:
        if not self.stopped.is_set():
          self._abort(f"process 0, the coordinator, does not answer: it died or ended ({e})")
      except Exception:
        logging.exception("the heartbeat thread of process %d failed", self.index)
        self._abort("its heartbeat thread failed")
      # If all processes failed on their own, each may take its time to finish its checkpoint.
      late = self.deadline is not None and time.monotonic() > self.deadline
      if late and len(self.failed) < self.count:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          self._log_unresponsive()
        self._abort("its main thread is blocked on the others")

  def _tick(self) -> None:
    self.beats += 1
    store.client().key_value_set(f"{store.ROOT}/heartbeat/{self.index}", str(self.beats), True)
    for flag_id in store.read_dir(f"{store.ROOT}/flag_set"):
      with self.lock:
        # A flag that this process has not created yet is handled in a later tick.
        if flag_id in self.flags:
          self.flags[flag_id].on_set()
    if self.index == 0:
      self._find_dead()
    self._read_failures()

  def _find_dead(self) -> None:
    now, beats = time.monotonic(), store.read_dir(f"{store.ROOT}/heartbeat")
    for p in range(1, self.count):
      beat = beats.get(str(p), "")
      if p not in self.last_beats or self.last_beats[p][0] != beat:
        self.last_beats[p] = beat, now
      elif now - self.last_beats[p][1] > self.timeout and p not in self.failed | self.dead:
        text = f"no heartbeat for {self.timeout:g} s: it was killed, or its machine is down"
        store.client().key_value_set(f"{store.ROOT}/dead/{p}", text, True)

  def _read_failures(self) -> None:
    for folder, known in (("failed", self.failed), ("dead", self.dead)):
      for p, text in store.read_dir(f"{store.ROOT}/{folder}").items():
        if int(p) not in known and int(p) != self.index:
          logging.error("process %s of %d failed: %s", p, self.count, text)
        known[int(p)] = text
    if (self.failed or self.dead) and self.deadline is None:
      store.client().key_value_set(f"{store.ROOT}/acknowledged/{self.index}", "", True)
      grace = EXIT_GRACE + COORDINATOR_GRACE * (self.index == 0)
      self.deadline = time.monotonic() + grace

  def report(self, error: BaseException) -> None:
    """Reports to the other processes that this one fails."""
    text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      store.client().key_value_set(f"{store.ROOT}/failed/{self.index}", text[:4000], True)

  def _abort(self, why: str) -> None:
    """Ends the process without jax.distributed.shutdown, which would wait for all processes."""
    logging.error(
      "process %d of %d stops because another one failed: %s. Rerun the same command on all of "
      "them to resume from the last checkpoint", self.index, self.count, why
    )  # fmt: skip
    self.exit(1)

  def exit(self, code: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      store.client().key_value_set(f"{store.ROOT}/exited/{self.index}", "", True)
      if self.index == 0:
        self._wait_for("exited", EXIT_GRACE + 2)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _wait_for(self, folder: str, seconds: float) -> None:
    """Waits, at most so long, until all processes but the dead have a key in `folder`."""
    end = time.monotonic() + seconds
    while True:
      present = {int(p) for p in store.read_dir(f"{store.ROOT}/{folder}")}
      missing = set(range(self.count)) - present - self.dead.keys()
      if not missing or time.monotonic() > end:
        return
      time.sleep(0.1)

  def exit_after_failure(self) -> None:
    """Ends the process after its main thread failed, once the others know of the failure."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._wait_for("acknowledged", 5)
      self._log_unresponsive()
    self.exit(1)

  def _log_unresponsive(self) -> None:
    """Logs which processes did not acknowledge the failure: they are its likely cause."""
    known = {int(p) for p in store.read_dir(f"{store.ROOT}/acknowledged")}
    known |= self.failed.keys() | self.dead.keys()
    if unresponsive := sorted(set(range(self.count)) - known):
      logging.error(
        "no answer from %s: killed, or the machine is down. Rerun the same command on all "
        "processes to resume from the last checkpoint", store.format_indices(unresponsive)
      )  # fmt: skip
