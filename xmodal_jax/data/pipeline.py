"""Batches of host arrays from a split, read, decoded and tokenised on tf.data's threads.

tf.data supplies the thread pool, the buffers and their order; what a batch holds is decided by
`order` from (seed, epoch, position), so neither threads nor restarts change it. Ids are positions
in the split.
"""

import dataclasses
import functools
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
from xmodal_jax.data.records import BadRecordError, Record, Split
from xmodal_jax.data.stream import DataError, Ledger, Stream
from xmodal_jax.data.text import Tokenizer

Transform = Callable[[Image.Image], np.ndarray]

logger = logging.getLogger(__name__)

_ATTEMPTS = 1000  # stand-ins tried for one sample; reached only if nearly every record is bad


def _own_rows(rows: Sequence[int] | None, batch_size: int) -> np.ndarray:
  """int64 [b]: places in a global batch. Raises ValueError for places that it does not have."""
  own = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  if not len(own) or own.min() < 0 or own.max() >= batch_size:
    raise ValueError(f"rows {own.tolist()} of a batch of {batch_size}")
  return own


def _offsets(split: Split | mix_lib.Joined) -> np.ndarray:
  """Position of each record's first caption [N + 1]; ids are int32, so they must fit."""
  offsets = order_lib.caption_offsets(split.captions_per_record)
  if max(offsets[-1], len(split)) >= 2**31:
    raise ValueError(f"split {split.name!r} has more pictures or captions than int32 counts")
  return offsets


def _options(dataset: tf.data.Dataset, threads: int | None) -> tf.data.Dataset:
  options = tf.data.Options()
  options.deterministic = True
  # Its buffers grow with the run: closing a stream after 300 batches took up to 50 s.
  options.autotune.enabled = False
  if threads is not None:
    options.threading.private_threadpool_size = threads
  return dataset.prefetch(2).with_options(options)


def _parallel(threads: int | None) -> int:
  return threads or len(os.sched_getaffinity(0))


@dataclasses.dataclass(frozen=True)
class Regions:
  """What a row has in place of pixels: regions float32 [R, F], boxes float32 [R, 4] as parts of the
  picture, region_mask bool [R].

  count: R; rows with fewer regions are padded with zeros. width: F. truncate: of a picture with
  more regions the first R count; otherwise it is an error.
  """

  count: int
  width: int
  truncate: bool = False

  def blanks(self) -> list[np.ndarray]:
    """The three arrays of no regions."""
    return [
      np.zeros((self.count, self.width), np.float32),
      np.zeros((self.count, 4), np.float32),
      np.zeros(self.count, bool),
    ]

  def arrays(self, content: Record) -> list[np.ndarray]:
    """The three arrays of a record. ValueError, saying why, if it has none that fit."""
    if content.regions is None or content.boxes is None or content.size is None:
      raise ValueError(
        "no regions with boxes and the size of the picture, and config.data.regions asks for them; "
        "write the data set with `python tools/prepare_data.py regions`"
      )
    n, width = content.regions.shape
    if width != self.width or len(content.boxes) != n:
      raise ValueError(
        f"{n} regions of {width} numbers with {len(content.boxes)} boxes, expected {self.width} "
        "numbers and a box each; write the data set again, or set config.model.image.features"
      )
    if n > self.count and not self.truncate:
      raise ValueError(
        f"{n} regions, more than config.data.regions = {self.count}; raise it, or set "
        "config.data.truncate_regions to use the first ones"
      )
    n = min(n, self.count)
    features, boxes, mask = self.blanks()
    features[:n], mask[:n] = content.regions[:n], True
    boxes[:n] = content.boxes[:n] / np.array(content.size * 2, np.float32)
    return [features, boxes, mask]


# What a row has of a picture: the names of the fields, blanks of them, and what gives the arrays of
# record number i, None if it is bad. The last argument is the generator of its augmentation.
class _Visual(NamedTuple):
  names: tuple[str, ...]
  blanks: list[np.ndarray]
  read: Callable[[Record, int, np.random.Generator | None], list[np.ndarray] | None]


def _visual(regions: Regions | None, transform: Callable | None, ledger: Ledger) -> _Visual:
  """transform: (picture, generator) -> uint8 [H, W, 3]; not needed for regions."""
  if regions is None:

    def pixels(content: Record, record: int, rng) -> list[np.ndarray] | None:
      found = _pixels(content, lambda image: transform(image, rng), ledger, record)
      return None if found is None else [found]

    blank = _blank(lambda image: transform(image, order_lib.generator(0, 0, 0)))
    return _Visual(("image",), [blank], pixels)

  def arrays(content: Record, record: int, rng) -> list[np.ndarray]:
    try:
      return regions.arrays(content)
    except ValueError as e:  # of the data set as a whole, not of a bad record
      raise DataError(f"{ledger.named(record, content.filename)}: {e}") from None

  return _Visual(("regions", "boxes", "region_mask"), regions.blanks(), arrays)


