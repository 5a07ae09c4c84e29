"""The embedded `shapes` dataset: rendered scenes of coloured shapes with paraphrased captions.

A scene has 2 or 3 objects of 8 colours, 5 shapes and 2 sizes, in different cells of a 3 x 3 grid.
All scenes of all splits differ. Each scene has five captions with different wordings and orders of
the objects; some omit sizes, or give relations instead of places. It also has regions like those of
a detector, with features of their pixels: first its objects, then some background. Everything is a
function of the seed.
"""

import io
import math
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from xmodal_jax.data.preparing import builder, publish

NAME, VERSION = "shapes", "1.1.0"  # to be changed with the contents, see `ensure`
SIZES = {"train": 4000, "val": 500, "test": 500}  # images of each split
WIDTH = 96
_CELL, _SCALE = WIDTH // 3, 2  # drawn at twice the size and averaged, for smooth edges
_CROP = 8  # a region's pixels are resized to 8 x 8
REGION_DIM = 3 * _CROP * _CROP + 6 + 7
_BACKGROUND = (2, 4)  # least and largest number of regions without an object
MAX_REGIONS = 3 + _BACKGROUND[1]

COLOURS = {
  "red": (208, 40, 38),
  "orange": (238, 130, 22),
  "yellow": (236, 210, 40),
  "green": (48, 152, 62),
  "blue": (38, 78, 196),
  "purple": (130, 52, 160),
  "pink": (242, 140, 182),
  "brown": (118, 72, 38),
}
SHAPES = {
  "circle": ("circle", "disc", "ball"),
  "square": ("square", "box", "block"),
  "triangle": ("triangle",),
  "star": ("star",),
  "cross": ("cross", "plus"),
}
_SIZE_WORDS = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
_RADIUS = {"large": 13.0, "small": 7.5}
_ROWS = (("top", "upper"), ("middle", "center"), ("bottom", "lower"))
_COLUMNS = ("left", "center", "right")

# colour, shape, size: words; cell: 0..8, row by row
Object = tuple[str, str, str, int]
Scene = tuple[Object, ...]


def scenes(seed: int, count: int) -> list[Scene]:
  """`count` different scenes; their objects are in the order of the cells."""
  rng, seen = np.random.default_rng(seed), {}
  kinds = tuple(COLOURS), tuple(SHAPES), tuple(_RADIUS)
  while len(seen) < count:
    cells = np.argsort(rng.random(9))[: 2 + int(rng.random() < 0.5)]
    scene = tuple((*(_choice(rng, words) for words in kinds), int(c)) for c in np.sort(cells))
    seen[scene] = None
  return list(seen)


