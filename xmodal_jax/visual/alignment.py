"""Renders and measures the attention of caption words over image regions; numpy and Pillow only.

`System.token_attention` returns attention weights of text tokens over image tokens. This module
groups text tokens into words, maps image tokens to boxes, draws heatmaps, and computes
localization metrics.

    found = words(tokenizer.pieces(ids), mask)
    boxes = token_boxes(attention.shape[1], height, width, patch=16)
    attention, scores = word_means(attention, found), word_means(scores, found)
    html = html_page("title", original, panels(image, found, attention, scores, boxes))
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from xmodal_jax.errors import UserError

_GLOW = np.array([255, 96, 0], np.float32)  # RGB of high attention
_PANEL = 192  # pixels of a panel's shorter side, at least


class Word(NamedTuple):
  """A word of a caption. text: as tokenized; tokens: indices of its text tokens;
  special: [CLS] or [SEP]."""

  text: str
  tokens: tuple[int, ...]
  special: bool = False


class TokenBoxes(NamedTuple):
  """Boxes of image tokens.

  boxes: float32 [Q, 4], x1 y1 x2 y2 of the last Q tokens, relative to the image size, in [0, 1].
  extra: number of tokens before them without a box (the class token). grid: (rows, columns) if the
  boxes are patches in row-major order.
  """

  boxes: np.ndarray
  extra: int
  grid: tuple[int, int] | None = None


class Panel(NamedTuple):
  """An image with two lines of text. pixels: uint8 [H, W, 3]."""

  title: str
  detail: str
  pixels: np.ndarray


def words(pieces: Sequence[str], mask: Sequence[bool]) -> list[Word]:
  """Groups the valid WordPiece tokens [L] of a caption into words.

  A piece that starts with "##" continues the word before it. Special tokens are recognised by their
  position, first and last, because a caption may contain their names as text.
  """
  kept = [int(i) for i in np.flatnonzero(mask)]
  out: list[Word] = []
  for i in kept:
    special = i in (kept[0], kept[-1])
    continues = pieces[i].startswith("##") and len(pieces[i]) > 2
    if continues and not special and out and not out[-1].special:
      text, tokens, _ = out[-1]
      out[-1] = Word(text + pieces[i][2:], (*tokens, i))
    else:
      out.append(Word(pieces[i], (i,), special))
  return out


def word_means(values: np.ndarray, found: Sequence[Word]) -> np.ndarray:
  """Values of tokens [L, ...] -> of words [W, ...], the mean over the tokens of each word."""
  return np.stack([values[list(word.tokens)].mean(0) for word in found])


def patch_boxes(rows: int, columns: int) -> np.ndarray:
  """float32 [rows * columns, 4]: boxes of a grid in row-major order, relative to the image size."""
  y, x = np.divmod(np.arange(rows * columns), columns)
  corners = [x / columns, y / rows, (x + 1) / columns, (y + 1) / rows]
  return np.stack(corners, 1).astype(np.float32)


def token_boxes(
  tokens: int, height: int, width: int, patch: int | None, boxes: np.ndarray | None = None
) -> TokenBoxes:
  """Boxes of the `tokens` image tokens of an image of height x width pixels.

  patch: side of the patches in pixels; None for a tower without patches. boxes: float32 [R, 4] of
  regions, in pixels. One token without a box, the class token, may come first. Raises UserError if
  neither the patches nor the boxes match the number of tokens.
  """
  if patch:
    rows, columns = height // patch, width // patch
    if tokens - rows * columns in (0, 1):
      return TokenBoxes(patch_boxes(rows, columns), tokens - rows * columns, (rows, columns))
  if boxes is not None and tokens - len(boxes) in (0, 1):
    scale = np.array([width, height, width, height], np.float32)
    return TokenBoxes(np.clip(boxes / scale, 0, 1).astype(np.float32), tokens - len(boxes))
  grid = f"patches of {patch} pixels make {rows} x {columns}" if patch else "there are no patches"
  regions = "boxes of regions" if boxes is None else f"as many boxes as regions, not {len(boxes)}"
  raise UserError(
    f"the image of {width} x {height} pixels has {tokens} tokens, but {grid}: to locate the tokens "
    f"the batch needs {regions}"
  )


def coverage(areas: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """areas [Q, 4], boxes [N, 4] -> float [N, Q]: the fraction of each area inside each box."""
  low = np.maximum(areas[None, :, :2], boxes[:, None, :2])
  high = np.minimum(areas[None, :, 2:], boxes[:, None, 2:])
  size = np.prod(areas[:, 2:] - areas[:, :2], -1)
  return np.prod(np.maximum(high - low, 0), -1) / np.maximum(size, 1e-12)


def pointing_metrics(
  attention: np.ndarray, where: TokenBoxes, boxes: np.ndarray
) -> dict[str, np.ndarray]:
  """Localization metrics of N words against the boxes of their objects, each [N].

  attention [N, P]; boxes [N, 4], relative to the image size.

  mass: fraction of the attention inside the box, with the attention of a token spread evenly over
    its own box.
  area: the box's fraction of the image, the mass that uniform attention has.
  hit: bool, the pointing game (Zhang et al., 2018): whether the token with the largest weight
    belongs to the object. A token belongs to it if its centre is in the box, or if no other token
    is covered more, so that a box between the centres has one too.
  chance: fraction of the tokens that belong to the object.
  extra: fraction of the attention on tokens without a box, which the other metrics leave out.
  """
  located = attention[:, where.extra :].astype(np.float64)  # [N, Q]
  cover = coverage(where.boxes, boxes)
  x, y = (where.boxes[:, i] / 2 + where.boxes[:, i + 2] / 2 for i in (0, 1))  # [Q]
  x1, y1, x2, y2 = boxes.T[:, :, None]  # [N, 1]
  own = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
  own |= (cover >= (1 - 1e-6) * cover.max(1, keepdims=True)) & (cover > 0)
  total = located.sum(1)
  return {
    "mass": (located * cover).sum(1) / np.maximum(total, 1e-12),
    "area": np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1),
    "hit": own[np.arange(len(own)), located.argmax(1)],
    "chance": own.mean(1),
    "extra": attention[:, : where.extra].sum(1),
  }


def heatmap(
  attention: np.ndarray, where: TokenBoxes, height: int, width: int, smooth: bool = False
) -> np.ndarray:
  """Attention [P] of one word -> float32 [height, width], scaled to a maximum of 1.

  Overlapping boxes show the larger weight. smooth: interpolates bilinearly between patch centres.
  """
  located = np.asarray(attention[where.extra :], np.float32)
  located = located / max(float(located.max()), 1e-12)
  if where.grid:
    kind = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(located.reshape(where.grid)).resize((width, height), kind))
  out = np.zeros((height, width), np.float32)
  for i in np.argsort(located, kind="stable"):
    x1, y1, x2, y2 = _pixels(where.boxes[i], height, width)
    out[y1:y2, x1:x2] = located[i]
  return out


def _pixels(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
  return tuple(int(v) for v in np.round(box * [width, height, width, height]))


def upscale(image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3]: repeats pixels until the shorter side has at least _PANEL of them."""
  factor = -(-_PANEL // min(image.shape[:2]))
  return image.repeat(factor, 0).repeat(factor, 1)


def overlay(
  image: np.ndarray, attention: np.ndarray, where: TokenBoxes, smooth: bool = False
) -> np.ndarray:
  """Image uint8 [H, W, 3], attention [P] -> uint8 [H, W, 3]: the image with a heatmap over it.

  Of boxes that are regions the three with the largest weights are outlined.
  """
  height, width = image.shape[:2]
  glow = 0.75 * heatmap(attention, where, height, width, smooth)[..., None]
  grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
  pale = 0.5 * image + 0.3 * grey[..., None] + 51
  out = np.clip(pale * (1 - glow) + _GLOW * glow, 0, 255).astype(np.uint8)
  if where.grid:
    return out
  canvas = Image.fromarray(out)
  draw = ImageDraw.Draw(canvas)
  for i in np.argsort(attention[where.extra :])[-3:]:
    x1, y1, x2, y2 = _pixels(where.boxes[i], height, width)
    draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=(0, 0, 0), width=2)
  return np.asarray(canvas)


