"""The order of training samples as a pure function of (seed, epoch, position).

Position p of epoch e is sample `permute(p, n, seed, e)`. There is no shuffle buffer and no iterator
state to save, so resuming at any position costs nothing. With several datasets, `Mixture` gives the
dataset and the batch of each step.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from xmodal_jax.errors import ConfigError, check_choice

Captions = Literal["all", "one", "none"]
Mix = Literal["shuffle", "sequential", "debias"]
MIXES = ("shuffle", "sequential", "debias")

# The purpose of a random number. Each has its own stream, so that draws are independent.
_SHUFFLE, _CAPTION, _REPLACEMENT, _AUGMENT, _SOURCE, _PIECES = range(6)

# With 4 rounds a Feistel network is a strong permutation when its halves are large (Luby and
# Rackoff). Here a half can be as small as 2 or 3, which needs more rounds; they are cheap.
_ROUNDS = 10


def _seeds(stream: int, seed: int, epoch: int) -> np.random.SeedSequence:
  """Words of fixed width, so that no two (stream, seed, epoch) give the same entropy."""
  seed, epoch = seed % 2**64, epoch % 2**64
  return np.random.SeedSequence([stream, seed % 2**32, seed >> 32, epoch % 2**32, epoch >> 32])


def _mix(x: np.ndarray) -> np.ndarray:
  """A hash of 64 bits: uint64 [...] -> uint64 [...].

  The finaliser of SplitMix64 (Steele, Lea, Flood 2014), variant 13 of Stafford.
  """
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _check(values: np.ndarray, n: int, what: str) -> np.ndarray:
  values = np.asarray(values, np.int64)
  if values.size and (values.min() < 0 or values.max() >= n):
    raise ValueError(f"{what} must be in [0, {n}), got {values.min()} to {values.max()}")
  return values


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
  """The sample at each position of an epoch, a permutation of range(n). int [...] -> int64 [...].

  Raises ConfigError for positions outside of range(n). Example::

    permute(np.arange(5), 5, seed=0, epoch=1)   # all of 0..4, in the order of epoch 1

  A Feistel network over pairs (left, right) of digits in base ceil(sqrt(n)) with addition in place
  of xor, restricted to range(n) by cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite
  Domains" (CT-RSA 2002), sections 4 and 5. The base is the smallest that fits, so at most
  2 sqrt(n) values lie outside and almost no position walks more than once.
  """
  if n < 1:
    raise ValueError(f"a permutation needs at least one element, got n = {n}")
  x = _check(positions, n, "positions").astype(np.uint64)
  base = np.uint64(_ceil_sqrt(n))
  keys = _seeds(_SHUFFLE, seed, epoch).generate_state(_ROUNDS, np.uint64)

  def encipher(x):
    left, right = x // base, x % base
    for key in keys:
      left, right = right, (left + _mix(right + key) % base) % base
    return left * base + right

  x = encipher(np.atleast_1d(x))
  while (outside := x >= n).any():
    x[outside] = encipher(x[outside])
  return x.astype(np.int64).reshape(np.shape(positions))


def _ceil_sqrt(n: int) -> int:
  root = int(np.sqrt(n))
  while root * root < n:
    root += 1
  return root


def caption_offsets(captions_per_record: np.ndarray) -> np.ndarray:
  """Position of each record's first caption, and their sum at the end. int [N] -> int64 [N + 1]."""
  return np.concatenate([[0], np.cumsum(captions_per_record, dtype=np.int64)])


def samples_per_epoch(captions_per_record: np.ndarray, captions: Captions) -> int:
  """Number of samples of an epoch.

  "all": every caption is a sample. "one": every record, with one caption of it. "none": every
  record, without captions. Raises ConfigError for other values, and for records without a caption.
  """
  if captions == "all":
    return int(np.sum(captions_per_record, dtype=np.int64))
  if captions == "none":
    return len(captions_per_record)
  if captions != "one":
    raise ConfigError(f'captions must be "all" or "one", got {captions!r}')
  if len(empty := np.flatnonzero(np.asarray(captions_per_record) < 1)):
    raise ConfigError(
      f"records without a caption cannot be samples: positions {empty[:5].tolist()}"
    )
  return len(captions_per_record)


def steps_per_epoch(samples: int, batch_size: int) -> int:
  """Whole batches of an epoch. The remainder is dropped; it differs from epoch to epoch."""
  if samples < batch_size:
    raise ConfigError(f"a batch of {batch_size} is larger than the split's {samples} samples")
  return samples // batch_size


def source_seed(seed: int, source: int) -> int:
  """The seed by which dataset number `source` is shuffled: `seed` itself for the first.

  With a common seed, datasets of equal size would be in the same order.
  """
  if source == 0:
    return seed
  entropy = _seeds(_SOURCE, seed, source)
  return int(entropy.generate_state(1, np.uint64)[0])


