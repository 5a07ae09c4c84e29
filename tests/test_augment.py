"""Augmentation: results, frequencies and generators of each operation."""

import colorsys
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from xmodal_jax import config as base
from xmodal_jax.data import augment, auto_augment, inputs, order, rand_augment
from xmodal_jax.data import image as image_lib
from xmodal_jax.models import zerovl

SIZE = 32
TRANSFORM = image_lib.Transform(SIZE, SIZE, resize="exact")
TEAM = {
  "crop": "random",
  "crop_scale": (0.2, 1.0),
  "jitter": (0.4, 0.4, 0.4, 0.1),
  "grayscale": 0.2,
  "blur": 0.5,
  "flip": 0.5,
  "rand_augment": (2, 7),
}
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
  return np.asarray(image).astype(int)


def recorded(monkeypatch, name: str) -> list[tuple]:
  """Replaces a function by one that returns the image and records its arguments."""
  calls = []
  monkeypatch.setattr(rand_augment, name, lambda im, *args: calls.append(args) or im)
  return calls


def near(count: int, n: int, p: float) -> bool:
  """Within four standard deviations of the binomial distribution."""
  return abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))


def uniform(values: np.ndarray, low: float, high: float) -> bool:
  """Kolmogorov's test at a level of about 1e-4, for at least 1000 values."""
  u = (np.sort(values) - low) / (high - low)
  steps = np.arange(len(u) + 1) / len(u)
  assert u[0] >= 0 and u[-1] <= 1
  return max(abs(u - steps[1:]).max(), abs(u - steps[:-1]).max()) < 2.2 / math.sqrt(len(u))


# ------------------------------------------------------------------------------------------ colour


@pytest.mark.parametrize("which", range(3))
def test_jitter_of_tone(which):
  """Blends with black, with the mean grey, with the image in grey."""
  image, strengths = noise(), np.eye(4)[which] * 0.4
  x = array(image)
  luma = array(image.convert("L"))[..., None]
  other = (0, int(luma.mean() + 0.5), luma)[which]
  for seed in range(20):
    got = array(augment.color_jitter(image, np.random.default_rng(seed), *strengths))
    rng = np.random.default_rng(seed)
    rng.permutation(4)
    factor = rng.uniform(0.6, 1.4)
    want = np.clip(other + factor * (x - other), 0, 255)
    assert abs(got - want).max() < 1.01  # truncated to integers


def test_factors_of_jitter(monkeypatch):
  """Uniform in [max(0, 1 - s), 1 + s], hue in [-h, h]; all 24 orders are equally likely."""
  factors, orders, current = [[], [], [], []], [], []

  def enhancer(i):
    def factory(im):
      current.append(i)
      return type("E", (), {"enhance": lambda self, f: factors[i].append(f) or im})()

    return factory

  monkeypatch.setattr(augment, "_ENHANCERS", tuple(map(enhancer, range(3))))
  turn = lambda im, f: current.append(3) or factors[3].append(f) or im
  monkeypatch.setattr(augment, "turn_hue", turn)
  rng, n = np.random.default_rng(1), 4800
  for _ in range(n):
    current.clear()
    augment.color_jitter(noise(2, 2), rng, 0.4, 1.5, 0.2, 0.1)
    orders.append(tuple(current))
  ranges = ((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))
  for values, (low, high) in zip(factors, ranges, strict=True):
    assert len(values) == n and uniform(np.array(values), low, high)
  counts = np.unique([str(o) for o in orders], return_counts=True)[1]
  assert len(counts) == 24 and all(near(c, n, 1 / 24) for c in counts)


def test_jitter_of_nothing_draws_no_change():
  image = noise()
  assert augment.color_jitter(image, np.random.default_rng(0), 0, 0, 0, 0) is image


