"""BERT's tokenizer against the `tokenizers` package, and the caption clean-up against Python's."""

import random
import subprocess
import sys
import unicodedata

import child_process
import numpy as np
import pytest
import tensorflow as tf
import test_pipeline

from xmodal_jax import config
from xmodal_jax.data import inputs, pipeline, wordpiece
from xmodal_jax.data import text as text_lib

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALPHABETS = [
  "".join(map(chr, range(32, 127))),
  "abcdefg XYZ  ",
  "éÉñÑüÜçşİıßſåÅøﬁÀ ab",
  "e\u0301a\u0308o\u0302\u0323n\u0303x\u20dd ",
  "ΣσςΩά Йё Αβ.",
  "中文字国漢丁㐀豈𠀀𪜀𫠠𫤠、。，！a ",
  "한국어각힣ㄱ日本かなカナｶﾞが a",
  "😀👩\u200d👩\u200d👧🇩🇪☃\ufe0f❤ a",
  "".join(map(chr, range(33))) + "\x7f\x80\x85\x9fab",
  "\u00ad\u200b\u200c\u200d\u200e\u2060\ufeff\ufffd\ue000\U0010fff0ab",
  "\u00a0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000ab",
  "$+<=>^`|~.,!?-_'\"()[]{}#@%&*/\\:; ab",
  "«»„“”’–—…¿¡§¶·「」ab",
]
WORDS = [
  *SPECIAL, "[mask]", "[ SEP]", "[MASK", "[unused1]", "[MA\u200bSK]", "##s", "x" * 100, "x" * 101,
  "é" * 101, "한" * 60, "中" * 101, "\U0010fff0mask\U0010fff1", "<person>", "<PERSON>", "don't",
  "unaffable", "Straße", "skateboarders",
]  # fmt: skip


def hard_texts(n: int) -> list[str]:
  rng = random.Random(0)
  out = ["", " ", "\0", "a\0b", "\t\n"]
  while len(out) < n:
    pick = lambda: rng.choice(WORDS if rng.random() < 0.15 else rng.choice(ALPHABETS))
    out.append("".join(pick() for _ in range(rng.randint(1, 24))))
  return out


@pytest.fixture(scope="module")
def tokenizer():
  return wordpiece.BertTokenizer()


def vocab_file(folder, pieces, end="\n"):
  path = folder / "vocab.txt"
  path.write_bytes((end.join(pieces) + end).encode())
  return path


def expected(path, lowercase, texts, length):
  """Ids and mask of the reference, which is written in Rust."""
  tokenizers = pytest.importorskip("tokenizers")
  reference = tokenizers.BertWordPieceTokenizer(str(path), lowercase=lowercase)
  reference.enable_truncation(length)
  reference.enable_padding(length=length)
  rows = reference.encode_batch(texts)
  return np.array([r.ids for r in rows]), np.array([r.attention_mask for r in rows])


def check(path, lowercase, texts, length):
  ids, mask = wordpiece.BertTokenizer(path, lowercase=lowercase)(texts, length)
  want_ids, want_mask = expected(path, lowercase, texts, length)
  for i, caption in enumerate(texts):
    assert ids[i].tolist() == want_ids[i].tolist(), ascii(caption)
    assert mask[i].tolist() == want_mask[i].tolist(), ascii(caption)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
  """The packaged vocabulary as a file, which the reference needs."""
  return vocab_file(tmp_path_factory.mktemp("vocab"), wordpiece.read_vocab())


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("length", [12, 64])
def test_hard_texts(packaged, lowercase, length):
  check(packaged, lowercase, hard_texts(1500), length)


@pytest.mark.parametrize("lowercase", [True, False])
def test_chinese_vocabulary(shared_data, lowercase):
  path = shared_data / "vocab" / "bert_base_chinese_vocab.txt"
  check(path, lowercase, [*hard_texts(500), "一个穿着蓝色连衣裙的Woman骑着自行车。"], 48)
  assert wordpiece.BertTokenizer(path).vocab_size == 21128  # a piece of it is U+2028


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_of_unicode_3(packaged, lowercase):
  """All characters that a caption can contain; newer Unicode tables differ (see the class)."""
  changed = {0x166D, 0x1734, 0x1885, 0x1886}
  known = lambda c: unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")
  chars = [chr(c) for c in range(0x30000) if c not in changed and known(c)]
  assert len(chars) > 90000
  # Between letters: splits, is dropped, or belongs to the word.
  texts = ["a".join(chars[i : i + 60]) for i in range(0, len(chars), 60)]
  check(packaged, lowercase, texts, 128)


