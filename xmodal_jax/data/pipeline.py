"""Batches of host arrays from a split, read, decoded and tokenised on tf.data's threads.

tf.data supplies the thread pool, the buffers and the order of batches. What a batch holds is
decided by `sampling` from (seed, epoch, position), so neither threads nor restarts change it. Ids
are positions in the split.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from xmodal_jax.data import image as image_lib
from xmodal_jax.data import mix as mix_lib
from xmodal_jax.data import order as order_lib
from xmodal_jax.data import sampling
from xmodal_jax.data.records import BadRecordError, Record, Split
from xmodal_jax.data.regions import Regions
from xmodal_jax.data.stream import DataError, Ledger, Stream
from xmodal_jax.data.text import Tokenizer

Transform = Callable[[Image.Image], np.ndarray]

logger = logging.getLogger(__name__)

_ATTEMPTS = 1000  # replacements tried for one sample; reached only if nearly every record is bad


def _own_rows(rows: Sequence[int] | None, batch_size: int) -> np.ndarray:
  """int64 [b]: rows of a global batch. Raises ValueError for rows that it does not have."""
  own = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  if not len(own) or own.min() < 0 or own.max() >= batch_size:
    raise ValueError(f"rows {own.tolist()} of a batch of {batch_size}")
  return own


def _offsets(split: Split | mix_lib.Joined) -> np.ndarray:
  """Position of each record's first caption [N + 1]; ids are int32, so they must fit."""
  offsets = order_lib.caption_offsets(split.captions_per_record)
  if max(offsets[-1], len(split)) >= 2**31:
    raise ValueError(f"split {split.name!r} has more images or captions than int32 counts")
  return offsets


def _options(dataset: tf.data.Dataset, threads: int | None) -> tf.data.Dataset:
  options = tf.data.Options()
  options.deterministic = True
  # Autotuned buffers grow with the run: closing a stream after 300 batches took up to 50 s.
  options.autotune.enabled = False
  if threads is not None:
    options.threading.private_threadpool_size = threads
  return dataset.prefetch(2).with_options(options)


def _parallel(threads: int | None) -> int:
  return threads or len(os.sched_getaffinity(0))


class _ImageFields(NamedTuple):
  """The image side of a row: pixels, or regions.

  names: of the fields. blanks: arrays of their shapes. read: (record, its number, generator of its
  augmentation) -> the arrays; None if the record is bad.
  """

  names: tuple[str, ...]
  blanks: list[np.ndarray]
  read: Callable[[Record, int, np.random.Generator | None], list[np.ndarray] | None]


def _image_fields(
  regions: Regions | None, transform: Callable | None, ledger: Ledger, max_pixels: int
) -> _ImageFields:
  """transform: (image, generator) -> uint8 [H, W, 3]; not needed for regions."""
  if regions is None:

    def read_pixels(content: Record, record: int, rng) -> list[np.ndarray] | None:
      try:
        return [image_lib.load(content.image, lambda image: transform(image, rng), max_pixels)]
      except image_lib.DecodeError as e:
        ledger.add(record, e, content.filename)
        return None

    blank = _blank(lambda image: transform(image, order_lib.generator(0, 0, 0)))
    return _ImageFields(("image",), [blank], read_pixels)

  def read_regions(content: Record, record: int, rng) -> list[np.ndarray]:
    try:
      return regions.arrays(content)
    except ValueError as e:  # a fault of the whole dataset, not a bad record
      raise DataError(f"{ledger.named(record, content.filename)}: {e}") from None

  return _ImageFields(("regions", "boxes", "region_mask"), regions.blanks(), read_regions)


def _without_generator(transform: Transform | None) -> Callable:
  """An evaluation transform with the signature of an augmentation."""
  return lambda image, rng: transform(image)


