"""Corruption of captions: frequencies, random numbers and the resulting strings."""

import math

import numpy as np
import pytest
import tensorflow as tf
import test_pipeline

from xmodal_jax.data import corrupt, order, wordpiece

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "'", "##s", "##ing", "##er"]
MASK = VOCAB.index("[MASK]")
MASK_64 = 2**64 - 1


def corruption(share: float = 0.2) -> corrupt.Corruption:
  return corrupt.Corruption(VOCAB, MASK, share)


def rows(n: int, seed: int = 0) -> list[list[int]]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, len(VOCAB), rng.integers(0, 12)).tolist() for _ in range(n)]


def ragged(ids: list[list[int]]) -> tf.RaggedTensor:
  return tf.ragged.constant(ids, tf.int32)


def split_mix(key: int, count: int) -> list[int]:
  """java.util.SplittableRandom in Python integers."""
  out = []
  for _ in range(count):
    key = (key + 0x9E3779B97F4A7C15) & MASK_64
    z = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK_64
    out.append(z ^ z >> 31)
  return out


def test_draws():
  """A function of the caption's key alone, not of its place in the batch or its neighbours."""
  assert split_mix(0, 1) == [0xE220A8397B1DCDAF]  # published
  lengths = [3, 0, 5, 1]
  keys = np.array([7, 1, 2**64 - 5, 0], np.uint64)
  pieces = ragged([[5] * n for n in lengths])
  uniform, word = (x.numpy() for x in corrupt.draws(pieces, tf.constant(keys)))
  assert uniform.dtype == np.float64 and word.dtype == np.uint64
  want = [z for k, n in zip(keys.tolist(), lengths, strict=True) for z in split_mix(k, 2 * n)]
  assert word.tolist() == want[1::2]
  assert uniform.tolist() == [(z >> 11) / 2**53 for z in want[::2]]


def test_keys():
  """Keys differ by (seed, epoch, position), and from those of other purposes."""
  made = [
    order.caption_keys(np.arange(50), seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))
  ]
  assert made[0].dtype == np.uint64 and len(np.unique(made)) == 150
  np.testing.assert_array_equal(order.caption_keys(np.array([9, 3]), 0, 1), made[1][[9, 3]])


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_frequencies(share):
  """Half of the share is masked, a tenth replaced, the rest deleted: within 3 sigma."""
  n, width = 20000, 10
  cat = VOCAB.index("cat")
  keys = tf.constant(order.caption_keys(np.arange(n), 5, 6))
  pieces = tf.RaggedTensor.from_tensor(tf.fill([n, width], cat))
  made, asked = corruption(share), []
  change = made.change
  made.change = lambda pieces, uniform, other: asked.append(change(pieces, uniform, other))
  made.rebuild = lambda pieces: None
  made(pieces, keys)
  ids = asked[0].flat_values.numpy()
  total, counts = n * width, np.bincount(ids, minlength=len(VOCAB))
  near = lambda count, p: abs(count - total * p) <= 3 * math.sqrt(total * p * (1 - p))
  each = 0.1 * share / len(VOCAB)
  assert near(total - len(ids), 0.4 * share)
  assert near(counts[MASK], 0.5 * share + each)
  assert near(counts[cat], 1 - share + each)
  assert all(near(counts[i], each) for i in range(len(VOCAB)) if i not in (MASK, cat))


def slow(ids: list[int]) -> str:
  """`rebuild` in plain Python, for one caption."""
  words, i = [], 0
  while i < len(ids):
    piece = VOCAB[ids[i]]
    i += 1
    if piece.startswith("##"):
      continue
    end = i
    while piece != "[MASK]" and end < min(i + 2, len(ids)) and VOCAB[ids[end]].startswith("##"):
      end += 1
    words.append(piece + "".join(VOCAB[j][2:] for j in ids[i:end]))
    i = end
  return " ".join(words)


def test_rebuild():
  ids = [*rows(2000), [], [8], [5], [8, 9], [5, 8, 9, 10, 8], [4, 8], [5, 4, 8, 8]]
  got = [text.decode() for text in corruption().rebuild(ragged(ids)).numpy()]
  assert got == [slow(row) for row in ids]
  assert got[-3:] == ["catsing", "[MASK]", "cat [MASK]"]


def test_nothing_to_corrupt():
  """Words are cut after three pieces even so."""
  tokenizer = wordpiece.BertTokenizer(corrupt=1e-12)
  texts = ["", "A Man's café, skateboarding!", "antidisestablishmentarianism [MASK]ed"]
  keys = tf.constant(np.arange(3), tf.uint64)
  got = [t.decode() for t in tokenizer.corrupted(tf.constant(texts), keys).numpy()]
  assert got == ["", "a man ' s cafe , skateboarding !", "antidisest [MASK] ed"]
  assert tokenizer.pieces(tokenizer.encode(texts[2]))[:4] == ["anti", "##dis", "##est", "##ab"]


def take(n, tokenizer, **kw):
  split = test_pipeline.FakeSplit(n=16)  # 80 captions, "number 0 of 1"
  return test_pipeline.take(n, split, tokenizer=tokenizer, batch_size=20, **kw)


def test_batches():
  """Only training corrupts, independently of threads, processes and restarts, but not of epochs."""
  tokenizer, plain = wordpiece.BertTokenizer(corrupt=0.2), wordpiece.BertTokenizer()
  whole, clean = take(12, tokenizer), take(12, plain)
  pairs = zip(whole, clean, strict=True)
  differs = np.array([(a["text_ids"] != b["text_ids"]).any(1) for a, b in pairs])
  assert 0.4 < differs.mean() < 0.75  # of captions of 4 pieces, 1 - 0.8^4 = 0.59
  for a, b in zip(whole, clean, strict=True):
    for key in ("image", "image_id", "caption_id"):
      np.testing.assert_array_equal(a[key], b[key])
  test_pipeline.assert_same(whole[3:6], take(3, tokenizer, step=3, threads=1))
  parts = [take(2, tokenizer, step=5, rows=range(10 * p, 10 * p + 10)) for p in range(2)]
  joined = [test_pipeline.join(pair) for pair in zip(*parts, strict=True)]
  test_pipeline.assert_same(whole[5:7], joined)
  epochs = [test_pipeline.join(whole[i : i + 4]) for i in (0, 4, 8)]
  texts = [e["text_ids"][np.argsort(e["caption_id"])] for e in epochs]
  assert (texts[0] != texts[1]).any() and (texts[1] != texts[2]).any()

  split = test_pipeline.FakeSplit(n=4)
  test_pipeline.assert_same(
    *(list(test_pipeline.texts_of(split, tokenizer=t)) for t in (tokenizer, plain))
  )


def test_too_long():
  """The length is checked after corruption, and the error quotes the corrupted caption."""
  tokenizer = wordpiece.BertTokenizer(corrupt=1e-12)
  with pytest.raises(ValueError, match="caption of 6 tokens does not fit 5: 'number"):
    split = test_pipeline.FakeSplit(n=8)
    batches = test_pipeline.pipeline.train_batches(
      split,
      batch_size=8,
      image_transform=test_pipeline.TRANSFORM,
      tokenizer=tokenizer,
      text_length=5,
      seed=0,
      truncate=False,
    )
    next(batches)