def test_known_ids(tokenizer):
  ids, mask = tokenizer(["A man's café, skateboarding!", "", "dog [MASK]cat zzgxq☃"], 12)
  assert ids.dtype == np.int32 and mask.dtype == bool
  pieces = " ".join(tokenizer.pieces(ids[0]))
  assert pieces == "[CLS] a man ' s cafe , skate ##boarding ! [SEP] [PAD]"
  assert ids[1].tolist() == [101, 102] + [0] * 10 and mask[1].tolist() == [True] * 2 + [False] * 10
  assert tokenizer.pieces(ids[2][:6]) == ["[CLS]", "dog", "[MASK]", "cat", "[UNK]", "[SEP]"]
  assert ids[2][2] == 103
  assert (tokenizer.vocab_size, tokenizer.pad_id) == (30522, 0)
  assert tokenizer.encode("a man") == [1037, 2158]


def test_pieces_are_those_of_the_file(tmp_path):
  """Also special tokens, which are matched in another form; ids are in the file's order."""
  pieces = ["[SEP]", "dog", "[MASK]", "##s", "[UNK]", "[CLS]", "[PAD]"]
  for end in ("\n", "\r\n"):
    small = wordpiece.BertTokenizer(vocab_file(tmp_path, pieces, end))
    ids, mask = small(["dogs [SEP] cat"], 8)
    assert small.pieces(ids[0]) == [
      "[CLS]", "dog", "##s", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[PAD]",
    ]  # fmt: skip
    assert small.pad_id == 6 and mask.sum() == 6
    assert small.pieces(range(7)) == pieces


def test_graph_is_call(tokenizer):
  texts = hard_texts(300)
  for length, truncate in ((2, True), (16, True), (4096, False)):
    ids, mask = tokenizer(texts, length, truncate)
    dataset = tf.data.Dataset.from_tensor_slices([t.encode() for t in texts]).batch(50)
    dataset = dataset.map(lambda x, n=length, cut=truncate: tokenizer.graph(x, n, cut))
    assert [tuple(spec.shape) for spec in dataset.element_spec] == [(None, length)] * 2
    rows = list(dataset.as_numpy_iterator())
    np.testing.assert_array_equal(np.concatenate([r[0] for r in rows]), ids)
    np.testing.assert_array_equal(np.concatenate([r[1] for r in rows]), mask)
    assert (ids[:, 0] == 101).all() and mask[:, :2].all()
  ids, mask = tokenizer([], 5)
  assert ids.shape == mask.shape == (0, 5)
  with pytest.raises(ValueError, match="length 1 has no room"):
    tokenizer(["a"], 1)


def test_too_long(tokenizer):
  texts = ["a b c", "a b c d", ""]
  with pytest.raises(ValueError, match="caption of 6 tokens does not fit 5: 'a b c d'"):
    tokenizer(texts, 5, truncate=False)
  _, mask = tokenizer.graph(tf.constant(texts), 5, False)
  np.testing.assert_array_equal(mask.numpy().sum(1), [5, 0, 2])
  ids, mask = tokenizer(texts, 5)
  assert ids[1].tolist() == ids[0].tolist() and mask.sum(1).tolist() == [5, 5, 2]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty; a vocabulary has one word piece per line"),
    (b"\n", "is empty; a vocabulary has one word piece per line"),
    (b"[PAD]\n[UNK]\ndog\n[SEP]\n", r"no line \[CLS\]; a BERT vocabulary has \[PAD\]"),
    (b"[UNK]\ndog\n[SEP]\n", r"no line \[PAD\] or \[CLS\]"),
    (b"[PAD]\n[UNK]\ndog\n[CLS]\n[SEP]\ndog\n", "lines 3 and 6 are both 'dog'"),
    (b"[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n", "line 3 is empty"),
    (b"[PAD]\n\xff\n", "is UTF-8 text"),
  ],
)
def test_bad_vocabulary_is_named(tmp_path, content, message):
  path = tmp_path / "words.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"words\.txt: .*" + message):
    wordpiece.BertTokenizer(path)


