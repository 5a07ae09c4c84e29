"""Captions to token ids: the tokenizers by name, and CLIP's byte pair encoding."""

import gzip
import html
import importlib.resources
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
import regex


class Tokenizer(Protocol):
  """What the pipeline and the models need to know of a tokenizer."""

  vocab_size: int
  pad_id: int

  def __call__(
    self, texts: Sequence[str], length: int, truncate: bool = True
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [B, length] and bool [B, length], true where an id is a token and not padding."""


START, END = "<|startoftext|>", "<|endoftext|>"

_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
# What a lower-case text of printable ASCII splits into; the standard library knows these classes.
_PIECES_ASCII = re.compile(_SPLIT + r"|[a-z]+|[0-9]|[^\sa-z0-9]+")
# Any text: letters and numbers by their Unicode category, which only `regex` knows.
_PIECES = regex.compile(_SPLIT + r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_SPACE = regex.compile(r"\s+")
# Printable ASCII but for the ampersand, which may begin an HTML entity.
_PLAIN = re.compile(r"[ -%'-~]*")

_CACHE_WORDS, _CACHE_CHARS = 2**16, 64
"""Words kept with their ids: all of COCO's (30 thousand) fit; a web crawl's may not, and then the
cache starts over. Longer words are rarely met twice."""


def clean(text: str) -> str:
  """Repaired (ftfy), HTML-unescaped twice, white space collapsed, lower-case."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return _SPACE.sub(" ", text).strip().lower()


def byte_symbols() -> dict[int, str]:
  """A printable character for each byte, in the order of the vocabulary.

  Printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in set(printable)]
  return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_merges(path: str | Path | None = None, max_merges: int | None = None) -> list[tuple]:
  """Pairs of symbols in order of rank from a merge file, plain or gzip; None: the published one.

  The first line is a header. The published file lists more merges than the published vocabulary
  has, hence the default bound.
  """
  folder = importlib.resources.files("xmodal_jax") / "vocab"
  source = Path(path) if path else folder / "clip_bpe_simple_vocab_16e6.txt.gz"
  data = source.read_bytes()
  lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")[1:]
  lines = lines[: 49152 - 256 - 2 if max_merges is None else max_merges]
  # The original counts the empty line after a final newline as a merge; that is never meant.
  while lines and not lines[-1].strip():
    lines.pop()
  merges = [tuple(line.split()) for line in lines]
  if bad := [i + 2 for i, merge in enumerate(merges) if len(merge) != 2]:
    raise ValueError(f"{source}: not two symbols on line {bad[0]}: {lines[bad[0] - 2]!r}")
  return merges


class ClipTokenizer:
  """CLIP's tokenizer. Rows are [start] ids [end], padded with 0, which is also a real symbol.

  path, max_merges: see `read_merges`.
  """

  pad_id = 0

  def __init__(self, path: str | Path | None = None, max_merges: int | None = None):
    merges = read_merges(path, max_merges)
    self._bytes = byte_symbols()
    symbols = list(self._bytes.values())
    symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
    self._symbols = symbols
    self._id = {symbol: i for i, symbol in enumerate(symbols)}
    self._rank = {pair: i for i, pair in enumerate(merges)}
    self.vocab_size = len(symbols)
    self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
    self._words: dict[str, list[int]] = {}

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone, without start, end and padding."""
    if _PLAIN.fullmatch(text):
      # Nothing that clean() could change but case and spaces, and every pattern class is ASCII.
      # A piece never holds a space, so a text is its words, and words come again and again.
      cache, ids = self._words, []
      for word in text.lower().split():
        known = cache.get(word)
        ids += self._word(word) if known is None else known
      return ids
    return self._encode_any(text)

  def _encode_any(self, text: str) -> list[int]:
    """`encode` for every text; the definition that the path for plain text must equal."""
    return [i for piece in _PIECES.findall(clean(text)) for i in self._piece(piece)]

  def _word(self, word: str) -> list[int]:
    ids = [i for piece in _PIECES_ASCII.findall(word) for i in self._piece(piece)]
    if len(word) <= _CACHE_CHARS:
      if len(self._words) >= _CACHE_WORDS:
        self._words.clear()
      self._words[word] = ids
    return ids

  def _piece(self, piece: str) -> list[int]:
    """Merge the pair of lowest rank, everywhere, until no pair has a rank."""
    if piece in (START, END):
      return [self._id[piece]]
    symbols = [self._bytes[b] for b in piece.encode()]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
      pairs = set(itertools.pairwise(symbols))
      best = min(pairs, key=lambda pair: self._rank.get(pair, len(self._rank)))
      if best not in self._rank:
        break
      merged, i = [], 0
      while i < len(symbols):
        if tuple(symbols[i : i + 2]) == best:
          merged.append(best[0] + best[1])
          i += 2
        else:
          merged.append(symbols[i])
          i += 1
      symbols = merged
    return [self._id[symbol] for symbol in symbols]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the ids; words end in a space. Bytes that are not UTF-8 become U+FFFD."""
    text = "".join(self._symbols[i] for i in ids).replace("</w>", " ")
    back = {symbol: byte for byte, symbol in self._bytes.items()} | {" ": 32}
    return bytes(back[c] for c in text).decode(errors="replace")

  def __call__(
    self, texts: Sequence[str], length: int, truncate: bool = True
  ) -> tuple[np.ndarray, np.ndarray]:
    """Captions [B] -> ids int32 [B, length], mask bool [B, length].

    A caption that is too long keeps its first ids and the end token in the last place; without
    `truncate` it is an error.
    """
    out = np.full((len(texts), length), self.pad_id, np.int32)
    lengths = np.empty(len(texts), np.int32)
    for i, text in enumerate(texts):
      row = [self.start_id, *self.encode(text), self.end_id]
      if len(row) > length:
        if not truncate:
          raise ValueError(f"caption of {len(row)} tokens does not fit {length}: {text!r}")
        row[length - 1 :] = [self.end_id]
      out[i, : len(row)] = row
      lengths[i] = len(row)
    return out, np.arange(length) < lengths[:, None]


def _bert(**options) -> Tokenizer:
  from xmodal_jax.data import wordpiece  # here, because it imports TensorFlow

  return wordpiece.BertTokenizer(**options)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {"clip_bpe": ClipTokenizer, "bert": _bert}

OPTIONS = {
  "clip_bpe": {"max_merges": 0},
  "bert": {"lowercase": True, "clean": "none", "max_words": 0, "corrupt": 0.0},
}
"""What each tokenizer takes beside a file, with the values that stand for its own defaults."""


def make_tokenizer(name: str, **options) -> Tokenizer:
  """The tokenizer of that name, built with the options."""
  if name not in TOKENIZERS:
    raise ValueError(f"no tokenizer {name!r}; there are {sorted(TOKENIZERS)}")
  return TOKENIZERS[name](**options)


def tokenizer_from(section: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer that the `text` section of a config describes.

  ValueError for one that does not exist, or an option set that only another tokenizer takes.
  """
  name, chosen = section["tokenizer"], {}
  for owner, options in OPTIONS.items():
    for key, default in options.items():
      if section[key] == default:
        continue
      if owner != name and name in TOKENIZERS:
        raise ValueError(
          f"config.text.{key} is {section[key]!r}, but the tokenizer {name!r} has no such option, "
          f"only {owner!r} has: leave it at {default!r}"
        )
      chosen[key] = section[key]
  if section["vocab"] and not Path(section["vocab"]).is_file():
    raise ValueError(
      f"config.text.vocab: there is no file {section['vocab']}; name the vocabulary that the model "
      "was trained with, or leave it empty for the packaged one"
    )
  return make_tokenizer(name, path=section["vocab"] or None, **chosen)
