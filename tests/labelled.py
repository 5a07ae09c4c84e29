"""A small dataset of labelled images, and random parameters that distinguish them."""

import functools
import io
import pathlib

import jax
import numpy as np
from flax import nnx

from xmodal_jax.data.preparing import builder, shapes

NAMES = ("circle", "cross", "square", "star", "triangle")
COLOURS = ("red", "yellow", "green", "blue", "purple")
COUNT = {"train": 70, "val": 21}  # not multiples of the batch sizes


def encoded_image(i: int, label: int) -> bytes:
  """One large shape in the middle, whose colour depends on the class: easy to classify."""
  scene = ((COLOURS[label], NAMES[label], "large", 4),)
  data = io.BytesIO()
  shapes.render(scene, np.random.default_rng(i))[0].save(data, "PNG")
  return data.getvalue()


def write(folder: pathlib.Path, names=NAMES, count=COUNT, last=None) -> str:
  """last: replaces the label of the last training image."""

  def examples(split, first):
    for i in range(first, first + count[split]):
      label = i % len(names)
      given = last if last is not None and split == "train" and i == count[split] - 1 else label
      yield {
        "image": encoded_image(i, label), "image_id": i, "filename": f"{i}.png", "captions": (),
        "label": given,
      }  # fmt: skip

  splits = {"train": examples("train", 0), "val": examples("val", count["train"])}
  return str(
    builder.write_dataset(
      folder, "labelled", "1.0.0", splits, description="One shape each.", class_names=names
    )
  )


def weights(built, seed=0):
  """Random parameters and statistics, drawn on the host, with which embeddings of images differ."""
  rng = np.random.default_rng(seed)

  def draw(path, v):
    norm = path[-1].key == "scale"
    x = norm + (0.1 if norm else 0.3) * rng.standard_normal(v.shape)
    return np.asarray(x, np.float32)

  draws = functools.partial(jax.tree_util.tree_map_with_path, draw)
  return tuple(draws(nnx.to_pure_dict(s)) for s in (built.params, built.stats))
