"""Readers of lists of images in JSON: Karpathy's and ALBEF's.

They return {split: [AnnotatedImage]} in the order of the files, and raise DatasetError for files
that are not as documented. `coco`, `pairs` and `folders` have the other readers.
"""

import collections
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from xmodal_jax.data.preparing import coco, values
from xmodal_jax.data.preparing.annotations import Splits
from xmodal_jax.data.preparing.grouping import Blank, Grouper
from xmodal_jax.data.preparing.listing import Listing
from xmodal_jax.data.tfrecord import DatasetError

_KARPATHY = (
  "Karpathy's layout, {'images': [{'filename', 'imgid' or 'cocoid', 'split', "
  "'sentences': [{'raw', 'sentid'}]}]}; for other layouts see the other sources (--help)"
)
_ALBEF = 'ALBEF\'s, [{"image": path, "caption": text or list of texts}]'


def checksums(annotations: epath.PathLike) -> dict[str, str]:
  """{file name: sha256} of an annotation file, or of the files of an annotation folder."""
  path = epath.Path(annotations)
  files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
  return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def read_karpathy(
  annotations: epath.PathLike,
  images: epath.PathLike,
  captions_per_image: int | None = 5,
  blank: Blank = "keep",
) -> Splits:
  """Karpathy's dataset_*.json (plain or .gz) with all its splits.

  The image is images/filename, else images/filepath/filename, else one of `coco.places`.
  captions_per_image: number of captions to use, the first ones; 5 as in the COCO protocol, None for
  all. Images or captions whose ids are not all integers are numbered by position instead, which is
  logged. Raises DatasetError, naming the entry.
  """
  file, images = epath.Path(annotations), epath.Path(images)
  if captions_per_image is not None and captions_per_image < 1:
    raise DatasetError(f"captions_per_image {captions_per_image}: expected 1 or more, or all")
  data = values.read_json(file)
  values.keys(f"{file}", data, ("images",), _KARPATHY)
  items = values.entries(f"{file}: images", data["images"], _KARPATHY)
  for i, item in enumerate(items):
    _check_entry(f"{file}: images[{i}]", item)
  if not items:
    raise DatasetError(f"{file}: the list 'images' is empty; fetch the file again")
  number = _numbering(file, "image ids", [item.get("cocoid", item.get("imgid")) for item in items])
  sentids = [s["sentid"] for item in items for s in item["sentences"]]
  sentence_number = _numbering(file, "sentids", sentids)
  grouper, listing, first = Grouper(blank, per_image=True), Listing(), 0
  for i, item in enumerate(items):
    where, sentences = f"{file}: images[{i}]", item["sentences"]
    texts = [
      values.text(f"{where}.sentences[{j}]", "raw", s["raw"]) for j, s in enumerate(sentences)
    ]
    ids = [sentence_number(where, first + j, s["sentid"]) for j, s in enumerate(sentences)]
    first += len(sentences)
    grouper.add(
      where,
      item["split"],
      item["filename"],
      listing.first(images / p for p in coco.places(item["filename"], item.get("filepath"))),
      texts,
      image_id=number(where, i, item.get("cocoid", item.get("imgid"))),
      caption_ids=ids,
      limit=captions_per_image,
      position=None if "cocoid" in item else i,
      size=coco.size_of(item),
    )
  return grouper.splits()


def _check_entry(where: str, item: object) -> None:
  values.keys(where, item, ("filename", "split", "sentences"), _KARPATHY)
  if "cocoid" not in item:
    values.keys(where, item, ("imgid",), _KARPATHY)
  values.file_name(where, "filename", item["filename"])
  if item.get("filepath"):
    values.file_name(where, "filepath", item["filepath"])
  if not values.text(where, "split", item["split"]).strip():
    raise DatasetError(f"{where}: the split is blank; expected train, val or test")
  sentences = values.entries(f"{where}.sentences", item["sentences"], _KARPATHY)
  for j, sentence in enumerate(sentences):
    values.keys(f"{where}.sentences[{j}]", sentence, ("raw", "sentid"), _KARPATHY)
  if not sentences:
    raise DatasetError(f"{where} ({item['filename']}) has no captions; add some or take it out")


def _numbering(file: epath.Path, what: str, ids: Sequence):
  """(where, position, id) -> a number: the id, or the position if some id is a text of its own."""
  texts = [i for i in ids if isinstance(i, str) and values.as_integer(i) is None]
  if not texts:
    return lambda where, position, given: values.integer(where, what, given)
  (common, count), *_ = collections.Counter(map(repr, ids)).most_common(1)
  if count > 1:
    raise DatasetError(f"{file}: {what}: {common:.60} occurs {count} times; they must differ")
  logging.info("%s: %s like %r are no integers: positions are used instead", file, what, texts[0])
  return lambda where, position, given: position


def read_albef(
  files: Mapping[str, Sequence[tuple[epath.PathLike, epath.PathLike]]], blank: Blank = "keep"
) -> Splits:
  """ALBEF's lists of {"image": path, "caption": str or [str]}, concatenated within each split.

  files: split -> (json file, root folder of its paths); absolute paths are used as they are.
  Records with the same full path become one image with all their captions, in the place of the
  first. Ids count from 0 over all splits; other keys are ignored. Raises DatasetError, naming file
  and record.
  """
  grouper = Grouper(blank, per_image=True)
  for split, parts in files.items():
    for file, root in parts:
      for where, name, captions in _albef_records(epath.Path(file), split):
        grouper.add(where, split, name, epath.Path(root) / name, captions)
  return grouper.splits(files)


def _albef_records(file: epath.Path, split: str) -> Iterator[tuple[str, str, list[str]]]:
  """(file and record, for messages; path of the image; captions) of each record of a list."""
  data = values.read_json(file, f"--{split}")
  if not isinstance(data, list) or not data:
    raise DatasetError(f"{file}: not a list of records; expected {_ALBEF}")
  for i, item in enumerate(data):
    where = f"{file}: record {i} (counted from 0)"
    values.keys(where, item, ("image", "caption"), _ALBEF)
    name, captions = values.file_name(where, "image", item["image"]), item["caption"]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
      raise DatasetError(f"{where} ({name}): caption is {captions!r:.80}; expected {_ALBEF}")
    if not captions:
      raise DatasetError(f"{where} ({name}) has no captions; add some or take it out")
    yield where, name, [values.text(f"{where} ({name})", "caption", c) for c in captions]
