"""Many processes as one run: how they find each other, agree, and stop together.

What they say to each other goes through the key-value store of jax.distributed's coordinator, which
process 0 runs: no device takes part. A thread per process, the watch, tells that it lives, hears
what the others have to say, and ends a process whose main thread waits for one that is gone. With
one process all of this is nothing: gather gives one value, barriers are open, a vote is a question.

Every process calls gather, agree, first, barrier and votes in the same order.
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
from jax._src import distributed  # the store has no public name

TIMEOUT = 300.0  # seconds that processes wait for each other, where nobody says otherwise
SILENCE = 20.0  # seconds without a sign of life after which a process counts as dead
_GRACE = 6.0  # seconds that a process has to end by itself, once another one failed
_LAST = 3.0  # more for process 0, which holds the store that the others read the reason from
_PERIOD = 0.5  # of the watch
_ROOT = "xmodal_jax"


class HostsError(RuntimeError):
  """Processes that differ, or that did not come."""


_turns: collections.Counter[str] = collections.Counter()  # calls by name, alike in every process
_watch: "_Watch | None" = None


def initialize(
  coordinator: str = "",
  count: int | None = None,
  index: int | None = None,
  *,
  cluster: bool | None = None,
  timeout: float = TIMEOUT,
  silence: float = SILENCE,
) -> None:
  """Joins the other processes of the run, if there are any; before any device is touched.

  coordinator: HOST:PORT of process 0, with the number of processes and which of them this is; or
  $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID. Without it, cluster=True asks
  the TPU slice, SLURM or Open MPI; None does so in a SLURM step of several tasks. Raises ValueError
  for half of an address, HostsError where the others do not come within `timeout` seconds.
  """
  env = os.environ.get
  coordinator = coordinator or env("JAX_COORDINATOR_ADDRESS", "")
  count = _number(count, "JAX_NUM_PROCESSES")
  index = _number(index, "JAX_PROCESS_ID")
  if cluster is None:
    cluster = "SLURM_STEP_NODELIST" in os.environ and int(env("SLURM_NTASKS", 1)) > 1
  given = bool(coordinator), count is not None, index is not None
  if any(given) and not all(given):
    raise ValueError(
      f"--coordinator={coordinator or None} --process_count={count} --process_id={index}: "
      "processes that are started by hand need all three (or JAX_COORDINATOR_ADDRESS, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
    )
  if not any(given) and not cluster:
    return
  # SIGTERM is ours: JAX's service would take it from the training loop.
  jax.config.update("jax_enable_preemption_service", False)
  address = dict(coordinator_address=coordinator, num_processes=count, process_id=index)
  alone = dict(cluster_detection_method="deactivate") if any(given) else {}
  started = time.monotonic()
  try:
    jax.distributed.initialize(
      **(address if any(given) else {}),
      **alone,
      initialization_timeout=int(timeout),
      # JAX itself ends processes should the watch be unable to. It beats twice in this time and may
      # find out in half of it.
      heartbeat_timeout_seconds=int(2 * (silence + _GRACE + _LAST + 1)),
      shutdown_timeout_seconds=60,
    )
  except Exception as e:  # jaxlib's own types
    raise HostsError(
      f"process {index if any(given) else '(by the cluster)'} waited "
      f"{time.monotonic() - started:.0f} s for the others at {coordinator or 'its coordinator'}: "
      f"start all of them, with the same address, within {timeout:.0f} s ({e})"
    ) from e
  if distributed.global_state.num_processes > 1:
    global _watch
    _watch = _Watch(silence)
    _watch.start()


def _number(value: int | None, name: str) -> int | None:
  if value is None and name in os.environ:
    return int(os.environ[name])
  return value


def check_joined() -> None:
  """Raises HostsError where the devices are of several processes that were never joined."""
  if jax.process_count() > 1 and _watch is None:
    raise HostsError(
      f"this machine is one of {jax.process_count()} of a slice: add --distributed, on all of them"
    )


def _client() -> Any:
  return distributed.global_state.client


def _listed(found: list[int]) -> str:
  return ("process " if len(found) == 1 else "processes ") + ", ".join(map(str, found))


def _folder(path: str) -> dict[str, str]:
  """{name: value} of a folder of the store."""
  return {k.rsplit("/", 1)[1]: v for k, v in _client().key_value_dir_get(f"{path}/")}


def barrier(name: str, timeout: float = TIMEOUT) -> None:
  """Waits until every process is here. HostsError after `timeout` seconds, naming who is not."""
  if jax.process_count() == 1:
    return
  _turns[name] += 1
  path = f"{_ROOT}/barrier/{name}/{_turns[name]}"
  _client().key_value_set(f"{path}/{jax.process_index()}", socket.gethostname())
  try:
    _client().wait_at_barrier(path, int(timeout * 1000))
  except jax.errors.JaxRuntimeError as e:
    try:
      here = {int(p) for p in _folder(path)}
    except jax.errors.JaxRuntimeError:
      raise HostsError(f"barrier {name!r}: process 0, the coordinator, does not answer") from e
    missing = sorted(set(range(jax.process_count())) - here)
    came = f"{_listed(missing)} of {jax.process_count()} did not come" if missing else "it broke"
    why = "" if "DEADLINE" in str(e) else f" ({str(e).splitlines()[0]})"
    raise HostsError(f"barrier {name!r}: {came} within {timeout:g} s{why}") from e
  if jax.process_index() == 0:  # all have passed: nobody reads it any more
    _client().key_value_delete(path)


def gather(name: str, value: Any, timeout: float = TIMEOUT) -> list[Any]:
  """`value`, anything that json can hold, of every process, in their order. Raises HostsError."""
  value = json.loads(json.dumps(value, default=str))
  if jax.process_count() == 1:
    return [value]
  _turns[f"gather {name}"] += 1
  turn = _turns[f"gather {name}"]
  path = f"{_ROOT}/gather/{name}"
  _client().key_value_set(f"{path}/{turn}/{jax.process_index()}", json.dumps(value))
  barrier(name, timeout)
  found = _folder(f"{path}/{turn}")
  if jax.process_index() == 0 and turn > 1:  # everyone here has read the turn before
    _client().key_value_delete(f"{path}/{turn - 1}")
  return [json.loads(found[str(p)]) for p in range(jax.process_count())]


def first(name: str, value: Any, timeout: float = TIMEOUT) -> Any:
  """The `value` of process 0, in every process; that of the others is not looked at."""
  return gather(name, value if jax.process_index() == 0 else None, timeout)[0]


def agree(name: str, value: Any, timeout: float = TIMEOUT) -> None:
  """Raises HostsError, in every process, where `value` is not the same in all of them.

  The message names the values of two processes, of a Mapping only the keys that differ.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(value, sort_keys=True, default=str)
  digests = gather(name, hashlib.sha256(text.encode()).hexdigest(), timeout)
  other = next((p for p, d in enumerate(digests) if d != digests[0]), None)
  if other is None:
    return
  mine = value if jax.process_index() in (0, other) else None
  told = gather(f"{name}, values", mine, timeout)
  a, b = told[0], told[other]
  if not isinstance(a, Mapping) or not isinstance(b, Mapping):
    a, b = {name: a}, {name: b}
  differ = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
  lines = [f"\n  {k}: {a.get(k)!r} in process 0, {b.get(k)!r} in process {other}" for k in differ]
  raise HostsError(f"the processes differ in {name}:" + "".join(lines))


