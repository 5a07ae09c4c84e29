"""Writes a data set for training and evaluation: TFRecords that TFDS reads, with offset indices.

  python tools/prepare_data.py karpathy --annotations dataset.json --images DIR --out DATA_DIR
  python tools/prepare_data.py coco --annotations DIR --images DIR --out DATA_DIR
  python tools/prepare_data.py pairs --annotations pairs.csv --images DIR --out DATA_DIR
  python tools/prepare_data.py albef --train JSON ROOT --train JSON ROOT --out DATA_DIR
  python tools/prepare_data.py shapes --out DATA_DIR

The data set goes to DATA_DIR/NAME/VERSION; give DATA_DIR/NAME as the data directory of a config.
"""

import argparse
import logging
import pathlib
import sys

from etils import epath

# Runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from xmodal_jax.data import builder, shapes, sources

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
    if name not in ("albef", "shapes"):
      sub.add_argument("--annotations", required=True)
      sub.add_argument("--images", required=True, help="folder of the pictures")
    if name != "shapes":
      sub.add_argument("--check_images", action="store_true", help="decode each picture first")
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
  text = "leave out up to so many pictures whose file does not exist (default: 0)"
  sub.add_argument("--max_missing", type=int, default=0, help=text)
  sub = command("shapes", "the embedded data set of rendered scenes", "shapes")
  sub.add_argument("--seed", type=int, default=0)
  return parser


def _write(args: argparse.Namespace) -> epath.Path:
  builder.check_absent(args.out, args.name, args.version, args.overwrite)
  where = {"name": args.name, "version": args.version, "overwrite": args.overwrite}
  if args.source == "shapes":
    return shapes.write(args.out, seed=args.seed, **where)
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
  else:
    names = ("image_column", "caption_column", "id_column", "split_column")
    options = {k: getattr(args, k) for k in (*names, "val_fraction", "test_fraction")}
    splits = sources.read_pairs(args.annotations, args.images, **options)
  if args.source == "albef":  # by full name: lists of several folders may be called the same
    sha256 = {f: sources.checksums(f).popitem()[1] for part in lists.values() for f, _ in part}
  else:
    sha256 = sources.checksums(args.annotations)
  splits = sources.check_pictures(splits, args.check_images, args.max_missing)
  return builder.write_dataset(
    args.out,
    splits={name: sources.examples(pictures) for name, pictures in splits.items()},
    description=f"Pictures and captions, written by prepare_data.py {args.source}.",
    sources={"source": args.source, "options": options, "sha256": sha256},
    **where,
  )


def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  try:
    path = _write(args)
  except builder.DatasetError as e:
    raise SystemExit(f"prepare_data.py: {e}") from None
  print(path)


if __name__ == "__main__":
  main()