def test_bad_options(tmp_path):
  with pytest.raises(ValueError, match="no caption clean-up 'alb'"):
    wordpiece.BertTokenizer(clean="alb")
  with pytest.raises(ValueError, match="only 'albef' counts words"):
    wordpiece.BertTokenizer(max_words=30)
  with pytest.raises(ValueError, match="max_words -1"):
    wordpiece.BertTokenizer(clean="albef", max_words=-1)
  for share in (-0.1, 1.1, float("nan")):
    with pytest.raises(ValueError, match=r"corrupt is .* expected a share"):
      wordpiece.BertTokenizer(corrupt=share)
  with pytest.raises(ValueError, match=r"corrupt 0\.2 with clean 'albef'"):
    wordpiece.BertTokenizer(clean="albef", corrupt=0.2)
  path = vocab_file(tmp_path, SPECIAL[:-1])
  wordpiece.BertTokenizer(path)
  with pytest.raises(ValueError, match=r"vocab\.txt: corrupt is 0\.2, but .* no line \[MASK\]"):
    wordpiece.BertTokenizer(path, corrupt=0.2)


def clean_ops(texts, max_words):
  out = wordpiece.pre_caption_ops(tf.constant([t.encode() for t in texts]), max_words)
  return [t.decode() for t in out.numpy()]


@pytest.mark.parametrize("max_words", [0, 1, 3, 30])
def test_clean_up_in_the_graph_is_pythons(max_words):
  texts = [t.replace("\0", "") for t in hard_texts(3000)]
  rng = random.Random(1)
  parts = ["<person>", "<PERSON>", "-", "/", "\n", "\t", " ", "\x1c", "\x85", "\u3000", "ab", "~:"]
  texts += ["".join(rng.choice(parts) for _ in range(rng.randint(0, 12))) for _ in range(3000)]
  texts += [f"a{c}b{c}{c}d{c}" for c in map(chr, range(1, 0x2C00))]
  for caption, got in zip(texts, clean_ops(texts, max_words), strict=True):
    assert got == wordpiece.pre_caption(caption, max_words), ascii(caption)


def test_clean_up_rules():
  clean = wordpiece.pre_caption
  assert clean("A-b/C, <Person>'s #1 ~ (x)!") == "a b c persons 1 x"
  assert clean("\ta\tb \t c\nd\n\n") == "\ta\tb c\nd"
  assert clean("a b\tc d e", 3) == "a b\tc d"
  assert clean("") == clean(" \n -") == ""
  both = wordpiece.BertTokenizer(clean="albef", max_words=2)
  assert both.pieces(both.encode("Red-hot dog")) == ["red", "hot"]
  # Lower-cased first, so this is not a special token.
  assert both.pieces(both.encode("[SEP]")) == ["[", "sep", "]"]
  assert both.encode("a\0b dog") == both.encode("ab dog") != both.encode("a dog")


def section(**changes):
  c = config.base().text
  c.update(changes)
  return c


def test_config(tmp_path):
  assert isinstance(text_lib.tokenizer_from(section()), text_lib.ClipTokenizer)
  assert text_lib.tokenizer_from(section(max_merges=6000)).vocab_size == 512 + 6000 + 2
  path = vocab_file(tmp_path, [*SPECIAL, "A", "a", "b"])
  cased = text_lib.tokenizer_from(section(tokenizer="bert", vocab=str(path), lowercase=False))
  assert cased.vocab_size == 8 and cased.encode("A a") == [5, 6]
  cut = text_lib.tokenizer_from(
    section(tokenizer="bert", vocab=str(path), clean="albef", max_words=1)
  )
  assert cut.encode("A. b") == [6]
  with pytest.raises(ValueError, match=r"config\.text\.vocab: there is no file none\.txt"):
    text_lib.tokenizer_from(section(tokenizer="bert", vocab="none.txt"))
  with pytest.raises(ValueError, match=r"text\.clean is 'albef', but the tokenizer 'clip_bpe' has"):
    text_lib.tokenizer_from(section(clean="albef"))
  assert text_lib.tokenizer_from(section(tokenizer="bert", corrupt=0.2)).corrupt == 0.2
  with pytest.raises(ValueError, match=r"text\.corrupt is 0\.2, but the tokenizer 'clip_bpe' has"):
    text_lib.tokenizer_from(section(corrupt=0.2))
  with pytest.raises(ValueError, match=r"text\.max_merges is 9, but the tokenizer 'bert' has"):
    text_lib.tokenizer_from(section(tokenizer="bert", max_merges=9))
  with pytest.raises(ValueError, match=r"no tokenizer 'bort'; there are \['bert', 'clip_bpe'\]"):
    text_lib.tokenizer_from(section(tokenizer="bort", clean="albef"))