def panels(
  image: np.ndarray,
  found: Sequence[Word],
  attention: np.ndarray,
  agreement: np.ndarray,
  where: TokenBoxes,
  smooth: bool = False,
) -> list[Panel]:
  """One panel per word. attention [W, P] and agreement [W] are values of words: `word_means`."""
  image = upscale(image)
  out = []
  for word, row, score in zip(found, attention, agreement, strict=True):
    detail = f"strongest {row[where.extra :].max():.0%}"
    if where.extra:
      detail = f"class token {row[: where.extra].sum():.0%}, {detail}"
    out.append(Panel(f"{word.text}  {score:+.3f}", detail, overlay(image, row, where, smooth)))
  return out


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; color: #222; background: #fff; }}
main {{ display: flex; flex-wrap: wrap; gap: 1em; }}
figure {{ margin: 0; width: 192px; }}
img {{ width: 100%; display: block; }}
figcaption {{ margin-top: 0.3em; overflow-wrap: anywhere; }}
small {{ display: block; color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
<main>
{figures}
</main>
</body>
</html>
"""

_FIGURE = """<figure>
<img alt="{alt}" src="data:image/png;base64,{data}">
<figcaption><b>{title}</b><small>{detail}</small></figcaption>
</figure>"""


def html_page(title: str, plain: Panel, rest: Sequence[Panel]) -> str:
  """A self-contained HTML page: the image without a heatmap, then the panels, as data URLs."""
  figures = []
  for i, panel in enumerate([plain, *rest]):
    data = io.BytesIO()
    Image.fromarray(panel.pixels).save(data, "PNG")
    name = f"{panel.title}, {panel.detail}"
    alt = f"Image: {name}" if i == 0 else f"Attention of the word: {name}"
    fields = dict(alt=alt, title=panel.title, detail=panel.detail)
    fields = {k: html.escape(v) for k, v in fields.items()}
    figures.append(_FIGURE.format(data=base64.b64encode(data.getvalue()).decode(), **fields))
  return _PAGE.format(title=html.escape(title), figures="\n".join(figures))
