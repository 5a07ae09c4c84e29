"""Multi-process runs: initialization, host-side collectives, and coordinated failure and exit.

The collectives exchange small JSON values through the key-value store of jax.distributed's
coordinator, which runs in process 0; no device takes part. A heartbeat thread in each process
publishes that the process is alive, reads the failures that others report, and terminates the
process if its main thread stays blocked on one that failed. With one process all of this is a
no-op: all_gather returns one value, and barrier returns at once.

All processes must call all_gather, check_equal, broadcast, barrier and ConsensusFlag in the same
order.
"""

import collections
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from jax._src import distributed  # the key-value store has no public API

from xmodal_jax.errors import UserError

TIMEOUT = 300.0  # default of how long processes wait for each other, in seconds
HEARTBEAT_TIMEOUT = 20.0  # seconds without a heartbeat after which a process counts as dead
_EXIT_GRACE = 6.0  # seconds a process has to exit by itself after another one failed
_COORDINATOR_GRACE = 3.0  # extra seconds of process 0, whose store the others still read from
_HEARTBEAT_PERIOD = 0.5  # seconds
_ROOT = "xmodal_jax"  # prefix of all keys in the store


class ProcessError(UserError):
  """Processes of a run disagree, or some of them are missing."""


_call_counts: collections.Counter[str] = collections.Counter()  # by name, equal in all processes
_heartbeat: "_Heartbeat | None" = None  # None with one process


