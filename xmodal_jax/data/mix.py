"""Splits of several datasets joined into one, for training on all of them."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from xmodal_jax.data import order
from xmodal_jax.data.records import Record, Split
from xmodal_jax.errors import ConfigError


class Joined:
  """Splits of several datasets, concatenated; training reads it like a `Split`.

  Records are numbered from 0 to N - 1 over all datasets. captions_per_record: int32 [N]. starts:
  int64 [n + 1], the number of the first record of each of the n datasets, and N. fingerprint:
  sha256 of the fingerprints of the splits, in order.
  """

  def __init__(self, parts: Sequence[Split], names: Sequence[str]):
    """names: of the datasets. Raises ConfigError if only some of them have captions."""
    self.parts, self.names = tuple(parts), tuple(names)
    self.name = f"{parts[0].name} of {' + '.join(names)}"
    self.starts = np.cumsum([0, *map(len, parts)])
    self.captions_per_record = np.concatenate([p.captions_per_record for p in parts])
    self.fingerprint = hashlib.sha256("\n".join(p.fingerprint for p in parts).encode()).hexdigest()
    have = [bool(p.captions_per_record.any()) for p in parts]
    if any(have) and not all(have):
      without = have.index(False)
      raise ConfigError(
        f"dataset {names[without]} has no captions in split {parts[without].name!r}, and "
        f"{names[have.index(True)]} has: either all datasets of a run have captions, or none"
      )

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the labels. Raises ConfigError if the datasets have different ones."""
    for part, name in zip(self.parts, self.names, strict=True):
      if part.class_names != self.parts[0].class_names:
        raise ConfigError(f"datasets {self.names[0]} and {name} have different classes")
    return self.parts[0].class_names

  def __len__(self) -> int:
    return int(self.starts[-1])

  def place(self, record: int) -> tuple[int, int]:
    """Record -> (index of its dataset, its number there). Raises IndexError."""
    if not 0 <= record < len(self):
      raise IndexError(f"record {record} of {len(self)} in split {self.name!r}")
    source = int(np.searchsorted(self.starts, record, side="right")) - 1
    return source, int(record - self.starts[source])

  def read(self, i: int) -> Record:
    """Record i, checked. Raises BadRecordError, with its number in its own dataset."""
    source, i = self.place(i)
    return self.parts[source].read(i)

  def __iter__(self) -> Iterator[Record]:
    return (self.read(i) for i in range(len(self)))


def sample_counts(split: Split | Joined, captions: order.Captions) -> list[int]:
  """Samples of an epoch of each dataset; one number for a split that is not joined."""
  if not isinstance(split, Joined):
    return [order.samples_per_epoch(split.captions_per_record, captions)]
  counts = []
  for part, name in zip(split.parts, split.names, strict=True):
    try:
      counts.append(order.samples_per_epoch(part.captions_per_record, captions))
    except ValueError as e:
      raise ConfigError(f"dataset {name}: {e}") from None
  return counts


def mixture(
  split: Split | Joined, captions: order.Captions, mix: order.Mix, batch_size: int, seed: int
) -> order.Mixture:
  """The `order.Mixture` of a split, which raises ConfigError."""
  names = split.names if isinstance(split, Joined) else (split.name,)
  return order.Mixture(mix, sample_counts(split, captions), batch_size, seed, names)
