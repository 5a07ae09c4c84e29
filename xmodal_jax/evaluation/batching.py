"""Rows of host arrays to the devices and back, in batches and blocks of static shapes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from xmodal_jax.distributed import sharding


class Interrupted(Exception):
  """The run was asked to stop during an evaluation."""


class HostRows:
  """Valid rows of device batches, appended to host arrays.

  rows: a tree of arrays [N, ...], None before the first batch.
  """

  def __init__(self):
    self.rows, self._count = None, 0

  def append(self, batch: dict[str, Any]) -> None:
    """batch: arrays [B, ...] on the devices, `valid` bool [B] among them."""
    batch = jax.device_get(batch)
    valid = batch.pop("valid")
    new = jax.tree.map(lambda x: x[valid], batch)
    if self.rows is None:
      self.rows = jax.tree.map(lambda x: np.empty((0, *x.shape[1:]), x.dtype), new)
    for array, part in zip(jax.tree.leaves(self.rows), jax.tree.leaves(new), strict=True):
      # Resized in place, where the system can remap pages: no second copy of gigabytes.
      array.resize((self._count + len(part), *part.shape[1:]), refcheck=False)
      array[self._count :] = part
    self._count += int(valid.sum())


def collect(
  step: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
  batches: Iterator[Mapping[str, np.ndarray]],
  stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], np.ndarray]:
  """Runs `step` on all batches -> (its outputs for valid rows, their image_id int [N]).

  Outputs are host arrays [N, ...].

  Args:
    step: host batch -> arrays [B, ...] on the devices, `valid` and `image_id` among them.
    stop: called before each batch; Interrupted is raised when it returns True.
  """
  rows, pending = HostRows(), None
  for batch in batches:
    if stop():
      raise Interrupted
    # One batch stays in flight, so that reading the next overlaps with computing this one.
    out = step(batch)
    if pending is not None:
      rows.append(pending)
    pending = out
  rows.append(pending)
  return rows.rows, rows.rows.pop("image_id")


def put_block(tree: Any, start: int, size: int, to: NamedSharding) -> Any:
  """Rows start .. start + size of every host leaf on the devices, zero-padded to `size` rows."""

  def put(x):
    part = x[start : start + size]
    part = np.pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1))
    return sharding.place(part, to)

  return jax.tree.map(put, tree)


def split_blocks(tree: Any, size: int) -> Any:
  """Host leaves [N, ...] -> [ceil(N / size), size, ...], zero-padded at the end."""

  def split(x):
    x = np.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])

  return jax.tree.map(split, tree)
