"""Which samples the rows of each training batch are."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from xmodal_jax.data import mix as mix_lib
from xmodal_jax.data import order as order_lib
from xmodal_jax.data.records import Split
from xmodal_jax.errors import ConfigError


class Rows(NamedTuple):
  """The samples of some rows of one batch; [b] arrays are int64 unless said otherwise."""

  seed: int  # of the shuffle that the batch is taken from
  epoch: int  # of that shuffle
  positions: np.ndarray  # [b] in that epoch
  sources: np.ndarray  # [b] indices of datasets
  records: np.ndarray  # [b]
  captions: np.ndarray  # [b] indices of captions within the records
  keys: np.ndarray  # uint64 [b], for the corruption of captions


class Sampler:
  """The samples of each step's batch, as a function of (seed, step) alone. Thread-safe.

  rows: int64 [b], the rows of a global batch that are wanted. offsets: `order.caption_offsets` of
  the split. order: epoch -> sample indices, instead of the shuffle; the same number in every epoch.
  Raises ConfigError for a mix that does not exist or a batch larger than what is shuffled.
  """

  def __init__(
    self,
    split: Split | mix_lib.Joined,
    *,
    captions: order_lib.Captions,
    mix: order_lib.Mix,
    batch_size: int,
    seed: int,
    rows: np.ndarray,
    offsets: np.ndarray,
    order: Callable[[int], np.ndarray] | None = None,
  ):
    self._captions, self._batch_size, self._seed = captions, batch_size, seed
    self._own_rows, self._offsets, self._order = rows, offsets, order
    self._counts = mix_lib.sample_counts(split, captions)
    self._firsts = np.cumsum([0, *self._counts])  # first sample of each dataset
    if order is None:
      self._mixture = mix_lib.mixture(split, captions, mix, batch_size, seed)
    elif mix == "shuffle":
      self._mixture = order_lib.Mixture(mix, [len(order(0))], batch_size, seed)
    else:
      raise ConfigError(f'a given order replaces data.mix="shuffle", but mix is {mix!r}')
    # The threads of one batch share its rows; far fewer batches are in flight than this.
    self.rows = functools.lru_cache(maxsize=256)(self._rows)

  def _rows(self, step: int) -> Rows:
    pool, epoch, batch = self._mixture(step)
    seed = order_lib.source_seed(self._seed, pool)
    positions = batch * self._batch_size + self._own_rows
    if self._order is None:
      samples = order_lib.permute(positions, self._mixture.sizes[pool], seed, epoch)
      samples += self._firsts[pool]
    else:
      samples = np.asarray(self._order(epoch))[positions]
    sources = np.searchsorted(self._firsts, samples, side="right") - 1
    records, captions = order_lib.locate(samples, self._offsets, self._captions, seed, epoch)
    keys = order_lib.caption_keys(positions, seed, epoch)
    return Rows(seed, epoch, positions, sources, records, captions, keys)

  def replacement(self, rows: Rows, row: int, attempt: int) -> tuple[int, int]:
    """(record, caption) that replaces a bad sample of a row: another one of the same dataset.

    A function of the sample's position, so every run and process draws the same replacement.
    """
    source, position = rows.sources[row], int(rows.positions[row])
    count = self._counts[source]
    sample = order_lib.replacement(position, attempt, count, rows.seed, rows.epoch)
    sample = np.array([sample + self._firsts[source]])
    record, caption = order_lib.locate(sample, self._offsets, self._captions, rows.seed, rows.epoch)
    return int(record[0]), int(caption[0])
