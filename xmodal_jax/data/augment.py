"""Augmentation of training images, on the host.

Each step takes an RGB image and the sample's own generator, the only source of random numbers, and
returns an RGB image of the same size. Two differ: the crop changes the size, and erasing, the last
step, works on arrays. `build` composes them from the values of a config.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from xmodal_jax.data import auto_augment as auto_lib
from xmodal_jax.data import image as image_lib
from xmodal_jax.data import rand_augment as rand_lib
from xmodal_jax.errors import ConfigError

EraseMode = Literal["pixel", "rand", "const"]
Step = Callable[[Image.Image, np.random.Generator], Image.Image]

ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of random_erase

# ------------------------------------------------------------------------------------------ colour


def color_jitter(
  image: Image.Image,
  rng: np.random.Generator,
  brightness: float,
  contrast: float,
  saturation: float,
  hue: float,
) -> Image.Image:
  """torchvision's ColorJitter: the four changes in random order; a strength of 0 disables one.

  The factors of the first three are uniform in [max(0, 1 - strength), 1 + strength]; the hue is
  rotated by a fraction of the circle that is uniform in [-hue, hue].
  """
  strengths = (brightness, contrast, saturation, hue)
  for i in rng.permutation(4):
    if strengths[i] and i == 3:
      image = turn_hue(image, rng.uniform(-hue, hue))
    elif strengths[i]:
      factor = rng.uniform(max(0.0, 1 - strengths[i]), 1 + strengths[i])
      image = _ENHANCERS[i](image).enhance(factor)
  return image


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
  """Rotates the hue by a fraction of the circle, in Pillow's 8-bit HSV: truncated to 1/255."""
  steps = int(turn * 255)
  hues = [(i + steps) % 256 for i in range(256)]
  return image.convert("HSV").point(hues + 2 * list(range(256))).convert("RGB")


def random_grayscale(
  image: Image.Image, rng: np.random.Generator, probability: float
) -> Image.Image:
  """Converts to grey, in three channels, with the given probability."""
  return image.convert("L").convert("RGB") if rng.random() < probability else image


def random_blur(
  image: Image.Image,
  rng: np.random.Generator,
  probability: float,
  radius: tuple[float, float] = (0.1, 2.0),
) -> Image.Image:
  """Pillow's Gaussian blur with a standard deviation uniform in `radius`."""
  if rng.random() < probability:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*radius)))
  return image


# ----------------------------------------------------------------------------------------- erasing


def random_erase(
  pixels: np.ndarray,
  rng: np.random.Generator,
  probability: float,
  mode: EraseMode = "pixel",
  count: tuple[int, int] = (1, 1),
  mean: Sequence[float] = (0.0, 0.0, 0.0),
  std: Sequence[float] = (1.0, 1.0, 1.0),
) -> np.ndarray:
  """Random erasing (Zhong et al., 2020): fills random boxes of pixels [H, W, 3] with noise.

  Returns a copy, or with probability 1 - `probability` the array itself. The number of boxes is
  uniform in `count`. Their total area, as a fraction of the image, is uniform in ERASE_AREA, the
  aspect ratio log-uniform in ERASE_ASPECT; a box is omitted after ten that do not fit.

  The filling is mean + std n with n standard normal: drawn for each pixel and channel (mode
  "pixel") or for each channel of a box ("rand"), or 0 ("const"). mean and std are in the units of
  `pixels`; the defaults are for normalised ones. Integers are rounded and clipped.
  """
  if rng.random() > probability:
    return pixels
  height, width, _ = pixels.shape
  boxes = count[0] + (int(rng.integers(count[1] - count[0] + 1)) if count[0] < count[1] else 0)
  pixels = pixels.copy()
  for _ in range(boxes):
    for _ in range(10):
      area = rng.uniform(*ERASE_AREA) * height * width / boxes
      aspect = math.exp(rng.uniform(*map(math.log, ERASE_ASPECT)))
      h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if h < height and w < width:
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        fill = np.asarray(mean, np.float64)
        if mode != "const":
          shape = (h, w, 3) if mode == "pixel" else (3,)
          fill = fill + np.asarray(std) * rng.standard_normal(shape)
        if np.issubdtype(pixels.dtype, np.integer):
          fill = np.clip(np.rint(fill), 0, np.iinfo(pixels.dtype).max)
        pixels[top : top + h, left : left + w] = fill
        break
  return pixels


# ----------------------------------------------------------------------------------------- together