def test_hue():
  """The hue is rotated by steps of 8-bit HSV; saturation and value are unchanged."""
  colours = np.array([[[200, 40, 40], [40, 200, 40], [40, 40, 200], [90, 90, 90]]], np.uint8)
  for turn in (1 / 3, -0.1, 0.5):
    got = array(augment.turn_hue(Image.fromarray(colours), turn))[0]
    for before, after in zip(colours[0], got, strict=True):
      h, s, v = colorsys.rgb_to_hsv(*before / 255)
      want = np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255
      assert abs(after - want).max() < 6
  image = noise()
  for turn, steps in ((0.1, 25), (-0.1, -25), (0.0999, 25), (-0.5, -127)):  # truncated towards zero
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray((np.asarray(hue).astype(int) + steps).astype(np.uint8))
    want = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(augment.turn_hue(image, turn)), np.asarray(want))


def test_grayscale_and_blur(monkeypatch):
  image, rng, n = noise(), np.random.default_rng(0), 1000
  grey = np.repeat(array(image.convert("L"))[..., None], 3, 2)
  got = [augment.random_grayscale(image, rng, 0.2) for _ in range(n)]
  changed = [array(g) for g in got if g is not image]
  assert near(len(changed), n, 0.2) and all((g == grey).all() for g in changed)

  blurred = augment.random_blur(image, np.random.default_rng(5), 1.0, (1.5, 1.5))
  want = image.filter(ImageFilter.GaussianBlur(1.5))
  np.testing.assert_array_equal(np.asarray(blurred), np.asarray(want))
  radii = []
  monkeypatch.setattr(
    augment.ImageFilter, "GaussianBlur", lambda r: radii.append(r) or ImageFilter.SMOOTH
  )
  for _ in range(4000):
    augment.random_blur(image, rng, 0.5)
  assert near(len(radii), 4000, 0.5) and uniform(np.array(radii), 0.1, 2.0)


# ------------------------------------------------------------------------------------- RandAugment


def test_frequencies_of_operations(monkeypatch):
  """Each of the ten operations is equally likely, applied and negated with probability 0.5."""
  calls = recorded(monkeypatch, "operation")
  rng, n = np.random.default_rng(0), 6000
  per_image = []
  for _ in range(n):
    before = len(calls)
    rand_augment.random_operations(noise(2, 2), rng, 2, 7)
    per_image.append(len(calls) - before)
  # Two draws with replacement, each applied with probability 0.5: 0, 1 or 2 operations.
  for count, p in ((0, 0.25), (1, 0.5), (2, 0.25)):
    assert near(per_image.count(count), n, p)
  names = [c[0] for c in calls]
  assert set(names) == set(rand_augment.OPERATIONS) and len(rand_augment.OPERATIONS) == 10
  assert all(near(names.count(name), 2 * n, 0.05) for name in rand_augment.OPERATIONS)
  assert {c[1:3] for c in calls} == {(7, "corrected")}
  for name in rand_augment.OPERATIONS:
    negative = sum(c[3] for c in calls if c[0] == name)
    assert near(negative, names.count(name), 0.5) if name in WARPS else negative == 0
  pairs = [(a[0], b[0]) for a, b in zip(calls[::2], calls[1::2], strict=False)]
  assert any(a == b for a, b in pairs)

  calls.clear()
  for _ in range(500):
    rand_augment.random_operations(noise(2, 2), rng, 3, 4, "original")
  assert near(len(calls), 1500, 0.5) and {c[1:] for c in calls} == {(4, "original", False)}


