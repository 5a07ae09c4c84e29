"""Reading ahead with threads, which hide the latency of disks and remote folders."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")

THREADS, AHEAD = 16, 32


def ordered(
  function: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD
) -> Iterator[Result]:
  """map(function, items) on threads, in order. At most `ahead` results wait in memory.

  An error of the function is raised in its turn.
  """
  pool = concurrent.futures.ThreadPoolExecutor(THREADS)
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) >= ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