def build(
  transform: image_lib.Transform,
  *,
  crop: Literal["center", "random"] = "center",
  crop_scale: Sequence[float] = (0.08, 1.0),
  crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
  jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
  jitter_p: float = 0.8,
  grayscale: float = 0.0,
  blur: float = 0.0,
  blur_radius: Sequence[float] = (0.1, 2.0),
  flip: float = 0.0,
  rand_augment: Sequence[int] = (0, 0),
  rand_augment_mode: rand_lib.Mode = "corrected",
  auto_augment: Literal["", "imagenet"] = "",
  erase: float = 0.0,
  erase_mode: EraseMode = "pixel",
  erase_count: Sequence[int] = (1, 1),
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
) -> image_lib.Augment | None:
  """A training augmentation (image, generator) -> uint8 [crop, crop, 3]; None if nothing is on.

  The steps run in the order of the arguments, which are keys of `config.data`. Example::

    augment = build(Transform(256, 224), crop="random", flip=0.5)
    pixels = augment(image, np.random.default_rng(0))   # uint8 [224, 224, 3]

  Args:
    transform: the evaluation transform. It gives size, filter and EXIF orientation, and is the
      first step of a "center" crop.
    mean, std: three floats each, by which the device will normalise pixels / 255; only for `erase`,
      which fills boxes such that they are noise, or 0, after the normalisation.

  Raises:
    ValueError: for a bad value; the message begins with the key.
  """
  if crop not in ("center", "random"):
    raise ConfigError(f"crop is {crop!r}; there are 'center' and 'random'")
  _check_numbers("crop_scale", crop_scale, 2, 0, 1, above=True, rising=True)
  _check_numbers("crop_ratio", crop_ratio, 2, 0, math.inf, above=True, rising=True)
  _check_numbers("jitter", jitter, 4, 0, math.inf)
  if jitter[3] > 0.5:
    raise ConfigError(f"jitter is {tuple(jitter)!r}; its last number, the hue, is at most 0.5")
  shares = dict(jitter_p=jitter_p, grayscale=grayscale, blur=blur, flip=flip, erase=erase)
  for key, value in shares.items():
    if not 0 <= value <= 1:
      raise ConfigError(f"{key} is {value!r}; expected a probability")
  _check_numbers("blur_radius", blur_radius, 2, 0, math.inf, rising=True)
  _check_policies(rand_augment, rand_augment_mode, auto_augment)
  _check_erasing(erase, erase_mode, erase_count, mean, std)

  steps: list[Step] = []
  if crop == "random":
    size, scale, ratio = transform.crop, tuple(crop_scale), tuple(crop_ratio)
    steps.append(functools.partial(_random_crop, transform, size=size, scale=scale, ratio=ratio))
  if any(jitter) and jitter_p:
    steps.append(functools.partial(_random_jitter, probability=jitter_p, strengths=tuple(jitter)))
  if grayscale:
    steps.append(functools.partial(random_grayscale, probability=grayscale))
  if blur:
    steps.append(functools.partial(random_blur, probability=blur, radius=tuple(blur_radius)))
  if flip:
    steps.append(functools.partial(image_lib.random_flip, probability=flip))
  n, magnitude = map(int, rand_augment)
  if n:
    how = {"n": n, "magnitude": magnitude, "mode": rand_augment_mode}
    steps.append(functools.partial(rand_lib.random_operations, **how))
  if auto_augment:
    steps.append(auto_lib.imagenet_policy)
  if not steps and not erase:
    return None
  if crop == "center":
    steps.insert(0, functools.partial(_center_crop, transform))
  erasing = None
  if erase:
    scaled = {"mean": 255 * np.asarray(mean), "std": 255 * np.asarray(std)}
    how = {"mode": erase_mode, "count": tuple(map(int, erase_count)), **scaled}
    erasing = functools.partial(random_erase, probability=erase, **how)

  def augment(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    for step in steps:
      image = step(image, rng)
    pixels = image_lib.pixels(image)
    return erasing(pixels, rng) if erasing else pixels

  return augment


def _center_crop(
  transform: image_lib.Transform, image: Image.Image, rng: np.random.Generator
) -> Image.Image:
  return Image.fromarray(transform(image))


def _random_crop(
  transform: image_lib.Transform, image: Image.Image, rng: np.random.Generator, **kw
) -> Image.Image:
  image = image_lib.to_rgb(image_lib.upright(image) if transform.exif else image)
  return image_lib.random_resized_crop(image, rng, interpolation=transform.interpolation, **kw)


def _random_jitter(
  image: Image.Image, rng: np.random.Generator, probability: float, strengths: tuple[float, ...]
) -> Image.Image:
  return color_jitter(image, rng, *strengths) if rng.random() < probability else image


def _check_policies(rand_augment: Sequence[int], mode: str, auto_augment: str) -> None:
  if len(rand_augment) != 2 or any(int(v) != v or v < 0 for v in rand_augment):
    raise ConfigError(f"rand_augment is {tuple(rand_augment)!r}; expected (operations, magnitude)")
  if rand_augment[1] > rand_lib.MAX_MAGNITUDE:
    raise ConfigError(
      f"rand_augment has magnitude {int(rand_augment[1])}; expected 0 to {rand_lib.MAX_MAGNITUDE}"
    )
  if mode not in ("corrected", "original"):
    raise ConfigError(f"rand_augment_mode is {mode!r}; there are 'corrected' and 'original'")
  if auto_augment not in ("", "imagenet"):
    raise ConfigError(f"auto_augment is {auto_augment!r}; there are 'imagenet', and '' for none")


def _check_erasing(
  erase: float,
  mode: str,
  count: Sequence[int],
  mean: Sequence[float] | None,
  std: Sequence[float] | None,
) -> None:
  if mode not in ("pixel", "rand", "const"):
    raise ConfigError(f"erase_mode is {mode!r}; there are 'pixel', 'rand' and 'const'")
  _check_numbers("erase_count", count, 2, 1, math.inf, rising=True)
  if any(int(v) != v for v in count):
    raise ConfigError(f"erase_count is {tuple(count)!r}; expected (fewest, most) boxes")
  if erase and (mean is None or std is None):
    raise ConfigError(f"erase is {erase!r}, which needs the mean and std of pixels")


def _check_numbers(
  key: str,
  values: Sequence[float],
  count: int,
  low: float,
  high: float,
  *,
  above: bool = False,
  rising: bool = False,
) -> None:
  """Raises ConfigError unless there are `count` finite numbers in [low, high], or (low, high]."""
  inside = lambda v: math.isfinite(v) and (low < v if above else low <= v) and v <= high
  if len(values) != count or not all(map(inside, values)) or (rising and values[0] > values[-1]):
    bound = f"{'above' if above else 'from'} {low:g}" + (f" up to {high:g}" * (high < math.inf))
    order = ", the smaller first" if rising else ""
    raise ConfigError(f"{key} is {tuple(values)!r}; expected {count} numbers {bound}{order}")
