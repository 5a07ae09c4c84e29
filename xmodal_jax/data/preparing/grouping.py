"""Gathers the captions of a source by image: one picture, one split, one id.

Every reader of captions adds what it finds to a `Grouper`, which refuses what contradicts itself
and counts and logs what it leaves out.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Literal

from etils import epath

from xmodal_jax.data.preparing.annotations import AnnotatedImage, Splits, renumbered
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.errors import listed

_BEYOND = "captions beyond the limit"
# What is done with captions of white space only.
Blank = Literal["error", "drop", "keep"]


@dataclasses.dataclass
class _Group:
  where: str  # the first record of the image
  split: str
  image: AnnotatedImage  # without captions
  numbered: bool  # its id was not given
  captions: list[str] = dataclasses.field(default_factory=list)
  ids: list[int] = dataclasses.field(default_factory=list)
  positions: list[int] = dataclasses.field(default_factory=list)


class Grouper:
  """Images by file, in the order in which they are added.

  blank: what to do with blank captions; "error" lists them at the end. ids: whether ids of images
  are unique in the whole source or in each split. per_image: a record is of an image and not of a
  caption, so records of the same image are worth a message.
  """

  def __init__(
    self,
    blank: Blank = "error",
    ids: Literal["source", "split"] = "source",
    per_image: bool = False,
  ):
    self._blank, self._ids, self._per_image = blank, ids, per_image
    self._groups: dict[str, _Group] = {}  # by path
    self._owners: dict[tuple[str, int], _Group] = {}  # by id
    self._blanks: list[str] = []
    self._left_out: dict[str, collections.Counter[str]] = collections.defaultdict(
      collections.Counter
    )
    self._records: collections.Counter[str] = collections.Counter()

  def add(
    self,
    where: str,
    split: str,
    name: str,
    path: epath.Path,
    captions: Sequence[str],
    *,
    image_id: int | None = None,
    caption_ids: Sequence[int] = (),
    positions: Sequence[int] = (),
    limit: int | None = None,
    **fields,
  ) -> None:
    """Adds captions of an image, and the image if its file is new.

    Args:
      where: file and line or entry, for messages.
      image_id: None: images are numbered from 0, in the order of the source.
      caption_ids, positions: one for each caption, or none.
      limit: the number of captions to use, the first ones; the rest is counted.
      **fields: further fields of AnnotatedImage.

    Raises DatasetError if an earlier record has the image in another split or with another id, or
    another image with this id.
    """
    group = self._group(where, split, name, path, image_id, fields)
    self._records[split] += 1
    for i, caption in enumerate(captions[:limit]):
      if not caption.strip():
        self._blanks.append(f"{where} ({name})")
        if self._blank == "drop":
          self._left_out[split]["blank captions"] += 1
          continue
      group.captions.append(caption)
      group.ids += caption_ids[i : i + 1]
      group.positions += positions[i : i + 1]
    if limit is not None and len(captions) > limit:
      self._left_out[split][_BEYOND] += len(captions) - limit

  def _group(
    self,
    where: str,
    split: str,
    name: str,
    path: epath.Path,
    image_id: int | None,
    fields: dict,
  ) -> _Group:
    key = os.path.normpath(path)  # "./a" is "a", and "b/../a" too
    number = len(self._groups) if image_id is None else image_id
    new = _Group(where, split, AnnotatedImage(name, path, number, (), **fields), image_id is None)
    group = self._groups.setdefault(key, new)
    if group is new:
      owner = self._owners.setdefault((split if self._ids == "split" else "", number), group)
      if owner is not group:
        raise DatasetError(
          f"{where}: image_id {number} is of image {name}, but of {owner.image.filename} at "
          f"{owner.where}; each image must have its own"
        )
    elif group.split != split:
      raise DatasetError(
        f"{where}: image {path} of split {split!r} is also in split {group.split!r}, at "
        f"{group.where}; splits must not share images"
      )
    elif image_id != (None if group.numbered else group.image.image_id):
      raise DatasetError(
        f"{where}: image {name} has image_id {image_id}, but {group.image.image_id} at "
        f"{group.where}; all records of an image must have the same"
      )
    return group

  def splits(self, names: Iterable[str] = ()) -> Splits:
    """The images of each split. names: of splits, first ones, that are there even without images.

    Raises DatasetError for blank captions, unless they are to be kept or left out.
    """
    self._report_blanks()
    if beyond := sum(reasons[_BEYOND] for reasons in self._left_out.values()):
      text = "%d captions beyond the first ones of their image are left out (--captions_per_image "
      logging.info(text + "all keeps them)", beyond)
    out: dict[str, list[AnnotatedImage]] = {name: [] for name in names}
    for group in self._groups.values():
      kept = out.setdefault(group.split, [])
      if group.captions:
        optional = {"caption_ids": group.ids, "caption_positions": group.positions}
        given = {k: tuple(v) for k, v in optional.items() if v}
        captions = tuple(group.captions)
        kept.append(dataclasses.replace(group.image, captions=captions, **given))
      else:
        self._left_out[group.split]["images with blank captions alone"] += 1
    if left := len(self._groups) - sum(map(len, out.values())):
      logging.info("%d images are left out, they have no other captions", left)
    self._log_odd()
    images = {name: renumbered(images) for name, images in out.items()}
    return Splits(images, self._left_out)

  def _report_blanks(self) -> None:
    if not self._blanks:
      return
    named = listed(self._blanks)
    if self._blank == "error":
      raise DatasetError(
        f"{self._blanks[0]}: a blank caption, {len(self._blanks)} in all; fill them in, or pass "
        f"--blank_captions drop (leave them out) or keep:{named}"
      )
    done = "left out" if self._blank == "drop" else "kept"
    logging.info("%d blank captions are %s:%s", len(self._blanks), done, named)

  def _log_odd(self) -> None:
    if self._per_image:
      for split, records in self._records.items():
        if merged := records - sum(group.split == split for group in self._groups.values()):
          text = "%s: %d records, %d merged into earlier ones of their image"
          logging.info(text, split, records, merged)
    spelled: dict[str, str] = {}
    pairs = [
      (spelled[key], path)
      for path in self._groups
      if spelled.setdefault(key := path.casefold(), path) != path
    ]
    if pairs:
      text = "%d images have a name that differs from another one's in case only, first %s and %s: "
      text += "both are taken as images of their own"
      logging.info(text, len(pairs), *pairs[0])
