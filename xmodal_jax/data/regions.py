"""Region features of an image, padded to one shape."""

import dataclasses

import numpy as np

from xmodal_jax.data.records import Record
from xmodal_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Regions:
  """Arrays of a row of a model of regions: regions float32 [R, F], boxes float32 [R, 4] as
  fractions of the image's width and height, region_mask bool [R].

  count: R; rows with fewer regions are padded with zeros. width: F. truncate: uses the first R
  regions of an image with more; otherwise it is an error.
  """

  count: int
  width: int
  truncate: bool = False

  def blanks(self) -> list[np.ndarray]:
    """The three arrays without any region."""
    return [
      np.zeros((self.count, self.width), np.float32),
      np.zeros((self.count, 4), np.float32),
      np.zeros(self.count, bool),
    ]

  def arrays(self, content: Record) -> list[np.ndarray]:
    """The three arrays of a record. Raises ConfigError if it has none that fit."""
    if content.regions is None or content.boxes is None or content.size is None:
      raise ConfigError(
        "no regions with boxes and the size of the image, and config.data.regions asks for them; "
        "write the dataset with `python tools/prepare_data.py regions`"
      )
    n, width = content.regions.shape
    if width != self.width or len(content.boxes) != n:
      raise ConfigError(
        f"{n} regions of {width} numbers with {len(content.boxes)} boxes, expected {self.width} "
        "numbers and a box each; write the dataset again, or set config.model.image.features"
      )
    if n > self.count and not self.truncate:
      raise ConfigError(
        f"{n} regions, more than config.data.regions = {self.count}; raise it, or set "
        "config.data.truncate_regions to use the first ones"
      )
    n = min(n, self.count)
    features, boxes, mask = self.blanks()
    features[:n], mask[:n] = content.regions[:n], True
    boxes[:n] = content.boxes[:n] / np.array(content.size * 2, np.float32)
    return [features, boxes, mask]
