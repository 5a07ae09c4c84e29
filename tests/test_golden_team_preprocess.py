"""TEAM's evaluation transform, RandAugment and position tables against the original program."""

import re

import golden_files
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from xmodal_jax.data import image, rand_augment
from xmodal_jax.models import base
from xmodal_jax.models.layers import positions

MANIFEST = golden_files.manifest("team")
MEANING = str(MANIFEST["arrays"]["preprocess/randaugment_ops.npz"])


class Pixels(base.System):
  """A system's normalisation of image batches, with CLIP's statistics."""

  mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read(name: str) -> dict[str, np.ndarray]:
  return golden_files.arrays("team", "preprocess", f"{name}.npz")


@pytest.mark.parametrize("name", [n for n in read("eval_transform") if "out_" in n])
def test_evaluation_transform(name):
  """Resized by Pillow and normalised on the device; also of a greyscale image."""
  assert "exact if PIL itself is used" in MANIFEST["tolerance"]["resized images"]
  gray = re.fullmatch(r"gray_out_(\d+)", name)
  size, source = (gray[1], None) if gray else re.fullmatch(r"out_(\d+)_(.+)", name).groups()
  pixels = read("eval_transform")["gray" if gray else f"image_{source}"]
  transform = image.Transform(int(size), int(size), resize="exact")
  normalise = lambda x: np.asarray(Pixels().pixels(jnp.asarray(x[None])))[0]
  got = normalise(image.load(pixels, transform))
  want = read("eval_transform")[name].transpose(1, 2, 0)
  error = abs(got - want).max()
  if error > 1e-5:
    # One level of 255, 0.015, if a newer Pillow recorded it: it resizes some sizes first by height,
    # then by width, and rounds in between. The Pillow of the published program did the opposite.
    wide = Image.fromarray(pixels).convert("RGB").resize((pixels.shape[1], int(size)))
    assert error < 0.02 and abs(normalise(image.load(wide, transform)) - want).max() < 1e-5


@pytest.mark.parametrize("name", [n for n in read("randaugment_ops") if "/" in n])
def test_operations(name):
  assert MANIFEST["tolerance"]["uint8 augmentations"].startswith("exact")
  source, operation = name.split("/")
  original = Image.fromarray(read("randaugment_ops")[source])
  magnitude = int(re.search(r"at magnitude (\d+)", MEANING)[1])
  got = np.asarray(rand_augment.operation(original, operation, magnitude, "original")).astype(int)
  error = abs(got - read("randaugment_ops")[name])
  if operation in ("Rotate", "ShearX", "ShearY"):
    # Processors may round differently, by one level.
    assert error.max() <= 1 and error.mean() < 0.01
  else:
    assert error.max() == 0


def test_every_operation_is_covered():
  names = [n.split("/")[1] for n in read("randaugment_ops") if "/" in n]
  assert set(names) == set(rand_augment.OPERATIONS)


OUT = re.compile(r"(deit|clip)_out_(\d+)_(\d+)")


@pytest.mark.parametrize("name", [n for n in read("pos_embed_interpolation") if OUT.fullmatch(n)])
def test_position_tables(name):
  tower, old, new = OUT.fullmatch(name).groups()
  arrays = read("pos_embed_interpolation")
  table, want = arrays[f"deit_in_{old}_{new}"][0], arrays[name]
  got = positions.resize_table(table, 1 + int(new) ** 2)
  np.testing.assert_array_equal(got[0], table[0])
  np.testing.assert_allclose(got, want[0] if tower == "deit" else want, rtol=1e-5, atol=1e-5)