def test_text_alone_does_not_import_tensorflow():
  code = "import sys, xmodal_jax.data.text; sys.exit('tensorflow' in sys.modules)"
  command, env = [sys.executable, "-c", code], child_process.environment()
  assert subprocess.run(command, env=env).returncode == 0


def check_texts(batch, split, tokenizer):
  """text_ids of every row are those of the caption with its caption_id."""
  captions = [c for i in range(len(split)) for c in split.read(i).captions]
  texts = [captions[i] if i >= 0 else "" for i in batch["caption_id"]]
  ids, mask = tokenizer(texts, test_pipeline.LENGTH)
  np.testing.assert_array_equal(batch["text_ids"], ids)
  np.testing.assert_array_equal(batch["text_mask"], mask)
  assert batch["text_ids"].dtype == np.int32 and batch["text_mask"].dtype == bool


def test_batches(tokenizer, monkeypatch):
  split = test_pipeline.FakeSplit(n=11, captions=lambda i: i % 3)

  class GraphOnly(wordpiece.BertTokenizer):
    def __call__(self, *args):
      raise AssertionError("called from Python")

  for batch in test_pipeline.take(3, split, tokenizer=GraphOnly(), batch_size=5):
    check_texts(batch, split, tokenizer)
  batches = list(test_pipeline.texts_of(split, tokenizer=GraphOnly(), batch_size=4, threads=2))
  assert len(batches) == 3 and sum(b["valid"].sum() for b in batches) == 10
  for batch in batches:
    check_texts(batch, split, tokenizer)


def test_too_long_captions_end_the_stream(tokenizer):
  for kind in (tokenizer, text_lib.ClipTokenizer()):
    split = test_pipeline.FakeSplit(n=8)
    kw = {"tokenizer": kind, "truncate": False}
    assert len(test_pipeline.take(1, split, **kw)) == 1
    assert len(list(test_pipeline.texts_of(split, **kw))) == 5
    kw["text_length"] = 4  # "number 0 of 1" and two more
    with pytest.raises(ValueError, match=r"caption of 6 tokens does not fit 4: 'number \d of \d'"):
      list(test_pipeline.texts_of(split, **kw))
    with pytest.raises(ValueError, match="caption of 6 tokens does not fit 4"):
      next(
        pipeline.train_batches(
          split, batch_size=8, image_transform=test_pipeline.TRANSFORM, seed=0, **kw
        )
      )


def test_a_run_reads_bert_ids(tiny_data):
  import tiny

  c = tiny.config(tiny_data, text__tokenizer="bert", text__max_merges=0, model__text__vocab=30522)
  source = inputs.from_config(c)
  (batch,) = [b for _, b in zip(range(1), source.train(0), strict=False)]
  offsets = np.cumsum([0, *source.split("train").captions_per_record])
  for row, image, caption in zip(
    batch["text_ids"], batch["image_id"], batch["caption_id"], strict=True
  ):
    text = source.split("train").read(int(image)).captions[caption - offsets[image]]
    np.testing.assert_array_equal(row, source.tokenizer([text], 24)[0][0])
  assert sum(b["valid"].sum() for b in source.texts(source.split("val"))) > 12
  c.text.truncate, c.text.length = False, 4
  with pytest.raises(ValueError, match="tokens does not fit 4"):
    next(inputs.from_config(c).train(0))
  c.model.text.vocab = 30521
  with pytest.raises(ValueError, match="the tokenizer 'bert' has 30522 ids"):
    inputs.from_config(c)
