"""Draws the training loss and the evaluated recalls of a workdir.

python tools/plot_metrics.py --workdir DIR --out curve.png
"""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from etils import epath


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, type=epath.Path)
  parser.add_argument("--out", required=True, type=epath.Path)
  args = parser.parse_args()
  path = args.workdir / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]

  def series(kind, key):
    mine = [r for r in rows if r["kind"] == kind]
    return [r["step"] for r in mine], [r[key] for r in mine]

  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
  left.plot(*series("train", "loss"))
  left.set(xlabel="step", ylabel="training loss")
  for key, label in (("i2t_r10", "image to text R@10"), ("t2i_r10", "text to image R@10")):
    if any(r["kind"] == "val" for r in rows):
      right.plot(*series("val", key), marker="o", label=label)
  right.set(xlabel="step", ylabel="%, validation split")
  right.legend()
  with args.out.open("wb") as f:
    figure.savefig(f, dpi=110, format=args.out.suffix.lstrip(".") or "png")


if __name__ == "__main__":
  main()
