"""Readers of the annotation files that image-text datasets come in.

Each returns {split: [AnnotatedImage]} in the order of its file. All raise DatasetError for files
that are not as documented.
"""

import collections
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from xmodal_jax.data.preparing.annotations import AnnotatedImage, Splits
from xmodal_jax.data.tfrecord import DatasetError


def checksums(annotations: epath.PathLike) -> dict[str, str]:
  """{file name: sha256} of an annotation file, or of the files of an annotation folder."""
  path = epath.Path(annotations)
  files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
  return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _text(path: epath.Path) -> str:
  if not path.exists():
    raise DatasetError(f"{path}: no such file; check --annotations")
  data = path.read_bytes()
  try:
    return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8-sig")
  except (OSError, EOFError, UnicodeDecodeError) as e:
    raise DatasetError(f"{path}: neither UTF-8 text nor gzip of it ({e}); fetch it again") from e


def _json(path: epath.Path) -> dict | list:
  try:
    return json.loads(_text(path))
  except json.JSONDecodeError as e:
    raise DatasetError(f"{path}: not JSON ({e}); fetch the file again") from e


def _size(item: dict) -> tuple[int, int] | None:
  """(width, height) of an image's entry, if it has them."""
  size = item.get("width"), item.get("height")
  return size if all(type(side) is int and side > 0 for side in size) else None


def _keys(where: str, item: object, keys: tuple[str, ...], layout: str) -> None:
  missing = [k for k in keys if not isinstance(item, dict) or k not in item]
  if missing:
    raise DatasetError(f"{where}: no key {missing[0]!r}; expected {layout}")


def read_karpathy(
  annotations: epath.PathLike, images: epath.PathLike, captions_per_image: int | None = 5
) -> Splits:
  """Karpathy's dataset_*.json (plain or .gz) with all its splits.

  The image is images/filename, else images/filepath/filename. captions_per_image: number of
  captions to use, the first ones; 5 as in the COCO protocol, None for all.
  """
  file, images = epath.Path(annotations), epath.Path(images)
  if captions_per_image is not None and captions_per_image < 1:
    raise DatasetError(f"captions_per_image {captions_per_image}: expected 1 or more, or all")
  layout = (
    "Karpathy's layout, {'images': [{'filename', 'imgid' or 'cocoid', 'split', "
    "'sentences': [{'raw', 'sentid'}]}]}; for other layouts see the other sources (--help)"
  )
  data = _json(file)
  _keys(f"{file}", data, ("images",), layout)
  splits = collections.defaultdict(list)
  for i, item in enumerate(data["images"]):
    where = f"{file}: images[{i}]"
    _keys(where, item, ("filename", "split", "sentences"), layout)
    if "cocoid" not in item:
      _keys(where, item, ("imgid",), layout)
    for j, sentence in enumerate(item["sentences"]):
      _keys(f"{where}.sentences[{j}]", sentence, ("raw", "sentid"), layout)
    sentences = item["sentences"][:captions_per_image]
    if not sentences:
      raise DatasetError(f"{where} ({item['filename']}) has no captions; add some or take it out")
    path = images / item["filename"]
    if item.get("filepath") and not path.exists():
      path = images / item["filepath"] / item["filename"]
    splits[item["split"]].append(
      AnnotatedImage(
        item["filename"],
        path,
        int(item.get("cocoid", item.get("imgid"))),
        tuple(s["raw"] for s in sentences),
        tuple(int(s["sentid"]) for s in sentences),
        position=None if "cocoid" in item else i,
        size=_size(item),
      )
    )
  if not splits:
    raise DatasetError(f"{file}: the list 'images' is empty; fetch the file again")
  return dict(splits)


def read_coco(
  annotations: epath.PathLike, images: epath.PathLike, dev_captions: int | None = None
) -> Splits:
  """The layout of VSE++: captions_{train,val}2014.json and coco_{train,restval,dev,test}_ids.npy.

  annotations: the folder of these files. All captions of an image make one AnnotatedImage, in the
  place of the first of them in the id list; captions keep their positions in the list. dev becomes
  "val". The image is images/file_name, else images/train2014/file_name or images/val2014/file_name,
  by the annotation file that has it. dev_captions: number of captions of dev to use; None for all.

  Raises DatasetError, naming file and entry.
  """
  folder, images = epath.Path(annotations), epath.Path(images)
  if dev_captions is not None and dev_captions < 1:
    raise DatasetError(f"dev_captions {dev_captions}: expected 1 or more, or all")
  found: dict[int, AnnotatedImage] = {}  # by image id, without captions
  captions: dict[int, tuple[int, str]] = {}  # by caption id: image id, text
  for part in ("train2014", "val2014"):
    _read_coco_part(folder / f"captions_{part}.json", images, images / part, found, captions)
  splits, owner = {}, {}
  for stem, split in (("train", "train"), ("restval", "restval"), ("dev", "val"), ("test", "test")):
    file = folder / f"coco_{stem}_ids.npy"
    ids = _id_list(file, captions)[: dev_captions if stem == "dev" else None]
    places = collections.defaultdict(list)  # image id -> positions of its captions
    for position, caption in enumerate(ids):
      places[captions[caption][0]].append(position)
    if twice := [i for i in places if owner.setdefault(i, split) != split]:
      raise DatasetError(
        f"{file}: image {twice[0]} is also in split {owner[twice[0]]!r} ({len(twice)} such "
        "images); the id lists must not share images"
      )
    splits[split] = [
      dataclasses.replace(
        found[image],
        captions=tuple(captions[ids[p]][1] for p in positions),
        caption_ids=tuple(ids[p] for p in positions),
        caption_positions=tuple(positions),
      )
      for image, positions in places.items()
    ]
  return splits


