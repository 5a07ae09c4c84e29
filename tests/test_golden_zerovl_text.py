"""ZeroVL's tokenizer and caption corruption against values recorded from its original code."""

import json

import golden_files
import numpy as np
import pytest
import tensorflow as tf

from xmodal_jax.data import corrupt, wordpiece

TEXT = json.loads(golden_files.path("zerovl", "text.json").read_text(encoding="utf-8"))
VOCAB = golden_files.path("zerovl", "vocab.txt")
SHARE = 0.2  # of pieces that are changed, a constant of the original


@pytest.fixture(scope="module")
def tokenizer():
  return wordpiece.BertTokenizer(VOCAB)


@pytest.fixture(scope="module")
def corruption():
  vocab = wordpiece.read_vocab(VOCAB)
  return corrupt.Corruption(vocab, vocab.index("[MASK]"), SHARE)


def check_rows(tokenizer, texts, rows):
  for length in {len(row["input_ids"]) for row in rows}:
    chosen = [i for i, row in enumerate(rows) if len(row["input_ids"]) == length]
    ids, mask = tokenizer([texts[i] for i in chosen], length)
    np.testing.assert_array_equal(ids, [rows[i]["input_ids"] for i in chosen])
    np.testing.assert_array_equal(mask, [rows[i]["attention_mask"] for i in chosen])


def test_tokenizer(tokenizer):
  rows = TEXT["tokenize"]
  assert all(len(row["input_ids"]) == row["max_length"] for row in rows)
  check_rows(tokenizer, [row["caption"] for row in rows], rows)
  for row in rows:
    assert tokenizer.pieces(tokenizer.encode(row["caption"])) == row["tokens"]


def test_corruption(tokenizer, corruption):
  """All captions in one batch, with the original's draws and replacement pieces."""
  rows, index = TEXT["corrupt"], {p: i for i, p in enumerate(wordpiece.read_vocab(VOCAB))}
  pieces = tf.ragged.constant([tokenizer.encode(row["caption"]) for row in rows], tf.int32)
  uniform, other = [], []
  for row in rows:
    chosen = iter(row["chosen_tokens"])
    uniform += row["uniform_draws"]
    replaced = [0.5 <= u / SHARE < 0.6 for u in row["uniform_draws"]]
    other += [index[next(chosen)] if r else -1 for r in replaced]
    assert next(chosen, None) is None
  changed = corruption.change(pieces, tf.constant(uniform, tf.float64), tf.constant(other))
  texts = [text.decode() for text in corruption.rebuild(changed).numpy()]
  assert texts == [row["corrupted"] for row in rows]
  check_rows(tokenizer, texts, rows)