def initialize(
  coordinator: str = "",
  count: int | None = None,
  index: int | None = None,
  *,
  cluster: bool | None = None,
  timeout: float = TIMEOUT,
  heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
) -> None:
  """Connects this process to the others of the run, if any. Call it before any device is used.

  Args:
    coordinator: HOST:PORT of process 0. By default $JAX_COORDINATOR_ADDRESS.
    count: number of processes. By default $JAX_NUM_PROCESSES.
    index: index of this process. By default $JAX_PROCESS_ID.
    cluster: without a coordinator, whether to detect the processes of a TPU slice, SLURM or Open
      MPI. By default only in a SLURM step of several tasks.
    timeout: seconds to wait for the other processes.
    heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.

  Raises:
    ProcessError: some, but not all, of coordinator, count and index are given, or the other
      processes did not connect within `timeout` seconds.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  count = _int_from_env(count, "JAX_NUM_PROCESSES")
  index = _int_from_env(index, "JAX_PROCESS_ID")
  if cluster is None:
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    cluster = "SLURM_STEP_NODELIST" in os.environ and tasks > 1
  given = bool(coordinator), count is not None, index is not None
  if any(given) and not all(given):
    raise ProcessError(
      f"--coordinator={coordinator or None} --process_count={count} --process_id={index}: "
      "processes that are started by hand need all three (or JAX_COORDINATOR_ADDRESS, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
    )
  if not any(given) and not cluster:
    return
  # The training loop handles SIGTERM itself; JAX's service would replace its handler.
  jax.config.update("jax_enable_preemption_service", False)
  address = {}
  if any(given):
    address = dict(
      coordinator_address=coordinator,
      num_processes=count,
      process_id=index,
      cluster_detection_method="deactivate",
    )
  started = time.monotonic()
  try:
    jax.distributed.initialize(
      **address,
      initialization_timeout=int(timeout),
      # A fallback for when the heartbeat thread cannot terminate the process. JAX sends two
      # heartbeats in this time and may give up after half of it, hence the factor.
      heartbeat_timeout_seconds=int(2 * (heartbeat_timeout + _EXIT_GRACE + _COORDINATOR_GRACE + 1)),
      shutdown_timeout_seconds=60,
    )
  except Exception as e:  # jaxlib's own exception types
    raise ProcessError(
      f"process {index if any(given) else '(index from the cluster)'} waited "
      f"{time.monotonic() - started:.0f} s for the others at {coordinator or 'its coordinator'}: "
      f"start all of them, with the same address, within {timeout:.0f} s ({e})"
    ) from e
  if distributed.global_state.num_processes > 1:
    global _heartbeat
    _heartbeat = _Heartbeat(heartbeat_timeout)
    _heartbeat.start()


def _int_from_env(value: int | None, name: str) -> int | None:
  if value is None and name in os.environ:
    try:
      return int(os.environ[name])
    except ValueError:
      raise ProcessError(f"${name} is {os.environ[name]!r}, not a number") from None
  return value


def check_initialized() -> None:
  """Raises ProcessError on a host of a multi-host slice that did not connect to the others."""
  if jax.process_count() > 1 and _heartbeat is None:
    raise ProcessError(
      f"this machine is one of {jax.process_count()} of a slice: add --distributed, on all of them"
    )


def _client() -> Any:
  return distributed.global_state.client


def _format_indices(indices: list[int]) -> str:
  """[1, 3] -> "processes 1, 3"."""
  return ("process " if len(indices) == 1 else "processes ") + ", ".join(map(str, indices))


def _read_dir(path: str) -> dict[str, str]:
  """{last part of the key: value} of all keys under `path` in the store."""
  return {k.rsplit("/", 1)[1]: v for k, v in _client().key_value_dir_get(f"{path}/")}


def barrier(name: str, timeout: float = TIMEOUT) -> None:
  """Blocks until all processes call it.

  Raises ProcessError, naming the missing processes, if they do not within `timeout` seconds.
  """
  if jax.process_count() == 1:
    return
  _call_counts[name] += 1
  path = f"{_ROOT}/barrier/{name}/{_call_counts[name]}"
  _client().key_value_set(f"{path}/{jax.process_index()}", socket.gethostname())
  try:
    _client().wait_at_barrier(path, int(timeout * 1000))
  except jax.errors.JaxRuntimeError as e:
    try:
      arrived = {int(p) for p in _read_dir(path)}
    except jax.errors.JaxRuntimeError:
      raise ProcessError(f"barrier {name!r}: process 0, the coordinator, does not answer") from e
    missing = sorted(set(range(jax.process_count())) - arrived)
    what = (
      f"{_format_indices(missing)} of {jax.process_count()} did not arrive"
      if missing
      else "it failed"
    )
    why = "" if "DEADLINE" in str(e) else f" ({str(e).splitlines()[0]})"
    raise ProcessError(f"barrier {name!r}: {what} within {timeout:g} s{why}") from e
  if jax.process_index() == 0:  # all processes have passed, so no one reads the keys any more
    _client().key_value_delete(path)


def all_gather(name: str, value: Any, timeout: float = TIMEOUT) -> list[Any]:
  """Returns the `value` of every process, in the order of their indices.

  value: anything that JSON can encode; other types become str. Raises ProcessError if a process
  does not call it within `timeout` seconds.
  """
  value = json.loads(json.dumps(value, default=str))
  if jax.process_count() == 1:
    return [value]
  _call_counts[f"gather {name}"] += 1
  call = _call_counts[f"gather {name}"]
  path = f"{_ROOT}/gather/{name}"
  _client().key_value_set(f"{path}/{call}/{jax.process_index()}", json.dumps(value))
  barrier(name, timeout)
  values = _read_dir(f"{path}/{call}")
  if jax.process_index() == 0 and call > 1:  # all processes have read the values of the last call
    _client().key_value_delete(f"{path}/{call - 1}")
  return [json.loads(values[str(p)]) for p in range(jax.process_count())]


def broadcast(name: str, value: Any, timeout: float = TIMEOUT) -> Any:
  """Returns the `value` of process 0 in every process; the others' values are ignored."""
  return all_gather(name, value if jax.process_index() == 0 else None, timeout)[0]


