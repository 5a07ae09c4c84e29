"""Batches do not depend on threads and restarts, visit each sample once and count bad records.

Also transforms that the golden vectors do not cover.
"""

import collections
import io
import itertools
import logging
import pathlib
import subprocess
import sys
import threading
import time

import child_process
import numpy as np
import pytest
from PIL import Image

from xmodal_jax.data import augment as augment_lib
from xmodal_jax.data import image, order, pipeline, records, text
from xmodal_jax.data.preparing import builder

SIZE, LENGTH = 8, 12
TRANSFORM = image.clip_transform(SIZE)
TOKENIZER = text.ClipTokenizer()


def encoded(i: int, form: str = "PNG", size: tuple[int, int] = (14, 10)) -> bytes:
  pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, form)
  return out.getvalue()


class FakeSplit:
  """Images in memory. unreadable: read raises BadRecordError; broken: the file is truncated."""

  name, fingerprint, class_names = "fake", "none", ()

  def __init__(self, n=30, captions=lambda i: 5, unreadable=(), broken=(), delay=0.0):
    self.captions_per_record = np.array([captions(i) for i in range(n)], np.int32)
    self.unreadable, self.broken, self.delay = unreadable, broken, delay
    self.reads = collections.Counter()

  def __len__(self):
    return len(self.captions_per_record)

  def read(self, i):
    self.reads[i] += 1
    time.sleep(self.delay * (i % 5) / 5)  # neighbours finish out of order
    if i in self.unreadable:
      raise records.BadRecordError(self.name, i, "shard", "crc differs")
    data = encoded(i)
    return records.Record(
      image=data[: len(data) // 2] if i in self.broken else data,
      image_id=2**40 + i,
      filename=f"{i}.png",
      captions=tuple(f"number {j} of {i}" for j in range(self.captions_per_record[i])),
      caption_ids=(),
    )


def stream(split, **kw):
  kw = {"batch_size": 8, "image_transform": TRANSFORM, "tokenizer": TOKENIZER, "seed": 3, **kw}
  return pipeline.train_batches(split, text_length=LENGTH, **kw)


def take(n, split, **kw):
  batches = stream(split, **kw)
  out = list(itertools.islice(batches, n))
  batches.close()
  return out


def join(batches):
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def assert_same(one, two):
  assert len(one) == len(two)
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for k in a:
      np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def check_rows(split, batch):
  """Each row holds the image and the caption that its ids name."""
  offsets = order.caption_offsets(split.captions_per_record)
  for i, record in enumerate(batch["image_id"]):
    j = batch["caption_id"][i] - offsets[record]
    assert 0 <= j < split.captions_per_record[record]
    np.testing.assert_array_equal(batch["image"][i], image.load(encoded(int(record)), TRANSFORM))
    ids, mask = TOKENIZER([f"number {j} of {record}"], LENGTH)
    np.testing.assert_array_equal(batch["text_ids"][i], ids[0])
    np.testing.assert_array_equal(batch["text_mask"][i], mask[0])


def test_fields_and_content():
  split = FakeSplit(captions=lambda i: i % 4 + 1)
  (batch,) = take(1, split)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "image": ((8, SIZE, SIZE, 3), "uint8"),
    "text_ids": ((8, LENGTH), "int32"),
    "text_mask": ((8, LENGTH), "bool"),
    "image_id": ((8,), "int32"),
    "caption_id": ((8,), "int32"),
  }
  check_rows(split, batch)


def test_an_epoch_visits_every_caption_once():
  split = FakeSplit(n=16, captions=lambda i: i % 2 + 1)  # 24 captions: 3 batches of 8, no remainder
  batches = take(6, split)
  epochs = [join(part)["caption_id"] for part in (batches[:3], batches[3:])]
  for ids in epochs:
    np.testing.assert_array_equal(np.sort(ids), np.arange(24))
  assert (epochs[0] != epochs[1]).any()


