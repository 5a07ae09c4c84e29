"""Multi-process runs: initialization, host-side collectives, and coordinated failure and exit.

The collectives exchange small JSON values through the key-value store of jax.distributed's
coordinator, which runs in process 0; no device takes part. A heartbeat thread in each process
publishes that it is alive, reads the failures that others report, and terminates it if its main
thread stays blocked on one that failed: see `heartbeat`. With one process all of this is a
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
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from jax._src import distributed  # its state has no public API

from xmodal_jax.distributed import heartbeat, store
from xmodal_jax.errors import UserError

TIMEOUT = 300.0  # default of how long processes wait for each other, in seconds
HEARTBEAT_TIMEOUT = 20.0  # seconds without a heartbeat after which a process counts as dead


class ProcessError(UserError):
  """Processes of a run disagree, or some of them are missing."""


_call_counts: collections.Counter[str] = collections.Counter()  # by name, equal in all processes
_heartbeat: heartbeat.Heartbeat | None = None  # None with one process


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
  grace = heartbeat.EXIT_GRACE + heartbeat.COORDINATOR_GRACE
  started = time.monotonic()
  try:
    jax.distributed.initialize(
      **address,
      initialization_timeout=int(timeout),
      # A fallback for when the heartbeat thread cannot terminate the process. JAX sends two
      # heartbeats in this time and may give up after half of it, hence the factor.
      heartbeat_timeout_seconds=int(2 * (heartbeat_timeout + grace + 1)),
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
    _heartbeat = heartbeat.Heartbeat(heartbeat_timeout)
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


def barrier(name: str, timeout: float = TIMEOUT) -> None:
  """Blocks until all processes call it.

  Raises ProcessError, naming the missing processes, if they do not within `timeout` seconds.
  """
  if jax.process_count() == 1:
    return
  _call_counts[name] += 1
  path = f"{store.ROOT}/barrier/{name}/{_call_counts[name]}"
  store.client().key_value_set(f"{path}/{jax.process_index()}", socket.gethostname())
  try:
    store.client().wait_at_barrier(path, int(timeout * 1000))
  except jax.errors.JaxRuntimeError as e:
    try:
      arrived = {int(p) for p in store.read_dir(path)}
    except jax.errors.JaxRuntimeError:
      raise ProcessError(f"barrier {name!r}: process 0, the coordinator, does not answer") from e
    missing = sorted(set(range(jax.process_count())) - arrived)
    what = (
      f"{store.format_indices(missing)} of {jax.process_count()} did not arrive"
      if missing
      else "it failed"
    )
    why = "" if "DEADLINE" in str(e) else f" ({str(e).splitlines()[0]})"
    raise ProcessError(f"barrier {name!r}: {what} within {timeout:g} s{why}") from e
  if jax.process_index() == 0:  # all processes have passed, so no one reads the keys any more
    store.client().key_value_delete(path)


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
  path = f"{store.ROOT}/gather/{name}"
  store.client().key_value_set(f"{path}/{call}/{jax.process_index()}", json.dumps(value))
  barrier(name, timeout)
  values = store.read_dir(f"{path}/{call}")
  if jax.process_index() == 0 and call > 1:  # all processes have read the values of the last call
    store.client().key_value_delete(f"{path}/{call - 1}")
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
    self._path = f"{store.ROOT}/flag/{self.id}"
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
        store.client().key_value_set(f"{store.ROOT}/flag_set/{self.id}", "", True)
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
    store.client().key_value_set(f"{self._path}/{jax.process_index()}", str(calls))

  def _first_true_call(self) -> int:
    if self._true_from is None:
      deadline, count = time.monotonic() + TIMEOUT, jax.process_count()
      while len(published := store.read_dir(self._path)) < count:
        if time.monotonic() > deadline:
          missing = sorted(set(range(count)) - {int(p) for p in published})
          raise ProcessError(
            f"a process was asked to stop, but {store.format_indices(missing)} did not answer "
            f"within {TIMEOUT:g} s"
          )
        time.sleep(0.02)
      self._true_from = max(map(int, published.values())) + 1
    return self._true_from


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
