"""Caption clean-up and WordPiece against values recorded from TEAM's original code."""

import json

import golden_files
import numpy as np
import pytest
import tensorflow as tf

from xmodal_jax.data import wordpiece

LENGTH = 30


def read(*parts):
  return json.loads(golden_files.path("team", *parts).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def captions():
  return read("text", "captions.json")


def tokenizer(**options):
  return wordpiece.BertTokenizer(golden_files.path("team", "text", "vocab.txt"), **options)


def clean(texts, max_words):
  """Both forms of the clean-up, which must agree."""
  out = wordpiece.pre_caption_ops(tf.constant([t.encode() for t in texts]), max_words).numpy()
  out = [t.decode() for t in out]
  assert out == [wordpiece.pre_caption(t, max_words) for t in texts]
  return out


def test_clean_up(captions):
  raw = [row["raw"] for row in captions]
  in_data_set = clean(raw, 80)
  assert clean(raw, LENGTH) == [row["train_clean_30"] for row in captions]
  assert in_data_set == [row["eval_clean_80"] for row in captions]
  assert clean(in_data_set, LENGTH) == [row["eval_clean_80_then_30"] for row in captions]


@pytest.mark.parametrize("once", [True, False])
def test_rows(captions, once):
  """From the raw caption, and from the one that evaluation has cleaned before."""
  texts = [row["raw" if once else "eval_clean_80"] for row in captions]
  ids, mask = tokenizer(clean="albef", max_words=LENGTH)(texts, LENGTH)
  np.testing.assert_array_equal(ids, [row["ids_padded_30"] for row in captions])
  np.testing.assert_array_equal(mask, [row["mask_padded_30"] for row in captions])


def test_pieces_and_ids(captions):
  model = tokenizer()
  for row in captions:
    ids, mask = model([row["train_clean_30"]], LENGTH)
    assert ids[mask].tolist() == row["train_ids"]
    assert model.pieces(ids[mask]) == row["tokens"]


def test_chinese():
  """Case and accents are kept, and captions are not cleaned up."""
  path = golden_files.path("team", "chinese_large", "vocab.txt")
  model, rows = wordpiece.BertTokenizer(path, lowercase=False), read("chinese_large", "texts.json")
  ids, mask = model([row["text"] for row in rows], LENGTH)
  np.testing.assert_array_equal(ids, [row["ids_padded_30"] for row in rows])
  assert [model.pieces(i[m]) for i, m in zip(ids, mask, strict=True)] == [
    row["tokens"] for row in rows
  ]