def test_one_caption_of_each_image():
  split = FakeSplit(n=16)
  batches = take(4, split, captions="one")
  for part in (batches[:2], batches[2:]):
    np.testing.assert_array_equal(np.sort([b["image_id"] for b in part], None), np.arange(16))
  one, two = (np.sort(join(part)["caption_id"]) for part in (batches[:2], batches[2:]))
  assert (one != two).sum() > 5  # sorted by caption is sorted by image: 4 in 5 change


@pytest.mark.parametrize("augment", [None, augment_lib.build(TRANSFORM, crop="random", flip=0.5)])
def test_restarts_threads_and_processes_do_not_change_the_data(augment):
  # 30 images x 5 = 150 captions: 18 whole batches in an epoch, so 24 cross into the next.
  kw = {"max_bad_fraction": 0.2, "augment": augment}
  split = FakeSplit(unreadable={4}, broken={9, 20}, delay=0.01)
  whole = take(24, split, threads=4, **kw)
  assert_same(whole[:6], take(6, split, threads=1, **kw))
  for step in (1, 17, 18, 20):
    assert_same(whole[step:][:3], take(len(whole[step:][:3]), split, step=step, threads=3, **kw))
  parts = [take(3, split, rows=(2 * p, 2 * p + 1), step=16, **kw) for p in range(4)]
  assert_same(whole[16:19], [join(rows) for rows in zip(*parts, strict=True)])
  apart = take(3, split, rows=[0, 1, 4, 5], step=16, **kw)  # rows of one host of a 4x4 slice
  assert_same([{k: v[[0, 1, 4, 5]] for k, v in b.items()} for b in whole[16:19]], apart)


def test_augmentation_is_drawn_per_position():
  split = FakeSplit(n=1, captions=lambda i: 16)
  augment = augment_lib.build(TRANSFORM, crop="random", crop_scale=(0.1, 0.5))
  one, two = take(2, split, augment=augment)
  seen = {row.tobytes() for b in (one, two) for row in b["image"]}
  assert len(seen) == 16  # one image, 16 captions, 16 crops


def test_order_can_be_given():
  chosen = np.arange(20)[::-1]
  batches = take(3, FakeSplit(), order=lambda epoch: (chosen + epoch) % 150)
  assert batches[0]["caption_id"].tolist() == chosen[:8].tolist()
  assert batches[1]["caption_id"].tolist() == chosen[8:16].tolist()
  assert batches[2]["caption_id"].tolist() == (chosen[:8] + 1).tolist()
  with pytest.raises(ValueError, match=r"must be in \[0, 150\)"):
    take(1, FakeSplit(), order=lambda epoch: np.arange(150, 160))


def test_bad_records_are_replaced_and_reported_once(caplog):
  split, seen = FakeSplit(unreadable={4}, broken={9, 20}), []
  with caplog.at_level(logging.WARNING):
    batches = take(36, split, max_bad_fraction=0.1, on_bad=lambda *args: seen.append(args))
  for batch in batches[:4]:
    check_rows(split, batch)
  assert not {4, 9, 20} & {i for b in batches for i in b["image_id"].tolist()}
  assert sorted(i for i, _ in seen) == [4, 9, 20]
  lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("bad")]
  assert len(lines) == 3
  assert any("record 4 of split 'fake' in shard: crc differs" in line for line in lines)
  assert any("record 9 (9.png) of split 'fake': OSError" in line for line in lines)
  # Only rows with a bad record differ.
  good = take(36, FakeSplit())
  for a, b in zip(batches, good, strict=True):
    same = ~np.isin(b["image_id"], [4, 9, 20])
    np.testing.assert_array_equal(a["caption_id"][same], b["caption_id"][same])
    assert (a["image_id"] != b["image_id"])[~same].all()


