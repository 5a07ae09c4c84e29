"""Captions to token ids: the tokenizers by name, and CLIP's byte pair encoding.

Example::

  tokenizer = make_tokenizer("clip_bpe")
  ids, mask = tokenizer(["a cat on a mat"], length=77)   # int32 [1, 77], bool [1, 77]
  tokenizer.decode(ids[0][mask[0]][1:-1])                # "a cat on a mat "
"""

import gzip
import heapq
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

from xmodal_jax.errors import UserError


class Tokenizer(Protocol):
  """The interface that the pipeline and the models use.

  A tokenizer may also have `graph` and `corrupt`, see `wordpiece.BertTokenizer`.
  """

  vocab_size: int
  pad_id: int

  def __call__(
    self, texts: Sequence[str], length: int, truncate: bool = True
  ) -> tuple[np.ndarray, np.ndarray]:
    """Captions [B] -> ids int32 [B, length], mask bool [B, length] that is false on padding."""


START, END = "<|startoftext|>", "<|endoftext|>"

_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
# Pieces of lower-case printable ASCII, with the faster `re` of the standard library.
_PIECES_ASCII = re.compile(_SPLIT + r"|[a-z]+|[0-9]|[^\sa-z0-9]+")
# Pieces of any text: letters and numbers by Unicode category, which only `regex` supports.
_PIECES = regex.compile(_SPLIT + r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_SPACE = regex.compile(r"\s+")
# Printable ASCII without the ampersand, which may begin an HTML entity.
_PLAIN = re.compile(r"[ -%'-~]*")

_CACHE_WORDS, _CACHE_CHARS = 2**16, 64
"""Number of words in the cache, which is cleared when full (COCO has 30 thousand different words),
and the length of the longest word that it keeps."""


def clean(text: str) -> str:
  """CLIP's clean-up: ftfy, HTML-unescaping twice, collapsed white space, lower case."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return _SPACE.sub(" ", text).strip().lower()


def byte_symbols() -> dict[int, str]:
  """A printable character for each byte, in the order of the vocabulary.

  Printable Latin-1 maps to itself, the other 68 bytes to U+0100 and following.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in set(printable)]
  return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_merges(path: str | Path | None = None, max_merges: int | None = None) -> list[tuple]:
  """Pairs of symbols in order of rank from a merge file, plain or gzip; None: the published one.

  The first line is a header. max_merges: None for 49152 - 256 - 2, as in the published vocabulary;
  the published file lists more. Raises UserError for a line that is not two symbols.
  """
  folder = importlib.resources.files("xmodal_jax") / "vocab"
  source = Path(path) if path else folder / "clip_bpe_simple_vocab_16e6.txt.gz"
  data = source.read_bytes()
  lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")[1:]
  lines = lines[: 49152 - 256 - 2 if max_merges is None else max_merges]
  # The original counts the empty line after a final newline as a merge.
  while lines and not lines[-1].strip():
    lines.pop()
  merges = [tuple(line.split()) for line in lines]
  if bad := [i + 2 for i, merge in enumerate(merges) if len(merge) != 2]:
    raise UserError(f"{source}: not two symbols on line {bad[0]}: {lines[bad[0] - 2]!r}")
  return merges


