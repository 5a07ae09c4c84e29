"""SIGTERM as a request to stop that all processes of a run see at the same step."""

import signal

from xmodal_jax.distributed import processes


class Preemption:
  """Turns SIGTERM into a question that the loop asks after every step.

  Of several processes any may get it: the answer becomes yes in all of them, at the same question.
  """

  def __init__(self):
    self.asked = False
    self._stop = processes.ConsensusFlag(lambda: self.asked)
    signal.signal(signal.SIGTERM, self._note)

  def _note(self, signum, frame):
    del signum, frame
    self.asked = True

  def __call__(self) -> bool:
    return self._stop()
