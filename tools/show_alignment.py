"""Shows which image tokens each word of a caption attends to, and its score there.

  python tools/show_alignment.py --config configs/shapes.py:team --workdir DIR \
    --image scene.png --caption "a tiny red star at the top left" --out alignment.png
  python tools/show_alignment.py --config configs/shapes.py:team --workdir DIR \
    --split test --index 3 --out alignment.html

For systems with token attention (TEAM). The image is drawn after the model's transform, with the
relevance of each patch to a word's score or, with --weights attention, the attention weights,
scaled to the strongest patch. Beside it are the score and the share of the class token, which has
no position.

  python tools/show_alignment.py --config configs/shapes.py:team --workdir DIR \
    --split test --measure

On the embedded shapes: how often the strongest patch of words for colours and for shapes lies on
the object that they name. Only words that fit exactly one object of their scene count.
"""

import argparse
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import restore
from xmodal_jax.data import image, records
from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data.preparing import shapes
from xmodal_jax.errors import UserError
from xmodal_jax.evaluation import rerank
from xmodal_jax.models import base
from xmodal_jax.runtime import cli, setup
from xmodal_jax.visual import alignment

BATCH = 50  # pairs that are measured at a time


def load_config(name: str) -> Any:
  """configs/shapes.py:team -> its config, resolved, for one device."""
  try:
    config = config_lib.load(name)
  except UserError as e:
    raise UserError(f"--config: {e}") from e
  config.mesh = (("data", -1), ("fsdp", 1), ("model", 1))
  return config_lib.resolve(config)


class Model:
  """A system with its parameters, on one device."""

  def __init__(self, config: Any, source: str, weights: str):
    self.config = config
    built = setup.build(config, jax.devices()[:1])
    name, system = config.model.system, built.system
    if type(system).token_attention is base.System.token_attention:
      raise SystemExit(f"{name} has no attention of caption tokens over image tokens")
    self.inputs = inputs_lib.from_config(config)
    if not hasattr(self.inputs.tokenizer, "pieces"):
      raise SystemExit(f"the tokenizer {config.text.tokenizer!r} does not name its pieces")
    self.second = rerank.second_stage(config.eval, system)
    params, stats, _ = restore.load(
      source, name, built.params, built.stats, built.facts, built.init_change
    )
    self.params = restore.put(params, built.params_shardings)
    self.stats = restore.put(stats, built.stats_shardings)

    def relate(params, stats, batch):
      model = nnx.merge(built.graphdef, params, stats)
      images, texts = model.encode_image(batch), model.encode_text(batch)
      out = model.token_attention(images, texts) | {"first": model.score(images, texts).diagonal()}
      out["weights"] = out[weights]
      if self.second:
        each = jax.tree.map(lambda x: x[:, None], texts)
        out["second"] = model.rerank(images, each)[:, 0] + self.second.mix * out["first"]
      return out

    self.relate = jax.jit(relate)

  def batch(self, pixels: np.ndarray, captions: list[str], boxes=None, regions=None) -> dict:
    """Pixels uint8 [N, H, W, 3] with N captions, and of N = 1 image its regions."""
    c = self.config.text
    ids, mask = self.inputs.tokenizer(captions, c.length, c.truncate)
    out = dict(image=pixels, text_ids=ids, text_mask=mask)
    if boxes is not None:
      out["boxes"] = boxes[None]
    if regions is not None:
      out |= dict(regions=regions[None], region_mask=np.ones((1, len(regions)), bool))
    return out

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """weights [N, L, P], agreement [N, L], first [N] and, with a second stage, second [N]."""
    try:
      return jax.device_get(self.relate(self.params, self.stats, batch))
    except KeyError as e:
      if e.args[0] in batch:
        raise
      raise SystemExit(
        f"{self.config.model.system} reads {e} of an image, and this one has none: name one of a "
        "dataset that has them, by --split and --index"
      ) from e

  def places(self, tokens: int, boxes: np.ndarray | None = None) -> alignment.TokenBoxes:
    """Of the image tokens; boxes in pixels of the image as the model saw it."""
    crop = self.inputs.transform.crop
    return alignment.token_boxes(tokens, crop, crop, self.config.model.image.get("patch"), boxes)

  def cut(self, caption: str) -> str:
    """A remark on a caption that is too long for the model; else nothing."""
    tokens, length = len(self.inputs.tokenizer.encode(caption)) + 2, self.config.text.length
    if tokens <= length:
      return ""
    return f"; the caption's {tokens} tokens are cut to config.text.length = {length}"

  def words(self, ids: np.ndarray, mask: np.ndarray) -> list[alignment.Word]:
    return alignment.words(self.inputs.tokenizer.pieces(ids), mask)


