"""ZeroVL's image transforms against the original: AutoAugment, erasing, crops, blur, evaluation.

What the original draws from Python's `random` is replayed through `Replay`, draw by draw.
"""

import random
import re

import golden_files
import numpy as np
import pytest
from PIL import Image

from xmodal_jax.data import augment, auto_augment, image

MANIFEST = golden_files.manifest("zerovl")
INPUTS = golden_files.arrays("zerovl", "inputs.npz")
OUTPUTS = golden_files.arrays("zerovl", "outputs.npz")


def names(pattern: str) -> list[str]:
  """Recorded arrays whose whole name matches the pattern."""
  return [n for n in OUTPUTS if re.fullmatch(pattern, n)]


def meaning(name: str) -> str:
  return MANIFEST["arrays"][f"outputs/{name}"]["meaning"]


def numbers(pattern: str, name: str) -> list[int]:
  """What the groups of the pattern match in the description of an array."""
  return [int(n) for n in re.search(pattern, meaning(name)).groups()]


def source() -> Image.Image:
  return Image.fromarray(INPUTS["augment/image"])


class Replay:
  """A generator with our interface that draws from Python's `random` as the original does."""

  def __init__(self, name: str):
    self._random = random.Random(numbers(r"random\.seed\((\d+)\)", name)[0])
    self.random, self.uniform = self._random.random, self._random.uniform
    self.integers = self._random.randrange


def assert_pixels(got: np.ndarray, want: np.ndarray):
  """Equal bytes, which the manifest requires of programs that use Pillow, as both do."""
  assert MANIFEST["tolerances"]["augmentation uint8 pictures"].startswith("equal")
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", names(r"augment/op/.*"))
def test_operation(name):
  operation, level, sign = name.split("/")[2:]
  negative = sign == "neg"
  assert not negative or operation in auto_augment.SIGNED
  got = auto_augment.operation(source(), operation, int(level), negative)
  assert_pixels(np.asarray(got), OUTPUTS[name])


def test_every_operation_and_sign_is_covered():
  recorded = {tuple(n.split("/")[2::2]) for n in names(r"augment/op/.*")}
  signs = lambda name: ("pos", "neg") if name in auto_augment.SIGNED else ("pos",)
  assert recorded == {(n, s) for n in auto_augment.OPERATIONS for s in signs(n)}


@pytest.mark.parametrize(("name", "value"), MANIFEST["augment_magnitudes"].items())
def test_magnitude(name, value):
  operation, level = name.split("/")
  assert auto_augment.magnitude(operation, int(level)) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", names(r"augment/policy/\d+"))
def test_policy(name):
  index = int(OUTPUTS["augment/policy_index"][int(name.split("/")[-1])])
  assert Replay(name).integers(len(auto_augment.POLICY)) == index
  assert_pixels(np.asarray(auto_augment.imagenet_policy(source(), Replay(name))), OUTPUTS[name])


@pytest.mark.parametrize("name", names(r"augment/random_erasing/\d+"))
def test_erasing(name):
  """The original erases the normalised image, whose mean is 0."""
  assert "p=1 mode const" in meaning(name)
  count = tuple(numbers(r"count (\d+)\.\.(\d+)", name))
  before = INPUTS["augment/erasing_image"].transpose(1, 2, 0)
  got = augment.random_erase(before, Replay(name), 1.0, "const", count)
  np.testing.assert_array_equal(got, OUTPUTS[name].transpose(1, 2, 0))
  assert got.dtype == np.float32 and (got != before).any()


@pytest.mark.parametrize("name", names(r"augment/random_resized_crop/\d+"))
def test_crop(name, monkeypatch):
  """Of the recorded box. How boxes are drawn is tested with the crop itself."""
  params = OUTPUTS["augment/random_resized_crop/params"][int(name.split("/")[-1])]
  top, left, height, width = params.tolist()
  monkeypatch.setattr(image, "crop_box", lambda *args: (left, top, left + width, top + height))
  want = OUTPUTS[name]
  got = image.random_resized_crop(source(), None, len(want), interpolation="bilinear")
  assert_pixels(np.asarray(got), want)


@pytest.mark.parametrize("name", names(r"augment/gaussian_blur/.*"))
def test_blur(name):
  radius = float(name.split("/")[-1])
  got = augment.random_blur(source(), np.random.default_rng(0), 1.0, (radius, radius))
  assert_pixels(np.asarray(got), OUTPUTS[name])


@pytest.mark.parametrize("name", names(r"transform/\w+_norm"))
def test_evaluation_at_real_size(name):
  """Recorded are the sums of whole images, and every so many rows and columns."""
  (size, _, crop) = numbers(r"Resize\(\((\d+), ?(\d+)\)\), CenterCrop\((\d+)\)", name)
  (stride,) = numbers(r"every (\d+)th", name)
  value = float(re.search(r"mean/std ([\d.]+)", meaning(name))[1])
  transform = image.Transform(size, crop, resize="exact", interpolation="bilinear")
  tolerance = MANIFEST["tolerances"]["eval pixels (absolute, after normalisation)"]
  for i, want in enumerate(OUTPUTS[name]):
    pixels = transform(Image.fromarray(INPUTS[f"disk_eval/image_{i:02d}"]))
    got = ((pixels / 255 - value) / value).transpose(2, 0, 1)
    np.testing.assert_allclose(got[:, ::stride, ::stride], want, rtol=0, atol=tolerance)
    sums = OUTPUTS[f"{name}_sum"][i]
    np.testing.assert_allclose(got.mean((1, 2)), sums / crop**2, rtol=0, atol=tolerance)