def check_equal(name: str, value: Any, timeout: float = TIMEOUT) -> None:
  """Raises ProcessError in every process if `value` is not the same in all of them.

  The message gives the values of process 0 and of the first that differs; of a Mapping only the
  keys that differ.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(value, sort_keys=True, default=str)
  digests = all_gather(name, hashlib.sha256(text.encode()).hexdigest(), timeout)
  other = next((p for p, d in enumerate(digests) if d != digests[0]), None)
  if other is None:
    return
  # Only the two processes that are compared send their value, which may be large.
  own = value if jax.process_index() in (0, other) else None
  values = all_gather(f"{name}, values", own, timeout)
  a, b = values[0], values[other]
  if not isinstance(a, Mapping) or not isinstance(b, Mapping):
    a, b = {name: a}, {name: b}
  differ = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
  lines = [f"\n  {k}: {a.get(k)!r} in process 0, {b.get(k)!r} in process {other}" for k in differ]
  raise ProcessError(f"the processes differ in {name}:" + "".join(lines))


def visible_everywhere(path: Any) -> bool:
  """Whether the file `path` exists in every process; the same result in all of them."""
  return all(all_gather("file", path.exists()))


class ConsensusFlag:
  """A local condition that becomes true in all processes at the same call.

  All processes must call the flag equally often. While the condition is false everywhere a call
  takes a lock and sends no message. Once it is true in one process, each process publishes how many
  calls it has begun; the flag is true from the call after the largest of these numbers on.

      stop = ConsensusFlag(lambda: sigterm_received)
      for step in range(total):
        train_step()
        if stop():  # true after the same step in all processes
          break
  """

  def __init__(self, condition: Callable[[], bool]):
    self.condition, self.calls, self.value = condition, 0, False
    self._published: int | None = None  # the number of calls that this process published
    self._true_from: int | None = None  # index, from 1, of the first call that returns True
    _call_counts["flag"] += 1
    self.id = str(_call_counts["flag"])
    self._path = f"{_ROOT}/flag/{self.id}"
    if _heartbeat is not None:
      _heartbeat.register(self)

  def __call__(self) -> bool:
    if self.value:
      return True
    if _heartbeat is None:
      self.value = self.condition()
      return self.value
    with _heartbeat.lock:
      self.calls += 1
      if self._published is None and self.condition():
        _client().key_value_set(f"{_ROOT}/flag_set/{self.id}", "", True)
        self._publish(self.calls - 1)  # without the current call, which may return True itself
    if self._published is not None:
      self.value = self.calls >= self._first_true_call()
    return self.value

  def on_set(self) -> None:
    """The heartbeat thread saw that another process set the flag. Requires the lock."""
    if self._published is None:
      self._publish(self.calls)

  def _publish(self, calls: int) -> None:
    """Requires the lock."""
    self._published = calls
    _client().key_value_set(f"{self._path}/{jax.process_index()}", str(calls))

  def _first_true_call(self) -> int:
    if self._true_from is None:
      deadline, count = time.monotonic() + TIMEOUT, jax.process_count()
      while len(published := _read_dir(self._path)) < count:
        if time.monotonic() > deadline:
          missing = sorted(set(range(count)) - {int(p) for p in published})
          raise ProcessError(
            f"a process was asked to stop, but {_format_indices(missing)} did not answer within "
            f"{TIMEOUT:g} s"
          )
        time.sleep(0.02)
      self._true_from = max(map(int, published.values())) + 1
    return self._true_from


class _Heartbeat(threading.Thread):
  """Publishes that this process is alive and ends it if its main thread cannot after a failure."""

  def __init__(self, timeout: float):
    super().__init__(name="heartbeat", daemon=True)
    self.lock = threading.Lock()
    self.timeout, self.stopped = timeout, threading.Event()
    self.flags: dict[str, ConsensusFlag] = {}
    state = distributed.global_state
    self.index, self.count = state.process_id, state.num_processes
    # Bounds the load of the coordinator to some hundred messages a second.
    self.period = max(_HEARTBEAT_PERIOD, self.count / 256)
    self.beats = 0
    # In process 0 only: index -> (last heartbeat, time when it changed).
    self.last_beats: dict[int, tuple[str, float]] = {}
    self.failed: dict[int, str] = {}  # reported by the failing process itself
    self.dead: dict[int, str] = {}  # reported by process 0 after missing heartbeats
    self.deadline: float | None = None  # set once a failure is known

  def register(self, flag: ConsensusFlag) -> None:
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
    _client().key_value_set(f"{_ROOT}/heartbeat/{self.index}", str(self.beats), True)
    for flag_id in _read_dir(f"{_ROOT}/flag_set"):
      with self.lock:
        # A flag that this process has not created yet is handled in a later tick.
        if flag_id in self.flags:
          self.flags[flag_id].on_set()
    if self.index == 0:
      self._find_dead()
    self._read_failures()

  def _find_dead(self) -> None:
    now, beats = time.monotonic(), _read_dir(f"{_ROOT}/heartbeat")
    for p in range(1, self.count):
      beat = beats.get(str(p), "")
      if p not in self.last_beats or self.last_beats[p][0] != beat:
        self.last_beats[p] = beat, now
      elif now - self.last_beats[p][1] > self.timeout and p not in self.failed | self.dead:
        text = f"no heartbeat for {self.timeout:g} s: it was killed, or its machine is down"
        _client().key_value_set(f"{_ROOT}/dead/{p}", text, True)

  def _read_failures(self) -> None:
    for folder, known in (("failed", self.failed), ("dead", self.dead)):
      for p, text in _read_dir(f"{_ROOT}/{folder}").items():
        if int(p) not in known and int(p) != self.index:
          logging.error("process %s of %d failed: %s", p, self.count, text)
        known[int(p)] = text
    if (self.failed or self.dead) and self.deadline is None:
      _client().key_value_set(f"{_ROOT}/acknowledged/{self.index}", "", True)
      grace = _EXIT_GRACE + _COORDINATOR_GRACE * (self.index == 0)
      self.deadline = time.monotonic() + grace

  def report(self, error: BaseException) -> None:
    """Reports to the other processes that this one fails."""
    text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(f"{_ROOT}/failed/{self.index}", text[:4000], True)

  def _abort(self, why: str) -> None:
    """Ends the process without jax.distributed.shutdown, which would wait for all processes."""
    logging.error(
      "process %d of %d stops because another one failed: %s. Rerun the same command on all of "
      "them to resume from the last checkpoint", self.index, self.count, why
    )  # fmt: skip
    self.exit(1)

  def exit(self, code: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(f"{_ROOT}/exited/{self.index}", "", True)
      if self.index == 0:
        self._wait_for("exited", _EXIT_GRACE + 2)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _wait_for(self, folder: str, seconds: float) -> None:
    """Waits, at most so long, until all processes but the dead have a key in `folder`."""
    end = time.monotonic() + seconds
    while True:
      present = {int(p) for p in _read_dir(f"{_ROOT}/{folder}")}
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
    known = {int(p) for p in _read_dir(f"{_ROOT}/acknowledged")}
    known |= self.failed.keys() | self.dead.keys()
    if unresponsive := sorted(set(range(self.count)) - known):
      logging.error(
        "no answer from %s: killed, or the machine is down. Rerun the same command on all "
        "processes to resume from the last checkpoint", _format_indices(unresponsive)
      )  # fmt: skip


@contextlib.contextmanager
def report_failure() -> Iterator[None]:
  """Reports an exception in this block to the other processes at once; all exit seconds later.

  Use it inside context managers whose exit waits for the other processes, such as checkpoint
  writers: without it they learn of the failure only by a timeout.
  """
  try:
    yield
  except BaseException as e:
    if _heartbeat is not None:
      _heartbeat.report(e)
    raise


@contextlib.contextmanager
def exit_together(
  message: Callable[[BaseException], str | None] = lambda error: None,
) -> Iterator[None]:
  """Wraps the program's work: its processes all succeed, or all exit with a non-zero code.

  message: the text that is logged for an error instead of its traceback, or None. With one process,
  errors pass through.
  """
  if _heartbeat is None:
    yield
    return
  try:
    with report_failure():
      yield
      barrier("the end", 2 * TIMEOUT)
  except BaseException as e:
    index, count, text = jax.process_index(), jax.process_count(), message(e)
    if text is None:
      logging.exception("process %d of %d failed", index, count)
    else:
      logging.error("process %d of %d failed: %s", index, count, text)
    _heartbeat.exit_after_failure()
  _heartbeat.stopped.set()
  _heartbeat.join()
  jax.distributed.shutdown()
