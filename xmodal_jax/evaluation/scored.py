"""Which images and captions of a split were scored, and why the others were left out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from xmodal_jax.data import mix, records
from xmodal_jax.distributed import processes

# Records of a split that were left out: [{"record": 3, "captions": 5, "reason": "..."}].
LeftOut = list[dict[str, Any]]


class Scored(NamedTuple):
  """The rows and columns of a score matrix [I, T].

  image_id: int [I], ascending, positions of the images in the split. caption_image: int [T], the
  row of each caption's image. kept: bool [T'], which of the captions that were read are columns:
  those whose image was read, too.
  """

  image_id: np.ndarray
  caption_image: np.ndarray
  kept: np.ndarray
  left_out: LeftOut

  def facts(self) -> dict[str, Any]:
    """What was scored, for results.json."""
    facts = dict(images=len(self.image_id), captions=len(self.caption_image))
    return facts | ({"left_out": self.left_out} if self.left_out else {})


def match(image_id: np.ndarray, caption_image: np.ndarray, left_out: LeftOut) -> Scored:
  """From the images [I] and captions [T'] that were read, as positions of images in the split."""
  return Scored(image_id, *positions(image_id, caption_image), left_out)


def positions(image_id: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the score matrix that captions belong to, after unreadable images are left out.

  image_id [I], ascending, and caption_image [T] are positions in the split. Returns int [T'], the
  row of each kept caption, and bool [T], whether a caption's image was read.
  """
  row = np.searchsorted(image_id, caption_image)
  kept = (row < len(image_id)) & (image_id[np.minimum(row, len(image_id) - 1)] == caption_image)
  return row[kept], kept


def left_out(
  split: records.Split | mix.Joined, image_id: np.ndarray, bad: Mapping[int, str]
) -> LeftOut:
  """The records of a split that are not among image_id int [I], with their reasons.

  bad: record -> reason, of the records that this process read. All processes must call it.
  """
  missing = np.setdiff1d(np.arange(len(split)), image_id).tolist()
  if not missing:
    return []
  reasons: dict[str, str] = {}
  for found in processes.all_gather("bad records", bad):  # JSON: the numbers become strings
    reasons |= found
  captions = split.captions_per_record
  return [
    dict(record=i, captions=int(captions[i]), reason=reasons.get(str(i), "unknown"))
    for i in missing
  ]
