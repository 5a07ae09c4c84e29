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
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath

from xmodal_jax.data import image
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

SPLITS = ("train", "val", "test")

_CAPTIONS = "number of captions of an image, the first ones, or all (default: 5, the COCO protocol)"
_DEV = "number of captions of coco_dev_ids.npy, the first ones; {} uses 5000 (default: all)"
_MISSING = "leave out up to this many images whose file does not exist (default: 0)"


def _count(value: str) -> int | None:
  return None if value == "all" else int(value)


def _parser() -> argparse.ArgumentParser:
  raw = argparse.RawDescriptionHelpFormatter
  parser = cli.ArgumentParser(description=__doc__, formatter_class=raw)
  commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
  for add in (
    _add_karpathy, _add_coco, _add_pairs, _add_albef, _add_csv, _add_folders, _add_img2dataset,
    _add_regions, _add_shapes,
  ):  # fmt: skip
    add(commands)
  return parser


def _command(
  commands, name: str, text: str, *, version: str = "1.0.0", check_images: bool = True
) -> argparse.ArgumentParser:
  """A source with the options that all have."""
  sub = commands.add_parser(name, help=text, description=text)
  sub.add_argument("--out", required=name != "regions", help="folder of datasets, local or gs://")
  sub.add_argument("--name", default=name, help="(default: %(default)s)")
  sub.add_argument("--version", default=version, help="(default: %(default)s)")
  sub.add_argument("--overwrite", action="store_true", help="replace the dataset if it exists")
  if check_images:
    _add_check(sub, ["leave_out"] if name == "img2dataset" else ["error", "leave_out"])
  if check_images and name != "img2dataset":
    sub.add_argument("--max_missing", type=int, default=0, help=_MISSING)
  return sub


def _add_check(sub: argparse.ArgumentParser, choices: list[str]) -> None:
  """choices: what becomes of images that do not decode; the first without a value."""
  text = f"decode each image; one that does not decode is: {' or '.join(choices)} (counted by "
  text += "reason). Without a value: %(const)s"
  sub.add_argument("--check_images", nargs="?", const=choices[0], choices=choices, help=text)
  text = "width x height of an image that --check_images accepts; training and evaluation accept "
  text += "config.data.max_pixels (default of both: %(default)s)"
  sub.add_argument("--max_pixels", type=int, default=image.MAX_PIXELS, metavar="N", help=text)


def _add_annotations(
  sub: argparse.ArgumentParser, images: bool = True, blank: str = "keep"
) -> None:
  sub.add_argument("--annotations", required=True)
  sub.add_argument("--images", required=images, help="folder of the images")
  _add_blank(sub, blank)


def _add_blank(sub: argparse.ArgumentParser, default: str) -> None:
  """default: published lists of captions are not changed, tables are refused."""
  text = "what to do with captions of white space only; they are counted (default: %(default)s)"
  choices = ("error", "drop", "keep")
  sub.add_argument("--blank_captions", choices=choices, default=default, help=text)


def _add_karpathy(commands) -> None:
  sub = _command(commands, "karpathy", "Karpathy's dataset_*.json or .json.gz, all its splits")
  _add_annotations(sub)
  sub.add_argument("--captions_per_image", type=_count, default=5, help=_CAPTIONS)


def _add_coco(commands) -> None:
  text = "captions_*2014.json with coco_{train,restval,dev,test}_ids.npy, or captions_*.json alone"
  sub = _command(commands, "coco", text)
  _add_annotations(sub)
  text = _DEV.format("HAT's program")
  sub.add_argument("--dev_captions", type=int, metavar="N", help=text)


def _add_pairs(commands) -> None:
  text = "a table with a row per caption: .csv, .tsv, .jsonl, or lines NAME#N<TAB>caption"
  sub = _command(commands, "pairs", text)
  _add_annotations(sub, blank="error")
  for role, names in pairs.COLUMNS.items():
    text = f"(default: the first of {', '.join(names)} that exists)"
    sub.add_argument(f"--{role}_column", metavar="NAME", help=text)
  text = "how the table is written (default: by its name and first line)"
  sub.add_argument("--format", choices=tables.KINDS, help=text)
  text = "between the fields (default: by the first line)"
  sub.add_argument("--delimiter", choices=tuple(tables.DELIMITERS), help=text)
  text = "of a file without a line of column names: NAME,NAME,..."
  sub.add_argument("--columns", type=lambda names: tuple(names.split(",")), default=(), help=text)
  text = "csv: a field in quotation marks is unquoted; none: they are characters like others "
  text += "(default: csv, and for tables with tabs csv if all lines can be read so)"
  sub.add_argument("--quotes", choices=("csv", "none"), help=text)
  for split in ("val", "test"):
    text = "fraction of the images, drawn by their paths"
    sub.add_argument(f"--{split}_fraction", type=float, default=0.0, help=text)
  text = "the images of a split, a name per line; others are left out; may be repeated"
  form = {"nargs": 2, "metavar": ("SPLIT", "FILE"), "action": "append", "default": []}
  sub.add_argument("--split_list", **form, help=text)


