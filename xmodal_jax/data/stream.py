"""The iterator over tf.data's batches, and the count of bad records behind it.

A Python function that raises inside tf.data is reported as one of TensorFlow's errors. So functions
return a flag instead (`Ledger.call`), and the consumer raises the original error (`Stream`).
"""

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from xmodal_jax.data import mix as mix_lib
from xmodal_jax.data.records import BadRecordError, Split
from xmodal_jax.errors import UserError

Batch = dict[str, np.ndarray]

logger = logging.getLogger(__name__)

_NAMED = 5  # bad records whose names an error message lists


class DataError(UserError):
  """Too many records of a split are bad, or it lacks what the model reads."""


class Ledger:
  """Counts the distinct bad records of a split, and keeps the error that ends the stream, if any.

  on_bad(record, reason) is called once per bad record, after it was logged. key: the key of the
  config that is max_bad_fraction, for messages. Thread-safe.
  """

  def __init__(
    self,
    split: Split | mix_lib.Joined,
    max_bad_fraction: float,
    on_bad: Callable[[int, str], None] | None = None,
    key: str = "data.max_bad_fraction",
  ):
    self.split, self.max_bad_fraction, self.on_bad = split, max_bad_fraction, on_bad
    self.key = key
    self.bad: dict[int, str] = {}
    self.failure: Exception | None = None
    self.closed = False
    self._lock = threading.Lock()

  def add(self, record: int, error: Exception, filename: str = "") -> None:
    """Counts a record once. Raises DataError if there are now too many."""
    reason = str(error)
    if not isinstance(error, BadRecordError):  # its text already names the record
      reason = f"{self.named(record, filename)}: {reason}"
    with self._lock:
      if record in self.bad:
        return
      self.bad[record] = reason
      bad = list(self.bad.values())
    logger.warning("bad %s", reason)
    if self.on_bad:
      self.on_bad(record, reason)
    if len(bad) > self.max_bad_fraction * len(self.split):
      names = "".join(f"\n  {name}" for name in bad[:_NAMED]) + "\n  ..." * (len(bad) > _NAMED)
      raise DataError(
        f"{len(bad)} of the {len(self.split)} records of split {self.split.name!r} are bad, more "
        f"than config.{self.key} = {self.max_bad_fraction:g} allows; raise it, or prepare the data "
        f"again without them:{names}"
      )

  def named(self, record: int, filename: str) -> str:
    """The name of a record in messages."""
    split = self.split
    if not isinstance(split, mix_lib.Joined):
      return f"record {record} ({filename}) of split {split.name!r}"
    source, i = split.place(record)
    where = f"split {split.parts[source].name!r} of dataset {split.names[source]}"
    return f"record {i} ({filename}) of {where}"

  def call(self, function: Callable, inputs: list, blanks: list) -> list:
    """`function` as a tf.data op: `inputs` -> tensors of the shapes of `blanks`, and a flag.

    If it raised (`failure` is then set) or the stream was closed, the flag is false and the tensors
    are the blanks.
    """

    def guarded(*args):
      try:
        if self.failure is None and not self.closed:
          return (*function(*args), True)
      except Exception as e:
        self.failure = self.failure or e
      return (*blanks, False)

    blanks = [np.asarray(b, object) if isinstance(b, bytes) else b for b in blanks]
    types = [tf.string if b.dtype == object else tf.as_dtype(b.dtype) for b in blanks]
    out = tf.numpy_function(guarded, inputs, [*types, tf.bool])
    for tensor, blank in zip(out, [*blanks, np.True_], strict=True):
      tensor.set_shape(np.shape(blank))
    return out


_OPEN: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class Stream(Iterator[Batch]):
  """Iterates over batches; where their flag `ok` is false, raises the ledger's failure.

  Batches are dicts of NumPy arrays without the flag. It may be read from any thread, and abandoned
  at any time by `close` or by deleting it.
  """

  def __init__(self, dataset: tf.data.Dataset, ledger: Ledger):
    self._ledger, self._lock = ledger, threading.RLock()
    self._batches = dataset.as_numpy_iterator()
    _OPEN.add(self)

  def __next__(self) -> Batch:
    with self._lock:
      if self._batches is None:
        raise StopIteration
      batch = next(self._batches, None)
      if batch is not None and batch.pop("ok").all():
        return batch
      self.close()
      if batch is not None and self._ledger.failure is not None:
        raise self._ledger.failure
      raise StopIteration

  @property
  def bad(self) -> dict[int, str]:
    """The bad records that were found so far, with their reasons."""
    return dict(self._ledger.bad)

  def close(self) -> None:
    """Ends the stream. Its threads finish the samples they are reading and start no others."""
    self._ledger.closed = True  # first: it lets a `next` in another thread return
    with self._lock:
      self._batches = None

  def __del__(self):
    if hasattr(self, "_lock"):
      self.close()


@atexit.register
def _close_all() -> None:
  # tf.data's threads would wait forever for the GIL of an interpreter that is shutting down.
  for stream in list(_OPEN):
    stream.close()
