"""What the words of a caption look at in a picture, for people to see: numpy and Pillow only.

`System.token_attention` gives weights of text tokens over image tokens. Here tokens become words,
image tokens become places in the picture, and weights become pictures and numbers.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

_GLOW = np.array([255, 96, 0], np.float32)  # what is looked at
_PANEL = 192  # pixels of a panel's shorter side, at least


class Word(NamedTuple):
  """text: as the model saw it; tokens: which text tokens it is made of; special: [CLS], [SEP]."""

  text: str
  tokens: tuple[int, ...]
  special: bool = False


class Places(NamedTuple):
  """Where image tokens lie. boxes float32 [Q, 4]: x1 y1 x2 y2 as parts of the picture, of the last
  Q tokens; `extra`: how many tokens before them stand for the whole picture (the class token);
  grid: (rows, columns) where the boxes are patches, row by row."""

  boxes: np.ndarray
  extra: int
  grid: tuple[int, int] | None = None


class Panel(NamedTuple):
  """title and detail: lines of text; pixels uint8 [H, W, 3]."""

  title: str
  detail: str
  pixels: np.ndarray


def words(pieces: Sequence[str], mask: Sequence[bool]) -> list[Word]:
  """Word pieces [L] of a caption in its order, those that `mask` leaves out dropped, as words.

  "##" goes on with the word before it. The first and the last token are special: a caption may
  itself spell out their names.
  """
  kept = [int(i) for i in np.flatnonzero(mask)]
  out: list[Word] = []
  for i in kept:
    special = i in (kept[0], kept[-1])
    joins = pieces[i].startswith("##") and len(pieces[i]) > 2
    if joins and not special and out and not out[-1].special:
      text, tokens, _ = out[-1]
      out[-1] = Word(text + pieces[i][2:], (*tokens, i))
    else:
      out.append(Word(pieces[i], (i,), special))
  return out


def joined(values: np.ndarray, found: Sequence[Word]) -> np.ndarray:
  """Values of tokens [L, ...] -> of words [W, ...]: the mean over the tokens of each."""
  return np.stack([values[list(word.tokens)].mean(0) for word in found])


def patches(rows: int, columns: int) -> np.ndarray:
  """Boxes float32 [rows * columns, 4] of a grid, row by row, as parts of the picture."""
  y, x = np.divmod(np.arange(rows * columns), columns)
  corners = [x / columns, y / rows, (x + 1) / columns, (y + 1) / rows]
  return np.stack(corners, 1).astype(np.float32)


def places(
  tokens: int, height: int, width: int, patch: int | None, boxes: np.ndarray | None = None
) -> Places:
  """Where `tokens` image tokens of a picture of height x width pixels lie.

  patch: side of the patches in pixels, None where the tower has none. boxes: float32 [R, 4] in
  pixels of that picture. One token in front may stand for the whole. ValueError, saying what is
  missing, where neither accounts for the tokens.
  """
  if patch:
    rows, columns = height // patch, width // patch
    if tokens - rows * columns in (0, 1):
      return Places(patches(rows, columns), tokens - rows * columns, (rows, columns))
  if boxes is not None and tokens - len(boxes) in (0, 1):
    scale = np.array([width, height, width, height], np.float32)
    return Places(np.clip(boxes / scale, 0, 1).astype(np.float32), tokens - len(boxes))
  grid = f"patches of {patch} pixels make {rows} x {columns}" if patch else "there are no patches"
  regions = "boxes of regions" if boxes is None else f"as many boxes as regions, not {len(boxes)}"
  raise ValueError(
    f"the picture of {width} x {height} pixels has {tokens} tokens, but {grid}: to show where the "
    f"tokens lie the batch needs {regions}"
  )


def coverage(areas: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """areas [Q, 4], boxes [N, 4] -> float [N, Q]: the share of each area inside each box."""
  low = np.maximum(areas[None, :, :2], boxes[:, None, :2])
  high = np.minimum(areas[None, :, 2:], boxes[:, None, 2:])
  size = np.prod(areas[:, 2:] - areas[:, :2], -1)
  return np.prod(np.maximum(high - low, 0), -1) / np.maximum(size, 1e-12)


def pointing(attention: np.ndarray, where: Places, boxes: np.ndarray) -> dict[str, np.ndarray]:
  """How well N words point at their objects. attention [N, P]; boxes [N, 4], parts of the picture.

  Each [N]: `mass`, the share of the attention inside the box, each place's spread evenly over it;
  `area`, the box's share of the picture, which is the mass of attention that is the same
  everywhere; `hit`, bool, whether the strongest place is one of the object's; `chance`, the share
  of places that are; `extra`, the share of the attention on tokens without a place, which
  the others leave out. A place is an object's if its centre lies in the box or if no other
  is covered more, so that a box between the centres has one too.
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


