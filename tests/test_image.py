"""Decoding and transforms of images."""

import concurrent.futures
import io
import resource
import time
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageFilter
from test_pipeline import encoded

from xmodal_jax.data import augment
from xmodal_jax.data import image as image_lib

SIZE = 8
TRANSFORM = image_lib.clip_transform(SIZE)
RNG = lambda: np.random.default_rng(0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_decode_errors(form):
  assert ImageFile.LOAD_TRUNCATED_IMAGES is False
  data = encoded(0, form, (40, 30))
  assert image_lib.load(data, TRANSFORM).shape == (SIZE, SIZE, 3)
  for damaged in (data[: len(data) // 2], data[:10], b"", b"not an image"):
    with pytest.raises(image_lib.DecodeError):
      image_lib.load(damaged, TRANSFORM)


def test_one_bound_on_pixels(monkeypatch):
  """It is max_pixels, whatever Pillow's own says, for training, evaluation and the check alike."""
  data = encoded(0)  # 14 x 10
  for call in (lambda n: image_lib.load(data, TRANSFORM, n), lambda n: image_lib.check(data, n)):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses from twice that
    call(140)
    with pytest.raises(image_lib.DecodeError, match="14 x 10 pixels, more than max_pixels = 139"):
      call(139)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(image_lib.DecodeError, match="max_pixels = 19") as error:
      call(19)
    assert error.value.kind == "too large"


def png(height: int, width: int, *channels: int) -> bytes:
  file = io.BytesIO()
  pixels = np.zeros((height, width, *channels), np.uint8)
  pixels[height // 2 :, width // 2 :] = 200
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def test_a_large_photograph_is_readable():
  """Of 108 megapixels, where PIL and torchvision only warn."""
  file = io.BytesIO()
  Image.new("1", (12000, 9000), 1).save(file, "PNG")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert (image_lib.load(file.getvalue(), TRANSFORM) == 255).all()


def test_one_large_image_is_in_memory_at_a_time(monkeypatch):
  monkeypatch.setattr(image_lib, "_LARGE", 139)
  inside, most = [], []

  def transform(image):
    inside.append(image)
    most.append(len(inside))
    time.sleep(0.01)
    inside.remove(image)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda i: image_lib.load(encoded(i), transform), range(8)))
  assert most == [1] * 8


@pytest.mark.parametrize("shape", [(60_000, 1, 3), (1, 60_000, 3), (200_000, 2), (3, 2_000_000)])
@pytest.mark.parametrize("resize", ["shorter", "exact"])
@pytest.mark.parametrize("rgb_first", [True, False])
def test_extreme_shapes_cost_what_the_crop_needs(shape, resize, rgb_first):
  """A file of 312 bytes became 224 x 13 million pixels, 12 GB."""
  transform = image_lib.Transform(256, 224, resize=resize, rgb_first=rgb_first)
  data, peak = png(*shape), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  got = image_lib.load(data, transform)
  assert got.shape == (224, 224, 3) and got.min() < 50 and got.max() > 150
  assert augment.build(transform, crop="random")(image_lib.decode(data), RNG()).shape == got.shape
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # kB


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(30, 400), (400, 30), (90, 70)])
def test_the_box_of_an_extreme_shape_is_that_of_the_whole(monkeypatch, interpolation, size):
  x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
  pixels = np.stack([x * 5 % 200, y * 3 % 200, x + y], -1).astype(np.uint8)
  image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
  transform = image_lib.Transform(48, 40, interpolation=interpolation)
  whole = transform(image).astype(int)
  monkeypatch.setattr(image_lib, "_WHOLE", 0)
  assert abs(transform(image) - whole).max() <= 1


def test_formats_are_a_closed_list(monkeypatch):
  from PIL import EpsImagePlugin

  calls = []
  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kw: calls.append(args))
  eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
  with pytest.raises(image_lib.DecodeError, match=r"no known image format \(JPEG, PNG, ") as error:
    image_lib.load(eps, TRANSFORM)
  assert not calls and error.value.kind == "unknown format"
  with pytest.raises(image_lib.DecodeError, match="the file is empty"):
    image_lib.load(b"", TRANSFORM)
  with pytest.raises(image_lib.DecodeError, match="no known image format"):
    image_lib.size(io.BytesIO(eps))
  assert image_lib.size(io.BytesIO(encoded(0))) == (14, 10)


def test_pictures_that_failed(shared_data):
  """A photograph of 108 megapixels, a file of 0 bytes, and greyscale of 16 bits."""
  folder = shared_data.parent / "cases" / "data" / "pictures"
  if not folder.is_dir():
    pytest.skip(f"no folder {folder}")
  scan, zero, grey = (
    (folder / n).read_bytes() for n in ("scan_108mp.jpg", "zero.jpg", "gray16.png")
  )
  transform = image_lib.Transform(224, 224)
  assert image_lib.load(scan, transform).std() > 1
  with pytest.raises(image_lib.DecodeError, match="the file is empty"):
    image_lib.load(zero, transform)
  assert "16-bit greyscale with values from 0 to 65535" in image_lib.check(grey)
  want = np.asarray(Image.open(io.BytesIO(grey)).convert("RGB"))  # as PIL and torchvision
  np.testing.assert_array_equal(image_lib.pixels(image_lib.decode(grey)), want)


@pytest.mark.parametrize(
  "values, want",
  [
    (np.uint16([[0, 255]]), None),
    (np.uint16([[300, 40000]]), "16-bit greyscale with values from 300 to 40000"),
    (np.int32([[-5, 90]]), "32-bit greyscale with values from -5 to 90"),
    (np.float32([[0, 0.9]]), "float greyscale with values from 0 to 0.9"),
    (np.float32([[0, 200]]), None),
    (np.uint8([[0, 200]]), None),
  ],
)
def test_the_check_names_greyscale_that_turns_blank(values, want):
  file = io.BytesIO()
  Image.fromarray(values).save(file, "TIFF")
  found = image_lib.check(file.getvalue())
  assert found is None if want is None else found.startswith(want)