class Draws:
  """Draws a dataset for each step, with probability proportional to its number of samples.

  The draws are successive ones of NumPy's `default_rng(seed).choice(n, p=sizes / sum)`. A draw
  takes one 64-bit output of PCG64, which can be advanced, so any block of draws can be made
  directly; only the counts of whole blocks are kept. Thread-safe.
  """

  BLOCK = 2**16

  def __init__(self, sizes: Sequence[float], seed: int):
    sizes = np.asarray(sizes)
    self._p, self._seed, self._lock = sizes / sizes.sum(), seed % 2**64, threading.Lock()
    self._before = [np.zeros(len(sizes), np.int64)]  # draws of each dataset before a block
    self._block = functools.lru_cache(maxsize=4)(self._draw)

  def _draw(self, block: int) -> np.ndarray:
    """The draws of a block, int64 [BLOCK]."""
    bits = np.random.PCG64(self._seed).advance(block * self.BLOCK)
    return np.random.Generator(bits).choice(len(self._p), self.BLOCK, p=self._p)

  def __call__(self, step: int) -> tuple[int, int]:
    """Step -> (index of its dataset, number of earlier steps with the same dataset)."""
    block, i = divmod(step, self.BLOCK)
    with self._lock:
      while len(self._before) <= block:
        drawn = self._block(len(self._before) - 1)
        self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self._p)))
      drawn = self._block(block)
    source = int(drawn[i])
    return source, int(self._before[block][source] + np.count_nonzero(drawn[:i] == source))


class Mixture:
  """The batch that each step takes from one dataset or several, as a function of (seed, step).

  "shuffle": all datasets are shuffled together, as one pool. "sequential": each dataset is a pool
  of its own, and an epoch goes through one after another. "debias": each dataset is a pool, and
  each step draws one of them (`Draws`); a pool without a whole batch left starts its next epoch. An
  epoch of the run has as many steps as all pools have whole batches.
  """

  def __init__(
    self, mix: Mix, sizes: Sequence[int], batch_size: int, seed: int, names: Sequence[str] = ()
  ):
    """sizes: number of samples of each dataset. names: of the datasets, for messages.

    Raises ConfigError for an unknown mix, and for a pool smaller than a batch.
    """
    check_choice("data.mix", mix, MIXES)
    self.mix, self._seed = mix, seed
    self.sizes = [sum(sizes)] if mix == "shuffle" else list(sizes)  # of each pool
    for name, size in zip(names, self.sizes, strict=False):
      if size < batch_size and len(self.sizes) > 1:
        raise ConfigError(
          f"dataset {name} has {size} samples, fewer than a batch of {batch_size}, and with "
          f"data.mix={mix!r} a batch is of one dataset: leave it out, lower batch_size, or set "
          'data.mix to "shuffle"'
        )
    self._steps = [steps_per_epoch(size, batch_size) for size in self.sizes]
    self._ends = np.cumsum(self._steps)
    self._draws = Draws(self.sizes, seed) if mix == "debias" else None

  @property
  def steps_per_epoch(self) -> int:
    return int(self._ends[-1])

  def __call__(self, step: int) -> tuple[int, int, int]:
    """Step -> (pool, its epoch, batch in that epoch). The pool is 0 for "shuffle", else the index
    of a dataset."""
    if self._draws is not None:
      source, batch = self._draws(step)
      return source, *divmod(batch, self._steps[source])
    epoch, batch = divmod(step, self.steps_per_epoch)
    source = int(np.searchsorted(self._ends, batch, side="right"))
    return source, epoch, batch - int(self._ends[source]) + self._steps[source]


def locate(
  samples: np.ndarray, offsets: np.ndarray, captions: Captions, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Sample indices [B] -> (record, index of the caption within the record), both int64 [B].

  offsets: `caption_offsets` [N + 1]. With "one" the caption is drawn by (seed, epoch, record).
  """
  if captions == "all":
    samples = _check(samples, int(offsets[-1]), "samples")
    record = np.searchsorted(offsets, samples, side="right") - 1
    return record, samples - offsets[record]
  record = _check(samples, len(offsets) - 1, "samples")
  if captions == "none":
    return record, np.zeros_like(record)
  key = _seeds(_CAPTION, seed, epoch).generate_state(1, np.uint64)[0]
  count = (offsets[record + 1] - offsets[record]).astype(np.uint64)
  return record, (_mix(_mix(record.astype(np.uint64)) + key) % count).astype(np.int64)


def replacement(position: int, attempt: int, n: int, seed: int, epoch: int) -> int:
  """The sample that replaces the one at `position` if it, or an earlier replacement, is bad.

  A function of its arguments alone, so restarts and any number of threads draw the same one.
  """
  key = _seeds(_REPLACEMENT, seed, epoch).generate_state(1, np.uint64)
  x = _mix(_mix(key + np.uint64(position)) + np.uint64(attempt))
  return int(x[0] % np.uint64(n))


def generator(position: int, seed: int, epoch: int) -> np.random.Generator:
  """The random numbers of the augmentation of the sample at `position` of an epoch."""
  seeds = _seeds(_AUGMENT, seed, epoch)
  return np.random.Generator(
    np.random.Philox(np.random.SeedSequence(seeds.entropy, spawn_key=(position,)))
  )


def caption_keys(positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
  """Seeds of the caption corruption at these positions of an epoch: int [B] -> uint64 [B]."""
  key = _seeds(_PIECES, seed, epoch).generate_state(1, np.uint64)
  return _mix(_mix(np.asarray(positions, np.uint64)) + key)