def seen_boxes(boxes: np.ndarray, size: tuple[int, int], transform: image.Transform) -> np.ndarray:
  """Boxes [R, 4] in pixels of an image of size (width, height) -> in pixels after `transform`."""
  width, height = transform.target(*size)
  left, top = (round((side - transform.crop) / 2) for side in (width, height))
  scaled = boxes * (np.array([width, height] * 2) / np.array(size * 2))
  moved = scaled - [left, top] * 2
  return np.clip(moved, 0, transform.crop).astype(np.float32)


def record_of(model: Model, split: str, index: int) -> records.Record:
  """Image `index` of a split, by its key in the config's data section."""
  found = model.inputs.split(split)
  if not 0 <= index < len(found):
    raise SystemExit(f"--index {index}: split {split!r} has images 0 to {len(found) - 1}")
  return found.read(index)


def show(model: Model, args: argparse.Namespace) -> tuple[str, alignment.Panel, list]:
  """(caption, the plain image with the pair's scores, a panel per word)."""
  caption, boxes, regions, transform = args.caption, None, None, model.inputs.transform
  if args.image:
    encoded = args.image.read_bytes()
  else:
    record = record_of(model, args.split, args.index)
    encoded, n = record.image, len(record.captions)
    if not encoded:
      raise SystemExit(f"image {args.index} of split {args.split!r} is stored without its pixels")
    if caption is None and not 0 <= args.caption_number < n:
      raise SystemExit(f"--caption_number {args.caption_number}: image {args.index} has {n}")
    caption = record.captions[args.caption_number] if caption is None else caption
    boxes, regions = record.boxes, record.regions
  original = image.decode(encoded, model.inputs.max_pixels)
  pixels = transform(original)
  batch = model.batch(pixels[None], [caption], boxes, regions)
  out = {k: v[0] for k, v in model(batch).items()}
  if boxes is not None:
    boxes = seen_boxes(boxes, original.size, transform)
  where = model.places(out["weights"].shape[-1], boxes)
  found = model.words(batch["text_ids"][0], batch["text_mask"][0])
  if not args.special:
    found = [word for word in found if not word.special]
  if not found:
    raise SystemExit("the caption has no words")
  attention, agreement = (alignment.word_means(out[k], found) for k in ("weights", "agreement"))
  scores = f"first stage {out['first']:+.3f}"
  if model.second:
    scores += f", second stage {out['second']:+.3f}"
  plain = alignment.Panel("as the model sees it", scores, alignment.upscale(pixels))
  rest = alignment.panels(pixels, found, attention, agreement, where, args.smooth)
  return caption, plain, rest


