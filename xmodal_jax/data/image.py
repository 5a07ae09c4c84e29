"""Decodes and transforms images to uint8 pixels, on the host, with Pillow.

The published systems resized with Pillow, whose antialiased fixed-point filters no other library
reproduces; Pillow also releases the GIL while it decodes and resizes. Batches are uint8; the model
normalises them on the device.
"""

import contextlib
import dataclasses
import io
import math
import threading
from collections.abc import Callable
from typing import IO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from xmodal_jax.errors import ConfigError

Interpolation = Literal["bicubic", "bilinear"]
Augment = Callable[[Image.Image, np.random.Generator], np.ndarray]

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


# Pillow has some 45 readers. One of them runs Ghostscript (EPS), others guess without a signature.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

MAX_PIXELS = 178_956_970
"""Default bound on width x height: twice Pillow's MAX_IMAGE_PIXELS, from where Pillow refuses."""

_LARGE = 2**25  # pixels from which images are decoded one at a time, each with 4 bytes a pixel
_ONE_LARGE = threading.Lock()
_WHOLE = 2**24  # pixels up to which a resized image is made whole, and then cropped


class DecodeError(Exception):
  """The bytes are not an image, or it is truncated, damaged or too large.

  kind: "empty", "unknown format", "too large" or "damaged".
  """

  def __init__(self, message: str, kind: str = "damaged"):
    super().__init__(message)
    self.kind = kind


def decode(source: bytes | np.ndarray | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """Bytes of one of FORMATS, or pixels uint8 [H, W] or [H, W, 3 or 4], to an image.

  Keeps the file's mode. EXIF orientation is left to `Transform`: most published systems ignore it.
  Raises DecodeError, also for bytes of an image of more than max_pixels.
  """
  return _loaded(_opened(source, max_pixels))


def load(
  source: bytes | np.ndarray | Image.Image,
  transform: Callable[[Image.Image], np.ndarray],
  max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
  """Decodes and transforms to uint8 [H, W, 3]. Raises DecodeError as `decode`.

  Of images above 33 megapixels, one at a time is in memory, whatever the number of threads.
  """
  image = _opened(source, max_pixels)
  with _turn(image):
    return transform(_loaded(image))


def check(source: bytes, max_pixels: int = MAX_PIXELS) -> str | None:
  """Decodes an image; returns a remark if its conversion to 8 bits loses what is in it, else None.

  Raises DecodeError as `decode`.
  """
  image = _opened(source, max_pixels)
  with _turn(image):
    image = _loaded(image)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
      return None
    low, high = image.getextrema()
  if low >= 0 and 1 < high <= 255:
    return None
  kind = "float" if image.mode == "F" else "16-bit" if ";" in image.mode else "32-bit"
  return (
    f"{kind} greyscale with values from {low:g} to {high:g}, of which 8 bits keep 0 to 255 and "
    "clip the rest, as PIL and torchvision do: nearly white or black; convert it to 8 bits"
  )


def _opened(source: bytes | np.ndarray | Image.Image, max_pixels: int) -> Image.Image:
  """Reads the header, and checks the size by it. Raises DecodeError."""
  if isinstance(source, Image.Image):
    return source
  if isinstance(source, np.ndarray):
    return Image.fromarray(source)
  return _header(io.BytesIO(source), max_pixels)


def size(file: IO[bytes], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """(width, height) by the header of a file. Raises DecodeError."""
  return _header(file, max_pixels).size


def _header(file: IO[bytes], max_pixels: int) -> Image.Image:
  # The bound is max_pixels. Pillow has a global one, which warns first, and refuses from twice it.
  if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
    Image.MAX_IMAGE_PIXELS = max_pixels
  try:
    image = Image.open(file, formats=FORMATS)
  except Image.DecompressionBombError as e:
    raise DecodeError(f"{e} The bound is max_pixels = {max_pixels}", "too large") from None
  except UnidentifiedImageError:
    # Pillow's message prints the file object.
    file.seek(0)
    if not (first := file.read(8)):
      raise DecodeError("the file is empty", "empty") from None
    known = ", ".join(FORMATS)
    raise DecodeError(
      f"no known image format ({known}), first bytes {first!r}", "unknown format"
    ) from None
  except Exception as e:
    raise DecodeError(f"{type(e).__name__}: {e}") from e
  if image.width * image.height > max_pixels:
    raise DecodeError(
      f"{image.width} x {image.height} pixels, more than max_pixels = {max_pixels}", "too large"
    )
  return image


def _turn(image: Image.Image) -> contextlib.AbstractContextManager:
  return _ONE_LARGE if image.width * image.height > _LARGE else contextlib.nullcontext()


def _loaded(image: Image.Image) -> Image.Image:
  """Decodes the pixels of an open image. Raises DecodeError."""
  try:
    image.load()  # open() reads only the header; a truncated file raises here
  except Exception as e:
    # Decoders of broken files raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    raise DecodeError(f"{type(e).__name__}: {e}") from e
  return image


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

  Raises ConfigError for a crop larger than the size. Example::

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
      raise ConfigError(f"a crop of {self.crop} does not fit images resized to {self.size}")
    if self.resize not in ("shorter", "exact") or self.interpolation not in FILTERS:
      raise ConfigError(f"unknown resize or interpolation in {self}")

  def __call__(self, image: Image.Image) -> np.ndarray:
    if self.exif:
      image = upright(image)
    if self.rgb_first:
      image = to_rgb(image)
    width, height = target = self.target(image.width, image.height)
    # Python's round, half to even: an offset of 0.5 is 0, of 1.5 and 2.5 is 2.
    left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
    box = (left, top, left + self.crop, top + self.crop)
    if width * height > _WHOLE:
      return pixels(self._resized_box(image, box))
    if image.size != target:
      image = _resized(image, target, FILTERS[self.interpolation])
    if target != (self.crop, self.crop):
      image = image.crop(box)
    return pixels(image)

  def _resized_box(self, image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A box of the resized image without the rest: 1 x 60,000 pixels become 224 x 13 million.

    Pillow chooses which axis to resize first by the sizes, so roundings differ from the whole's.
    """
    width, height = self.target(image.width, image.height)
    x, y = image.width / width, image.height / height
    left, top, right, bottom = box
    source = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return image.resize((self.crop, self.crop), FILTERS[self.interpolation], box=source)

  def target(self, width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize."""
    if self.resize == "exact":
      return self.size, self.size
    if width <= height:
      return self.size, int(self.size * height / width)
    return int(self.size * width / height), self.size


def _resized(
  image: Image.Image, target: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
  """Pillow's resize; many versions change the width first, which makes a tall image huge."""
  width, height = target
  if width > image.width and width * image.height > _WHOLE:
    image = image.resize((image.width, height), resample)
  return image.resize(target, resample)


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