def heat(
  attention: np.ndarray, where: Places, height: int, width: int, smooth: bool = False
) -> np.ndarray:
  """Attention [P] of one word -> float32 [height, width], its strongest place 1.

  Boxes that overlap show the stronger. smooth: bilinear between the centres of patches.
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


def enlarged(picture: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3], every pixel repeated until the picture is large enough to look at."""
  factor = -(-_PANEL // min(picture.shape[:2]))
  return picture.repeat(factor, 0).repeat(factor, 1)


def overlay(
  picture: np.ndarray, attention: np.ndarray, where: Places, smooth: bool = False
) -> np.ndarray:
  """Picture uint8 [H, W, 3], attention [P] -> uint8 [H, W, 3]: paler, and glowing where looked at.

  Where the places are boxes of regions, the three strongest are outlined.
  """
  height, width = picture.shape[:2]
  glow = 0.75 * heat(attention, where, height, width, smooth)[..., None]
  grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
  pale = 0.5 * picture + 0.3 * grey[..., None] + 51
  out = np.clip(pale * (1 - glow) + _GLOW * glow, 0, 255).astype(np.uint8)
  if where.grid:
    return out
  image = Image.fromarray(out)
  draw = ImageDraw.Draw(image)
  for i in np.argsort(attention[where.extra :])[-3:]:
    x1, y1, x2, y2 = _pixels(where.boxes[i], height, width)
    draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=(0, 0, 0), width=2)
  return np.asarray(image)


def panels(
  picture: np.ndarray,
  found: Sequence[Word],
  attention: np.ndarray,
  agreement: np.ndarray,
  where: Places,
  smooth: bool = False,
) -> list[Panel]:
  """One panel per word: attention [W, P] and agreement [W] are the words' (see `joined`)."""
  picture = enlarged(picture)
  out = []
  for word, row, score in zip(found, attention, agreement, strict=True):
    detail = f"strongest {row[where.extra :].max():.0%}"
    if where.extra:
      detail = f"class token {row[: where.extra].sum():.0%}, {detail}"
    out.append(Panel(f"{word.text}  {score:+.3f}", detail, overlay(picture, row, where, smooth)))
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


def page(title: str, plain: Panel, rest: Sequence[Panel]) -> str:
  """HTML that stands alone: the plain picture, then the panels, all pictures inside."""
  figures = []
  for i, panel in enumerate([plain, *rest]):
    data = io.BytesIO()
    Image.fromarray(panel.pixels).save(data, "PNG")
    name = f"{panel.title}, {panel.detail}"
    alt = f"The picture: {name}" if i == 0 else f"What the word looks at: {name}"
    fields = dict(alt=alt, title=panel.title, detail=panel.detail)
    fields = {k: html.escape(v) for k, v in fields.items()}
    figures.append(_FIGURE.format(data=base64.b64encode(data.getvalue()).decode(), **fields))
  return _PAGE.format(title=html.escape(title), figures="\n".join(figures))
