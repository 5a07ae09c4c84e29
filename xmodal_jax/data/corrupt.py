"""ZeroVL's corruption of training captions, as TensorFlow ops on word pieces.

Some pieces of a caption are masked, replaced or deleted. The rest are joined into a string, which
is tokenised like any other caption.
"""

from collections.abc import Sequence

import tensorflow as tf

MASKED, REPLACED = 0.5, 0.6  # bounds of v = u / share: masked below the first, then replaced
FOLLOWERS = 2  # ## pieces that a word keeps

_GAMMA = 0x9E3779B97F4A7C15  # of SplitMix64


class Corruption:
  """Corrupts captions, for one vocabulary.

  vocab: word pieces in order of id. mask_id: the id of [MASK]. share: fraction of pieces to change.
  """

  def __init__(self, vocab: Sequence[str], mask_id: int, share: float):
    self.size, self.mask_id, self.share = len(vocab), mask_id, share
    follows = [piece.startswith("##") for piece in vocab]
    self._follows = tf.constant(follows)
    # The string that a kept piece appends.
    spelling = [p[2:] if f else f" {p}" for p, f in zip(vocab, follows, strict=True)]
    self._spelling = tf.constant([s.encode() for s in spelling])

  def __call__(self, pieces: tf.RaggedTensor, keys: tf.Tensor) -> tf.Tensor:
    """Pieces int32 [B, W] and keys uint64 [B] -> strings [B] to be tokenised."""
    uniform, word = draws(pieces, keys)
    other = tf.cast(word % tf.constant(self.size, tf.uint64), tf.int32)
    return self.rebuild(self.change(pieces, uniform, other))

  def change(
    self, pieces: tf.RaggedTensor, uniform: tf.Tensor, other: tf.Tensor
  ) -> tf.RaggedTensor:
    """Masks 0.5 share of the pieces [B, W], replaces 0.1 share, deletes 0.4 share -> [B, W'].

    uniform: float64 [N], decides for each of the N pieces. other: int32 [N], the possible
    replacements: any entry of the vocabulary, including special tokens and ## pieces.
    """
    v = uniform / self.share
    ids = tf.where(v < REPLACED, other, pieces.flat_values)
    ids = tf.where(v < MASKED, self.mask_id, ids)
    return _kept(pieces, ids, (v < REPLACED) | (uniform >= self.share))

  def rebuild(self, pieces: tf.RaggedTensor) -> tf.Tensor:
    """Pieces [B, W] -> strings [B] of words with single spaces between them.

    As in the published program, a piece without ## starts a word and at most the two ## pieces
    after it continue it; none continues [MASK]. Further ## pieces are dropped, so a word of more
    than three pieces loses its end even if nothing was changed.
    """
    ids, rows = pieces.flat_values, pieces.value_rowids()
    follows = tf.gather(self._follows, ids)
    keep, taker = ~follows, ~follows & (ids != self.mask_id)
    inside = follows & (rows == _shifted(rows, -1))  # the previous piece is of the same caption
    for _ in range(FOLLOWERS):
      taker = inside & _shifted(taker, False)
      keep |= taker
    strings = _kept(pieces, tf.gather(self._spelling, ids), keep)
    return tf.strings.strip(tf.strings.reduce_join(strings, axis=-1))


def draws(pieces: tf.RaggedTensor, keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Two random numbers for each piece, a function of its caption's key and its position in it.

  pieces [B, W], N in all; keys uint64 [B]. Returns uniforms in [0, 1), float64 [N], and words,
  uint64 [N]: alternating outputs of SplitMix64 (Steele, Lea, Flood 2014) seeded by the key.
  """
  rows = pieces.value_rowids()
  place = tf.range(tf.size(rows, tf.int64)) - tf.gather(pieces.row_starts(), rows)
  turn, key = 2 * tf.cast(place, tf.uint64), tf.gather(keys, rows)
  first, second = (_mix(key + (turn + _word(i)) * _word(_GAMMA)) for i in (1, 2))
  return tf.cast(_right(first, 11), tf.float64) * 2.0**-53, second


def _kept(pieces: tf.RaggedTensor, values: tf.Tensor, keep: tf.Tensor) -> tf.RaggedTensor:
  """The values [N] of pieces [B, W] for which keep, bool [N], is true, in their rows."""
  rows = tf.boolean_mask(pieces.value_rowids(), keep)
  values = tf.boolean_mask(values, keep)
  return tf.RaggedTensor.from_value_rowids(values, rows, pieces.nrows(), validate=False)


def _shifted(x: tf.Tensor, first: int | bool) -> tf.Tensor:
  """[N] -> [N]: shifted by one place, with `first` in front."""
  return tf.concat([tf.constant([first], x.dtype), x], 0)[: tf.size(x)]


def _word(x: int) -> tf.Tensor:
  return tf.constant(x, tf.uint64)


def _right(x: tf.Tensor, bits: int) -> tf.Tensor:
  return tf.bitwise.right_shift(x, _word(bits))


def _mix(x: tf.Tensor) -> tf.Tensor:
  """`order._mix` of tensors."""
  x = tf.bitwise.bitwise_xor(x, _right(x, 30)) * _word(0xBF58476D1CE4E5B9)
  x = tf.bitwise.bitwise_xor(x, _right(x, 27)) * _word(0x94D049BB133111EB)
  return tf.bitwise.bitwise_xor(x, _right(x, 31))