class _Rows(NamedTuple):
  """What a process's rows of a batch are read from; [b] arrays are int64."""

  seed: int  # of what the batch is shuffled with
  epoch: int  # of the same
  positions: np.ndarray  # [b] in that epoch
  sources: np.ndarray  # [b] data sets
  records: np.ndarray  # [b]
  texts: np.ndarray  # [b] captions within the records
  keys: np.ndarray  # uint64 [b], of the corruption of captions


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
  order: Callable[[int], np.ndarray] | None = None,
  augment: image_lib.Augment | None = None,
  regions: Regions | None = None,
  on_bad: Callable[[int, str], None] | None = None,
  threads: int | None = None,
  truncate: bool = True,
) -> Stream:
  """These rows of global batches step, step + 1, ... without end.

  Fields, with b the number of rows: image uint8 [b, H, W, 3], text_ids int32 [b, L],
  text_mask bool [b, L], image_id int32 [b], caption_id int32 [b]; of a joined split also dataset
  int32 [b], the number of each row's data set. With captions "none", which needs no tokenizer,
  there are neither texts nor caption_id, but label int32 [b], see `records.Record`. With `regions`
  there are regions float32 [b, R, F], boxes float32 [b, R, 4] and region_mask bool [b, R] in place
  of image, and a record that they do not fit is a DataError.

  batch_size: global; rows: places in it that this process reads, None: all. captions: see
  `order.samples_per_epoch`. mix: see `order.Mixture`. augment: (picture, generator) -> uint8
  [H, W, 3], in place of image_transform. order: epoch -> sample indices, in place of the shuffle;
  the same number in every epoch. A bad record is replaced by another sample of its data set that
  its place in the epoch determines; DataError if more than max_bad_fraction of all records of the
  split were found bad by this process. on_bad: called with (record, reason) for each. threads: of
  reading and decoding; None: tf.data decides. truncate: False makes a caption that is too long a
  ValueError. A tokenizer with `graph` (see wordpiece) runs inside tf.data, and with `corrupt` above
  0 corrupts the captions first, which is drawn per position as the augmentation is.
  """
  own = _own_rows(rows, batch_size)
  local = len(own)
  offsets, ledger = _offsets(split), Ledger(split, max_bad_fraction, on_bad)
  counts = mix_lib.sample_counts(split, captions)
  firsts = np.cumsum([0, *counts])  # sample that each data set begins with
  if order is None:
    mixture = mix_lib.mixture(split, captions, mix, batch_size, seed)
  elif mix == "shuffle":
    mixture = order_lib.Mixture(mix, [len(order(0))], batch_size, seed)
  else:
    raise ValueError(f'a given order takes the place of data.mix="shuffle", and mix is {mix!r}')
  visual = _visual(regions, augment or (lambda image, rng: image_transform(image)), ledger)
  labelled = captions == "none"

  @functools.lru_cache(maxsize=256)  # far more batches than are under way at a time
  def plan(step: int) -> _Rows:
    pool, epoch, done = mixture(step)
    pool_seed = order_lib.source_seed(seed, pool)
    positions = done * batch_size + own
    if order is None:
      chosen = order_lib.permute(positions, mixture.sizes[pool], pool_seed, epoch) + firsts[pool]
    else:
      chosen = np.asarray(order(epoch))[positions]
    sources = np.searchsorted(firsts, chosen, side="right") - 1
    found = order_lib.locate(chosen, offsets, captions, pool_seed, epoch)
    keys = order_lib.caption_keys(positions, pool_seed, epoch)
    return _Rows(pool_seed, epoch, positions, sources, *found, keys)

  def example(i: np.ndarray):
    """Row i of ours, over all steps -> fields of the picture, caption, record, caption id or label,
    key."""
    this_step, row = divmod(int(i), local)
    planned = plan(this_step)
    seed, epoch, source = planned.seed, planned.epoch, planned.sources[row]
    position, key = int(planned.positions[row]), planned.keys[row]
    record, text = int(planned.records[row]), int(planned.texts[row])
    for attempt in range(_ATTEMPTS):
      content = _read(split, ledger, record)
      if content is not None:
        rng = augment and order_lib.generator(position, seed, epoch)
        arrays = visual.read(content, record, rng)
        if arrays is not None:
          caption = b"" if labelled else content.captions[text].encode()
          mark = content.label if labelled else offsets[record] + text
          return *arrays, caption, record, mark, key
      stand_in = order_lib.replacement(position, attempt, counts[source], seed, epoch)
      stand_in += firsts[source]
      found = order_lib.locate(np.array([stand_in]), offsets, captions, seed, epoch)
      record, text = int(found[0][0]), int(found[1][0])
    raise DataError(f"split {split.name!r}: {_ATTEMPTS} samples in a row are bad")

  example_blanks = [*visual.blanks, b"", np.int64(0), np.int64(0), np.uint64(0)]

  def assemble(*x):
    *arrays, texts, record, caption, keys, ok = x
    seen = dict(zip(visual.names, arrays, strict=True))
    int32 = lambda x: tf.cast(x, tf.int32)
    several = {}
    if isinstance(split, mix_lib.Joined):
      several["dataset"] = int32(tf.searchsorted(split.starts, record, side="right") - 1)
    if labelled:
      ids = {"image_id": int32(record), "label": int32(caption)}
      return {**seen, **ids, **several, "ok": tf.reduce_all(ok)}
    if getattr(tokenizer, "corrupt", 0.0):  # evaluation makes no use of it
      texts = tokenizer.corrupted(texts, keys)
    ids, mask, tokens_ok = _tokens(texts, tokenizer, text_length, truncate, ledger)
    return {
      **seen,
      "text_ids": ids,
      "text_mask": mask,
      "image_id": int32(record),
      "caption_id": int32(caption),
      **several,
      "ok": tf.reduce_all(ok) & tokens_ok,
    }

  dataset = tf.data.Dataset.range(step * local, 2**63 - 1).map(
    lambda i: tuple(ledger.call(example, [i], example_blanks)),
    num_parallel_calls=_parallel(threads),
  )
  dataset = dataset.batch(local, drop_remainder=True).map(assemble)
  return Stream(_options(dataset, threads), ledger)


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
    call(texts[~mask.any(1)])  # a row without a token did not fit: raises the error that says so
    return ()

  return [ids, mask, *ledger.call(check, [texts, mask], [])]


