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

img2dataset writes one shard from each of its shards, one after another, or on the workers of Apache
Beam (`pip install xmodal_jax[beam]`): on the cores of this machine by --beam_runner=DirectRunner
--beam_options="--direct_running_mode=multi_processing --direct_num_workers=16", or for instance by
--beam_runner=DataflowRunner --beam_options="--project=P --region=R --temp_location=gs://B/tmp
--setup_file=./setup.py", which needs apache-beam[gcp] besides. Options are Beam's own.

regions writes no images but the regions that a detector found in them, from a folder with bu_att
and bu_box, from tables of bottom-up attention or from an HDF5 file, whose layouts are listed in
xmodal_jax/data/preparing/detections.py. --check reads all of them and reports what does not fit,
without writing.

The dataset goes to DATA_DIR/NAME/VERSION; give DATA_DIR/NAME as the data directory of a config.
"""

import argparse
import functools
import logging
import pathlib
import shlex
import sys

from etils import epath

# Runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from xmodal_jax.data.preparing import (
  annotations,
  builder,
  detections,
  folders,
  img2dataset,
  regions,
  shapes,
  shards,
  sources,
)

SPLITS = ("train", "val", "test")


def _parser() -> argparse.ArgumentParser:
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.set_defaults(max_missing=0)  # the other sources allow none
  commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

  def command(
    name: str, text: str, default_name: str, version: str = "1.0.0"
  ) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    required = name != "regions"
    sub.add_argument("--out", required=required, help="folder of datasets, local or gs://")
    sub.add_argument("--name", default=default_name, help="(default: %(default)s)")
    sub.add_argument("--version", default=version, help="(default: %(default)s)")
    sub.add_argument("--overwrite", action="store_true", help="replace the dataset if it exists")
    if name in ("csv", "folders"):
      sub.add_argument("--root", required=True, help="the folder of the dataset")
    elif name not in ("albef", "img2dataset", "shapes"):
      sub.add_argument("--annotations", required=True)
      sub.add_argument("--images", required=required, help="folder of the images")
    if name not in ("regions", "shapes"):
      broken = "left out and counted" if name == "img2dataset" else "an error"
      text = f"decode each image; one that does not is {broken}"
      sub.add_argument("--check_images", action="store_true", help=text)
    return sub

  sub = command("karpathy", "Karpathy's dataset_*.json or .json.gz, all its splits", "karpathy")
  count = lambda v: None if v == "all" else int(v)
  five = "the first so many of each image, or all (default: 5, the COCO protocol)"
  sub.add_argument("--captions_per_image", type=count, default=5, help=five)
  text = "folder with captions_{train,val}2014.json and coco_{train,restval,dev,test}_ids.npy"
  sub = command("coco", text, "coco")
  dev = "of coco_dev_ids.npy only the first so many; {} takes 5000 (default: all)"
  text = dev.format("HAT's program")
  sub.add_argument("--dev_captions", type=count, metavar="N", help=text)
  sub = command("pairs", "a .csv, .tsv or .jsonl with a row per caption", "pairs")
  for column in ("image", "caption", "id", "split"):
    default = "image_id" if column == "id" else column
    sub.add_argument(f"--{column}_column", default=default, help="(default: %(default)s)")
  for split in ("val", "test"):
    sub.add_argument(f"--{split}_fraction", type=float, default=0.0, help="drawn by path")
  sub = command("albef", "lists of {image, caption} records in .json, as ALBEF has them", "albef")
  for split in SPLITS:
    text = f"a list of the {split} split and the folder of its paths; may be repeated"
    sub.add_argument(
      f"--{split}", nargs=2, metavar=("JSON", "ROOT"), action="append", default=[], help=text
    )
  missing = "leave out up to so many images whose file does not exist (default: 0)"
  sub.add_argument("--max_missing", type=int, default=0, help=missing)
  text = "ZeroVL's {train,valid}_anno.csv, beside the folders train and valid of their images"
  sub = command("csv", text, "csv")
  text = "the split of valid_anno.csv (default: %(default)s)"
  sub.add_argument("--valid_split", choices=("val", "test"), default="val", help=text)
  sub.add_argument("--max_missing", type=int, default=0, help=missing)
  sub = command("folders", "labelled images in train/CLASS/ and val/CLASS/, no captions", "folders")
  text = "a line 'folder<TAB>readable name' for each class (default: the folders' names)"
  sub.add_argument("--names", metavar="FILE", help=text)
  sub = command("img2dataset", "what img2dataset wrote: tars, folders or parquet", "img2dataset")
  for split in SPLITS:
    text = f"an output folder of img2dataset for the {split} split; may be repeated"
    sub.add_argument(f"--{split}", metavar="DIR", action="append", default=[], help=text)
  text = "a runner of Apache Beam, like DirectRunner or DataflowRunner (default: no Beam)"
  sub.add_argument("--beam_runner", help=text)
  text = "the runner's options, one string: --beam_options='--direct_num_workers=2 ...'"
  sub.add_argument("--beam_options", type=shlex.split, default=[], metavar="OPTIONS", help=text)
  text = (
    "regions that a detector found, with the captions of a Karpathy json or a folder as of coco"
  )
  sub = command("regions", text, "regions")
  text = "a folder with bu_att and bu_box, tables of bottom-up attention, or an .h5 file"
  sub.add_argument("--features", nargs="+", metavar="PATH", required=True, help=text)
  sub.add_argument("--boxes", metavar="DIR", help="ID.npy for each image (default: bu_box)")
  text = "sizes of the images, .pkl, .json or .csv (default: those of annotations or tables)"
  sub.add_argument("--sizes", metavar="FILE", help=text)
  text = "how features name an image: by id, by its file name without suffix, or (auto, the "
  text += "default) by COCO's id, else by its place in the json"
  sub.add_argument("--key", choices=("auto", "id", "stem"), default="auto", help=text)
  text = "of the stored features (default: %(default)s)"
  sub.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=text)
  sub.add_argument("--captions_per_image", type=count, default=5, help=f"of a json: {five}")
  text = dev.format("TGDT's program")
  sub.add_argument("--dev_captions", type=count, metavar="N", help=text)
  sub.add_argument("--check", action="store_true", help="report, and write nothing")
  sub = command("shapes", "the embedded dataset of rendered scenes", "shapes", shapes.VERSION)
  sub.add_argument("--seed", type=int, default=0)
  return parser


def _write(args: argparse.Namespace) -> epath.Path | None:
  """The folder of the dataset; None where nothing was to be written."""
  if args.source == "regions" and args.check:
    report = _regions(args).check()
    print(report)
    if report.errors:
      raise builder.DatasetError("the region features have errors, which are listed above")
    return None
  if not args.out:
    raise builder.DatasetError("no --out; name the folder of datasets, or pass --check")
  builder.check_absent(args.out, args.name, args.version, args.overwrite)
  where = {"name": args.name, "version": args.version, "overwrite": args.overwrite}
  if args.source == "regions":
    return _write_regions(args, where)
  if args.source == "shapes":
    return shapes.write(args.out, seed=args.seed, **where)
  if args.source == "img2dataset":
    return _write_img2dataset(args, where)
  sha256, class_names = None, ()
  if args.source == "karpathy":
    options = {"captions_per_image": args.captions_per_image}
    splits = sources.read_karpathy(args.annotations, args.images, **options)
  elif args.source == "coco":
    options = {"dev_captions": args.dev_captions}
    splits = sources.read_coco(args.annotations, args.images, args.dev_captions)
  elif args.source == "albef":
    lists = {k: getattr(args, k) for k in SPLITS if getattr(args, k)}
    options = {**lists, "max_missing": args.max_missing}
    if not lists:
      raise builder.DatasetError("no list is named; pass --train, --val or --test JSON ROOT")
    splits = sources.read_albef(lists)
    # By full name: lists of several folders may be called the same.
    sha256 = {f: sources.checksums(f).popitem()[1] for part in lists.values() for f, _ in part}
  elif args.source == "csv":
    options = {"valid_split": args.valid_split, "max_missing": args.max_missing}
    splits = folders.read_csv(args.root, args.valid_split)
    files = (epath.Path(args.root) / name for name in folders.CSV_FILES.values())
    sha256 = {k: v for f in files if f.exists() for k, v in sources.checksums(f).items()}
  elif args.source == "folders":
    options = {"names": args.names}
    splits, class_names = folders.read_folders(args.root, args.names)
    sha256 = sources.checksums(args.names) if args.names else {}
  else:
    names = ("image_column", "caption_column", "id_column", "split_column")
    options = {k: getattr(args, k) for k in (*names, "val_fraction", "test_fraction")}
    splits = sources.read_pairs(args.annotations, args.images, **options)
  if sha256 is None:
    sha256 = sources.checksums(args.annotations)
  splits = annotations.check_images(splits, args.check_images, args.max_missing)
  return builder.write_dataset(
    args.out,
    splits={name: annotations.examples(split) for name, split in splits.items()},
    description=f"Images and {'labels' if class_names else 'captions'}, written by "
    f"prepare_data.py {args.source}.",
    sources={"source": args.source, "options": options, "sha256": sha256},
    class_names=class_names,
    **where,
  )


def _regions(args: argparse.Namespace) -> regions.RegionDataset:
  images = args.images or ""
  if epath.Path(args.annotations).is_dir():
    splits = sources.read_coco(args.annotations, images, args.dev_captions)
  elif args.dev_captions:
    raise builder.DatasetError(f"--dev_captions is of id lists, and {args.annotations} is a file")
  else:
    splits = sources.read_karpathy(args.annotations, images, args.captions_per_image)
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
    **where,
  )
  logging.info("%s", joined.report)
  return path


def _write_img2dataset(args: argparse.Namespace, where: dict) -> epath.Path:
  folders = {k: getattr(args, k) for k in SPLITS if getattr(args, k)}
  if not folders:
    raise builder.DatasetError("no folder is named; pass --train, --val or --test DIR")
  if args.beam_options and not args.beam_runner:
    raise builder.DatasetError("--beam_options without --beam_runner; pass that too")
  find = lambda dirs: [shard for folder in dirs for shard in img2dataset.find_shards(folder)]
  return shards.write_dataset(
    args.out,
    sources={split: find(dirs) for split, dirs in folders.items()},
    read=functools.partial(img2dataset.read, check_images=args.check_images),
    description="Images and captions, written by prepare_data.py img2dataset.",
    origin={"source": "img2dataset", "options": {**folders, "check_images": args.check_images}},
    beam=shards.Beam(args.beam_runner, args.beam_options) if args.beam_runner else None,
    **where,
  )


def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  logging.getLogger("apache_beam").setLevel(logging.WARNING)  # or every worker's start and end
  try:
    path = _write(args)
  except builder.DatasetError as e:
    raise SystemExit(f"prepare_data.py: {e}") from None
  if path:
    print(path)


if __name__ == "__main__":
  main()
