"""CLIP's tokenizer: the fast path for plain text, merge files, ids and masks."""

import gzip
import itertools
import json
import math
import random
import string
import time

import numpy as np
import pytest

from xmodal_jax.data import text

MERGES = "#version: 0.2\nt h\nth e</w>\na n\nan d</w>"


@pytest.fixture(scope="module")
def tokenizer():
  return text.ClipTokenizer()


def test_coco_captions_take_the_fast_path(tokenizer, shared_data):
  with gzip.open(shared_data / "coco_splits" / "dataset_coco_karpathy_test5k.json.gz") as f:
    images = json.load(f)["images"]
  captions = [s["raw"] for image in images[::3] for s in image["sentences"]]
  assert np.mean([bool(text._PLAIN.fullmatch(c)) for c in captions]) > 0.99
  for caption in captions:
    assert tokenizer.encode(caption) == tokenizer._encode_any(caption), caption


def test_fast_path_equals_the_definition_on_random_text(tokenizer):
  rng = random.Random(0)
  words = ["'s", "'LL", "n't", "<|startoftext|>", "<|EndOfText|>", "&amp;", "&#39;", "<b>", "it's"]
  alphabets = [
    string.printable,
    string.printable[:95],
    "ab'<|>&; 1",
    "'stREVElmd ",
    "aſ' é½2_\u0301",
  ]
  plain = 0
  for _ in range(3000):
    chars = rng.choice(alphabets)
    parts = [rng.choice(words) if rng.random() < 0.1 else rng.choice(chars) for _ in range(20)]
    caption = "".join(parts)
    plain += bool(text._PLAIN.fullmatch(caption))
    assert tokenizer.encode(caption) == tokenizer._encode_any(caption), caption
  assert 500 < plain < 2900  # both paths were taken


def test_plain_text_is_what_clean_up_leaves_alone():
  everything = "".join(chr(i) for i in range(128) if text._PLAIN.fullmatch(chr(i)))
  assert everything == "".join(chr(i) for i in range(32, 127) if chr(i) != "&")
  for c in everything:
    for caption in (f"x{c}y", f"{c}{c}", f"3{c} {c}'s"):
      assert text.clean(caption) == " ".join(caption.lower().split())


def test_clean_up():
  # ftfy keeps entities in texts with a tag, so these show the two rounds of unescaping.
  assert text.clean("<b> A &amp;lt; &amp;amp;lt; \u3000\u201cB\u201d\n") == '<b> a < &lt; "b"'


@pytest.mark.parametrize(
  ("caption", "ids"),
  [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("'tis", [713, 533]),
    ("café", [15304]),
    ("cafe\u0301", [15304]),
    ("1234", [272, 273, 274, 275]),
    ("½", [33613]),
    ("\u2603", [1741, 481]),
    ("!<|endoftext|>", [0, 27, 347, 40786, 4160, 91, 285]),
    ("a <|endoftext|>", [320, 49407]),
    ("", []),
  ],
)
def test_known_ids(tokenizer, caption, ids):
  assert tokenizer.encode(caption) == ids
  assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)


def test_decoding_replaces_what_is_not_utf8(tokenizer):
  assert tokenizer.decode(tokenizer.encode("a Snowman \u2603 !")) == "a snowman \u2603 ! "
  assert tokenizer.decode(tokenizer.encode("\u2603")[:1]) == "\ufffd"