def all_see(path: Any) -> bool:
  """Whether a file is there in every process, in each of them the same answer."""
  return all(gather("file", path.exists()))


class Vote:
  """A yes of one process becomes a yes of all, from the same call on in each of them.

  The processes call it equally often. A call costs a lock, no message, until someone says yes: then
  each says how many calls it has begun, and the answer is yes from the next after the largest on.
  """

  def __init__(self, ask: Callable[[], bool]):
    self.ask, self.calls, self.answer = ask, 0, False
    self._at: int | None = None  # calls begun when a yes was heard of
    self._from: int | None = None  # first call whose answer is yes
    _turns["vote"] += 1
    self.path = f"{_ROOT}/vote/{_turns['vote']}"
    if _watch is not None:
      _watch.add(self)

  def __call__(self) -> bool:
    if self.answer:
      return True
    if _watch is None:
      self.answer = self.ask()
      return self.answer
    with _watch.lock:
      self.calls += 1
      if self._at is None and self.ask():
        _client().key_value_set(f"{_ROOT}/asked/{self.path.rsplit('/', 1)[1]}", "", True)
        self._freeze(self.calls - 1)
    if self._at is not None:
      self.answer = self.calls >= self._first_yes()
    return self.answer

  def _freeze(self, calls: int) -> None:
    """Called with the lock held."""
    self._at = calls
    _client().key_value_set(f"{self.path}/{jax.process_index()}", str(calls))

  def hear(self) -> None:
    """Another process said yes. Called with the lock held."""
    if self._at is None:
      self._freeze(self.calls)

  def _first_yes(self) -> int:
    if self._from is None:
      end, count = time.monotonic() + TIMEOUT, jax.process_count()
      while len(found := _folder(self.path)) < count:
        if time.monotonic() > end:
          missing = sorted(set(range(count)) - {int(p) for p in found})
          raise HostsError(f"asked to stop, but {_listed(missing)} did not answer")
        time.sleep(0.02)
      self._from = max(map(int, found.values())) + 1
    return self._from


