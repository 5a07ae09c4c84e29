"""RandAugment (Cubuk et al., 2020): ten operations at magnitudes 0 to 10, as in ALBEF's programs.

Two operations of the published program overflow 8 bits, and TEAM's warps have one sign only: mode
"original" reproduces both. Results equal OpenCV's, which these programs use.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter, ImageOps

Mode = Literal["corrected", "original"]

MAX_MAGNITUDE = 10
FILL = 128  # grey, for pixels from outside of the image


def random_operations(
  image: Image.Image, rng: np.random.Generator, n: int, magnitude: int, mode: Mode = "corrected"
) -> Image.Image:
  """n operations drawn from OPERATIONS with replacement, each applied with probability 0.5.

  mode "corrected" clips where the published program overflows, and negates shear, translation and
  rotation with probability 0.5; "original" does neither.
  """
  for _ in range(n):
    name = _NAMES[rng.integers(len(_NAMES))]
    if rng.random() < 0.5:
      negative = mode == "corrected" and name in _SIGNED and bool(rng.random() < 0.5)
      image = operation(image, name, magnitude, mode, negative)
  return image


def operation(
  image: Image.Image,
  name: str,
  magnitude: int,
  mode: Mode = "corrected",
  negative: bool = False,
) -> Image.Image:
  """One operation by its name. negative: reverses shear, translation and rotation only."""
  share = magnitude / MAX_MAGNITUDE
  return OPERATIONS[name](image, -share if negative else share, mode == "original")


def _identity(image: Image.Image, share: float, original: bool) -> Image.Image:
  return image


def _autocontrast(image: Image.Image, share: float, original: bool) -> Image.Image:
  level, tables = np.arange(256), []
  for low, high in image.getextrema():
    if high == low:
      table = level
    elif original:  # it negates the lowest level as an unsigned byte
      table = level * (255 / (high - low)) + -low % 256 * (255 / (high - low))
    else:
      table = (level - low) * 255 // (high - low)
    tables.append(np.clip(table, 0, 255).astype(np.uint8))
  return image.point(np.concatenate(tables).tolist())


def _equalize(image: Image.Image, share: float, original: bool) -> Image.Image:
  return ImageOps.equalize(image)


def _factor(share: float) -> float:
  return 1.8 * abs(share) + 0.1


def _brightness(image: Image.Image, share: float, original: bool) -> Image.Image:
  table = np.clip(np.arange(256) * _factor(share), 0, 255).astype(np.uint8)
  return image.point(3 * table.tolist())


def _sharpness(image: Image.Image, share: float, original: bool) -> Image.Image:
  # Pillow's SMOOTH is the kernel (1 1 1, 1 5 1, 1 1 1) / 13, and keeps the border.
  smooth, factor = image.filter(ImageFilter.SMOOTH), _factor(share)
  if not original:
    return Image.blend(smooth, image, factor)  # clips
  d, x = (np.asarray(a).astype(np.float32) for a in (smooth, image))
  # Through int32: casting a negative float to an unsigned byte is undefined in C.
  return Image.fromarray((d + np.float32(factor) * (x - d)).astype(np.int32).astype(np.uint8))


def _shear_x(image: Image.Image, share: float, original: bool) -> Image.Image:
  return warp(image, np.array([[1, np.float32(0.3 * share), 0], [0, 1, 0]]))


def _shear_y(image: Image.Image, share: float, original: bool) -> Image.Image:
  return warp(image, np.array([[1, 0, 0], [np.float32(0.3 * share), 1, 0]]))


def _translate_x(image: Image.Image, share: float, original: bool) -> Image.Image:
  return _shift(image, -round(10 * share), 0)


def _translate_y(image: Image.Image, share: float, original: bool) -> Image.Image:
  return _shift(image, 0, -round(10 * share))


def _shift(image: Image.Image, right: int, down: int) -> Image.Image:
  out = Image.new("RGB", image.size, (FILL,) * 3)
  out.paste(image, (right, down))
  return out


def _rotate(image: Image.Image, share: float, original: bool) -> Image.Image:
  """Counter-clockwise about (W / 2, H / 2)."""
  angle, x, y = math.radians(30 * share), image.width / 2, image.height / 2
  cos, sin = math.cos(angle), math.sin(angle)
  forward = [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]]
  return warp(image, np.array(forward))


OPERATIONS: dict[str, Callable[[Image.Image, float, bool], Image.Image]] = {
  "Identity": _identity,
  "AutoContrast": _autocontrast,
  "Equalize": _equalize,
  "Brightness": _brightness,
  "Sharpness": _sharpness,
  "ShearX": _shear_x,
  "ShearY": _shear_y,
  "TranslateX": _translate_x,
  "TranslateY": _translate_y,
  "Rotate": _rotate,
}
_NAMES = tuple(OPERATIONS)
_SIGNED = frozenset(n for n in _NAMES if n.startswith(("Shear", "Translate", "Rotate")))


def warp(image: Image.Image, forward: np.ndarray) -> Image.Image:
  """Warps an image by an affine map of coordinates, float64 [2, 3]; bilinear, FILL outside.

  Uses the fixed-point arithmetic of OpenCV's warpAffine: source coordinates are rounded to 1/32 of
  a pixel, so the weights of the four neighbours are multiples of 1/1024.
  """
  width, height = image.size
  a, b = forward[:, :2].astype(np.float64), forward[:, 2].astype(np.float64)
  inverse = np.array([[a[1, 1], -a[0, 1]], [-a[1, 0], a[0, 0]]])
  inverse *= 1 / (a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0])
  shift = -(inverse @ b)
  columns = np.rint(inverse[:, :1] * np.arange(width) * 1024).astype(np.int32)  # [2, W]
  rows = np.rint((inverse[:, 1:] * np.arange(height) + shift[:, None]) * 1024).astype(np.int32)
  columns += 16
  # Source positions in 1/32 pixel, clipped to a margin of FILL. In place, here and below: arrays of
  # this size cost more to allocate than to compute.
  x, y = (rows[i][:, None] + columns[i] for i in range(2))  # int32 [H, W]
  for position, size in ((x, width), (y, height)):
    position >>= 5
    np.clip(position, -64, 32 * size, out=position)
  stride = width + 4
  index = (y >> 5).astype(np.intp)
  index += 2
  index *= stride
  index += x >> 5
  index += 2
  x &= 31
  y &= 31

  canvas = Image.new("RGB", (stride, height + 4), (FILL,) * 3)
  canvas.paste(image, (2, 2))
  words = _pack(np.asarray(canvas.convert("RGBA")).view("<u4").ravel())
  at = lambda k: words[k:].take(index, mode="clip")
  x, y = x.astype(np.uint64), y.astype(np.uint64)
  mixed = _mix(_mix(at(0), at(1), x), _mix(at(stride), at(stride + 1), x), y)
  mixed += _pack(np.uint32(0x020202)) << 8  # one half, in units of 1/1024
  mixed >>= 10
  return Image.frombytes("RGB", image.size, _unpack(mixed).tobytes(), "raw", "RGBX")


# Three channels in one word of 64 bits, in lanes of 20 bits, so that one product serves all three.
# A difference may borrow from the next lane; the final sum does not.


def _pack(rgbx: np.ndarray) -> np.ndarray:
  """uint32, red in the lowest byte -> uint64 of the same shape."""
  rgbx = rgbx.astype(np.uint64)
  out = rgbx & 0xFF
  for byte in (1, 2):
    out |= (rgbx & (0xFF << 8 * byte)) << 12 * byte
  return out


def _mix(p: np.ndarray, q: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """(32 - weight) p + weight q, in place of p; overwrites q."""
  q -= p
  q *= weight
  p <<= 5
  p += q
  return p


def _unpack(words: np.ndarray) -> np.ndarray:
  """The lowest 8 bits of each lane: uint64 -> uint32 of the same shape; overwrites the words."""
  out = words & 0xFF
  for byte in (1, 2):
    words >>= 12
    out |= words & (0xFF << 8 * byte)
  return out.astype("<u4")
