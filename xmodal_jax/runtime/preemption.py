"""SIGTERM as a request to stop, agreed on by all processes at the same step."""

import signal

from xmodal_jax.distributed import processes


class Preemption:
  """Callable that returns whether the run was asked to stop, by SIGTERM in any process.

  All processes have to call it equally often; they all get True from the same call on.
  """

  def __init__(self):
    self.requested = False
    self._stop = processes.ConsensusFlag(lambda: self.requested)
    signal.signal(signal.SIGTERM, self._on_sigterm)

  def _on_sigterm(self, signum, frame):
    del signum, frame
    self.requested = True

  def __call__(self) -> bool:
    return self._stop()
