"""The order of training samples as a pure function of (seed, epoch, position).

Nothing is shuffled in memory and nothing has to be saved: position p of epoch e is sample
`permute(p, n, seed, e)`, whatever came before, so resuming at any position costs nothing.
"""

from typing import Literal

import numpy as np

Captions = Literal["all", "one"]

# What a random number is for. Each purpose has its own stream, so none repeats another's draws.
_SHUFFLE, _CAPTION, _REPLACEMENT, _AUGMENT = range(4)

# With 4 rounds a Feistel network is a strong permutation when its halves are large (Luby and
# Rackoff); halves here can be 2 or 3, where more rounds are needed and cost next to nothing.
_ROUNDS = 10


def _seeds(stream: int, seed: int, epoch: int) -> np.random.SeedSequence:
  """Words of fixed width, so that no two (stream, seed, epoch) spell the same sequence."""
  seed, epoch = seed % 2**64, epoch % 2**64
  return np.random.SeedSequence([stream, seed % 2**32, seed >> 32, epoch % 2**32, epoch >> 32])


def _mix(x: np.ndarray) -> np.ndarray:
  """Every bit of the result depends on every bit of x. uint64 [...] -> uint64 [...].

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
  """Where each position of an epoch points: a permutation of range(n). int [...] -> int64 [...].

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
  """With "all" an epoch visits every caption once; with "one" every record, with one caption."""
  if captions == "all":
    return int(np.sum(captions_per_record, dtype=np.int64))
  if captions != "one":
    raise ValueError(f'captions must be "all" or "one", got {captions!r}')
  if len(empty := np.flatnonzero(np.asarray(captions_per_record) < 1)):
    raise ValueError(f"records without a caption cannot be samples: positions {empty[:5].tolist()}")
  return len(captions_per_record)


def steps_per_epoch(samples: int, batch_size: int) -> int:
  """Only whole batches: what is left of an epoch is dropped, a different part in each epoch."""
  if samples < batch_size:
    raise ValueError(f"a batch of {batch_size} is larger than the split's {samples} samples")
  return samples // batch_size


def locate(
  samples: np.ndarray, offsets: np.ndarray, captions: Captions, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Sample indices [B] -> (record, caption within the record), both int64 [B].

  offsets: `caption_offsets` [N + 1]. With "one" the caption is drawn per (seed, epoch, record).
  """
  if captions == "all":
    samples = _check(samples, int(offsets[-1]), "samples")
    record = np.searchsorted(offsets, samples, side="right") - 1
    return record, samples - offsets[record]
  record = _check(samples, len(offsets) - 1, "samples")
  key = _seeds(_CAPTION, seed, epoch).generate_state(1, np.uint64)[0]
  count = (offsets[record + 1] - offsets[record]).astype(np.uint64)
  return record, (_mix(_mix(record.astype(np.uint64)) + key) % count).astype(np.int64)


def replacement(position: int, attempt: int, n: int, seed: int, epoch: int) -> int:
  """The sample that stands in for the one at `position` when it (or an earlier stand-in) is bad.

  A function of its arguments alone: a restarted run, and any number of threads, draw the same one.
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
