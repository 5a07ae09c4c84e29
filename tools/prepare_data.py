"""Writes a data set for training and evaluation: TFRecords that TFDS reads, with offset indices.

  python tools/prepare_data.py karpathy --annotations dataset.json --images DIR --out DATA_DIR
  python tools/prepare_data.py coco --annotations DIR --images DIR --out DATA_DIR
  python tools/prepare_data.py pairs --annotations pairs.csv --images DIR --out DATA_DIR
  python tools/prepare_data.py albef --train JSON ROOT --train JSON ROOT --out DATA_DIR
  python tools/prepare_data.py csv --root DIR --out DATA_DIR
  python tools/prepare_data.py folders --root DIR --out DATA_DIR
  python tools/prepare_data.py img2dataset --train DIR --out DATA_DIR
  python tools/prepare_data.py shapes --out DATA_DIR

img2dataset writes one shard from each of its shards, one after another, or on the workers of Apache
Beam (`pip install xmodal_jax[beam]`): on the cores of this machine by --beam_runner=DirectRunner
--beam_options="--direct_running_mode=multi_processing --direct_num_workers=16", or for instance by
--beam_runner=DataflowRunner --beam_options="--project=P --region=R --temp_location=gs://B/tmp
--setup_file=./setup.py", which needs apache-beam[gcp] besides. Options are Beam's own.

The data set goes to DATA_DIR/NAME/VERSION; give DATA_DIR/NAME as the data directory of a config.
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

from xmodal_jax.data import builder, img2dataset, shapes, shards, sources, trees

SPLITS = ("train", "val", "test")


def _parser() -> argparse.ArgumentParser:
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.set_defaults(max_missing=0)  # the other sources allow none
  commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

  def command(name: str, text: str, default_name: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    sub.add_argument("--out", required=True, help="folder of data sets, local or gs://")
    sub.add_argument("--name", default=default_name, help="(default: %(default)s)")
    sub.add_argument("--version", default="1.0.0", help="(default: %(default)s)")
    sub.add_argument("--overwrite", action="store_true", help="replace the data set if it exists")
    if name in ("csv", "folders"):
      sub.add_argument("--root", required=True, help="the folder of the data set")
    elif name not in ("albef", "img2dataset", "shapes"):
      sub.add_argument("--annotations", required=True)
      sub.add_argument("--images", required=True, help="folder of the pictures")
    if name != "shapes":
      broken = "left out and counted" if name == "img2dataset" else "an error"
      text = f"decode each picture; one that does not is {broken}"
      sub.add_argument("--check_images", action="store_true", help=text)
    return sub

  sub = command("karpathy", "Karpathy's dataset_*.json or .json.gz, all its splits", "karpathy")
  count = lambda v: None if v == "all" else int(v)
  text = "the first so many of each picture, or all (default: 5, the COCO protocol)"
  sub.add_argument("--captions_per_image", type=count, default=5, help=text)
  text = "folder with captions_{train,val}2014.json and coco_{train,restval,dev,test}_ids.npy"
  command("coco", text, "coco")
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
  missing = "leave out up to so many pictures whose file does not exist (default: 0)"
  sub.add_argument("--max_missing", type=int, default=0, help=missing)
  text = "ZeroVL's {train,valid}_anno.csv, beside the folders train and valid of their pictures"
  sub = command("csv", text, "csv")
  text = "the split of valid_anno.csv (default: %(default)s)"
  sub.add_argument("--valid_split", choices=("val", "test"), default="val", help=text)
  sub.add_argument("--max_missing", type=int, default=0, help=missing)
  sub = command(
    "folders", "labelled pictures in train/CLASS/ and val/CLASS/, no captions", "folders"
  )
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
  sub = command("shapes", "the embedded data set of rendered scenes", "shapes")
  sub.add_argument("--seed", type=int, default=0)
  return parser


def _write(args: argparse.Namespace) -> epath.Path:
  builder.check_absent(args.out, args.name, args.version, args.overwrite)
  where = {"name": args.name, "version": args.version, "overwrite": args.overwrite}
  if args.source == "shapes":
    return shapes.write(args.out, seed=args.seed, **where)
  if args.source == "img2dataset":
    return _write_img2dataset(args, where)
  sha256, class_names = None, ()
  if args.source == "karpathy":
    options = {"captions_per_image": args.captions_per_image}
    splits = sources.read_karpathy(args.annotations, args.images, **options)
  elif args.source == "coco":
    options = {}
    splits = sources.read_coco(args.annotations, args.images)
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
    splits = trees.read_csv(args.root, args.valid_split)
    files = (epath.Path(args.root) / name for name in trees.CSV_FILES.values())
    sha256 = {k: v for f in files if f.exists() for k, v in sources.checksums(f).items()}
  elif args.source == "folders":
    options = {"names": args.names}
    splits, class_names = trees.read_folders(args.root, args.names)
    sha256 = sources.checksums(args.names) if args.names else {}
  else:
    names = ("image_column", "caption_column", "id_column", "split_column")
    options = {k: getattr(args, k) for k in (*names, "val_fraction", "test_fraction")}
    splits = sources.read_pairs(args.annotations, args.images, **options)
  if sha256 is None:
    sha256 = sources.checksums(args.annotations)
  splits = sources.check_pictures(splits, args.check_images, args.max_missing)
  return builder.write_dataset(
    args.out,
    splits={name: sources.examples(pictures) for name, pictures in splits.items()},
    description=f"Pictures and {'labels' if class_names else 'captions'}, written by "
    f"prepare_data.py {args.source}.",
    sources={"source": args.source, "options": options, "sha256": sha256},
    class_names=class_names,
    **where,
  )


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
    description="Pictures and captions, written by prepare_data.py img2dataset.",
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
  print(path)


if __name__ == "__main__":
  main()
