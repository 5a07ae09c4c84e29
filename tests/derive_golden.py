"""Writes golden sets of other sizes from a golden set, without the original programs.

  python tests/derive_golden.py SOURCE OUT [--seed N] [--systems clip,hat]
  XMODAL_GOLDEN=OUT python -m pytest tests/test_golden_clip_eval.py

SOURCE is a folder of golden sets (a folder per system) or one of them; OUT must not exist. It shows
that the golden tests take sizes, counts and names from the set. What changes:

- evaluation sets: fewer images, captions per image and folds. Captions are repeated, so that scores
  tie, and ties are ranked in the order opposite to ours. Ranks, recalls and shortlists are computed
  anew by plain numpy (derived_golden.py);
- images: other sizes, resized by Pillow alone, and fewer of them;
- captions: fewer, in another order, cut to other lengths;
- files: other names of models, optimizer states beside the checkpoint of another one.

Models and what was recorded of their training stay as they are. Arrays that depend on something
that was changed and cannot be computed here are left out, and tests that read them skip. Files that
SOURCE does not have are left out as well. Tolerances stay.
"""

import argparse
import json
import pathlib

import derive_clip_golden
import derive_hat_golden
import derive_team_golden
import derive_tgdt_golden
import derive_zerovl_golden
from derived_golden import Tree

SYSTEMS = {
  "clip": derive_clip_golden.derive,
  "hat": derive_hat_golden.derive,
  "team": derive_team_golden.derive,
  "tgdt": derive_tgdt_golden.derive,
  "zerovl": derive_zerovl_golden.derive,
}


def derive(source: pathlib.Path, out: pathlib.Path, seed: int = 0, systems=tuple(SYSTEMS)) -> None:
  """Writes the derived sets of `systems` that `source` holds; raises where there is none."""
  single = (source / "manifest.json").exists()
  folders = [source] if single else [source / name for name in systems]
  folders = [f for f in folders if (f / "manifest.json").exists()]
  if not folders:
    raise FileNotFoundError(f"{source}: no manifest.json in it or in {', '.join(systems)} below it")
  for folder in folders:
    system = json.loads((folder / "manifest.json").read_text())["system"].lower()
    tree = Tree(folder, out / system, seed)
    SYSTEMS[system](tree)
    tree.write_json("manifest.json", tree.manifest)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", type=pathlib.Path, help="golden sets, or one of them")
  parser.add_argument("out", type=pathlib.Path, help="folder to write; must not exist")
  parser.add_argument("--seed", type=int, default=0, help="of what is kept")
  parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas")
  a = parser.parse_args()
  if a.out.exists():
    parser.error(f"{a.out} exists: name a folder that does not")
  derive(a.source, a.out, a.seed, a.systems.split(","))


if __name__ == "__main__":
  main()