@pytest.mark.parametrize("threads", [1, 4])
def test_too_many_bad_records_end_the_stream(threads):
  split = FakeSplit(broken=set(range(0, 30, 3)))
  batches = stream(split, max_bad_fraction=0.1, threads=threads)
  with pytest.raises(pipeline.DataError) as error:
    for _ in range(40):
      next(batches)
  message = str(error.value)
  assert "4 of the 30 records of split 'fake' are bad" in message or threads > 1
  assert (
    "config.data.max_bad_fraction = 0.1" in message and ".png) of split 'fake': OSError" in message
  )
  with pytest.raises(StopIteration):
    next(batches)
  # The default bound allows no bad record in such a small split.
  with pytest.raises(pipeline.DataError, match="1 of the 30"):
    take(40, FakeSplit(broken={7}), threads=1)
  with pytest.raises(pipeline.DataError, match="in a row are bad"):
    take(1, FakeSplit(n=10, unreadable=range(10)), max_bad_fraction=1.0)


def test_messages_name_the_keys_of_the_bounds():
  """Images are 14 x 10: the same bound in training and evaluation, and the key that allows more."""
  split, reason = FakeSplit(n=16), "14 x 10 pixels, more than max_pixels = 139"
  cases = (
    (lambda **kw: take(1, split, threads=1, **kw), "data.max_bad_fraction = 0.0001 allows"),
    (lambda **kw: list(images_of(split, **kw)), "data.eval_max_bad_fraction = 0 allows"),
    (lambda **kw: list(images_of(split, max_bad_key="data.x", **kw)), "config.data.x = 0 allows"),
  )
  for call, key in cases:
    call(max_pixels=140)
    with pytest.raises(pipeline.DataError) as error:
      call(max_pixels=139)
    assert key in str(error.value) and reason in str(error.value)
  with pytest.raises(pipeline.DataError, match=r"config\.data\.eval_max_bad_fraction = 0"):
    list(texts_of(FakeSplit(n=16, unreadable={3})))


def test_other_errors_reach_the_consumer_as_they_are():
  split = FakeSplit()
  split.read = lambda i: pathlib.Path("/nowhere/to/be/found").read_bytes()
  with pytest.raises(FileNotFoundError, match="/nowhere"):
    take(1, split)

  def tokenizer(texts, length):
    raise KeyError("no such word")

  with pytest.raises(KeyError, match="no such word"):
    take(1, FakeSplit(), tokenizer=tokenizer)
  with pytest.raises(KeyError, match="no such word"):
    list(texts_of(FakeSplit(), tokenizer=tokenizer))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"rows": [7, 8]}, r"rows \[7, 8\] of a batch of 8"),
    ({"rows": []}, "of a batch of 8"),
    ({"batch_size": 151}, "larger than the split's 150"),
    ({"captions": "some"}, "some"),
  ],
)
def test_wrong_arguments_are_found_at_once(change, message):
  with pytest.raises(ValueError, match=message):
    stream(FakeSplit(), **change)  # before the first batch is asked for


@pytest.mark.parametrize("end", ["close", "forget"])
def test_leaving_a_stream_does_not_hang(end):
  def work():
    for _ in range(3):
      batches = stream(FakeSplit(delay=0.02), threads=4)
      next(batches)
      if end == "close":
        batches.close()
      del batches

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(60)
  assert not thread.is_alive()


@pytest.mark.parametrize(
  "reader",
  [
    "",
    pytest.param(
      "threading.Thread(target=list, args=[s], daemon=True).start()", marks=pytest.mark.full
    ),
  ],
)
def test_the_interpreter_exits_with_streams_open(reader):
  """Also while another thread, such as a prefetcher's, is reading."""
  tests = str(pathlib.Path(__file__).parent)
  code = f"""if True:
    import sys, threading, time
    sys.path.insert(0, {tests!r})
    import test_pipeline as t
    s = t.stream(t.FakeSplit(delay=0.1))
    next(s)
    {reader}
    time.sleep(0.2)
    sys.exit(3)
  """
  # Imports take two seconds; a deadlock never ends.
  command, env = [sys.executable, "-c", code], child_process.environment()
  assert subprocess.run(command, env=env, timeout=120).returncode == 3


def test_a_closed_stream_stays_closed():
  batches = stream(FakeSplit())
  next(batches)
  batches.close()
  batches.close()
  assert list(batches) == []


def images_of(split, **kw):
  return pipeline.eval_images(split, **{"batch_size": 8, "image_transform": TRANSFORM, **kw})


