"""A line of progress in the log for work of minutes or hours."""

import logging
import threading
import time

logger = logging.getLogger(__name__)

SECONDS = 10.0  # between lines


class Progress:
  """Logs a line every 10 s, also while one item takes longer, and one at the end. Thread-safe.

  Example::

    with Progress("writing train", "images", total=113_287) as progress:
      for image in images:
        ...
        progress.add()
    # writing train: 24,000 of 113,287 images (21 %), 2,400 a second, 0:00:37 left
    # writing train: 113,287 images in 0:00:47, 2,410 a second
  """

  def __init__(self, what: str, unit: str, total: int | None = None, last: bool = True):
    """total: number of items, None if it is unknown. last: False: the line at the end is logged
    only if there were others."""
    self._what, self._unit, self._total, self._last = what, unit, total, last
    self._done, self._start, self._lines = 0, time.monotonic(), 0
    self._lock, self._stop = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def add(self, count: int = 1) -> None:
    with self._lock:
      self._done += count

  def __enter__(self) -> "Progress":
    self._thread.start()
    return self

  def __exit__(self, kind: type | None, *error: object) -> None:
    self._stop.set()
    self._thread.join()
    if kind is None and (self._last or self._lines):
      seconds = time.monotonic() - self._start
      text = "%s: %s %s in %s, %s a second"
      rate = _rate(self._done / max(seconds, 1e-3))
      logger.info(text, self._what, f"{self._done:,}", self._unit, clock(seconds), rate)

  def _run(self) -> None:
    while not self._stop.wait(SECONDS):
      self._lines += 1
      logger.info("%s: %s", self._what, self.line(time.monotonic() - self._start))

  def line(self, seconds: float) -> str:
    """What is done after so many seconds, and how long the rest will take at that rate."""
    rate = self._done / max(seconds, 1e-3)
    if not self._total:
      return f"{self._done:,} {self._unit}, {_rate(rate)} a second"
    share = f"{self._done:,} of {self._total:,} {self._unit} ({self._done / self._total:.0%})"
    left = clock((self._total - self._done) / rate) if self._done else "unknown time"
    return f"{share}, {_rate(rate)} a second, {left} left"


def _rate(rate: float) -> str:
  return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def clock(seconds: float) -> str:
  """
  >>> clock(3723.4)
  '1:02:03'
  """
  minutes, rest = divmod(max(0, int(seconds)), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
