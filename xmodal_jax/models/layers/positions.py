"""Host-side tables of positions: resizing learned ones, and index tables of attention windows."""

import functools
import math

import numpy as np

from xmodal_jax.errors import ConfigError


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
  """Cubic convolution kernel (Keys, 1981) with the coefficient of PyTorch."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(source: int, target: int) -> np.ndarray:
  """float64 [target, source]: half-pixel centres, clamped borders, no antialiasing.

  torch's bicubic `interpolate`, which the published systems use; other libraries use a = -0.5 or
  antialiasing, and differ.
  """
  centre = (np.arange(target) + 0.5) * source / target - 0.5
  first = np.floor(centre).astype(int) - 1
  out = np.zeros((target, source))
  for tap in range(4):
    index = first + tap
    weight = _cubic(centre - index)
    np.add.at(out, (np.arange(target), np.clip(index, 0, source - 1)), weight)
  return out


def resize_table(table: np.ndarray, rows: int, *, prefix: int = 1) -> np.ndarray:
  """[prefix + g * g, D] -> [rows, D]: keeps the first `prefix` rows, resizes the square grid.

  Raises ConfigError where either grid is not square.
  """
  old, new = math.isqrt(len(table) - prefix), math.isqrt(rows - prefix)
  if old**2 != len(table) - prefix or new**2 != rows - prefix:
    raise ConfigError(
      f"position table of {len(table)} rows cannot become one of {rows}: both must hold {prefix} "
      "rows and a square grid"
    )
  m = bicubic_matrix(old, new)
  grid = table[prefix:].astype(np.float64).reshape(old, old, -1)
  grid = np.einsum("yh,xw,hwd->yxd", m, m, grid).reshape(new * new, -1)
  return np.concatenate([table[:prefix], grid.astype(table.dtype)])


@functools.cache
def relative_index(window: int) -> np.ndarray:
  """int64 [w*w, w*w]: the row of a bias table [(2w-1)^2, H] for each (query, key) of a window."""
  row, column = (x.ravel()[:, None] - x.ravel() + window - 1 for x in np.indices((window, window)))
  out = (row * (2 * window - 1) + column).astype(np.int64)
  out.flags.writeable = False  # cached: all callers share it
  return out


@functools.cache
def shift_mask(grid: int, window: int) -> np.ndarray:
  """float32 [(grid/w)^2, w*w, w*w]: -100 for tokens that only the cyclic shift made neighbours.

  The grid is rolled by half a window; other entries are 0. Windows and their tokens are row-major.
  """
  band = np.searchsorted([grid - window, grid - window // 2], np.arange(grid), side="right")
  n = grid // window
  region = (3 * band[:, None] + band).reshape(n, window, n, window).swapaxes(1, 2)
  region = region.reshape(n * n, window * window)
  out = np.where(region[:, :, None] != region[:, None], np.float32(-100), np.float32(0))
  out.flags.writeable = False
  return out