def train_batches(
  split: Split | mix_lib.Joined,
  *,
  batch_size: int,
  image_transform: Transform | None,
  tokenizer: Tokenizer | None,
  text_length: int,
  captions: order_lib.Captions = "all",
  mix: order_lib.Mix = "shuffle",
  seed: int,
  step: int = 0,
  rows: Sequence[int] | None = None,
  max_bad_fraction: float = 1e-4,
  max_pixels: int = image_lib.MAX_PIXELS,
  order: Callable[[int], np.ndarray] | None = None,
  augment: image_lib.Augment | None = None,
  regions: Regions | None = None,
  on_bad: Callable[[int, str], None] | None = None,
  threads: int | None = None,
  truncate: bool = True,
) -> Stream:
  """Rows of the global batches step, step + 1, ... without end.

  A bad record is replaced by another sample of its dataset, which its position in the epoch
  determines.

  Args:
    split: one split, or several datasets joined.
    batch_size: of the global batch.
    image_transform: image -> uint8 [H, W, 3]; not needed with `augment` or `regions`.
    tokenizer: one with `graph` (see wordpiece) runs inside tf.data, and with `corrupt` above 0
      corrupts the captions first, with draws of their own for each position of an epoch.
    text_length: L.
    captions: see `order.samples_per_epoch`.
    mix: see `order.Mixture`.
    seed: of the order, the augmentation and the corruption.
    rows: rows of the global batch to read, b in number; None: all.
    max_bad_fraction: of all records of the split that may be bad before DataError is raised.
    max_pixels: width x height from which an image is a bad record.
    order: epoch -> sample indices, instead of the shuffle; the same number in every epoch.
    augment: (image, generator) -> uint8 [H, W, 3], instead of image_transform.
    regions: read instead of pixels; a record that they do not fit raises DataError.
    on_bad: called with (record, reason) for each bad record.
    threads: of tf.data's own thread pool; None: its shared pool.
    truncate: False: a caption that is too long raises ValueError.

  Returns:
    Batches of image uint8 [b, H, W, 3], text_ids int32 [b, L], text_mask bool [b, L], image_id
    int32 [b], caption_id int32 [b]. A joined split adds dataset int32 [b], the index of each row's
    dataset. With captions "none", which needs no tokenizer, label int32 [b] (see `records.Record`)
    replaces the texts and caption_id. With `regions`, regions float32 [b, R, F], boxes float32
    [b, R, 4] and region_mask bool [b, R] replace image.
  """
  own = _own_rows(rows, batch_size)
  local = len(own)
  offsets, ledger = _offsets(split), Ledger(split, max_bad_fraction, on_bad)
  sampler = sampling.Sampler(
    split,
    captions=captions,
    mix=mix,
    batch_size=batch_size,
    seed=seed,
    rows=own,
    offsets=offsets,
    order=order,
  )
  changed = augment or _without_generator(image_transform)
  fields = _image_fields(regions, changed, ledger, max_pixels)
  labelled = captions == "none"

  def example(i: np.ndarray):
    """Row i of ours, over all steps -> image fields, caption, record, caption id or label, key."""
    this_step, row = divmod(int(i), local)
    planned = sampler.rows(this_step)
    record, caption = int(planned.records[row]), int(planned.captions[row])
    for attempt in range(_ATTEMPTS):
      content = _read(split, ledger, record)
      if content is not None:
        position = int(planned.positions[row])
        rng = augment and order_lib.generator(position, planned.seed, planned.epoch)
        arrays = fields.read(content, record, rng)
        if arrays is not None:
          text = b"" if labelled else content.captions[caption].encode()
          target = content.label if labelled else offsets[record] + caption
          return *arrays, text, record, target, planned.keys[row]
      record, caption = sampler.replacement(planned, row, attempt)
    raise DataError(f"split {split.name!r}: {_ATTEMPTS} samples in a row are bad")

  def assemble(*x):
    *arrays, texts, record, target, keys, ok = x
    batch = dict(zip(fields.names, arrays, strict=True)) | {"image_id": _int32(record)}
    if isinstance(split, mix_lib.Joined):
      batch["dataset"] = _int32(tf.searchsorted(split.starts, record, side="right") - 1)
    if labelled:
      return batch | {"label": _int32(target), "ok": tf.reduce_all(ok)}
    if getattr(tokenizer, "corrupt", 0.0):  # in training only
      texts = tokenizer.corrupted(texts, keys)
    ids, mask, tokens_ok = _tokens(texts, tokenizer, text_length, truncate, ledger)
    batch |= {"text_ids": ids, "text_mask": mask, "caption_id": _int32(target)}
    return batch | {"ok": tf.reduce_all(ok) & tokens_ok}

  blanks = [*fields.blanks, b"", np.int64(0), np.int64(0), np.uint64(0)]
  dataset = tf.data.Dataset.range(step * local, 2**63 - 1).map(
    lambda i: tuple(ledger.call(example, [i], blanks)), num_parallel_calls=_parallel(threads)
  )
  dataset = dataset.batch(local, drop_remainder=True).map(assemble)
  return Stream(_options(dataset, threads), ledger)


def _int32(x: tf.Tensor) -> tf.Tensor:
  return tf.cast(x, tf.int32)


def _tokens(
  texts: tf.Tensor, tokenizer: Tokenizer, length: int, truncate: bool, ledger: Ledger
) -> list[tf.Tensor]:
  """Strings [b] -> ids int32 [b, length], mask bool [b, length] and the flag of `Ledger.call`."""
  options = {} if truncate else {"truncate": False}

  def call(texts: np.ndarray):
    return tokenizer([text.decode() for text in texts], length, **options)

  if not hasattr(tokenizer, "graph"):
    blanks = [np.zeros((texts.shape[0], length), t) for t in (np.int32, bool)]
    return ledger.call(call, [texts], blanks)
  ids, mask = tokenizer.graph(texts, length, truncate)
  if truncate:
    return [ids, mask, tf.constant(True)]

  def check(texts: np.ndarray, mask: np.ndarray):
    call(texts[~mask.any(1)])  # rows without a token did not fit: raises for the first
    return ()

  return [ids, mask, *ledger.call(check, [texts, mask], [])]


