"""SIGTERM and Ctrl-C as a request to stop, agreed on by all processes at the same step."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from absl import logging

from xmodal_jax.distributed import processes


class Preemption:
  """Callable that returns whether the run was asked to stop, in any process.

  All processes have to call it equally often; they all get True from the same call on.
  """

  def __init__(self):
    self.requested = False
    self._stop = processes.ConsensusFlag(lambda: self.requested)

  def request(self) -> None:
    self.requested = True

  def __call__(self) -> bool:
    return self._stop()


@contextlib.contextmanager
def handled() -> Iterator[Preemption]:
  """Within the block, SIGTERM and the first Ctrl-C request a stop; the second Ctrl-C ends at once.

  with preemption.handled() as stop:
    for step in range(total):
      train_step()
      if stop():
        break
  """
  stop = Preemption()
  if threading.current_thread() is not threading.main_thread():  # only that one gets signals
    yield stop
    return
  # Python calls handlers between two instructions of the main thread, which may be compiling for
  # minutes; the descriptor is written to at once.
  read, write = os.pipe()
  os.set_blocking(write, False)
  before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
  descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(read, stop), name="signals", daemon=True).start()
  try:
    yield stop
  finally:
    signal.set_wakeup_fd(descriptor)
    for number, handler in before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    os.close(write)  # ends the thread


def _watch(read: int, stop: Preemption) -> None:
  interrupts = 0
  while data := os.read(read, 64):
    for number in data:
      if number == signal.SIGINT:
        interrupts += 1
        if interrupts > 1:
          print("interrupted twice: ending without saving", file=sys.stderr, flush=True)
          os._exit(130)
        logging.info("Ctrl-C: saving after this step; once more ends at once, without saving")
      if number in (signal.SIGINT, signal.SIGTERM):
        stop.request()
  os.close(read)
