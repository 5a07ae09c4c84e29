"""Annotated images: what the readers of sources return, and the examples that `builder` writes."""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from xmodal_jax.data.preparing import ahead
from xmodal_jax.data.preparing.builder import Example
from xmodal_jax.data.preparing.listing import Listing
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.errors import listed


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
  """An image file with its captions or its label.

  caption_positions: of the captions in the split's own list, if it has one. position: of the image
  in the list of annotations, if these number images so and not by COCO's ids. size: width and
  height, if the annotations have them.
  """

  filename: str
  path: epath.Path
  image_id: int
  captions: tuple[str, ...]
  caption_ids: tuple[int, ...] | None = None
  caption_positions: tuple[int, ...] | None = None
  label: int | None = None
  position: int | None = None
  size: tuple[int, int] | None = None


class Splits(dict[str, list[AnnotatedImage]]):
  """The images of each split, by its name.

  left_out: what the source has besides and a reader left out, by split and reason.
  """

  def __init__(
    self,
    images: Mapping[str, list[AnnotatedImage]] | None = None,
    left_out: Mapping[str, collections.Counter[str]] | None = None,
  ):
    super().__init__(images or {})
    self.left_out = dict(left_out or {})


def examples(images: Iterable[AnnotatedImage]) -> Iterator[Example]:
  """Images -> examples of `builder`, in order. Threads read a few files ahead."""
  return ahead.ordered(example, images)


def example(image: AnnotatedImage) -> Example:
  """Raises DatasetError if the file cannot be read."""
  try:
    return {"image": image.path.read_bytes(), **fields(image)}
  except OSError as e:
    raise DatasetError(f"{image.path}: cannot be read ({e}); check its disk and permissions") from e


def fields(image: AnnotatedImage) -> dict:
  """The fields of an example without the image itself."""
  optional = ("caption_ids", "caption_positions", "label")
  given = {name: getattr(image, name) for name in optional}
  return {
    "image_id": image.image_id,
    "filename": image.filename,
    "captions": image.captions,
    **{k: v for k, v in given.items() if v is not None},
  }


def check_images(splits: Splits, max_missing: int = 0) -> Splits:
  """Checks that image files exist, and are of one split each. `pictures.check` decodes them.

  Up to max_missing files that do not exist are left out of the splits returned. Raises
  DatasetError, listing the first images, for more of them, and for a file that two splits have
  under different names, by links.
  """
  listing = Listing()
  listing.load(p.path for split in splits.values() for p in split)
  missing = [(p, f) for split in splits.values() for p in split if (f := _absence(p, listing))]
  if len(missing) > max_missing:
    remedy = "check the folder of the images, or leave them out with --max_missing"
    allowed = f", more than the {max_missing} allowed" if max_missing else ""
    _fail(splits, missing, f"missing{allowed}", remedy)
  if missing:
    logging.info("left out %d missing images:%s", len(missing), _named(missing))
    splits = without(splits, [p for p, _ in missing])
  _check_links(splits, listing)
  return splits


def without(splits: Splits, images: Iterable[AnnotatedImage]) -> Splits:
  """The splits without these of their images."""
  absent = {id(p) for p in images}
  return Splits(
    {n: renumbered([p for p in split if id(p) not in absent]) for n, split in splits.items()},
    splits.left_out,
  )


def _absence(image: AnnotatedImage, listing: Listing) -> str | None:
  """Why there is no file of the image; None if there is one."""
  if (kind := listing.kind(image.path)) in ("file", "link"):
    return None
  if kind == "folder":
    return "(is a folder)"
  other = listing.other_spelling(image.path)
  return f"(there is {other}, another spelling)" if other else "(no such file)"


def _check_links(splits: Splits, listing: Listing) -> None:
  """Raises DatasetError if a file is in two splits, by links to it or to its folder."""
  owner: dict[str, tuple[str, AnnotatedImage]] = {}
  twice = 0
  for split, images in splits.items():
    for image in images:
      other, first = owner.setdefault(listing.identity(image.path), (split, image))
      if other != split:
        raise DatasetError(
          f"{image.path} of split {split!r} is the same file as {first.path} of split {other!r}; "
          "splits must not share images"
        )
      twice += first is not image
  if twice:
    logging.info("%d images are links to the file of another image of their split", twice)


def renumbered(images: list[AnnotatedImage]) -> list[AnnotatedImage]:
  """Renumbers caption positions to 0..C-1, keeping their order, after images were left out."""
  if any(p.caption_positions is None for p in images):
    return images
  kept = sorted(i for p in images for i in p.caption_positions)
  place = {old: new for new, old in enumerate(kept)}
  return [
    dataclasses.replace(p, caption_positions=tuple(place[i] for i in p.caption_positions))
    for p in images
  ]


Faults = list[tuple[AnnotatedImage, str]]


def _named(faults: Faults) -> str:
  return listed([f"{p.path} {f}".rstrip() for p, f in faults])


def _fail(splits: Splits, faults: Faults, what: str, remedy: str) -> None:
  total = sum(map(len, splits.values()))
  raise DatasetError(f"{len(faults)} of {total} images are {what}; {remedy}:{_named(faults)}")
