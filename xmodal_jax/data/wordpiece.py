"""BERT's WordPiece and the caption clean-up of ALBEF, as TensorFlow ops inside the input graph.

Only the greedy match against the vocabulary is TensorFlow Text's; the split into words is written
here. TensorFlow Text's BERT tokenizers split differently from those of the published models:
control characters separate words, a word is limited to 100 bytes instead of 100 characters, and
special tokens are split at their brackets.

Example::

  tokenizer = BertTokenizer()
  ids, mask = tokenizer(["a cat on a mat"], length=32)   # int32 [1, 32], bool [1, 32]
  tokenizer.pieces(ids[0][mask[0]])                      # ["[CLS]", "a", "cat", ..., "[SEP]"]
"""

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from xmodal_jax.data import corrupt as corrupt_lib
from xmodal_jax.errors import UserError

CLEAN_UPS = ("none", "albef")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens, also recognised in captions. All but the last must be in the vocabulary."""

_WORD_CHARS = 100  # a longer word becomes [UNK]

# Dropped characters: control characters except tab and line ends, formatting, private use.
_DROPPED = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F\x{FFFD}\p{Cf}\p{Co}]"
_MARK = "\x01"  # placeholder of a dropped character until special tokens have been found
# Characters that are words of their own: punctuation, all ASCII symbols, Chinese characters.
_ALONE = (
  r"([!-/:-@\[-`{-~\p{P}\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}"
  r"\x{2A700}-\x{2B81F}\x{2B920}-\x{2CEAF}\x{2F800}-\x{2FA1F}])"
)
# A special token in a caption is written as its name between these two. They are of private use, so
# no caption contains them after the dropping, and neither space nor punctuation, so the word stays
# whole and is found in the vocabulary.
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"


def pre_caption(text: str, max_words: int = 0) -> str:
  """ALBEF's clean-up of a caption: lower-case, without most punctuation, cut after max_words.

  max_words 0: all. As published, a single tab or line end inside is not a space, and "<b>" stays.
  `pre_caption_ops` is the same for tensors.
  """
  text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
  text = re.sub(r"[-/]", " ", text).replace("<person>", "person")
  text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
  return " ".join(text.split(" ")[: max_words or None])


def pre_caption_ops(texts: tf.Tensor, max_words: int = 0) -> tf.Tensor:
  """`pre_caption` of strings [B] -> strings [B].

  Texts must not contain NUL, at which TensorFlow's lower-casing stops. Letters that are newer than
  TensorFlow's Unicode tables, such as U+A7C0, stay upper-case.
  """
  replace = tf.strings.regex_replace
  texts = replace(tf.strings.lower(texts, encoding="utf-8"), r"[,.'!?\"()*#:;~]", "")
  texts = replace(replace(texts, r"[-/]", " "), "<person>", "person")
  texts = replace(texts, r"[\t-\r\x1C-\x1F\x{85}\p{Z}]{2,}", " ")  # Python's \s
  texts = replace(replace(texts, r"\n+\z", ""), r"^ +| +\z", "")
  if not max_words:
    return texts
  words = tf.strings.split(texts, " ")[:, :max_words]
  return tf.strings.reduce_join(words, axis=-1, separator=" ")


def read_vocab(path: str | Path | None = None) -> list[str]:
  """Word pieces in order of id from a file with one per line; None: that of BERT base uncased.

  Raises UserError, naming the file, if it is empty or not UTF-8, if a line is empty or repeated,
  or if a special token other than [MASK] is missing.
  """
  folder = importlib.resources.files("xmodal_jax") / "vocab"
  source = Path(path) if path else folder / "bert_base_uncased_vocab.txt"
  try:
    # Not splitlines(), which splits at U+2028, a piece of the Chinese vocabulary.
    pieces = source.read_bytes().decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
  except UnicodeDecodeError as e:
    raise UserError(f"{source}: a vocabulary is UTF-8 text, one word piece per line: {e}") from e
  if pieces == [""]:
    raise UserError(f"{source}: is empty; a vocabulary has one word piece per line")
  first: dict[str, int] = {}
  for line, piece in enumerate(pieces, 1):
    if not piece:
      raise UserError(f"{source}: line {line} is empty; each line must be a word piece")
    if piece in first:
      raise UserError(
        f"{source}: lines {first[piece]} and {line} are both {piece!r}; each must differ"
      )
    first[piece] = line
  if missing := [s for s in SPECIAL[:-1] if s not in first]:
    raise UserError(
      f"{source}: no line {' or '.join(missing)}; a BERT vocabulary has {', '.join(SPECIAL)}"
    )
  return pieces


class BertTokenizer:
  """BERT's tokenizer. Rows are [CLS] ids [SEP], padded with the id of [PAD].

  Ids equal those of `transformers.BertTokenizerFast`, including special tokens written in a caption
  ("[MASK]", in capitals), which the clean-up's lower-casing removes. As there, and unlike in
  Python, a final capital sigma becomes the medial one. Some characters that are new in Unicode, or
  have changed category, since version 9 (2016) differ: recent scripts, U+166D, U+1734, U+1885 and
  U+1886. No BERT vocabulary has them, so only the number of [UNK] of a word can differ.

  Args:
    path: see `read_vocab`.
    lowercase: convert to lower case and strip accents.
    clean: "albef" applies `pre_caption` with max_words first.
    corrupt: share of word pieces that `corrupted` changes; used in training only.

  Raises:
    ValueError: for options that do not go together, and for corrupt with a vocabulary that has no
      [MASK].
  """

  def __init__(
    self,
    path: str | Path | None = None,
    *,
    lowercase: bool = True,
    clean: str = "none",
    max_words: int = 0,
    corrupt: float = 0.0,
  ):
    if clean not in CLEAN_UPS:
      raise UserError(f"no caption clean-up {clean!r}; there are {CLEAN_UPS}")
    if max_words < 0 or (max_words and clean == "none"):
      raise UserError(f"max_words {max_words} with clean {clean!r}: only 'albef' counts words")
    if not 0 <= corrupt <= 1:
      raise UserError(f"corrupt is {corrupt!r}; expected a share of word pieces, from 0 to 1")
    if corrupt and clean != "none":
      # The corrupted caption is tokenised again, and the clean-up would remove its [MASK].
      raise UserError(f"corrupt {corrupt} with clean {clean!r}: set one of them to its default")
    self._vocab = read_vocab(path)
    self.vocab_size = len(self._vocab)
    self._lowercase, self._clean, self._max_words = lowercase, clean, max_words
    index = {piece: i for i, piece in enumerate(self._vocab)}
    self.pad_id, self.unk_id, self.cls_id, self.sep_id = (index[s] for s in SPECIAL[:-1])
    if corrupt and SPECIAL[-1] not in index:
      raise UserError(
        f"{path}: corrupt is {corrupt}, but the vocabulary has no line {SPECIAL[-1]}: set corrupt "
        "to 0, or name the vocabulary that the model was trained with"
      )
    self.corrupt = corrupt
    if corrupt:
      self._corruption = corrupt_lib.Corruption(self._vocab, index[SPECIAL[-1]], corrupt)
    special = {s: self._inside(s) for s in SPECIAL if s in index}
    self._special = r"\[(" + "|".join(s[1:-1] for s in special) + r")\]"
    self._unknown = special["[UNK]"]
    self._wordpiece = tf_text.FastWordpieceTokenizer(
      [special.get(piece, piece) for piece in self._vocab],
      unknown_token=self._unknown,
      max_bytes_per_word=4 * _WORD_CHARS,
      token_out_type=tf.int32,
      no_pretokenization=True,
    )
    self._compiled: dict[tuple[int, bool], tf.types.experimental.PolymorphicFunction] = {}

  def _inside(self, special: str) -> str:
    """The word by which a special token is represented after it was found in a caption."""
    name = special[1:-1]
    return _OPEN + (name.lower() if self._lowercase else name) + _CLOSE

  def _words(self, texts: tf.Tensor) -> tf.RaggedTensor:
    """Strings [B] -> words [B, W]."""
    replace = tf.strings.regex_replace
    texts = replace(texts, r"\x00", _MARK)  # dropped later; some ops end a string at NUL
    if self._clean == "albef":
      texts = pre_caption_ops(texts, self._max_words)
    # Special tokens are searched in the caption as written: "[MA\u200bSK]" is not one.
    texts = replace(texts, _DROPPED, _MARK)
    texts = replace(texts, self._special, rf" {_OPEN}\1{_CLOSE} ")
    texts = replace(replace(texts, _MARK, ""), r"\p{Z}", " ")
    if self._lowercase:
      texts = replace(tf_text.normalize_utf8(texts, "NFD"), r"\p{Mn}", "")
      # Before lower(), which distinguishes final and medial sigma.
      texts = tf.strings.lower(replace(texts, "Σ", "σ"), encoding="utf-8")
    words = tf.strings.split(replace(texts, _ALONE, r" \1 "))
    long = tf.strings.length(words.flat_values, unit="UTF8_CHAR") > _WORD_CHARS
    return words.with_flat_values(tf.where(long, self._unknown, words.flat_values))

  def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
    """Strings [B] -> ids int32 [B, W] without [CLS], [SEP] and padding."""
    return self._wordpiece.tokenize(self._words(texts)).merge_dims(1, 2)

  def corrupted(self, texts: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
    """ZeroVL's corruption of training captions [B] -> UTF-8 strings [B], to pass to `graph`.

    keys: uint64 [B], see `order.caption_keys`. A word of more than three pieces loses its end even
    if nothing is changed, see `corrupt.Corruption`. Requires `corrupt` above 0.
    """
    return self._corruption(self._ids(texts), keys)

  def graph(
    self, texts: tf.Tensor, length: int, truncate: bool = True
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """UTF-8 strings [B] -> ids int32 [B, length], mask bool [B, length], in TensorFlow ops only.

    A caption that is too long keeps its first ids, with [SEP] in the last place. Without `truncate`
    its row of the mask is false everywhere, which marks the error for the caller: an error raised
    inside the graph would not be readable. Raises UserError for a length below 2.
    """
    if length < 2:
      raise ValueError(f"length {length} has no room for [CLS] and [SEP]")
    ids = self._ids(texts)
    count = ids.row_lengths()  # [B]
    kept = tf.minimum(count, length - 2)[:, None]  # [B, 1]
    rows = ids.to_tensor(self.pad_id, shape=[None, length - 2])
    rows = tf.pad(rows, [[0, 0], [1, 1]], constant_values=self.pad_id)  # [B, length]
    place = tf.range(length, dtype=tf.int64)[None]  # [1, length]
    rows = tf.where(place == kept + 1, self.sep_id, tf.where(place == 0, self.cls_id, rows))
    mask = place <= kept + 1
    if not truncate:
      mask &= (count <= length - 2)[:, None]
    for tensor in (rows, mask):
      tensor.set_shape([texts.shape[0], length])
    return rows, mask

  def __call__(
    self, texts: Sequence[str], length: int, truncate: bool = True
  ) -> tuple[np.ndarray, np.ndarray]:
    """Captions [B] -> ids int32 [B, length], mask bool [B, length], see `graph`.

    Without `truncate`, raises UserError for a caption that is too long.
    """
    key = (length, truncate)
    if key not in self._compiled:
      self._compiled[key] = tf.function(
        lambda texts: self.graph(texts, length, truncate),
        input_signature=[tf.TensorSpec([None], tf.string)],
      )
    strings = tf.constant([text.encode() for text in texts], tf.string)
    ids, mask = (tensor.numpy() for tensor in self._compiled[key](strings))
    for i in np.flatnonzero(~mask.any(1)):
      tokens = len(self.encode(texts[i])) + 2
      raise UserError(f"caption of {tokens} tokens does not fit {length}: {texts[i]!r}")
    return ids, mask

  def encode(self, text: str) -> list[int]:
    """Ids of the text, without [CLS], [SEP] and padding."""
    return self._ids(tf.constant([text.encode()])).values.numpy().tolist()

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """Ids -> word pieces."""
    return [self._vocab[i] for i in ids]