def _read(split: Split, ledger: Ledger, record: int) -> Record | None:
  """A record, or None if it is bad."""
  try:
    return split.read(record)
  except BadRecordError as e:
    ledger.add(record, e)
    return None


def _pixels(
  content: Record, transform: Transform, ledger: Ledger, record: int
) -> np.ndarray | None:
  """uint8 [H, W, 3], or None if the picture does not decode."""
  try:
    return image_lib.load(content.image, transform)
  except image_lib.DecodeError as e:
    ledger.add(record, e, content.filename)
    return None


def _blank(transform: Transform) -> np.ndarray:
  """Zeros of the shape and type that the transform gives."""
  return np.zeros_like(transform(Image.new("RGB", (64, 64))))


def eval_images(
  split: Split,
  *,
  batch_size: int,
  image_transform: Transform | None,
  regions: Regions | None = None,
  rows: Sequence[int] | None = None,
  max_bad_fraction: float = 0.0,
  on_bad: Callable[[int, str], None] | None = None,
  threads: int | None = None,
) -> Stream:
  """Every picture once, in order: these rows of each global batch.

  Fields: image uint8 [b, H, W, 3], image_id int32 [b], valid bool [b]; label int32 [b] of a split
  with class names. The last batch is filled up with rows that are not valid, of image_id and label
  -1. A bad picture is not valid either but keeps its id;
  DataError if more than max_bad_fraction of the split are bad. regions: in place of image, as in
  `train_batches`.
  """
  own = _own_rows(rows, batch_size)
  local = len(own)
  ledger = Ledger(split, max_bad_fraction, on_bad)
  visual = _visual(regions, lambda image, rng: image_transform(image), ledger)

  def example(i: np.ndarray):
    this_step, row = divmod(int(i), local)
    record = this_step * batch_size + int(own[row])
    if record >= len(split):
      return *visual.blanks, np.int32(-1), np.int32(-1), False
    content = _read(split, ledger, record)
    arrays = content and visual.read(content, record, None)
    if arrays is None:
      return *visual.blanks, np.int32(record), np.int32(-1), False
    return *arrays, np.int32(record), np.int32(content.label), True

  blanks = [*visual.blanks, np.int32(0), np.int32(0), np.False_]
  steps = -(-len(split) // batch_size)
  dataset = tf.data.Dataset.range(steps * local).map(
    lambda i: tuple(ledger.call(example, [i], blanks)),
    num_parallel_calls=_parallel(threads),
  )
  dataset = dataset.batch(local, drop_remainder=True)
  fields = (*visual.names, "image_id", "label", "valid", "ok")
  left_out = () if split.class_names else ("label",)

  def assemble(*x):
    return {k: v for k, v in zip(fields, x, strict=True) if k not in left_out}

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
  """Every caption once, in order: these rows of each global batch.

  Fields: text_ids int32 [b, L], text_mask bool [b, L], caption_id int32 [b], image_id int32 [b] of
  the caption's picture, valid bool [b]. Rows that are not valid hold the empty caption, so that no
  mask is empty; those that fill up the last batch have ids -1, those of a bad record keep theirs.
  truncate: see `train_batches`.
  """
  own = _own_rows(rows, batch_size)
  local = len(own)
  ledger, offsets = Ledger(split, max_bad_fraction, on_bad), _offsets(split)

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