def test_rows_and_mask(tokenizer):
  ids, mask = tokenizer(["hello world", "", "a ! ! ! ! !"], 5)
  np.testing.assert_array_equal(ids[0], [49406, 3306, 1002, 49407, 0])
  np.testing.assert_array_equal(ids[1], [49406, 49407, 0, 0, 0])
  np.testing.assert_array_equal(ids[2], [49406, 320, 256, 256, 49407])
  np.testing.assert_array_equal(mask.sum(1), [4, 2, 5])
  assert mask.dtype == bool and mask[0, :4].all() and ids.dtype == np.int32
  # "!" inside a word is id 0, the padding id: the mask follows the length, not the id.
  ids, mask = tokenizer(["!<|endoftext|>"], 12)
  assert ids[0, 1] == 0 and mask[0, 1] and mask.sum() == 9
  with pytest.raises(ValueError, match="caption of 6 tokens does not fit 5: 'a b c d'"):
    tokenizer(["fine", "a b c d"], 5, truncate=False)
  ids, mask = tokenizer([], 5)
  assert ids.shape == mask.shape == (0, 5)


def merged_by_definition(ranks: dict, symbols: list[str]) -> list[str]:
  """All pairs of the lowest rank from left to right, until no pair has a rank: quadratic."""
  while len(symbols) > 1:
    best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, math.inf))
    if best not in ranks:
      break
    out, i = [], 0
    while i < len(symbols):
      step = 2 if tuple(symbols[i : i + 2]) == best else 1
      out.append("".join(symbols[i : i + step]))
      i += step
    symbols = out
  return symbols


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.full)])
def test_merges_equal_their_definition(monkeypatch, tokenizer, count):
  rng = random.Random(0)
  for _ in range(count):
    alphabet = rng.choice(["ab", "theand", "a", string.ascii_lowercase])
    symbols = rng.choices(alphabet, k=rng.randint(1, 60))
    symbols[-1] += "</w>"
    want = merged_by_definition(tokenizer._rank, symbols)
    assert tokenizer._merged(symbols.copy()) == want
  # Files where a symbol can be made in several ways, and merges of its parts come after its own.
  for _ in range(count):
    known, merges = ["a", "b", "c"], []
    for _ in range(rng.randint(1, 14)):
      merges.append((rng.choice(known), rng.choice(known)))
      known.append("".join(merges[-1]))
    rng.shuffle(merges)
    monkeypatch.setattr(tokenizer, "_rank", {pair: i for i, pair in enumerate(merges)})
    symbols = rng.choices("abc", k=rng.randint(1, 20))
    want = merged_by_definition(tokenizer._rank, symbols)
    assert tokenizer._merged(symbols.copy()) == want, (merges, symbols)


def test_a_long_word_takes_no_quadratic_time(tokenizer):
  """16,000 letters took 30 s."""
  word, start = (
    "".join(random.Random(0).choices(string.ascii_lowercase, k=32_000)),
    time.monotonic(),
  )
  assert tokenizer.decode(tokenizer.encode(word)) == word + " "
  assert time.monotonic() - start < 10


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("compress", [False, True])
def test_merge_files(tmp_path, ending, compress):
  path = tmp_path / "merges"
  data = (MERGES + ending).encode()
  path.write_bytes(gzip.compress(data) if compress else data)
  short = text.make_tokenizer("clip_bpe", path=path)
  assert short.vocab_size == 512 + 4 + 2
  assert short.encode("The and") == [513, 515]
  assert text.ClipTokenizer(path, max_merges=3).vocab_size == 512 + 3 + 2


def test_bad_merge_file_is_named(tmp_path):
  path = tmp_path / "merges"
  path.write_text(MERGES + "\nthree is many")
  with pytest.raises(ValueError, match=r"merges: not two symbols on line 6: 'three is many'"):
    text.ClipTokenizer(path)
  with pytest.raises(ValueError, match=r"no tokenizer 'bpe'; there are \['bert', 'clip_bpe'"):
    text.make_tokenizer("bpe")


def test_word_cache_is_bounded(tokenizer, monkeypatch):
  monkeypatch.setattr(text, "_CACHE_WORDS", 10)
  small = text.ClipTokenizer()
  for i in range(100):
    word = f"w{i % 13}x{i}"
    assert small.encode(f"{word} again") == tokenizer.encode(f"{word} again")
    assert len(small._words) <= 10
  small.encode("x" * 1000)
  assert "x" * 1000 not in small._words