def texts_of(split, **kw):
  kw = {"batch_size": 8, "tokenizer": TOKENIZER, "text_length": LENGTH, **kw}
  return pipeline.eval_texts(split, **kw)


def test_eval_images_in_order_and_padded():
  split = FakeSplit(n=19)
  batches = list(images_of(split, threads=3))
  assert [b["image"].shape for b in batches] == [(8, SIZE, SIZE, 3)] * 3
  got = join(batches)
  assert got["image_id"].tolist() == [*range(19), *[-1] * 5]
  assert got["valid"].tolist() == [True] * 19 + [False] * 5
  for i in range(19):
    np.testing.assert_array_equal(got["image"][i], image.load(encoded(i), TRANSFORM))
  parts = [list(images_of(split, rows=range(4 * p, 4 * p + 4))) for p in range(2)]
  assert_same(batches, [join(pair) for pair in zip(*parts, strict=True)])


def test_eval_texts_in_order_and_padded():
  split = FakeSplit(n=11, captions=lambda i: i % 3)
  batches = list(texts_of(split, threads=3))
  got = join(batches)
  pairs = [(i, j) for i in range(11) for j in range(i % 3)]
  assert got["caption_id"].tolist() == [*range(len(pairs)), *[-1] * (-len(pairs) % 8)]
  assert got["image_id"].tolist() == [i for i, _ in pairs] + [-1] * (-len(pairs) % 8)
  assert got["valid"].sum() == len(pairs) and got["text_mask"].any(1).all()
  ids, mask = TOKENIZER([f"number {j} of {i}" for i, j in pairs], LENGTH)
  np.testing.assert_array_equal(got["text_ids"][: len(pairs)], ids)
  np.testing.assert_array_equal(got["text_mask"][: len(pairs)], mask)
  parts = [list(texts_of(split, rows=range(4 * p, 4 * p + 4))) for p in range(2)]
  assert_same(batches, [join(pair) for pair in zip(*parts, strict=True)])


def test_eval_texts_reads_a_record_once_per_batch():
  split = FakeSplit(n=16)
  list(texts_of(split, batch_size=20))
  assert set(split.reads.values()) == {1}


def test_eval_and_bad_records():
  split = FakeSplit(n=10, unreadable={3}, broken={6})
  for batches in (images_of(split), texts_of(split)):
    with pytest.raises(pipeline.DataError, match="of the 10 records"):
      list(batches)
  seen = []
  got = join(list(images_of(split, max_bad_fraction=0.2, on_bad=lambda i, why: seen.append(i))))
  assert got["valid"].tolist() == [i not in (3, 6) and i < 10 for i in range(16)]
  assert got["image_id"].tolist() == [*range(10), *[-1] * 6] and sorted(seen) == [3, 6]
  assert not got["image"][~got["valid"]].any()
  got = join(list(texts_of(split, max_bad_fraction=0.2)))
  assert got["valid"].tolist() == [i // 5 != 3 and i < 50 for i in range(56)]
  assert got["caption_id"][15] == 15 and got["image_id"][15] == 3
  assert (got["text_ids"][15] == TOKENIZER([""], LENGTH)[0][0]).all()


def test_a_split_on_disk(tmp_path):
  examples = [
    {"image": encoded(i), "image_id": i, "filename": f"{i}.png", "captions": [f"number 0 of {i}"]}
    | {"caption_ids": [i]}
    for i in range(10)
  ]
  folder = builder.write_dataset(tmp_path, "toy", "1.0.0", {"train": examples}, description="x")
  split = records.open_split(folder, "train")
  batches = take(2, split, batch_size=5)
  for batch in batches:
    check_rows(split, batch)
  assert sorted(join(batches)["image_id"]) == list(range(10))
  (shard,) = folder.glob("*.tfrecord*00001")
  data = bytearray(shard.read_bytes())
  data[data.index(encoded(7)) + 20] ^= 1
  shard.write_bytes(data)
  with pytest.raises(pipeline.DataError, match="record 7 of split 'train'"):
    list(images_of(records.open_split(folder, "train")))