def _add_albef(commands) -> None:
  sub = _command(commands, "albef", "ALBEF's lists of {image, caption} records in .json")
  for split in SPLITS:
    text = f"a list of the {split} split and the root folder of its paths; may be repeated"
    sub.add_argument(
      f"--{split}", nargs=2, metavar=("JSON", "ROOT"), action="append", default=[], help=text
    )
  _add_blank(sub, "keep")


def _add_csv(commands) -> None:
  text = "ZeroVL's {train,valid}_anno.csv, with folders train and valid of their images"
  sub = _command(commands, "csv", text)
  sub.add_argument("--root", required=True, help="the folder of the dataset")
  text = "the split of valid_anno.csv (default: %(default)s)"
  sub.add_argument("--valid_split", choices=("val", "test"), default="val", help=text)
  _add_blank(sub, "error")


def _add_folders(commands) -> None:
  text = "labelled images in train/CLASS/ and val/CLASS/, no captions"
  sub = _command(commands, "folders", text)
  sub.add_argument("--root", required=True, help="the folder of the dataset")
  text = "a line 'folder<TAB>readable name' for each class (default: the folders' names)"
  sub.add_argument("--names", metavar="FILE", help=text)


def _add_img2dataset(commands) -> None:
  text = "the output of img2dataset, or tars for webdataset: tars, folders or parquet"
  sub = _command(commands, "img2dataset", text)
  for split in SPLITS:
    text = f"an output folder of img2dataset for the {split} split; may be repeated"
    sub.add_argument(f"--{split}", metavar="DIR", action="append", default=[], help=text)
  text = "each line of a .txt is a caption of its own (default: the whole file is one)"
  sub.add_argument("--caption_lines", action="store_true", help=text)
  text = "a runner of Apache Beam, like DirectRunner or DataflowRunner (default: no Beam)"
  sub.add_argument("--beam_runner", help=text)
  text = "the runner's options, one string: --beam_options='--direct_num_workers=2 ...'"
  sub.add_argument("--beam_options", type=shlex.split, default=[], metavar="OPTIONS", help=text)


def _add_regions(commands) -> None:
  text = (
    "regions that a detector found, with the captions of a Karpathy json or a folder as for coco"
  )
  sub = _command(commands, "regions", text, check_images=False)
  _add_annotations(sub, images=False)
  text = "a folder with bu_att and bu_box, tables of bottom-up attention, or an .h5 file"
  sub.add_argument("--features", nargs="+", metavar="PATH", required=True, help=text)
  sub.add_argument("--boxes", metavar="DIR", help="ID.npy for each image (default: bu_box)")
  text = "sizes of the images, .pkl, .json or .csv (default: those of annotations or tables)"
  sub.add_argument("--sizes", metavar="FILE", help=text)
  text = "how features name an image: by id, by its file name without suffix, or (auto, the "
  text += "default) by COCO's id, else by its position in the json"
  sub.add_argument("--key", choices=("auto", "id", "stem"), default="auto", help=text)
  text = "of the stored features (default: %(default)s)"
  sub.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=text)
  text = f"of a json: {_CAPTIONS}"
  sub.add_argument("--captions_per_image", type=_count, default=5, help=text)
  text = _DEV.format("TGDT's program")
  sub.add_argument("--dev_captions", type=int, metavar="N", help=text)
  sub.add_argument("--check", action="store_true", help="report, and write nothing")


def _add_shapes(commands) -> None:
  text = "the embedded dataset of rendered scenes"
  sub = _command(commands, "shapes", text, version=shapes.VERSION, check_images=False)
  sub.add_argument("--seed", type=int, default=0)


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
  lists = {k: getattr(args, k) for k in SPLITS if getattr(args, k)}
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
  dirs = {k: getattr(args, k) for k in SPLITS if getattr(args, k)}
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
  args = _parser().parse_args(argv)
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  # At INFO, Beam logs every worker's start and end.
  logging.getLogger("apache_beam").setLevel(logging.WARNING)
  with _ended_by_signals():
    path = _write(args)
  if path:
    print(path)


if __name__ == "__main__":
  main()