def test_transform_parameters():
  image = image_lib.decode(encoded(0, size=(50, 31)))
  exact = image_lib.Transform(16, 16, resize="exact", interpolation="bilinear")(image)
  want = image.resize((16, 16), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(exact, np.asarray(want))
  cut = image_lib.Transform(16, 12, resize="exact")(image)
  want = image.resize((16, 16), Image.Resampling.BICUBIC).crop((2, 2, 14, 14))
  np.testing.assert_array_equal(cut, np.asarray(want))
  # 50 x 31 -> 25 x 16 (25.8 cut off); offsets 5.5 -> 6 and 1: half to even.
  shorter = image_lib.Transform(16, 14)(image)
  want = image.resize((25, 16), Image.Resampling.BICUBIC).crop((6, 1, 20, 15))
  np.testing.assert_array_equal(shorter, np.asarray(want))
  with pytest.raises(ValueError, match="does not fit"):
    image_lib.Transform(16, 17)
  with pytest.raises(ValueError, match="unknown"):
    image_lib.Transform(16, 16, interpolation="nearest")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
  if mode == "I;16":
    image = Image.fromarray(np.arange(140, dtype=np.uint16).reshape(10, 14))
  else:
    image = image_lib.decode(encoded(0)).convert("L" if mode == "LA" else "RGB").convert(mode)
  for transform in (TRANSFORM, image_lib.Transform(SIZE, SIZE, resize="exact")):
    got = image_lib.load(image, transform)
    assert got.dtype == np.uint8 and got.shape == (SIZE, SIZE, 3)
  got = augment.build(TRANSFORM, crop="random")(image, np.random.default_rng(0))
  assert got.dtype == np.uint8 and got.shape == (SIZE, SIZE, 3)


def test_random_boxes():
  rng, scale, ratio = np.random.default_rng(0), (0.2, 0.9), (3 / 4, 4 / 3)
  boxes = np.array([image_lib.crop_box(200, 150, rng, scale, ratio) for _ in range(2000)])
  left, top, right, bottom = boxes.T
  w, h = right - left, bottom - top
  assert (left >= 0).all() and (top >= 0).all() and (right <= 200).all() and (bottom <= 150).all()
  share, aspect = w * h / 30000, w / h
  assert share.min() > 0.19 and share.max() < 0.91 and 0.3 < np.median(share) < 0.55
  assert aspect.min() > 0.73 and aspect.max() < 1.36
  # Boxes of up to half the area fit with any aspect ratio, so none is rejected.
  assert abs(np.log(aspect[share < 0.5]).mean()) < 0.02
  assert (left == 0).any() and (right == 200).any() and (top == 0).any() and (bottom == 150).any()


@pytest.mark.parametrize(
  ("width", "height", "box"),
  [(100, 10, (43, 0, 56, 10)), (10, 100, (0, 43, 10, 56)), (1, 400, (0, 199, 1, 200))],
)
def test_random_box_fallback_is_central(width, height, box):
  """No box of nine tenths of the area has an allowed aspect ratio."""
  rng = np.random.default_rng(0)
  assert image_lib.crop_box(width, height, rng, (0.9, 1.0), (3 / 4, 4 / 3)) == box


def with_exif(pixels: np.ndarray, orientation: int, form: str) -> bytes:
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112] = orientation
  exif[0x010E] = "a description"
  Image.fromarray(pixels).save(file, form, quality=100, lossless=True, exif=exif)
  return file.getvalue()


@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation(orientation):
  """Only Transform(exif=True) applies the EXIF orientation of a JPEG."""
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:8, :16] = 255  # the left upper corner
  turned = {
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: pixels.swapaxes(0, 1),
    6: np.rot90(pixels, -1),
    7: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90(pixels),
  }
  data = with_exif(pixels, orientation, "JPEG")
  for on in (True, False):
    transform = image_lib.Transform(20, 20, resize="exact", exif=on)
    got = image_lib.load(data, transform).astype(int)
    want = turned.get(orientation, pixels) if on else pixels
    want = image_lib.Transform(20, 20, resize="exact")(Image.fromarray(want))
    assert abs(got - want).max() < 8  # the losses of JPEG


def test_damaged_exif():
  pixels = np.asarray(image_lib.decode(encoded(0)).convert("RGB"))
  transform = image_lib.Transform(SIZE, SIZE, resize="exact", exif=True)
  plain = transform(Image.fromarray(pixels))
  data = with_exif(pixels, 3, "WEBP")
  np.testing.assert_array_equal(
    image_lib.load(data, transform), transform(Image.fromarray(pixels[::-1, ::-1]))
  )
  head = data[data.index(b"EXIF") + 8 :].removeprefix(b"Exif\0\0")[:4]
  assert head in (b"MM\0*", b"II*\0")
  # An unreadable header is ignored.
  np.testing.assert_array_equal(image_lib.load(data.replace(head, b"ZZZZ"), transform), plain)
  # A damaged description tag does not affect the orientation.
  start, order = data.index(head), "big" if head[:1] == b"M" else "little"
  tags = data[start:].replace((0x010E).to_bytes(2, order), (0x0100).to_bytes(2, order), 1)
  got = image_lib.load(data[:start] + tags, transform)
  np.testing.assert_array_equal(got, transform(Image.fromarray(pixels[::-1, ::-1])))