def draw(path: pathlib.Path, title: str, plain: alignment.Panel, rest: list) -> None:
  """All panels as one PNG."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  shown = [plain, *rest]
  columns = min(6, len(shown))
  rows = -(-len(shown) // columns)
  size = (2.2 * max(columns, 3), 2.75 * rows + 0.5)
  figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
  literal = dict(parse_math=False)  # a caption may hold dollar signs
  figure.suptitle(title, fontsize=11, wrap=True, **literal)
  for axis, panel in itertools.zip_longest(axes.flat, shown):
    axis.axis("off")
    if panel:
      axis.imshow(panel.pixels, interpolation="nearest")
      axis.set_title(panel.title, fontsize=11, pad=16, **literal)
      axis.text(
        0.5, 1.02, panel.detail, ha="center", va="bottom", fontsize=7, color="0.3",
        transform=axis.transAxes,
      )  # fmt: skip
  figure.savefig(path, dpi=110, format="png")
  plt.close(figure)


# What the captions of the embedded dataset call things.
COLOURS = {name: name for name in shapes.COLOURS}
SHAPES = {word: name for name, synonyms in shapes.SHAPES.items() for word in synonyms}


def named(record: records.Record, scene: shapes.Scene, word: str) -> tuple[str, int] | None:
  """("colour" or "shape", number of the object) for a word that fits one object of the scene."""
  for column, (kind, names) in enumerate((("colour", COLOURS), ("shape", SHAPES))):
    fits = [i for i, item in enumerate(scene) if item[column] == names.get(word)]
    if len(fits) == 1 and len(record.boxes) >= len(scene):  # background comes after the objects
      return kind, fits[0]
  return None


def pairs(model: Model, split: str) -> Iterator[tuple[np.ndarray, records.Record, Any, int]]:
  """(pixels, record, scene, number of the caption) of all pairs of a split of the shapes."""
  scenes: list = []
  for record in model.inputs.split(split):
    if record.image_id >= len(scenes):
      scenes = shapes.scenes(0, max(2 * len(scenes), record.image_id + 1))
    scene = scenes[record.image_id] if record.image_id >= 0 else ()
    # That these are the scenes shows in the captions: the first lists all of their objects.
    said = record.captions[0].replace(",", " ").split() if record.captions else []
    have = sorted((a, SHAPES[b]) for a, b in itertools.pairwise(said) if a in COLOURS)
    if record.boxes is None or not scene or have != sorted(item[:2] for item in scene):
      raise SystemExit("--measure needs the embedded dataset: config.data.dir is 'shapes'")
    pixels = image.load(record.image, model.inputs.transform, model.inputs.max_pixels)
    for i in range(len(record.captions)):
      yield pixels, record, scene, i


def measure(model: Model, split: str) -> dict[str, dict[str, np.ndarray]]:
  """{"colour" or "shape": what `alignment.pointing_metrics` gives, of all such words of the split}.

  With `other_hit` and `other_mass`, the means over the other objects of the word's scene: what a
  model reaches that looks at objects, whatever the word.
  """
  size, transform = (shapes.WIDTH, shapes.WIDTH), model.inputs.transform
  stream, found = pairs(model, split), {"colour": [], "shape": []}
  while batch := list(itertools.islice(stream, BATCH)):
    full = [*batch, *[batch[-1]] * (BATCH - len(batch))]  # one program for all
    arrays = model.batch(np.stack([b[0] for b in full]), [b[1].captions[b[3]] for b in full])
    attention = model(arrays)["weights"]
    where = model.places(attention.shape[-1])
    rows: dict[str, list] = {kind: [] for kind in found}
    for n, (_, record, scene, _) in enumerate(batch):
      boxes = seen_boxes(record.boxes[: len(scene)], size, transform) / transform.crop
      for word in model.words(arrays["text_ids"][n], arrays["text_mask"][n]):
        if target := named(record, scene, word.text):
          kind, item = target
          rows[kind].append((alignment.word_means(attention[n], [word])[0], boxes, item))
    for kind, named_words in rows.items():
      if named_words:
        found[kind].append(against_others(named_words, where))
  join = lambda parts: {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  return {kind: join(parts) for kind, parts in found.items() if parts}


def against_others(
  named_words: list[tuple[np.ndarray, np.ndarray, int]], where: alignment.TokenBoxes
) -> dict[str, np.ndarray]:
  """`alignment.pointing_metrics` of W words and their means over the scene's other objects.

  named_words: (attention [P], boxes [R, 4] of the scene, which of them is meant), R at least 2.
  """
  counts = [len(boxes) for _, boxes, _ in named_words]
  word = np.repeat(np.arange(len(counts)), counts)  # of each word and object
  own = np.concatenate([np.arange(len(boxes)) == item for _, boxes, item in named_words])
  attention = np.stack([row for row, _, _ in named_words])[word]
  every = alignment.pointing_metrics(
    attention, where, np.concatenate([b for _, b, _ in named_words])
  )
  out = {k: v[own] for k, v in every.items()}
  for key in ("hit", "mass"):
    total = np.bincount(word[~own], every[key][~own], len(counts))
    out[f"other_{key}"] = total / np.bincount(word[~own], minlength=len(counts))
  return out


COLUMNS = {
  "own": "hit", "other": "other_hit", "chance": "chance", " own": "mass", " other": "other_mass",
  "area": "area", "class": "extra",
}  # fmt: skip


def table(found: dict[str, dict[str, np.ndarray]]) -> str:
  """Lines: of each kind of word, in per cent, the means."""
  lines = [f"{'':16s}{'strongest patch on':>27s}{'weight in box of':>27s}"]
  lines += [f"{'':8s}{'words':>8s}" + "".join(f"{n:>9s}" for n in COLUMNS)]
  for kind, v in found.items():
    numbers = "".join(f"{100 * v[c].mean():9.1f}" for c in COLUMNS.values())
    lines.append(f"{kind:8s}{len(v['hit']):8d}{numbers}")
  return "\n".join([
    *lines,
    "In %. own: the object that the word names; other: the mean of the scene's other objects;",
    "chance: of a patch drawn at random; area: the box's share of the image. A model that looks",
    "at objects whatever the word has own equal to other.",
  ])  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]")
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", help="its best checkpoint")
  source.add_argument("--init", help="a released file or a converted directory")
  shown = parser.add_mutually_exclusive_group(required=True)
  shown.add_argument("--image", type=pathlib.Path)
  shown.add_argument("--split", choices=("train", "val", "test"))
  parser.add_argument("--index", type=int, help="of the image in the split, from 0")
  parser.add_argument("--caption", help="with --image, or in place of the dataset's own")
  parser.add_argument("--caption_number", type=int, default=0, help="of the image's captions")
  parser.add_argument("--out", type=pathlib.Path, help="a .png or .html file")
  parser.add_argument("--weights", choices=("relevance", "attention"), default="relevance")
  parser.add_argument("--smooth", action="store_true", help="bilinear between patches")
  parser.add_argument("--special", action="store_true", help="also [CLS] and [SEP]")
  parser.add_argument("--measure", action="store_true")
  args = parser.parse_args(argv)
  if args.measure:
    if not args.split or args.out or args.caption is not None or args.index is not None:
      parser.error("--measure takes a whole --split and writes no image")
    return args
  if args.out is None or args.out.suffix not in (".png", ".html"):
    parser.error("--out names the .png or .html file to write")
  if not args.out.parent.is_dir():
    parser.error(f"--out: there is no folder {args.out.parent}")
  if args.image and (args.caption is None or args.index is not None):
    parser.error("--image needs a --caption and no --index")
  if args.image and not args.image.is_file():
    parser.error(f"--image: there is no file {args.image}")
  if args.split and args.index is None:
    parser.error("--split needs the --index of an image, or --measure")
  return args


@cli.program
def main(argv: list[str] | None = None) -> None:
  args = arguments(argv)
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")  # TensorFlow only reads data
  try:
    model = Model(load_config(args.config), args.workdir or args.init, args.weights)
    if args.measure:
      print(table(measure(model, args.split)))
      return
    title, plain, rest = show(model, args)
    if args.out.suffix == ".html":
      args.out.write_text(alignment.html_page(title, plain, rest), encoding="utf-8")
    else:
      draw(args.out, title, plain, rest)
  except (ValueError, image.DecodeError, records.BadRecordError) as e:
    raise UserError(str(e)) from e
  print(f"{args.out}: {len(rest)} words, {plain.detail}{model.cut(title)}")


if __name__ == "__main__":
  main()
