"""Writes a dataset for training and evaluation: TFRecords that TFDS reads, with offset indices.

  python tools/prepare_data.py karpathy --annotations dataset.json --images DIR --out DATA_DIR
  python tools/prepare_data.py coco --annotations DIR --images DIR --out DATA_DIR
  python tools/prepare_data.py pairs --annotations pairs.csv --images DIR --out DATA_DIR
  python tools/prepare_data.py albef --train JSON ROOT --train JSON ROOT --out DATA_DIR
  python tools/prepare_data.py csv --root DIR --out DATA_DIR
  python tools/prepare_data.py folders --root DIR --out DATA_DIR
  python tools/prepare_data.py img2dataset --train DIR --out DATA_DIR
  python tools/prepare_data.py regions --annotations dataset.json --features DIR --out DATA_DIR
  python tools/prepare_data.py shapes --out DATA_DIR

img2dataset writes one output shard for each of its shards, one after another or on the workers of
Apache Beam (`pip install xmodal_jax[beam]`). On the cores of one machine:
--beam_runner=DirectRunner
--beam_options="--direct_running_mode=multi_processing --direct_num_workers=16". In the cloud, for
instance: --beam_runner=DataflowRunner --beam_options="--project=P --region=R
--temp_location=gs://B/tmp --setup_file=./setup.py", which also needs apache-beam[gcp].

regions writes the regions that a detector found in the images, without the images: from a folder
with bu_att and bu_box, from tables of bottom-up attention or from an HDF5 file; the layouts are
documented in xmodal_jax/data/preparing/detections.py. --check reads everything and reports errors,
without writing.

The dataset is written to DATA_DIR/NAME/VERSION; give DATA_DIR/NAME as config.data.dir.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath
from preparing import options as options_lib

from xmodal_jax.data.preparing import (
  annotations,
  builder,
  coco,
  detections,
  folders,
  img2dataset,
  pairs,
  pictures,
  publish,
  regions,
  shapes,
  shards,
  sources,
  tables,
)
from xmodal_jax.runtime import cli


def _write(args: argparse.Namespace) -> epath.Path | None:
  """Returns the folder of the dataset; None if nothing was to be written."""
  if args.source == "regions" and args.check:
    report = _regions(args).check()
    print(report)
    if report.errors:
      raise builder.DatasetError("the region features have errors, which are listed above")
    return None
  if not args.out:
    raise builder.DatasetError("no --out; name the folder of datasets, or pass --check")
  publish.make_way(args.out, args.name, args.version, args.overwrite)
  where = {"name": args.name, "version": args.version, "overwrite": args.overwrite}
  if args.source == "regions":
    return _write_regions(args, where)
  if args.source == "shapes":
    return shapes.write(args.out, seed=args.seed, **where)
  if args.source == "img2dataset":
    return _write_img2dataset(args, where)
  return _write_images(args, where)


# Of a source: its splits, the options for source.json, the sha256 of its files, the class names.
Annotated = tuple[annotations.Splits, dict[str, Any], dict[str, str], tuple[str, ...]]


def _karpathy(args: argparse.Namespace) -> Annotated:
  options = {"captions_per_image": args.captions_per_image, "blank": args.blank_captions}
  splits = sources.read_karpathy(args.annotations, args.images, **options)
  return splits, options, sources.checksums(args.annotations), ()


def _coco(args: argparse.Namespace) -> Annotated:
  options = {"dev_captions": args.dev_captions, "blank": args.blank_captions}
  splits = coco.read_coco(args.annotations, args.images, **options)
  return splits, options, sources.checksums(args.annotations), ()


def _pairs(args: argparse.Namespace) -> Annotated:
  names = [f"{role}_column" for role in pairs.COLUMNS]
  options = {k: getattr(args, k) for k in (*names, "val_fraction", "test_fraction")}
  options |= {"split_lists": args.split_list, "blank": args.blank_captions}
  delimiter = tables.DELIMITERS.get(args.delimiter)
  form = tables.Form(args.format, delimiter, args.columns, args.quotes)
  splits = pairs.read_pairs(args.annotations, args.images, form=form, **options)
  options["form"] = dataclasses.asdict(form)
  sha256 = {f: sources.checksums(f).popitem()[1] for _, f in args.split_list}
  return splits, options, sources.checksums(args.annotations) | sha256, ()


def _albef(args: argparse.Namespace) -> Annotated:
  lists = {k: getattr(args, k) for k in options_lib.SPLITS if getattr(args, k)}
  if not lists:
    raise builder.DatasetError("no list is named; pass --train, --val or --test JSON ROOT")
  splits = sources.read_albef(lists, args.blank_captions)
  # By full path: lists in different folders may have the same name.
  sha256 = {f: sources.checksums(f).popitem()[1] for part in lists.values() for f, _ in part}
  return splits, {**lists, "blank": args.blank_captions}, sha256, ()


def _csv(args: argparse.Namespace) -> Annotated:
  options = {"valid_split": args.valid_split, "blank": args.blank_captions}
  splits = folders.read_csv(args.root, **options)
  files = (epath.Path(args.root) / name for name in folders.CSV_FILES.values())
  sha256 = {k: v for f in files if f.exists() for k, v in sources.checksums(f).items()}
  return splits, options, sha256, ()


def _folders(args: argparse.Namespace) -> Annotated:
  splits, class_names = folders.read_folders(args.root, args.names)
  sha256 = sources.checksums(args.names) if args.names else {}
  return splits, {"names": args.names}, sha256, class_names


_READERS = {
  "karpathy": _karpathy,
  "coco": _coco,
  "pairs": _pairs,
  "albef": _albef,
  "csv": _csv,
  "folders": _folders,
}


def _checked(
  splits: annotations.Splits, args: argparse.Namespace
) -> tuple[annotations.Splits, pictures.LeftOut]:
  """The splits without images that may be left out, and how many of each these are."""
  found = annotations.check_images(splits, args.max_missing)
  left_out = {name: collections.Counter(splits.left_out.get(name)) for name in splits}
  for name, split in splits.items():
    left_out[name]["missing"] += len(split) - len(found[name])
  if args.check_images:
    leave_out = args.check_images == "leave_out"
    found, broken = pictures.check(found, max_pixels=args.max_pixels, leave_out=leave_out)
    for name, reasons in broken.items():
      left_out[name] += reasons
  return found, {name: +reasons for name, reasons in left_out.items()}


def _write_images(args: argparse.Namespace, where: dict) -> epath.Path:
  splits, options, sha256, class_names = _READERS[args.source](args)
  splits, left_out = _checked(splits, args)
  return builder.write_dataset(
    args.out,
    splits={name: annotations.examples(split) for name, split in splits.items()},
    description=f"Images and {'labels' if class_names else 'captions'}, written by "
    f"prepare_data.py {args.source}.",
    sources={
      "source": args.source,
      "options": {**options, "max_missing": args.max_missing},
      "sha256": sha256,
    },
    class_names=class_names,
    totals={name: len(split) for name, split in splits.items()},
    left_out=left_out,
    **where,
  )


def _regions(args: argparse.Namespace) -> regions.RegionDataset:
  images = args.images or ""
  if epath.Path(args.annotations).is_dir():
    splits = coco.read_coco(args.annotations, images, args.dev_captions, args.blank_captions)
  elif args.dev_captions:
    raise builder.DatasetError(
      f"--dev_captions is for a folder with id lists, but {args.annotations} is a file"
    )
  else:
    limit = args.captions_per_image
    splits = sources.read_karpathy(args.annotations, images, limit, args.blank_captions)
  return regions.RegionDataset(
    splits,
    detections.open_reader(args.features, args.boxes),
    sizes=detections.read_sizes(args.sizes) if args.sizes else None,
    read_images=bool(args.images),
    key=args.key,
    dtype=args.dtype,
  )


def _write_regions(args: argparse.Namespace, where: dict) -> epath.Path:
  joined = _regions(args)
  names = ("features", "boxes", "sizes", "key", "captions_per_image", "dev_captions")
  names += ("blank_captions",)
  sha256 = sources.checksums(args.annotations)
  if args.sizes:
    sha256 |= sources.checksums(args.sizes)
  path = builder.write_dataset(
    args.out,
    splits={split: joined.examples(split) for split in joined.report.images},
    description="Regions and captions, written by prepare_data.py regions.",
    sources={
      "source": "regions",
      "options": {name: getattr(args, name) for name in names},
      "sha256": sha256,
    },
    region_dim=joined.region_dim,
    region_dtype=args.dtype,
    images=False,
    totals=joined.report.images,
    **where,
  )
  logging.info("%s", joined.report)
  return path


def _write_img2dataset(args: argparse.Namespace, where: dict) -> epath.Path:
  dirs = {k: getattr(args, k) for k in options_lib.SPLITS if getattr(args, k)}
  if not dirs:
    raise builder.DatasetError("no folder is named; pass --train, --val or --test DIR")
  if args.beam_options and not args.beam_runner:
    raise builder.DatasetError("--beam_options without --beam_runner; pass that too")
  names = ("caption_lines", "max_pixels")
  options = {"check_images": bool(args.check_images), **{k: getattr(args, k) for k in names}}
  return shards.write_dataset(
    args.out,
    sources={
      split: [shard for folder in parts for shard in img2dataset.find_shards(folder)]
      for split, parts in dirs.items()
    },
    read=functools.partial(img2dataset.read, **options),
    description="Images and captions, written by prepare_data.py img2dataset.",
    origin={"source": "img2dataset", "options": {**dirs, **options}},
    beam=shards.Beam(args.beam_runner, args.beam_options) if args.beam_runner else None,
    **where,
  )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
  """SIGTERM and SIGHUP raise SystemExit: what is half written is removed, as after errors."""

  def end(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    print(f"prepare_data.py: ended by {name}; the dataset was not written", file=sys.stderr)
    raise SystemExit(128 + number)

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@cli.program
def main(argv: list[str] | None = None) -> None:
  """Runs one command line."""
  args = options_lib.parser(__doc__).parse_args(argv)
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  # At INFO, Beam logs every worker's start and end.
  logging.getLogger("apache_beam").setLevel(logging.WARNING)
  with _ended_by_signals():
    path = _write(args)
  if path:
    print(path)


if __name__ == "__main__":
  main()
