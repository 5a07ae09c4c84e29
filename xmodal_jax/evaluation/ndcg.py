"""NDCG with graded relevances, ROUGE-L relevances, and relevance files (numpy only).

Relevances are float32 [T, I]: how well caption t describes image i, from 0 to 1. A file holds these
numbers in little-endian order and no header, although it is called .npy: the format of the ROUGE-L
and SPICE files that TERAN (Messina et al., TOMM 2021) distributes.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xmodal_jax.errors import UserError
from xmodal_jax.evaluation import metrics

METHODS = ("rougeL", "spice")
DEPTH = 25  # NDCG at 25
_ELEMENTS = 2**24  # matrix elements copied at a time

# ROUGE-L: captions per block of rows; candidates and references compared at a time.
_ROWS, _LANES, _REFERENCES = 1024, 64, 1024
_BETA = 1.2  # weight of recall, as in the COCO caption evaluation


def ndcg(scores: np.ndarray, relevance: np.ndarray, depth: int = DEPTH) -> np.ndarray:
  """Normalised discounted cumulative gain of the first `depth` ranks of each query.

  With r_k the relevance of the candidate of 0-based rank k, DCG = sum_k (2^r_k - 1) / log2(k + 2).
  NDCG is DCG divided by the DCG of the `depth` largest relevances, 0 if all are 0. Ties of the
  scores go to the lower index. Carrara et al., "Picture it in your mind", Information Retrieval
  Journal 21, 2018.

  Args:
    scores: [Q, N], compared as float32. relevance: [Q, N]. Both may be transposed views: they are
      copied in blocks.

  Returns:
    float64 [Q], 0 to 1.

  Raises:
    ValueError: the shapes differ.

  >>> ndcg(np.array([[0.9, 0.8, 0.1]]), np.array([[1.0, 0.0, 0.5]])).round(4)
  array([0.957])
  """
  if scores.shape != relevance.shape:
    raise ValueError(f"scores {scores.shape} do not fit relevances {relevance.shape}")
  depth = min(depth, scores.shape[1])
  discount = 1 / np.log2(np.arange(2, depth + 2))
  out = np.empty(len(scores))
  size = max(1, _ELEMENTS // scores.shape[1])
  for start in range(0, len(scores), size):
    block = np.ascontiguousarray(scores[start : start + size], np.float32)
    grades = np.ascontiguousarray(relevance[start : start + size], np.float32)
    first = metrics.top(block, depth)  # by position
    order = np.argsort(-np.take_along_axis(block, first, 1), axis=1, kind="stable")
    ranked = np.take_along_axis(grades, np.take_along_axis(first, order, 1), 1)
    reached = _gain(ranked) @ discount
    largest = np.partition(grades, grades.shape[1] - depth, axis=1)[:, -depth:]
    ideal = _gain(np.sort(largest, axis=1)[:, ::-1]) @ discount
    out[start : start + size] = np.where(ideal > 0, reached / np.where(ideal > 0, ideal, 1), 0)
  return out


def _gain(relevance: np.ndarray) -> np.ndarray:
  return np.exp2(relevance.astype(np.float64)) - 1


def means(
  method: str, i2t: np.ndarray, t2i: np.ndarray, *, published: bool = False
) -> dict[str, float]:
  """Mean NDCG of both directions as {i2t,t2i}_ndcg_METHOD, and their sum as ndcg_METHOD.

  i2t, t2i: NDCG [Q] of each query. published: the mean of i2t leaves out zeros, as TGDT's program.
  """
  if published:
    i2t = i2t[i2t > 0] if i2t.any() else i2t
  one, two = float(np.mean(i2t)), float(np.mean(t2i))
  return {f"i2t_ndcg_{method}": one, f"t2i_ndcg_{method}": two, f"ndcg_{method}": one + two}


def rouge_l(captions: Sequence[Sequence[str]]) -> np.ndarray:
  """ROUGE-L float32 [T, I] of every caption against the captions of every image, its own included.

  captions: the captions of each of the I images, at least one each; lower-cased and split at single
  spaces. With L the length of the longest common subsequence of words of caption c and reference r,
  P = max_r L / |c| and R = max_r L / |r| (separate maxima), the relevance is
  (1 + b^2) P R / (R + b^2 P), b = 1.2; 0 without a common word. Lin, "ROUGE", ACL 2004.
  Raises UserError if an image has no caption.

  >>> rouge_l([["a dog runs"], ["a cat"]]).round(3)
  array([[1.   , 0.415],
         [0.386, 1.   ]], dtype=float32)
  """
  return np.concatenate(list(rouge_l_rows(captions)))


def rouge_l_rows(captions: Sequence[Sequence[str]]) -> Iterator[np.ndarray]:
  """Yields `rouge_l` in blocks of rows, so that memory is bounded by one block.

  Longest common subsequences are computed with one bit per word of a candidate (Hyyro,
  "Bit-parallel LCS-length computation revisited", 2004) in the narrowest integers that fit, for 64
  candidates and 1024 references of similar length at a time, which numpy vectorises with SIMD.
  """
  counts = np.array([len(c) for c in captions])
  if not counts.size or not counts.all():
    raise ValueError(f"{np.count_nonzero(counts == 0)} of {len(counts)} images have no caption")
  words = [caption.lower().split(" ") for own in captions for caption in own]
  numbers: dict[str, int] = {}
  ids = [[numbers.setdefault(word, len(numbers)) for word in caption] for caption in words]
  lengths = np.array([len(caption) for caption in ids])
  first = np.cumsum(counts) - counts  # each image's first caption
  references = list(_by_length(ids, lengths))
  for start in range(0, len(ids), _ROWS):
    size = min(_ROWS, len(ids) - start)
    out = np.empty((size, len(counts)), np.float32)
    order = start + np.argsort(lengths[start : start + size], kind="stable")
    for group in np.split(order, range(_LANES, size, _LANES)):
      common = _common([ids[i] for i in group], references, len(numbers), len(ids))  # [T, C]
      precision = np.maximum.reduceat(common, first, axis=0) / lengths[group]  # [I, C]
      recall = np.maximum.reduceat(common / lengths[:, None], first, axis=0)
      score = (1 + _BETA**2) * precision * recall
      score /= np.where(score > 0, recall + _BETA**2 * precision, 1)
      out[group - start] = score.T
    yield out


def _by_length(ids: list[list[int]], lengths: np.ndarray) -> Iterator[tuple]:
  """Yields blocks of r captions of similar length, longest first, padded to L words.

  Each block is (numbers of the captions [r], word ids [L, r], how many captions have a word at each
  of the L positions).
  """
  order = np.argsort(-lengths, kind="stable")
  for start in range(0, len(order), _REFERENCES):
    block = order[start : start + _REFERENCES]
    padded = np.zeros((lengths[block[0]], len(block)), np.intp)
    for column, i in enumerate(block):
      padded[: lengths[i], column] = ids[i]
    yield block, padded, (lengths[block] > np.arange(len(padded))[:, None]).sum(1)


def _common(
  candidates: list[list[int]], references: list[tuple], vocab: int, total: int
) -> np.ndarray:
  """Length of the longest common subsequence of each reference and candidate, unsigned [T, C].

  references: blocks from `_by_length`. vocab: number of word ids. total: T.
  """
  longest = max(map(len, candidates))
  bits = next((b for b in (8, 16, 32) if longest <= b), 64)
  limbs, dtype = -(-longest // bits), np.dtype(f"u{bits // 8}")
  table = np.zeros((limbs, vocab, len(candidates)), dtype)  # positions of each word, as bits
  for lane, candidate in enumerate(candidates):
    for place, word in enumerate(candidate):
      table[place // bits, word, lane] |= dtype.type(1 << place % bits)
  out = np.empty((total, len(candidates)), np.uint8 if longest < 256 else np.uint32)
  for numbers, ids, active in references:
    rest = np.full((limbs, len(numbers), len(candidates)), np.iinfo(dtype).max, dtype)
    for row, n in zip(ids, active, strict=True):
      carry = False
      for limb in range(limbs):  # more than one only for captions of more than 64 words
        old = rest[limb, :n]
        hit = table[limb].take(row[:n], 0, mode="clip")
        hit &= old
        new = old + hit
        if limbs > 1:
          over = new < hit
          new += carry
          carry = over | (new < carry)
        old ^= hit
        old |= new
    out[numbers] = np.bitwise_count(~rest).sum(0, out.dtype)
  return out


def find(directory: Any, split: str, method: str) -> Any | None:
  """The file NAME-SPLIT-METHOD.npy in a directory (a pathlib or epath path), or None.

  Raises UserError if there are several, FileNotFoundError if the directory does not exist.
  """
  if not directory.is_dir():
    raise FileNotFoundError(
      f"{directory}: no such folder; expected one with *-{split}-{method}.npy"
    )
  found = sorted(directory.glob(f"*-{split}-{method}.npy"))
  if len(found) > 1:
    listing = ", ".join(path.name for path in found)
    raise UserError(f"{directory} has relevances of several datasets ({listing}); keep one")
  return found[0] if found else None


def read(path: Any, captions: int, images: int) -> np.ndarray:
  """Reads relevances float32 [T, I] in the order of the split; a local file is memory-mapped.

  path: an epath path. Raises UserError for another size, and for negative or non-finite values:
  SPICE files mark values that were not computed with -1.
  """
  expected, size = 4 * captions * images, path.stat().length
  if size != expected:
    raise UserError(
      f"{path} has {size} bytes; {captions} captions x {images} images of the split need "
      f"{expected}: raw float32 without a header, one row per caption"
    )
  if "://" in str(path):
    values = np.frombuffer(path.read_bytes(), "<f4").reshape(captions, images)
  else:
    values = np.memmap(path, "<f4", "r", shape=(captions, images))
  size = max(1, _ELEMENTS // images)
  bad = absent = 0
  for start in range(0, captions, size):
    block = values[start : start + size]
    absent += np.count_nonzero(block == -1)
    bad += block.size - np.count_nonzero((block >= 0) & (block < np.inf))
  if bad:
    raise UserError(
      f"{path}: {bad} of {values.size} relevances are negative or not finite, {absent} of them -1, "
      "which means not computed; use a complete file"
    )
  return values


def prefers_own(values: np.ndarray, captions_per_record: np.ndarray) -> bool:
  """Whether captions are more relevant to their own image than to the next one, in the mean.

  values: relevances [T, I]; a file of another split, or in another order, shows no difference.
  """
  captions, images = np.arange(len(values)), values.shape[1]
  own = np.repeat(np.arange(images), captions_per_record)
  mean = lambda image: float(values[captions, image].mean())
  return images == 1 or mean(own) > 1.1 * mean((own + 1) % images)


def write(path: Any, rows: Iterator[np.ndarray]) -> None:
  """Writes blocks of rows [n, I] to an epath path atomically: readers see no file or all of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
  with temporary.open("wb") as f:
    for block in rows:
      f.write(block.astype("<f4", copy=False).tobytes())
  temporary.replace(path)
