"""Checks that images decode, as training and evaluation decode them."""

import collections
import logging
from collections.abc import Iterator

from xmodal_jax.data import image as image_lib
from xmodal_jax.data.preparing import ahead, summary
from xmodal_jax.data.preparing.annotations import AnnotatedImage, Splits, without
from xmodal_jax.data.progress import Progress
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.errors import listed

LeftOut = dict[str, collections.Counter]


def kind_of_fault(data: bytes, max_pixels: int = image_lib.MAX_PIXELS) -> str | None:
  """Why an image does not decode, see `image.DecodeError.kind`; None if it decodes."""
  try:
    image_lib.check(data, max_pixels)
  except image_lib.DecodeError as e:
    return e.kind
  return None


def check(
  splits: Splits, *, max_pixels: int = image_lib.MAX_PIXELS, leave_out: bool = False
) -> tuple[Splits, LeftOut]:
  """Decodes all images; returns the splits without those that do not decode, and their counts.

  Images that decode, but turn nearly white or black in 8 bits, are kept and named in the log.

  Args:
    max_pixels: of an image, as `config.data.max_pixels`.
    leave_out: False: images that do not decode raise DatasetError, which lists the first.

  Returns:
    The splits, and for each split its number of left out images by `image.DecodeError.kind`.
  """
  left_out: LeftOut = {name: collections.Counter() for name in splits}
  bad, faults, remarks = [], [], []
  total = sum(map(len, splits.values()))
  with Progress("checking", "images", total) as progress:
    for split, image, found in _found(splits, max_pixels):
      progress.add()
      if isinstance(found, image_lib.DecodeError):
        left_out[split][found.kind] += 1
        bad.append(image)
        faults.append(f"{image.path} ({found})")
      elif found:
        remarks.append(f"{image.path}: {found}")
  if remarks:
    text = "%d of %d images lose their content in 8 bits, and are kept:%s"
    logging.warning(text, len(remarks), total, listed(remarks))
  if not faults:
    return splits, left_out
  reasons = summary.reasons(sum(left_out.values(), collections.Counter()))
  if not leave_out:
    raise DatasetError(
      f"{len(faults)} of {total} images are broken ({reasons}); replace them, take them out of the "
      f"annotations, or leave them out with --check_images=leave_out:{listed(faults)}"
    )
  logging.warning("left out %d broken images (%s):%s", len(faults), reasons, listed(faults))
  return without(splits, bad), left_out


def _found(
  splits: Splits, max_pixels: int
) -> Iterator[tuple[str, AnnotatedImage, image_lib.DecodeError | str | None]]:
  """(split, image, its fault, its remark or None) of all images, which threads decode."""

  def look(image: AnnotatedImage) -> image_lib.DecodeError | str | None:
    try:
      return image_lib.check(image.path.read_bytes(), max_pixels)
    except image_lib.DecodeError as e:
      return e
    except OSError as e:
      message = f"{image.path}: cannot be read ({e}); check its disk and permissions"
      raise DatasetError(message) from e

  for name, split in splits.items():
    for image, found in zip(split, ahead.ordered(look, split), strict=True):
      yield name, image, found