def test_autocontrast():
  """Corrected: the channel from 0 to 255. Original: past 255 unless the lowest value is 0."""
  x = np.stack([np.arange(50, 150), np.arange(100), np.full(100, 9)], -1).astype(np.uint8)[None]
  image = Image.fromarray(x)
  got = array(rand_augment.operation(image, "AutoContrast", 7))
  for channel in range(2):
    np.testing.assert_array_equal(got[0, :, channel], np.arange(100) * 255 // 99)
  np.testing.assert_array_equal(got[..., 2], 9)
  wrong = array(rand_augment.operation(image, "AutoContrast", 7, "original"))
  np.testing.assert_array_equal(wrong[..., 0], 255)
  assert abs(wrong[..., 1] - got[..., 1]).max() <= 1  # floats may be just below an integer
  np.testing.assert_array_equal(wrong[..., 2], 9)


def test_sharpness():
  """Corrected is the original without the overflow."""
  image = noise()
  x = array(image)
  total = sum(
    np.roll(x, (i, j), (0, 1)) * (5 if i == j == 0 else 1) for i in (-1, 0, 1) for j in (-1, 0, 1)
  )
  smooth = np.floor(total / 13 + 0.5).astype(np.float32)
  for magnitude in (0, 5, 7, 10):
    factor = np.float32(0.18 * magnitude + 0.1)
    sharp = (smooth + factor * (x.astype(np.float32) - smooth)).astype(int)
    sharp[[0, -1]], sharp[:, [0, -1]] = x[[0, -1]], x[:, [0, -1]]
    got = array(rand_augment.operation(image, "Sharpness", magnitude))
    wrong = array(rand_augment.operation(image, "Sharpness", magnitude, "original"))
    if magnitude in (7, 10):
      assert sharp.min() < 0 and sharp.max() > 255
    # Both truncate, so a float32 just below an integer differs by one.
    error = abs(got - np.clip(sharp, 0, 255))
    assert error.max() <= 1 and error.mean() < 0.01
    np.testing.assert_array_equal(wrong, sharp % 256)


def test_brightness_and_equalize():
  image = noise()
  got = array(rand_augment.operation(image, "Brightness", 3))
  np.testing.assert_array_equal(got, np.floor(np.minimum(array(image) * 0.64, 255)))
  got = rand_augment.operation(image, "Equalize", 3)
  np.testing.assert_array_equal(np.asarray(got), np.asarray(ImageOps.equalize(image)))


def slow_warp(x: np.ndarray, forward: np.ndarray) -> np.ndarray:
  """Bilinear in float64, with exact coordinates."""
  height, width, _ = x.shape
  inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
  out = np.empty(x.shape)
  at = lambda i, j: x[i, j] if 0 <= i < height and 0 <= j < width else np.full(3, 128.0)
  for i in range(height):
    for j in range(width):
      u, v, _ = inverse @ [j, i, 1]
      c, r = math.floor(u), math.floor(v)
      u, v = u - c, v - r
      top, bottom = (at(k, c) * (1 - u) + at(k, c + 1) * u for k in (r, r + 1))
      out[i, j] = top * (1 - v) + bottom * v
  return out


@pytest.mark.parametrize("name", WARPS)
@pytest.mark.parametrize("negative", [False, True])
def test_warps(name, negative):
  """Against float64 arithmetic, on a smooth image: coordinates are rounded to 1/32 pixel."""
  width, height = 37, 24
  i, j = np.mgrid[:height, :width]
  x = np.stack([4 * i + 2 * j, 255 - 5 * i, 40 + 5 * j], -1).clip(0, 255)
  sign = -1 if negative else 1
  a, (cx, cy) = math.radians(12 * sign), (width / 2, height / 2)
  shift = np.array([[1, 0, cx], [0, 1, cy], [0, 0, 1]])
  turn = np.array([[math.cos(a), math.sin(a), 0], [-math.sin(a), math.cos(a), 0], [0, 0, 1]])
  forward = {
    "ShearX": np.array([[1, 0.12 * sign, 0], [0, 1, 0]]),
    "ShearY": np.array([[1, 0, 0], [0.12 * sign, 1, 0]]),
    "TranslateX": np.array([[1, 0, -4 * sign], [0, 1, 0]]),
    "TranslateY": np.array([[1, 0, 0], [0, 1, -4 * sign]]),
    "Rotate": (shift @ turn @ np.linalg.inv(shift))[:2],
  }[name]
  image = Image.fromarray(x.astype(np.uint8))
  got = array(rand_augment.operation(image, name, 4, negative=negative))
  want = slow_warp(x, forward)
  error = abs(got - want)
  # 5 levels per pixel inside; at the edge up to 128 levels per pixel.
  inside = slow_warp(np.full(x.shape, 255.0), forward)[..., 0] == 255
  assert inside.mean() > 0.6 and (~inside).any()
  assert error[inside].max() < 0.9 and error.max() < 5
  again = rand_augment.operation(image, name, 4, "original", negative)
  np.testing.assert_array_equal(np.asarray(again), got)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (1, 30), (300, 2)])