def _outline(shape: str, turn: float) -> np.ndarray:
  """Corners [N, 2] of a polygon around the origin; all shapes have about the same area."""
  if shape == "cross":
    a, b = 1.0, 0.36
    xy = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
    xy += [(b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
    points = np.array(xy)
  else:
    corners, radii, start = {
      "square": (4, (1.15,), 45.0),
      "triangle": (3, (1.2,), -90.0),
      "star": (10, (1.2, 0.5), -90.0),
    }[shape]
    angles = np.radians(start + 360.0 / corners * np.arange(corners))
    radius = np.resize(radii, corners)
    points = np.stack([np.cos(angles) * radius, np.sin(angles) * radius], 1)
  c, s = math.cos(turn), math.sin(turn)
  return points @ np.array([[c, s], [-s, c]])


def render(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
  """A scene -> (RGB image of 96 x 96, boxes float32 [R, 4] as x1 y1 x2 y2)."""
  uniform = lambda low, high, *shape: low + (high - low) * rng.random(shape)
  # The background is a slightly tinted light grey, darker towards one side.
  base = uniform(150, 225) + uniform(-8, 8, 3)
  slope, angle = uniform(0, 24), uniform(0, 2 * math.pi)
  axis = np.linspace(-0.5, 0.5, WIDTH)
  ramp = slope * (axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle))
  pixels = np.clip(base + ramp[..., None], 0, 255).astype(np.uint8)  # [H, W, 3]
  image = Image.fromarray(pixels).resize((WIDTH * _SCALE,) * 2, Image.Resampling.NEAREST)
  draw, boxes = ImageDraw.Draw(image), []
  for colour, shape, size, cell in scene:
    radius = _RADIUS[size] * float(uniform(0.92, 1.08))
    play = max(_CELL / 2 - radius - 1, 0.0)
    centre = np.array([cell % 3, cell // 3]) * _CELL + _CELL / 2 + uniform(-play, play, 2)
    fill = tuple(int(v) for v in np.clip(COLOURS[colour] + uniform(-18, 18, 3), 0, 255))
    turn = float(uniform(-0.3, 0.3))
    if shape == "circle":
      low, high = centre - radius, centre + radius
      draw.ellipse([*(low * _SCALE), *(high * _SCALE)], fill=fill)
    else:
      points = centre + radius * _outline(shape, turn)
      low, high = points.min(0), points.max(0)
      draw.polygon([tuple(p) for p in points * _SCALE], fill=fill)
    # As a detector's box, it is not exact.
    box = np.concatenate([low, high]) + uniform(-1, 1, 4)
    boxes.append(np.clip(box, 0, WIDTH))
  return image.reduce(_SCALE), np.array(boxes, np.float32)


def background_boxes(scene: Scene, rng: np.random.Generator) -> np.ndarray:
  """Boxes float32 [N, 4], N from 2 to 4, in different cells without objects: false positives."""
  empty = np.setdiff1d(np.arange(9), [item[3] for item in scene])
  count = rng.integers(_BACKGROUND[0], _BACKGROUND[1], endpoint=True)
  cells = rng.permutation(empty)[:count]
  corner = np.stack([cells % 3, cells // 3], 1) * _CELL  # [N, 2]
  size = rng.uniform(_CELL / 3, _CELL, (count, 2))
  low = corner + rng.random((count, 2)) * (_CELL - size)
  return np.concatenate([low, low + size], 1).astype(np.float32)


def region_features(image: Image.Image, boxes: np.ndarray) -> np.ndarray:
  """RGB image, boxes [R, 4] -> float32 [R, REGION_DIM].

  For each box: its pixels at 8 x 8 in [-1, 1], mean and standard deviation of each channel, and
  x1 y1 x2 y2 w h and area as fractions of the image.
  """
  out = []
  for box in boxes:
    crop = image.resize((_CROP, _CROP), Image.Resampling.BILINEAR, box=tuple(map(float, box)))
    pixels = np.asarray(crop, np.float32) / 127.5 - 1  # [8, 8, 3]
    x1, y1, x2, y2 = box / np.float32(WIDTH)
    w, h = x2 - x1, y2 - y1
    colour = np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))])
    geometry = np.array([x1, y1, x2, y2, w, h, w * h], np.float32)
    out.append(np.concatenate([pixels.ravel(), colour, geometry]))
  return np.array(out, np.float32)


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
  """Five captions of a scene."""
  return [f(scene, rng) for f in (_listing, _there_is, _places_first, _from_anchor, _related)]


def _choice(rng: np.random.Generator, options: tuple) -> str:
  return options[int(rng.random() * len(options))]


def _shuffled(scene: Scene, rng: np.random.Generator) -> list[Object]:
  return [scene[i] for i in np.argsort(rng.random(len(scene)))]


def _noun(item: Object, rng: np.random.Generator, size: bool = True) -> str:
  colour, shape, extent, _ = item
  words = [_choice(rng, _SIZE_WORDS[extent])] if size else []
  return " ".join([*words, colour, _choice(rng, SHAPES[shape])])


def _article(noun: str) -> str:
  return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _place(cell: int, rng: np.random.Generator) -> str:
  row, column = cell // 3, _COLUMNS[cell % 3]
  if cell == 4:
    return _choice(rng, ("in the middle", "in the center"))
  if row == 1:
    return _choice(rng, (f"on the {column} side", f"at the middle {column}"))
  if cell % 3 == 1:
    return _choice(rng, (f"at the {_ROWS[row][0]} center", f"in the {_ROWS[row][1]} middle"))
  corner = f"in the {_ROWS[row][1]} {column} corner"
  return _choice(rng, (f"at the {_ROWS[row][0]} {column}", corner))


def _relation(cell: int, to: int, rng: np.random.Generator) -> str:
  dx, dy = cell % 3 - to % 3, cell // 3 - to // 3
  across = _choice(
    rng, ("left of", "to the left of") if dx < 0 else ("right of", "to the right of")
  )
  along = _choice(
    rng, ("above", "over", "higher than") if dy < 0 else ("below", "under", "beneath", "lower than")
  )
  if not dy:
    return across
  if not dx:
    return along
  return f"{'above' if dy < 0 else 'below'} and {across}"


def _joined(parts: list[str]) -> str:
  return ", ".join(parts[:-1]) + " and " + parts[-1]


def _listing(scene: Scene, rng: np.random.Generator) -> str:
  return _joined([f"{_article(_noun(o, rng))} {_place(o[3], rng)}" for o in _shuffled(scene, rng)])


def _there_is(scene: Scene, rng: np.random.Generator) -> str:
  has = ("there are", "we see", "the image shows", "this scene has")
  start = _choice(rng, (*has, "a picture of", "a drawing with"))
  count = ("two", "three")[len(scene) - 2]
  parts = [f"{_article(_noun(o, rng))} {_place(o[3], rng)}" for o in _shuffled(scene, rng)]
  return (
    f"{start} {count} {_choice(rng, ('shapes', 'objects', 'figures', 'things'))}: {_joined(parts)}"
  )


def _places_first(scene: Scene, rng: np.random.Generator) -> str:
  verbs = ("is", "sits", "lies", "stands", "appears", "we find")
  parts = [
    f"{_place(o[3], rng)} {_choice(rng, verbs)} {_article(_noun(o, rng))}"
    for o in _shuffled(scene, rng)
  ]
  return "; ".join(parts)


def _from_anchor(scene: Scene, rng: np.random.Generator) -> str:
  """One object with its place, the others with their relations to it."""
  anchor, *others = _shuffled(scene, rng)
  parts = [f"{_article(_noun(o, rng))} {_relation(o[3], anchor[3], rng)} it" for o in others]
  text = " and ".join(parts)
  return f"{_article(_noun(anchor, rng))} {_place(anchor[3], rng)} with {text}"


def _related(scene: Scene, rng: np.random.Generator) -> str:
  """No sizes; the first object with its relation to the second, the others with their places."""
  first, *others = _shuffled(scene, rng)
  nouns = [f"the {_noun(o, rng, size=False)} {_place(o[3], rng)}" for o in others]
  noun = _noun(first, rng, size=False)
  text = f"the {noun} is {_relation(first[3], others[0][3], rng)} {nouns[0]}"
  near = ("and", "beside", "not far from")
  return text + "".join(f", {_choice(rng, near)} {n}" for n in nouns[1:])


def examples(seed: int, sizes: Mapping[str, int]) -> dict[str, Iterator[builder.Example]]:
  """{split: examples for `builder.write_dataset`}; sizes: images of each split."""
  found, start, out = scenes(seed, sum(sizes.values())), 0, {}
  for split, size in sizes.items():
    ids = range(start, start + size)
    out[split] = (_example(found[i], seed, i, split) for i in ids)
    start += size
  return out


def _example(scene: Scene, seed: int, index: int, split: str) -> builder.Example:
  rng = np.random.default_rng((seed, index))
  image, boxes = render(scene, rng)
  data = io.BytesIO()
  image.save(
    data, "JPEG", quality=95, subsampling=0
  )  # no subsampling: it blurs the colours of small objects
  texts = captions(scene, rng)
  # From a separate generator, so that images and captions are as in version 1.0.0 without regions.
  boxes = np.concatenate([boxes, background_boxes(scene, np.random.default_rng((seed, index, 1)))])
  return {
    "image": data.getvalue(),
    "image_id": index,
    "filename": f"{split}_{index:05d}.jpg",
    "captions": texts,
    "caption_ids": range(index * len(texts), (index + 1) * len(texts)),
    "regions": region_features(image, boxes),
    "boxes": boxes,
    "image_width": WIDTH,
    "image_height": WIDTH,
  }


def write(
  out_dir: epath.PathLike,
  *,
  seed: int = 0,
  sizes: Mapping[str, int] | None = None,
  name: str = NAME,
  version: str = VERSION,
  overwrite: bool = False,
) -> epath.Path:
  """Renders the dataset into out_dir/name/version and returns that folder."""
  sizes = dict(sizes or SIZES)
  return builder.write_dataset(
    out_dir,
    name,
    version,
    examples(seed, sizes),
    description="Rendered scenes of two or three coloured shapes, five captions each.",
    sources={"source": "shapes", "seed": seed},
    region_dim=REGION_DIM,
    overwrite=overwrite,
  )


def ensure(data_dir: epath.PathLike) -> epath.Path:
  """The folder of the dataset in data_dir, rendered first (10 s) if it does not exist.

  Folders of earlier versions are left alone. Several processes may call it at the same time: each
  renders the dataset, the first to finish publishes it, and all return that folder.
  """
  path = publish.dataset_dir(data_dir, NAME, VERSION)
  if not (path / "dataset_info.json").exists():
    try:
      write(data_dir)
    except publish.OutputExistsError:
      if not (path / "dataset_info.json").exists():
        raise
  return path