class ClipTokenizer:
  """CLIP's tokenizer. Rows are [start] ids [end], padded with 0, which is also the id of "!".

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
    """Ids of the text, without start, end and padding."""
    if _PLAIN.fullmatch(text):
      # clean() changes only case and spaces here, and no piece contains a space: words can be
      # encoded one by one, and cached.
      cache, ids = self._words, []
      for word in text.lower().split():
        known = cache.get(word)
        ids += self._word(word) if known is None else known
      return ids
    return self._encode_any(text)

  def _encode_any(self, text: str) -> list[int]:
    """`encode` without the fast path for plain text, which must give the same ids."""
    return [i for piece in _PIECES.findall(clean(text)) for i in self._piece(piece)]

  def _word(self, word: str) -> list[int]:
    ids = [i for piece in _PIECES_ASCII.findall(word) for i in self._piece(piece)]
    if len(word) <= _CACHE_CHARS:
      if len(self._words) >= _CACHE_WORDS:
        self._words.clear()
      self._words[word] = ids
    return ids

  def _piece(self, piece: str) -> list[int]:
    """Byte pair encoding: merges all pairs of the lowest rank until no pair has a rank."""
    if piece in (START, END):
      return [self._id[piece]]
    symbols = [self._bytes[b] for b in piece.encode()]
    symbols[-1] += "</w>"
    return [self._id[symbol] for symbol in self._merged(symbols)]

  def _merged(self, symbols: list[str]) -> list[str]:
    """`symbols` after all merges, in O(n log n): pairs are in a heap by rank, then by position."""
    get, after = self._rank.get, list(range(1, len(symbols) + 1))
    before, end = list(range(-1, len(symbols) - 1)), len(symbols)
    ranks = (get(pair, -1) for pair in itertools.pairwise(symbols))
    heap = [(rank, i) for i, rank in enumerate(ranks) if rank >= 0]
    heapq.heapify(heap)
    while heap:
      rank, fresh = heap[0][0], []
      # All pairs of this rank, from left to right, before any pair that they give rise to.
      while heap and heap[0][0] == rank:
        i = heapq.heappop(heap)[1]
        j = after[i]
        if not symbols[i] or j == end or get((symbols[i], symbols[j]), -1) != rank:
          continue  # one of its symbols has been merged
        symbols[i] += symbols[j]
        symbols[j], after[i] = "", after[j]
        if after[j] < end:
          before[after[j]] = i
        fresh.append(i)
      for i in fresh:
        for left in (before[i], i):
          if left >= 0 and after[left] < end:
            pair = (symbols[left], symbols[after[left]])
            if (r := get(pair, -1)) >= 0:
              heapq.heappush(heap, (r, left))
    return [symbol for symbol in symbols if symbol]

  def decode(self, ids: Sequence[int]) -> str:
    """Ids -> text, with a space after each word. Bytes that are not UTF-8 become U+FFFD."""
    text = "".join(self._symbols[i] for i in ids).replace("</w>", " ")
    back = {symbol: byte for byte, symbol in self._bytes.items()} | {" ": 32}
    return bytes(back[c] for c in text).decode(errors="replace")

  def __call__(
    self, texts: Sequence[str], length: int, truncate: bool = True
  ) -> tuple[np.ndarray, np.ndarray]:
    """Captions [B] -> ids int32 [B, length], mask bool [B, length].

    A caption that is too long keeps its first ids, with the end token in the last place; without
    `truncate` it raises UserError.
    """
    out = np.full((len(texts), length), self.pad_id, np.int32)
    lengths = np.empty(len(texts), np.int32)
    for i, text in enumerate(texts):
      row = [self.start_id, *self.encode(text), self.end_id]
      if len(row) > length:
        if not truncate:
          raise UserError(f"caption of {len(row)} tokens does not fit {length}: {text!r}")
        row[length - 1 :] = [self.end_id]
      out[i, : len(row)] = row
      lengths[i] = len(row)
    return out, np.arange(length) < lengths[:, None]


def _bert(**options) -> Tokenizer:
  from xmodal_jax.data import wordpiece  # late, because it imports TensorFlow

  return wordpiece.BertTokenizer(**options)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {"clip_bpe": ClipTokenizer, "bert": _bert}

OPTIONS = {
  "clip_bpe": {"max_merges": 0},
  "bert": {"lowercase": True, "clean": "none", "max_words": 0, "corrupt": 0.0},
}
"""The options of each tokenizer, keys of `config.text`, with their defaults."""


def make_tokenizer(name: str, **options) -> Tokenizer:
  """Builds a tokenizer: "clip_bpe" or "bert". Raises UserError for another name."""
  if name not in TOKENIZERS:
    raise UserError(f"no tokenizer {name!r}; there are {sorted(TOKENIZERS)}")
  return TOKENIZERS[name](**options)


def tokenizer_from(section: Mapping[str, Any]) -> Tokenizer:
  """Builds the tokenizer of a config's `text` section.

  Raises UserError for a tokenizer or a vocabulary file that does not exist, and for an option that
  is set though only another tokenizer has it.
  """
  name, chosen = section["tokenizer"], {}
  for owner, options in OPTIONS.items():
    for key, default in options.items():
      if section[key] == default:
        continue
      if owner != name and name in TOKENIZERS:
        raise UserError(
          f"config.text.{key} is {section[key]!r}, but the tokenizer {name!r} has no such option, "
          f"only {owner!r} has: leave it at {default!r}"
        )
      chosen[key] = section[key]
  if section["vocab"] and not Path(section["vocab"]).is_file():
    raise UserError(
      f"config.text.vocab: there is no file {section['vocab']}; name the vocabulary that the model "
      "was trained with, or leave it empty for the packaged one"
    )
  return make_tokenizer(name, path=section["vocab"] or None, **chosen)