@pytest.mark.parametrize("name", list(rand_augment.OPERATIONS))
def test_images_of_any_size(name, size):
  for magnitude in (0, 10):
    got = rand_augment.operation(noise(*size), name, magnitude)
    assert got.size == size and got.mode == "RGB"


def test_rotation_is_counter_clockwise():
  x = np.full((31, 31, 3), rand_augment.FILL, np.uint8)
  x[15, 25:] = 255  # at three o'clock
  got = array(rand_augment.operation(Image.fromarray(x), "Rotate", 10))[..., 0]
  rows, columns = np.nonzero(got > 200)
  assert rows.max() < 15 and columns.min() > 15  # up, on the right


# ------------------------------------------------------------------------------------- AutoAugment


def test_frequencies_of_the_policy(monkeypatch):
  """Each of the 25 sub-policies is equally likely; operations have their probabilities."""
  calls = []
  monkeypatch.setattr(auto_augment, "operation", lambda im, *args: calls.append(args) or im)
  assert len(auto_augment.POLICY) == 25
  expected, n, rng = {}, 25000, np.random.default_rng(0)
  for sub_policy in auto_augment.POLICY:
    for probability, *op in sub_policy:
      expected[tuple(op)] = expected.get(tuple(op), 0) + probability / 25
  for _ in range(n):
    auto_augment.imagenet_policy(noise(2, 2), rng)
  for op, p in expected.items():
    mine = [c for c in calls if c[:2] == op]
    assert near(len(mine), n, p)
    negative = sum(c[2] for c in mine)
    assert near(negative, len(mine), 0.5) if op[0] in auto_augment.SIGNED else negative == 0
  assert len(calls) == sum(c[:2] in expected for c in calls)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (300, 2)])
@pytest.mark.parametrize("name", list(auto_augment.OPERATIONS))
def test_policy_on_images_of_any_size(name, size):
  for level in range(auto_augment.LEVELS):
    for negative in (False, True):
      got = auto_augment.operation(noise(*size), name, level, negative)
      assert got.size == size and got.mode == "RGB"


# ----------------------------------------------------------------------------------------- erasing


def test_erased_area_and_aspect():
  """One box: area, log of the aspect ratio and position have the documented distributions."""
  side, n, rng = 200, 3000, np.random.default_rng(0)
  blank = np.zeros((side, side, 3), np.float32)
  areas, aspects, places = [], [], []
  for _ in range(n):
    got = augment.random_erase(blank, rng, 1.0, "const", mean=(1, 1, 1))[..., 0]
    rows, columns = np.flatnonzero(got.any(1)), np.flatnonzero(got.any(0))
    h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert got.sum() == h * w
    areas.append(h * w / side**2)
    aspects.append(math.log(h / w))
    places.append([rows[0] / (side - h), columns[0] / (side - w)])
  assert not blank.any()
  # Every aspect ratio fits a box of this area; rounding to pixels slightly exceeds the bounds.
  fit, bound = np.array(areas) < 0.25, math.log(1 / 0.3)
  assert uniform(np.clip(np.array(areas)[fit], 0.02, 0.25), 0.02, 0.25)
  assert uniform(np.clip(np.array(aspects)[fit], -bound, bound), -bound, bound)
  for place in np.transpose(places):
    assert place.min() == 0 and place.max() == 1 and abs(place.mean() - 0.5) < 0.02