def _read_coco_part(
  file: epath.Path,
  images: epath.Path,
  subfolder: epath.Path,
  found: dict[int, AnnotatedImage],
  captions: dict[int, tuple[int, str]],
) -> None:
  """Adds the images and captions of one captions_*.json to `found` and `captions`."""
  layout = (
    "COCO's {'images': [{'id', 'file_name'}], 'annotations': [{'id', 'image_id', 'caption'}]}"
  )
  subfolder = subfolder if subfolder.is_dir() else None
  data = _json(file)
  _keys(f"{file}", data, ("images", "annotations"), layout)
  for i, item in enumerate(data["images"]):
    _keys(f"{file}: images[{i}]", item, ("id", "file_name"), layout)
    name, image_id = item["file_name"], item["id"]
    path = _flat_or_in(images, subfolder, name)
    found[image_id] = AnnotatedImage(name, path, int(image_id), (), size=_size(item))
  for i, item in enumerate(data["annotations"]):
    _keys(f"{file}: annotations[{i}]", item, ("id", "image_id", "caption"), layout)
    if item["image_id"] not in found:
      raise DatasetError(
        f"{file}: annotations[{i}] is of image {item['image_id']}, not in 'images'"
      )
    captions[item["id"]] = item["image_id"], item["caption"]


def _flat_or_in(images: epath.Path, subfolder: epath.Path | None, name: str) -> epath.Path:
  """images/name, or subfolder/name if there is that folder and images/name does not exist."""
  path = images / name
  return path if subfolder is None or path.exists() else subfolder / name


def _id_list(file: epath.Path, captions: dict) -> list[int]:
  """The caption ids [C] of an .npy file; each must be a key of `captions`."""
  remedy = "expected an integer array [C] of distinct caption ids; take the file of the release"
  if not file.exists():
    raise DatasetError(f"{file}: no such file; {remedy}")
  try:
    ids = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
  except Exception as e:  # NumPy raises ValueError, EOFError and others
    raise DatasetError(f"{file}: not an npy file ({e}); {remedy}") from e
  if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
    raise DatasetError(f"{file}: has shape {ids.shape} of {ids.dtype}; {remedy}")
  values, counts = np.unique(ids, return_counts=True)
  if (counts > 1).any():
    raise DatasetError(f"{file}: id {values[counts > 1][0]} occurs twice or more; {remedy}")
  ids = ids.tolist()
  if unknown := [i for i in ids if i not in captions]:
    raise DatasetError(
      f"{file}: {len(unknown)} of {len(ids)} ids are in neither captions_train2014.json nor "
      f"captions_val2014.json, first {unknown[:5]}; {remedy}"
    )
  return ids


def read_pairs(
  table: epath.PathLike,
  images: epath.PathLike,
  *,
  image_column: str = "image",
  caption_column: str = "caption",
  id_column: str = "image_id",
  split_column: str = "split",
  val_fraction: float = 0.0,
  test_fraction: float = 0.0,
) -> Splits:
  """A .csv, .tsv or .jsonl file (or .gz of one) with a row per caption.

  Rows of the same image become one image. id_column and split_column may be absent: then ids count
  from 0, and the split is "train", or is drawn by a hash of the image's path, with the two
  fractions. Raises DatasetError, naming file and line.
  """
  file, images = epath.Path(table), epath.Path(images)
  if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
    raise DatasetError(
      f"val_fraction {val_fraction} and test_fraction {test_fraction}: expected two numbers of at "
      "least 0, together below 1"
    )
  drawn = functools.partial(_drawn_split, val=val_fraction, test=test_fraction)
  found: dict[str, dict] = {}
  for where, row in rows(file):
    if missing := [c for c in (image_column, caption_column) if not row.get(c)]:
      raise DatasetError(
        f"{where}: nothing in column {missing[0]!r}; the columns are {list(row)} "
        "(name others with --image_column, --caption_column)"
      )
    if row.get(split_column) and val_fraction + test_fraction:
      raise DatasetError(
        f"{where}: column {split_column!r} gives the split, so leave out --val_fraction and "
        "--test_fraction, or name another --split_column"
      )
    name = row[image_column]
    new = {"split": row.get(split_column) or drawn(name), "id": row.get(id_column), "captions": []}
    entry = found.setdefault(name, new)
    for key in ("split", "id"):
      if entry[key] != new[key]:
        raise DatasetError(
          f"{where}: image {name} has {key} {new[key]!r}, but {entry[key]!r} in an earlier row; "
          "all rows of an image must agree"
        )
    entry["captions"].append(row[caption_column])
  if not found:
    raise DatasetError(f"{file}: no rows; expected a row per caption after a line of column names")
  splits = _pair_splits(file, images, found)
  if val_fraction + test_fraction:
    # Includes splits without an image, for which the builder raises.
    asked = ["train"] + ["val"] * bool(val_fraction) + ["test"] * bool(test_fraction)
    return {split: splits.get(split, []) for split in asked}
  return splits


