"""AutoAugment's policy for ImageNet (Cubuk et al., 2019) as ZeroVL implements it, with Pillow.

Levels are 0 to 9, from weak to strong. Filters and fills are those of the published program: shear
is bicubic, translation and rotation use the nearest pixel, pixels from outside of the image are
grey, and rotations are always counter-clockwise.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVELS = 10
FILL = (128, 128, 128)  # of pixels from outside of the image


def imagenet_policy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Applies a random sub-policy of POLICY, each operation with its probability.

  Takes and returns an RGB image of the same size. Draws from the generator: the sub-policy; for
  each operation a uniform, and a sign if it is applied and in SIGNED.
  """
  for probability, name, level in POLICY[int(rng.integers(len(POLICY)))]:
    if rng.random() < probability:
      negative = name in SIGNED and not rng.integers(2)
      image = operation(image, name, level, negative)
  return image


def operation(image: Image.Image, name: str, level: int, negative: bool = False) -> Image.Image:
  """One operation by its name. negative: reverses the operations in SIGNED."""
  size = magnitude(name, level)
  return OPERATIONS[name](image, -size if negative and name in SIGNED else size)


def magnitude(name: str, level: int) -> float:
  """The magnitude of a level 0 to 9 of an operation: see RANGES; 0 for those not in it."""
  low, high = RANGES.get(name, (0.0, 0.0))
  value = float(np.linspace(low, high, LEVELS)[level])
  return float(round(value)) if name == "posterize" else value


RANGES = {
  "shearX": (0.0, 0.3),
  "shearY": (0.0, 0.3),
  "translateX": (0.0, 150 / 331),  # fraction of the width
  "translateY": (0.0, 150 / 331),
  "rotate": (0.0, 30.0),  # degrees
  "color": (0.0, 0.9),  # the factor is 1 plus or minus this
  "contrast": (0.0, 0.9),
  "sharpness": (0.0, 0.9),
  "brightness": (0.0, 0.9),
  "posterize": (8.0, 4.0),  # bits that are kept
  "solarize": (256.0, 0.0),  # threshold from which values are inverted
}
"""Magnitudes at the lowest and at the highest level, evenly spaced between."""


def _affine(
  image: Image.Image,
  source: tuple[float, ...],
  resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
  """source: the six coefficients that give the source of a pixel, as Pillow takes them."""
  return image.transform(image.size, Image.Transform.AFFINE, source, resample, fillcolor=FILL)


def _shear_x(image: Image.Image, m: float) -> Image.Image:
  return _affine(image, (1, m, 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, m: float) -> Image.Image:
  return _affine(image, (1, 0, 0, m, 1, 0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, m: float) -> Image.Image:
  return _affine(image, (1, 0, m * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, m: float) -> Image.Image:
  return _affine(image, (1, 0, 0, 0, 1, m * image.height))


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
  "shearX": _shear_x,
  "shearY": _shear_y,
  "translateX": _translate_x,
  "translateY": _translate_y,
  "rotate": lambda image, m: image.rotate(m, fillcolor=FILL),
  "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
  "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
  "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
  "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
  "posterize": lambda image, m: ImageOps.posterize(image, int(m)),
  "solarize": lambda image, m: ImageOps.solarize(image, m),
  "autocontrast": lambda image, m: ImageOps.autocontrast(image),
  "equalize": lambda image, m: ImageOps.equalize(image),
  "invert": lambda image, m: ImageOps.invert(image),
}

SIGNED = frozenset(
  ("shearX", "shearY", "translateX", "translateY", "color", "contrast", "sharpness", "brightness")
)
"""Operations that are reversed with probability 0.5."""

_P = tuple[tuple[float, str, int], tuple[float, str, int]]
POLICY: tuple[_P, ...] = (
  ((0.4, "posterize", 8), (0.6, "rotate", 9)),
  ((0.6, "solarize", 5), (0.6, "autocontrast", 5)),
  ((0.8, "equalize", 8), (0.6, "equalize", 3)),
  ((0.6, "posterize", 7), (0.6, "posterize", 6)),
  ((0.4, "equalize", 7), (0.2, "solarize", 4)),
  ((0.4, "equalize", 4), (0.8, "rotate", 8)),
  ((0.6, "solarize", 3), (0.6, "equalize", 7)),
  ((0.8, "posterize", 5), (1.0, "equalize", 2)),
  ((0.2, "rotate", 3), (0.6, "solarize", 8)),
  ((0.6, "equalize", 8), (0.4, "posterize", 6)),
  ((0.8, "rotate", 8), (0.4, "color", 0)),
  ((0.4, "rotate", 9), (0.6, "equalize", 2)),
  ((0.0, "equalize", 7), (0.8, "equalize", 8)),
  ((0.6, "invert", 4), (1.0, "equalize", 8)),
  ((0.6, "color", 4), (1.0, "contrast", 8)),
  ((0.8, "rotate", 8), (1.0, "color", 2)),
  ((0.8, "color", 8), (0.8, "solarize", 7)),
  ((0.4, "sharpness", 7), (0.6, "invert", 8)),
  ((0.6, "shearX", 5), (1.0, "equalize", 9)),
  ((0.4, "color", 0), (0.6, "equalize", 3)),
  ((0.4, "equalize", 7), (0.2, "solarize", 4)),
  ((0.6, "solarize", 5), (0.6, "autocontrast", 5)),
  ((0.6, "invert", 4), (1.0, "equalize", 8)),
  ((0.6, "color", 4), (1.0, "contrast", 8)),
  ((0.8, "equalize", 8), (0.6, "equalize", 3)),
)
"""Sub-policies of two (probability, operation, level); the last five repeat earlier ones."""
