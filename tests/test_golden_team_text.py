"""Caption clean-up and WordPiece against values recorded from TEAM's original code."""

import json
import re

import golden_files
import numpy as np
import pytest
import team_golden
import tensorflow as tf

from xmodal_jax.data import wordpiece


def read(*parts):
  return json.loads(golden_files.path("team", *parts).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def captions():
  return read("text", "captions.json")


@pytest.fixture(scope="module")
def length(captions):
  return team_golden.text_length(captions[0])


def tokenizer(**options):
  return wordpiece.BertTokenizer(golden_files.path("team", "text", "vocab.txt"), **options)


def clean(texts, max_words):
  """Cleaned captions; the TensorFlow and the Python form of the clean-up have to agree."""
  out = wordpiece.pre_caption_ops(tf.constant([t.encode() for t in texts]), max_words).numpy()
  out = [t.decode() for t in out]
  assert out == [wordpiece.pre_caption(t, max_words) for t in texts]
  return out


def key_of(captions, pattern):
  """(key of a recorded clean-up, the numbers of words in its name)."""
  for key in captions[0]:
    if found := re.fullmatch(pattern, key):
      return key, *map(int, found.groups())
  pytest.skip(f"no {pattern} in captions.json")


def test_clean_up(captions):
  raw = [row["raw"] for row in captions]
  column = lambda key: [row[key] for row in captions]
  key, words = key_of(captions, r"train_clean_(\d+)")
  assert clean(raw, words) == column(key)
  key, words = key_of(captions, r"eval_clean_(\d+)")
  assert (once := clean(raw, words)) == column(key)
  key, _, words = key_of(captions, r"eval_clean_(\d+)_then_(\d+)")
  assert clean(once, words) == column(key)


@pytest.mark.parametrize("once", [True, False])
def test_rows(captions, length, once):
  """Of the raw caption, and of the one that the evaluation has cleaned before."""
  source = "raw" if once else key_of(captions, r"eval_clean_(\d+)")[0]
  texts = [row[source] for row in captions]
  _, words = key_of(captions, r"train_clean_(\d+)")
  ids, mask = tokenizer(clean="albef", max_words=words)(texts, length)
  np.testing.assert_array_equal(ids, [row[f"ids_padded_{length}"] for row in captions])
  np.testing.assert_array_equal(mask, [row[f"mask_padded_{length}"] for row in captions])


def test_pieces_and_ids(captions, length):
  model = tokenizer()
  cleaned, _ = key_of(captions, r"train_clean_(\d+)")
  for row in captions:
    ids, mask = model([row[cleaned]], length)
    assert ids[mask].tolist() == row["train_ids"]
    assert model.pieces(ids[mask]) == row["tokens"]


def test_chinese():
  """Case and accents are kept, and captions are not cleaned up."""
  path = golden_files.path("team", "chinese_large", "vocab.txt")
  model, rows = wordpiece.BertTokenizer(path, lowercase=False), read("chinese_large", "texts.json")
  length = team_golden.text_length(rows[0])
  ids, mask = model([row["text"] for row in rows], length)
  np.testing.assert_array_equal(ids, [row[f"ids_padded_{length}"] for row in rows])
  assert [model.pieces(i[m]) for i, m in zip(ids, mask, strict=True)] == [
    row["tokens"] for row in rows
  ]