def test_erasing_is_as_frequent_as_asked():
  blank, rng, n = np.zeros((60, 60, 3), np.uint8), np.random.default_rng(1), 2000
  erase = lambda p, count: augment.random_erase(blank, rng, p, "const", count, (9, 9, 9))
  changed = [g for g in (erase(0.3, (1, 1)) for _ in range(n)) if g is not blank]
  assert near(len(changed), n, 0.3) and all((g == 9).any() for g in changed)
  # Five boxes have the total area of one, and overlap a little.
  areas = [(erase(1.0, (5, 5)) == 9).mean() for _ in range(400)]
  assert 0.12 < np.mean(areas) < (0.02 + 1 / 3) / 2 and max(areas) < 1 / 3
  # No box is as high or as wide as the image, not even in tiny images.
  few = np.zeros((3, 3, 3), np.uint8)
  tiny = [augment.random_erase(few, rng, 1.0, "const", mean=(9, 9, 9))[..., 0] for _ in range(400)]
  assert {int(np.count_nonzero(t)) for t in tiny} == {0, 1, 2, 4}


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erased_to_what_normalises_to_noise(mode):
  """Normalised, erased pixels are standard normal draws or 0; the others are unchanged."""
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  image, values = Image.new("RGB", (64, 64), (255, 0, 255)), []
  options = {"erase": 1.0, "erase_mode": mode, "erase_count": (2, 3), "mean": mean, "std": std}
  made = augment.build(image_lib.Transform(64, 64), **options)
  rng, before = np.random.default_rng(0), np.asarray(image)
  for _ in range(60):
    got = made(image, rng)
    assert got.dtype == np.uint8 and got.shape == (64, 64, 3)
    hit = (got != before).any(-1)
    assert 0.01 < hit.mean() < 0.4
    box = (got[hit] / 255 - mean) / std
    colours = len(np.unique(got[hit], axis=0))
    assert {"pixel": colours > 50, "rand": colours <= 3, "const": colours == 1}[mode]
    values.append(box)
  values = np.concatenate(values)
  if mode == "const":
    assert abs(values).max() < 0.5 / 255 / 0.22
  elif mode == "pixel":  # clipped to [0, 255], about two deviations away
    assert (abs(np.median(values, 0)) < 0.05).all()
    low, high = np.percentile(values, [15.87, 84.13], axis=0)
    np.testing.assert_allclose([low, high], [[-1] * 3, [1] * 3], atol=0.05)


# ---------------------------------------------------------------------------------------- together


def build(**kw) -> image_lib.Augment:
  return augment.build(TRANSFORM, **{**TEAM, **kw})


def test_nothing_on():
  assert augment.build(TRANSFORM) is None
  assert augment.build(TRANSFORM, jitter=(1, 1, 1, 0.5), jitter_p=0) is None
  assert augment.build(TRANSFORM, rand_augment=(0, 7)) is None


@pytest.mark.parametrize("crop", ["random", "center"])
def test_the_sample_alone_decides(crop):
  image, made = noise(60, 50), build(crop=crop)
  draw = lambda *at: made(image, order.generator(*at))
  first = draw(3, 1, 2)
  assert first.dtype == np.uint8 and first.shape == (SIZE, SIZE, 3)
  np.random.seed(0)  # noqa: NPY002 - neither the global generator
  draw(4, 1, 2)  # nor other samples have an influence
  np.testing.assert_array_equal(draw(3, 1, 2), first)
  np.testing.assert_array_equal(build(crop=crop)(image, order.generator(3, 1, 2)), first)
  others = [draw(p, s, e) for p, s, e in ((2, 1, 2), (3, 0, 2), (3, 1, 0), (9, 9, 9))]
  assert all((other != first).any() for other in others)


