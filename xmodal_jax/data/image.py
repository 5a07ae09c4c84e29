"""Decodes and transforms images to uint8 pixels, on the host, with Pillow.

The published systems resized with Pillow, whose antialiased fixed-point filters no other library
reproduces; Pillow also releases the GIL while it decodes and resizes. Batches are uint8; the model
normalises them on the device.
"""

import dataclasses
import io
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Interpolation = Literal["bicubic", "bilinear"]
Augment = Callable[[Image.Image, np.random.Generator], np.ndarray]

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class DecodeError(Exception):
  """The bytes are not an image, or it is truncated, damaged or too large."""


def decode(source: bytes | np.ndarray | Image.Image) -> Image.Image:
  """Bytes of any format that Pillow reads, or pixels uint8 [H, W] or [H, W, 3 or 4], to an image.

  Keeps the file's mode. EXIF orientation is left to `Transform`: most published systems ignore it.
  Raises DecodeError.
  """
  if isinstance(source, Image.Image):
    return source
  if isinstance(source, np.ndarray):
    return Image.fromarray(source)
  try:
    image = Image.open(io.BytesIO(source))
    # Pillow only warns up to twice its bound.
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
      raise DecodeError(f"{image.width} x {image.height} pixels: a decompression bomb?")
    image.load()  # open() reads only the header; a truncated file raises here
  except DecodeError:
    raise
  except UnidentifiedImageError:
    # Pillow's message prints the BytesIO object.
    raise DecodeError(f"no known image format, first bytes {source[:8]!r}") from None
  except Exception as e:
    # Decoders of broken files raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    raise DecodeError(f"{type(e).__name__}: {e}") from e
  return image


def load(
  source: bytes | np.ndarray | Image.Image, transform: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
  """Decodes and transforms to uint8 [H, W, 3]. Raises DecodeError."""
  return transform(decode(source))


def to_rgb(image: Image.Image) -> Image.Image:
  """Converts to RGB; an RGB image is returned as it is, where Pillow's conversion copies."""
  return image if image.mode == "RGB" else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; returns the image as it is if that is absent or unreadable."""
  # ImageOps.exif_transpose also rewrites the other tags, and fails on damaged ones.
  try:
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
  except Exception:  # SyntaxError, struct.error and others, by the damage
    return image
  return image if turn is None else image.transpose(turn)


_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def pixels(image: Image.Image) -> np.ndarray:
  """uint8 [H, W, 3]."""
  return np.asarray(to_rgb(image))


@dataclasses.dataclass(frozen=True)
class Transform:
  """Resize, then crop the centre: image -> uint8 [crop, crop, 3].

  Raises ValueError for a crop larger than the size. Example::

    transform = Transform(size=256, crop=224, interpolation="bilinear")
    pixels = load(pathlib.Path("cat.jpg").read_bytes(), transform)   # uint8 [224, 224, 3]
  """

  size: int
  """Length in pixels to resize to: of the shorter side, or with "exact" of both."""
  crop: int
  """Side of the central square that is kept, at most `size`."""
  resize: Literal["shorter", "exact"] = "shorter"
  """"exact" changes the aspect ratio."""
  interpolation: Interpolation = "bicubic"
  rgb_first: bool = True
  """False: resize in the file's mode, then convert to RGB, as CLIP does. This matters for palette
  images (nearest neighbour on indices) and RGBA (premultiplied alpha, then dropped)."""
  exif: bool = False
  """Apply the EXIF orientation first."""

  def __post_init__(self):
    if not 0 < self.crop <= self.size:
      raise ValueError(f"a crop of {self.crop} does not fit images resized to {self.size}")
    if self.resize not in ("shorter", "exact") or self.interpolation not in FILTERS:
      raise ValueError(f"unknown resize or interpolation in {self}")

  def __call__(self, image: Image.Image) -> np.ndarray:
    if self.exif:
      image = upright(image)
    if self.rgb_first:
      image = to_rgb(image)
    width, height = target = self.target(image.width, image.height)
    if image.size != target:
      image = image.resize(target, FILTERS[self.interpolation])
    if target != (self.crop, self.crop):
      # Python's round, half to even: an offset of 0.5 is 0, of 1.5 and 2.5 is 2.
      left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
      image = image.crop((left, top, left + self.crop, top + self.crop))
    return pixels(image)

  def target(self, width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize."""
    if self.resize == "exact":
      return self.size, self.size
    if width <= height:
      return self.size, int(self.size * height / width)
    return int(self.size * width / height), self.size


def clip_transform(size: int) -> Transform:
  """CLIP's transform, the same in training and evaluation."""
  return Transform(size, size, rgb_first=False)


def crop_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """A random box (left, top, right, bottom): torchvision's RandomResizedCrop.

  The fraction of the area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. After ten
  boxes that do not fit, the largest central box whose aspect ratio is in range.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  # At least one pixel: torchvision's rounding can reach 0 in an image one pixel wide.
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Image.Image,
  rng: np.random.Generator,
  size: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  interpolation: Interpolation = "bicubic",
) -> Image.Image:
  """A random box of the image, resized to size x size."""
  # Crop, then resize: with resize(box=...) the filter would use pixels outside of the box.
  image = image.crop(crop_box(image.width, image.height, rng, scale, ratio))
  return image.resize((size, size), FILTERS[interpolation])


def random_flip(
  image: Image.Image, rng: np.random.Generator, probability: float = 0.5
) -> Image.Image:
  """Flips left and right with the given probability."""
  if rng.random() < probability:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return image