def _pair_splits(file: epath.Path, images: epath.Path, found: Mapping[str, dict]) -> Splits:
  """found: name -> dict of split, id (or None) and captions, in the order of the ids."""
  splits = collections.defaultdict(list)
  for i, (name, entry) in enumerate(found.items()):
    try:
      image_id = int(entry["id"] if entry["id"] is not None else i)
    except ValueError as e:
      raise DatasetError(
        f"{file}: image {name} has the id {entry['id']!r}, expected an integer; name another "
        "--id_column, or a column that does not exist to count from 0"
      ) from e
    image = AnnotatedImage(name, images / name, image_id, tuple(entry["captions"]))
    splits[entry["split"]].append(image)
  return dict(splits)


def read_albef(files: Mapping[str, Sequence[tuple[epath.PathLike, epath.PathLike]]]) -> Splits:
  """ALBEF's lists of {"image": path, "caption": str or [str]}, concatenated within each split.

  files: split -> (json file, root folder of its paths); absolute paths are used as they are.
  Records with the same full path become one image with all their captions, in the place of the
  first. Ids count from 0 over all splits; other keys are ignored. Raises DatasetError, naming file
  and record.
  """
  splits, owner = {}, {}
  for split, parts in files.items():
    found: dict[str, tuple[str, epath.Path, list[str]]] = {}
    records = 0
    for file, root in parts:
      for where, name, captions in _albef_records(epath.Path(file), split):
        path = epath.Path(root) / name
        key = os.path.normpath(path)  # "a/../b" is "b"
        if owner.setdefault(key, split) != split:
          raise DatasetError(
            f"{where}: image {path} is also in split {owner[key]!r}; splits must not share images"
          )
        found.setdefault(key, (name, path, []))[2].extend(captions)
        records += 1
    merged = records - len(found)
    text = "%s: %d records, %d merged into earlier ones of their image"
    logging.info(text, split, records, merged)
    first = len(owner) - len(found)
    splits[split] = [
      AnnotatedImage(name, path, first + i, tuple(captions))
      for i, (name, path, captions) in enumerate(found.values())
    ]
  return splits


def _albef_records(file: epath.Path, split: str) -> Iterator[tuple[str, str, list[str]]]:
  """(file and record, for messages; path of the image; captions) of each record of a list."""
  layout = 'ALBEF\'s, [{"image": path, "caption": text or list of texts}]'
  if not file.exists():
    raise DatasetError(f"{file}: no such file; check --{split}")
  data = _json(file)
  if not isinstance(data, list) or not data:
    raise DatasetError(f"{file}: not a list of records; expected {layout}")
  for i, item in enumerate(data):
    where = f"{file}: record {i} (counted from 0)"
    _keys(where, item, ("image", "caption"), layout)
    name, captions = item["image"], item["caption"]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(name, str) or not name:
      raise DatasetError(f"{where}: image {name!r} is not a path; expected {layout}")
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
      raise DatasetError(f"{where} ({name}): caption is {captions!r:.80}; expected {layout}")
    if not captions:
      raise DatasetError(f"{where} ({name}) has no captions; add some or take it out")
    yield where, name, captions


def _drawn_split(name: str, val: float, test: float) -> str:
  u = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
  return "val" if u < val else "test" if u < val + test else "train"


def rows(file: epath.Path) -> Iterator[tuple[str, dict]]:
  """(file and line, for messages; the row) of each row of a .csv, .tsv or .jsonl file."""
  kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
  if kind not in ("csv", "tsv", "jsonl"):
    raise DatasetError(f"{file}: expected a file .csv, .tsv or .jsonl (or .gz of one)")
  text = _text(file)
  if kind == "jsonl":
    for i, line in enumerate(text.splitlines(), 1):
      if line.strip():
        try:
          row = json.loads(line)
        except json.JSONDecodeError as e:
          raise DatasetError(f"{file}:{i}: not JSON ({e}); expected an object per line") from e
        if not isinstance(row, dict):
          raise DatasetError(f"{file}:{i}: expected a JSON object, got {line[:40]!r}")
        yield f"{file}:{i}", row
    return
  # A .tsv usually has no quoting: a caption may begin with a quotation mark.
  form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
  reader = csv.DictReader(io.StringIO(text, newline=""), **form)
  for row in reader:
    if None in row:
      raise DatasetError(
        f"{file}:{reader.line_num}: {len(row) - 1 + len(row[None])} fields, expected "
        f"{len(row) - 1} ({list(row)[:-1]}); quote fields that hold the separator"
      )
    yield f"{file}:{reader.line_num}", row