class _Watch(threading.Thread):
  """Beats, listens, and ends the process where its main thread cannot."""

  def __init__(self, silence: float):
    super().__init__(name="watch", daemon=True)
    self.lock = threading.Lock()
    self.silence, self.votes, self.over = silence, {}, threading.Event()
    state = distributed.global_state
    self.index, self.count = state.process_id, state.num_processes
    self.period = max(_PERIOD, self.count / 256)  # some hundred messages a second, however many
    self.beats, self.seen = 0, {}  # of the others, at process 0: index -> (beat, when it changed)
    self.failed: dict[int, str] = {}  # what they said themselves
    self.dead: dict[int, str] = {}  # what process 0 says of them
    self.deadline: float | None = None

  def add(self, vote: Vote) -> None:
    with self.lock:
      self.votes[vote.path.rsplit("/", 1)[1]] = vote

  def run(self) -> None:
    while not self.over.wait(self.period):
      try:
        self._look()
      except jax.errors.JaxRuntimeError as e:
        if not self.over.is_set():
          self._leave(f"process 0, the coordinator, does not answer: it died or ended ({e})")
      except Exception:
        logging.exception("the watch of process %d failed", self.index)
        self._leave("nobody watches this one any more")
      # Where all of them fail alike, each has what it takes to finish its checkpoint and end.
      late = self.deadline is not None and time.monotonic() > self.deadline
      if late and len(self.failed) < self.count:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          self._name_silent()
        self._leave("its main thread waits for the others")

  def _look(self) -> None:
    self.beats += 1
    _client().key_value_set(f"{_ROOT}/alive/{self.index}", str(self.beats), True)
    for number in _folder(f"{_ROOT}/asked"):
      with self.lock:
        # A vote that this process has not come to yet is heard of as soon as it has.
        if number in self.votes:
          self.votes[number].hear()
    if self.index == 0:
      self._count_beats()
    self._hear_failures()

  def _count_beats(self) -> None:
    now, beats = time.monotonic(), _folder(f"{_ROOT}/alive")
    for p in range(1, self.count):
      beat = beats.get(str(p), "")
      if p not in self.seen or self.seen[p][0] != beat:
        self.seen[p] = beat, now
      elif now - self.seen[p][1] > self.silence and p not in self.failed | self.dead:
        text = f"no sign of life for {self.silence:g} s: it was killed, or its machine is gone"
        _client().key_value_set(f"{_ROOT}/dead/{p}", text, True)

  def _hear_failures(self) -> None:
    for folder, heard in (("failed", self.failed), ("dead", self.dead)):
      for p, text in _folder(f"{_ROOT}/{folder}").items():
        if int(p) not in heard and int(p) != self.index:
          logging.error("process %s of %d failed: %s", p, self.count, text)
        heard[int(p)] = text
    if (self.failed or self.dead) and self.deadline is None:
      _client().key_value_set(f"{_ROOT}/heard/{self.index}", "", True)
      self.deadline = time.monotonic() + _GRACE + _LAST * (self.index == 0)

  def tell(self, error: BaseException) -> None:
    """Tells the others that this process fails."""
    text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(f"{_ROOT}/failed/{self.index}", text[:4000], True)

  def _leave(self, why: str) -> None:
    """Ends the process without a word to JAX, whose own end would wait for all."""
    logging.error(
      "process %d of %d stops, because another one failed; %s. The same command, on all of them, "
      "goes on from the last checkpoint", self.index, self.count, why
    )  # fmt: skip
    self.end(1)

  def end(self, code: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(f"{_ROOT}/bye/{self.index}", "", True)
      if self.index == 0:
        self._wait_for("bye", _GRACE + 2)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _wait_for(self, folder: str, seconds: float) -> list[int]:
    """Waits until all but the dead are in a folder of the store; returns who is not."""
    end = time.monotonic() + seconds
    while True:
      found = {int(p) for p in _folder(f"{_ROOT}/{folder}")}
      missing = sorted(set(range(self.count)) - found - self.dead.keys())
      if not missing or time.monotonic() > end:
        return missing
      time.sleep(0.1)

  def fail(self) -> None:
    """The end of a process whose main thread failed."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._wait_for("heard", 5)
      self._name_silent()
    self.end(1)

  def _name_silent(self) -> None:
    """Says who did not hear of a failure, and is therefore the likely cause of it."""
    heard = {int(p) for p in _folder(f"{_ROOT}/heard")} | self.failed.keys() | self.dead.keys()
    if silent := sorted(set(range(self.count)) - heard):
      logging.error(
        "no word from %s: killed, or the machine is gone. The same command, on all of them, goes "
        "on from the last checkpoint", _listed(silent)
      )  # fmt: skip


@contextlib.contextmanager
def telling() -> Iterator[None]:
  """Around what may fail in one process alone, inside of what would wait for the others when it is
  left: they hear of the failure at once, and all have ended some seconds later."""
  try:
    yield
  except BaseException as e:
    if _watch is not None:
      _watch.tell(e)
    raise


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Around the work of a program: its processes end together, well or with a non-zero exit code."""
  if _watch is None:
    yield
    return
  try:
    with telling():
      yield
      barrier("the end", 2 * TIMEOUT)
  except BaseException:
    logging.exception("process %d of %d failed", jax.process_index(), jax.process_count())
    _watch.fail()
  _watch.over.set()
  _watch.join()
  jax.distributed.shutdown()
