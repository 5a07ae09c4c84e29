"""Draws the training loss and the evaluated recalls of a workdir.

python tools/plot_metrics.py --workdir DIR --out curve.png
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from etils import epath

from xmodal_jax.errors import UserError
from xmodal_jax.runtime import cli, metric_writers


@cli.program
def main(argv: list[str] | None = None) -> None:
  parser = cli.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, type=epath.Path)
  parser.add_argument("--out", required=True, type=epath.Path)
  args = parser.parse_args(argv)
  args.workdir, args.out = args.workdir.expanduser(), args.out.expanduser()
  rows = metric_writers.read_rows(args.workdir)
  if not rows:
    raise UserError(f"{args.workdir / metric_writers.JSONL}: there is no whole line in it yet")
  form = args.out.suffix.lstrip(".") or "png"
  if form not in plt.gcf().canvas.get_supported_filetypes():
    raise UserError(f"--out {args.out}: .{form} is no format of images, take .png, .svg or .pdf")

  def series(kind, key):
    mine = [r for r in rows if r["kind"] == kind and key in r]
    return [r["step"] for r in mine], [r[key] for r in mine]

  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
  left.plot(*series("train", "loss"))
  left.set(xlabel="step", ylabel="training loss")
  for key, label in (("i2t_r10", "image to text R@10"), ("t2i_r10", "text to image R@10")):
    right.plot(*series("val", key), marker="o", label=label)
  right.set(xlabel="step", ylabel="%, validation split")
  right.legend()
  with args.out.open("wb") as f:
    figure.savefig(f, dpi=110, format=form)


if __name__ == "__main__":
  main()
