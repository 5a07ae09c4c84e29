"""The command line of prepare_data.py."""

import argparse
import shlex

from xmodal_jax.data import image
from xmodal_jax.data.preparing import pairs, shapes, tables
from xmodal_jax.runtime import cli

SPLITS = ("train", "val", "test")

_CAPTIONS = "number of captions of an image, the first ones, or all (default: 5, the COCO protocol)"
_DEV = "number of captions of coco_dev_ids.npy, the first ones; {} uses 5000 (default: all)"
_MISSING = "leave out up to this many images whose file does not exist (default: 0)"


def _count(value: str) -> int | None:
  return None if value == "all" else int(value)


def parser(description: str) -> argparse.ArgumentParser:
  """The parser of the program, a subcommand for each source."""
  raw = argparse.RawDescriptionHelpFormatter
  out = cli.ArgumentParser(description=description, formatter_class=raw)
  commands = out.add_subparsers(dest="source", required=True, metavar="SOURCE")
  for add in (
    _add_karpathy, _add_coco, _add_pairs, _add_albef, _add_csv, _add_folders, _add_img2dataset,
    _add_regions, _add_shapes,
  ):  # fmt: skip
    add(commands)
  return out


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