def _read(split: Split, ledger: Ledger, record: int) -> Record | None:
  """A record, or None if it is bad."""
  try:
    return split.read(record)
  except BadRecordError as e:
    ledger.add(record, e)
    return None


def _blank(transform: Transform) -> np.ndarray:
  """Zeros of the shape and dtype of the transform's output."""
  return np.zeros_like(transform(Image.new("RGB", (64, 64))))


def eval_images(
  split: Split,
  *,
  batch_size: int,
  image_transform: Transform | None,
  regions: Regions | None = None,
  rows: Sequence[int] | None = None,
  max_bad_fraction: float = 0.0,
  max_bad_key: str = "data.eval_max_bad_fraction",
  max_pixels: int = image_lib.MAX_PIXELS,
  on_bad: Callable[[int, str], None] | None = None,
  threads: int | None = None,
) -> Stream:
  """Every image once, in order: the given rows of each global batch.

  Fields: image uint8 [b, H, W, 3], image_id int32 [b], valid bool [b]; a split with class names
  adds label int32 [b]. The last batch is padded with rows that are not valid, whose image_id and
  label are -1. A bad image is not valid either, but keeps its id. Raises DataError if more than
  max_bad_fraction of the split are bad. max_bad_key: its key in the config, for that message. The
  other arguments are those of `train_batches`.
  """
  own = _own_rows(rows, batch_size)
  local = len(own)
  ledger = Ledger(split, max_bad_fraction, on_bad, max_bad_key)
  fields = _image_fields(regions, _without_generator(image_transform), ledger, max_pixels)

  def example(i: np.ndarray):
    this_step, row = divmod(int(i), local)
    record = this_step * batch_size + int(own[row])
    if record >= len(split):
      return *fields.blanks, np.int32(-1), np.int32(-1), False
    content = _read(split, ledger, record)
    arrays = content and fields.read(content, record, None)
    if arrays is None:
      return *fields.blanks, np.int32(record), np.int32(-1), False
    return *arrays, np.int32(record), np.int32(content.label), True

  blanks = [*fields.blanks, np.int32(0), np.int32(0), np.False_]
  steps = -(-len(split) // batch_size)
  dataset = tf.data.Dataset.range(steps * local).map(
    lambda i: tuple(ledger.call(example, [i], blanks)),
    num_parallel_calls=_parallel(threads),
  )
  dataset = dataset.batch(local, drop_remainder=True)
  names = (*fields.names, "image_id", "label", "valid", "ok")
  left_out = () if split.class_names else ("label",)

  def assemble(*x):
    return {k: v for k, v in zip(names, x, strict=True) if k not in left_out}

  return Stream(_options(dataset.map(assemble), threads), ledger)


def eval_texts(
  split: Split,
  *,
  batch_size: int,
  tokenizer: Tokenizer,
  text_length: int,
  rows: Sequence[int] | None = None,
  max_bad_fraction: float = 0.0,
  on_bad: Callable[[int, str], None] | None = None,
  threads: int | None = None,
  truncate: bool = True,
) -> Stream:
  """Every caption once, in order: the given rows of each global batch.

  Fields: text_ids int32 [b, L], text_mask bool [b, L], caption_id int32 [b], image_id int32 [b] of
  the caption's image, valid bool [b]. Rows that are not valid hold the empty caption, so that no
  mask is empty; the padding of the last batch has ids -1, captions of a bad record keep theirs.
  The arguments are those of `train_batches`.
  """
  own = _own_rows(rows, batch_size)
  local = len(own)
  offsets = _offsets(split)
  ledger = Ledger(split, max_bad_fraction, on_bad, "data.eval_max_bad_fraction")

  def read(step: np.ndarray):
    caption = int(step) * batch_size + own  # [b]
    valid = caption < offsets[-1]
    caption = np.where(valid, caption, -1)
    record = np.full(local, -1)
    record[valid], j = order_lib.locate(caption[valid], offsets, "all", 0, 0)
    texts = np.full(local, b"", object)
    # A whole batch at a time: neighbouring captions share a record, which is read once.
    for i in np.unique(record[valid]):
      mine = np.flatnonzero(record == i)
      content = _read(split, ledger, int(i))
      if content is None:
        valid[mine] = False
        continue
      for row in mine:
        texts[row] = content.captions[j[row]].encode()
    return texts, caption.astype(np.int32), record.astype(np.int32), valid

  blanks = [np.full(local, b"", object), *(np.zeros(local, t) for t in (np.int32, np.int32, bool))]

  def batch(step: tf.Tensor):
    texts, caption, record, valid, ok = ledger.call(read, [step], blanks)
    ids, mask, tokens_ok = _tokens(texts, tokenizer, text_length, truncate, ledger)
    return {
      "text_ids": ids,
      "text_mask": mask,
      "caption_id": caption,
      "image_id": record,
      "valid": valid,
      "ok": ok & tokens_ok,
    }

  dataset = tf.data.Dataset.range(-(-int(offsets[-1]) // batch_size)).map(
    batch, num_parallel_calls=_parallel(threads)
  )
  return Stream(_options(dataset, threads), ledger)