def test_crop_and_flip():
  image = noise(30, 20)
  whole = {"crop": "random", "crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}  # no crop
  resized = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
  draw = lambda flip: augment.build(TRANSFORM, **whole, flip=flip)(image, np.random.default_rng(0))
  np.testing.assert_array_equal(draw(0.0), resized)
  np.testing.assert_array_equal(draw(1.0), resized[:, ::-1])
  rng, made = np.random.default_rng(0), augment.build(TRANSFORM, flip=0.5)
  flips = sum((made(image, rng) != resized).any() for _ in range(400))
  assert near(flips, 400, 0.5)


def test_exif_comes_first():
  image = noise(30, 20)
  image.getexif()[0x0112] = 6
  whole = {"crop": "random", "crop_scale": (1.0, 1.0), "crop_ratio": (2 / 3, 2 / 3)}
  want = np.asarray(image.transpose(Image.Transpose.ROTATE_270).resize((SIZE, SIZE)))
  transform = image_lib.Transform(SIZE, SIZE, resize="exact", exif=True)
  for options in (whole, {"flip": 1.0}):
    got = augment.build(transform, **options)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(got[:, ::-1] if "flip" in options else got, want)


def test_order_and_frequencies(monkeypatch):
  """Crop, jitter 0.8, grey, blur, flip, RandAugment, each on the output of the one before."""
  seen = []
  step = lambda name: lambda im, *args, **kw: seen.append((name, *args[1:], kw)) or im
  for name in ("color_jitter", "random_grayscale", "random_blur"):
    monkeypatch.setattr(augment, name, step(name))
  monkeypatch.setattr(rand_augment, "random_operations", step("random_operations"))
  for name in ("random_resized_crop", "random_flip"):
    monkeypatch.setattr(image_lib, name, step(name))
  made, rng, jitters, n = build(), np.random.default_rng(0), 0, 2000
  for _ in range(n):
    seen.clear()
    made(noise(), rng)
    names = [s[0] for s in seen]
    jittered = names[1] == "color_jitter"
    jitters += jittered
    rest = ["random_grayscale", "random_blur", "random_flip", "random_operations"]
    assert names == ["random_resized_crop", *["color_jitter"] * jittered, *rest]
    assert not jittered or seen[1][1:5] == (0.4, 0.4, 0.4, 0.1)
  assert near(jitters, n, 0.8)
  options = {s[0]: s[-1] for s in seen}
  crop = {"size": SIZE, "scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": "bicubic"}
  assert options["random_resized_crop"] == crop
  assert options["random_grayscale"] == {"probability": 0.2}
  assert options["random_blur"] == {"probability": 0.5, "radius": (0.1, 2.0)}
  assert options["random_flip"] == {"probability": 0.5}
  assert options["random_operations"] == {"n": 2, "magnitude": 7, "mode": "corrected"}


def test_auto_augment_and_erasing_come_last(monkeypatch):
  seen = []
  step = lambda name: lambda im, *args, **kw: seen.append(name) or im
  monkeypatch.setattr(rand_augment, "random_operations", step("random"))
  monkeypatch.setattr(auto_augment, "imagenet_policy", step("auto"))
  monkeypatch.setattr(augment, "random_erase", step("erase"))
  statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
  build(auto_augment="imagenet", erase=0.1, **statistics)(noise(), np.random.default_rng(0))
  assert seen == ["random", "auto", "erase"]
  for alone, name in (({"auto_augment": "imagenet"}, "auto"), ({"erase": 0.1}, "erase")):
    seen.clear()
    got = augment.build(TRANSFORM, **alone, **statistics)(noise(), np.random.default_rng(0))
    assert seen == [name]
    np.testing.assert_array_equal(got, TRANSFORM(noise()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_every_mode_of_image(mode, crop):
  always = {"jitter_p": 1.0, "grayscale": 0.5, "blur": 1.0, "rand_augment": (8, 10)}
  always |= {"auto_augment": "imagenet", "erase": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
  made = build(crop=crop, **always)
  got = made(noise().convert(mode), np.random.default_rng(0))
  assert got.shape == (SIZE, SIZE, 3) and got.dtype == np.uint8


BAD = [
  ("crop", "middle", "crop is 'middle'; there are 'center' and 'random'"),
  ("crop_scale", (0.0, 1.0), r"crop_scale is \(0.0, 1.0\); expected 2 numbers above 0 up to 1"),
  ("crop_scale", (0.9, 0.5), "crop_scale .* the smaller first"),
  ("crop_scale", (0.5, 1.5), "crop_scale .* up to 1"),
  ("crop_ratio", (0.0, 1.0), "crop_ratio .* above 0, the"),
  ("jitter", (0.1, 0.1, 0.1), "jitter is .* expected 4 numbers from 0"),
  ("jitter", (-0.1, 0.1, 0.1, 0.1), "jitter is"),
  ("jitter", (float("nan"), 0.1, 0.1, 0.1), "jitter is"),
  ("jitter", (0.1, 0.1, 0.1, 0.6), "jitter is .* the hue, is at most 0.5"),
  ("jitter_p", 1.1, "jitter_p is 1.1; expected a probability"),
  ("grayscale", -0.1, "grayscale is -0.1"),
  ("blur", 2.0, "blur is 2.0"),
  ("blur_radius", (2.0, 0.1), "blur_radius is"),
  ("flip", float("nan"), "flip is nan"),
  ("rand_augment", (-1, 7), r"rand_augment is \(-1, 7\); expected \(operations, magnitude\)"),
  ("rand_augment", (2, 6.5), "rand_augment is"),
  ("rand_augment", (2,), "rand_augment is"),
  ("rand_augment", (2, 11), "rand_augment has magnitude 11; expected 0 to 10"),
  ("rand_augment_mode", "old", "rand_augment_mode is 'old'; there are 'corrected' and 'original'"),
  ("auto_augment", "cifar", "auto_augment is 'cifar'; there are 'imagenet', and '' for none"),
  ("erase", 1.5, "erase is 1.5; expected a probability"),
  ("erase", 0.5, "erase is 0.5, which needs the mean and std"),
  ("erase_mode", "mean", "erase_mode is 'mean'; there are 'pixel', 'rand' and 'const'"),
  ("erase_count", (0, 1), r"erase_count is \(0, 1\); expected 2 numbers from 1, the smaller first"),
  ("erase_count", (2, 1), "erase_count .* the smaller first"),
  ("erase_count", (1, 1.5), r"erase_count is \(1, 1.5\); expected \(fewest, most\) boxes"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_bad_values(key, value, message):
  with pytest.raises(ValueError, match=message):
    build(**{key: value})


def test_config():
  """The keys of config.data are the arguments of `build`, all off by default."""
  c = base.base()
  data = c.data
  assert inputs._augment(data, c.model, TRANSFORM) is None
  for key, value in TEAM.items():
    assert type(value) is type(data[key])
    data[key] = value
  image = noise()
  got = inputs._augment(data, c.model, TRANSFORM)(image, np.random.default_rng(7))
  np.testing.assert_array_equal(got, build()(image, np.random.default_rng(7)))
  data.rand_augment_mode = "old"
  with pytest.raises(ValueError, match=r"^config\.data\.rand_augment_mode is 'old'"):
    inputs._augment(data, c.model, TRANSFORM)


@pytest.mark.parametrize("own", [False, True])
def test_statistics_are_the_models(own):
  """Erased boxes have the model's mean colour: the class's, or that of its config section."""
  import tiny

  c = tiny.config("none", data__erase=1.0, data__erase_mode="const")
  mean = (0.48145466, 0.4578275, 0.40821073)
  if own:
    mean = (0.1, 0.2, 0.3)
    c.model = zerovl.preset("100m") | {"mean": mean}
  image = Image.new("RGB", (SIZE, SIZE), (255, 0, 255))
  augmented = inputs._augment(c.data, c.model, TRANSFORM)
  got = augmented(image, np.random.default_rng(0))
  (colour,) = np.unique(got[(got != np.asarray(image)).any(-1)], axis=0).tolist()
  assert colour == [round(255 * m) for m in mean]
