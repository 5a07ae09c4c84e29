"""What derive_golden.py and its parts share: a copied golden set, evaluation in numpy, cuts."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
from PIL import Image

RECALL_AT = (1, 5, 10)


class Tree:
  """A copy of the golden set of one system, whose files are read, changed and written back."""

  def __init__(self, source: pathlib.Path, out: pathlib.Path, seed: int):
    shutil.copytree(source, out)
    self.root, self.rng = out, np.random.default_rng(seed)
    self.manifest = self.read_json("manifest.json")

  def has(self, *names: str) -> bool:
    return all((self.root / name).exists() for name in names)

  def read_json(self, name: str):
    return json.loads((self.root / name).read_text(encoding="utf-8"))

  def write_json(self, name: str, value) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    (self.root / name).write_text(text, encoding="utf-8")

  def arrays(self, name: str) -> dict[str, np.ndarray]:
    with np.load(self.root / name) as f:
      return dict(f)

  def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(self.root / name, **arrays)

  def some(self, n: int, size: int) -> np.ndarray:
    """n of range(size), ascending."""
    return np.sort(self.rng.permutation(size)[:n])


# --- evaluation in plain numpy --------------------------------------------------------------------


def order(scores: np.ndarray) -> np.ndarray:
  """Candidates of each row from best to worst; equal ones with the higher position first."""
  flipped = np.argsort(-scores[:, ::-1], axis=1, kind="stable")
  return scores.shape[1] - 1 - flipped


def ranks(scores: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
  """0-based rank of the first positive of each image and each caption. scores [I, T]."""
  out = {"i2t": [], "t2i": []}
  for i, row in enumerate(order(scores)):
    out["i2t"].append(min(np.flatnonzero(owner[row] == i)))
  for t, row in enumerate(order(scores.T)):
    out["t2i"].append(list(row).index(owner[t]))
  return {side: np.array(values) for side, values in out.items()}


def recall(found: np.ndarray, k: int) -> float:
  return 100 * float(np.mean(found < k))


class Cut:
  """Which images and captions of an evaluation set are kept, and which captions are repeated.

  images: kept positions, ascending. captions: positions of the kept captions. source: for each kept
  caption the position of the caption that replaces it. owner: the new image of each kept caption.
  """

  def __init__(self, owner: np.ndarray, images: np.ndarray, per_image: int, repeats: list):
    self.images = np.asarray(images)
    kept = [np.flatnonzero(owner == i)[:per_image] for i in self.images]
    self.captions = np.concatenate(kept)
    self.owner = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    self.source = self.captions.copy()
    for to, of in repeats:
      self.source[to] = self.captions[of]

  def scores(self, scores: np.ndarray) -> np.ndarray:
    return scores[np.ix_(self.images, self.source)]


def a_cut(tree: Tree, owner: np.ndarray, n_images: int, per_image: int, repeat: int = 2) -> Cut:
  """Keeps n_images; captions of some images become copies of a caption of another image."""
  images = tree.some(n_images, owner.max() + 1)
  cut = Cut(owner, images, per_image, [])
  firsts = [np.flatnonzero(cut.owner == i)[0] for i in tree.rng.permutation(n_images)]
  repeats = list(zip(firsts[:repeat], firsts[repeat : 2 * repeat], strict=True))
  return Cut(owner, images, per_image, repeats)


def even_owner(scores: np.ndarray) -> np.ndarray:
  return np.arange(scores.shape[1]) // (scores.shape[1] // len(scores))


def fewer(n: int, share: float = 0.75) -> int:
  """A smaller size, at least 2."""
  return max(2, int(n * share))


def keep(arrays: dict, wanted: Callable[[str], bool]) -> dict:
  return {k: v for k, v in arrays.items() if wanted(k)}


# --- images by Pillow -----------------------------------------------------------------------------


def resize_and_crop(pixels: np.ndarray, resize: int, crop: int, how: Image.Resampling):
  """uint8 [crop, crop, 3]: the short side becomes `resize`, then the centre is cut out."""
  image = Image.fromarray(pixels).convert("RGB")
  w, h = image.size
  size = (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)
  image = image.resize(size, how)
  left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
  return np.asarray(image.crop((left, top, left + crop, top + crop)))
