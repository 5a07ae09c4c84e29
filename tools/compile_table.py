"""Every config that trains, compiled for three slices: the tables of docs/sizing.md.

  python tools/compile_table.py --json sizing.json           # takes hours; rerunning resumes
  python tools/compile_table.py --json sizing.json --into docs/sizing.md

Each row is a run of compile_check.py with the published batch on 16 chips of v5e and on 32 of v5p
(v5p-64 counts cores), and as many pairs for each chip on 256 of v5e. What does not fit is tried
with what the tool proposes. Configs that differ in data and rates alone are compiled once.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from xmodal_jax import config as config_lib
from xmodal_jax.runtime import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]

GIB = 2**30
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"  # around them in a file
CLIP = ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14")
# The ones that weak scaling is asked of first.
CONFIGS = (
  "coco_ft.py:vit_l14",
  "zerovl_pretrain.py:dga",
  "team_pretrain.py:clip_l14",
  "team_pretrain.py:vit_b16",
  "zerovl_pretrain.py:zerovl",
  "hat.py:f30k",
  "tgdt.py:f30k_all",
  *(f"coco_ft.py:{v}" for v in (*CLIP, "vit_l14_336") if v != "vit_l14"),
  "zerovl_ft.py:coco",
  "team_ft.py:coco_clip_l14",
  "team_ft.py:coco_vit_b16",
  *(f"tgdt.py:f30k_{v}" for v in ("global", "local", "stage1", "stage1_shared")),
)
SLICES = {"v5e:4x4": 1, "v5e:16x16": 16, "v5p:2x4x4": 1}  # topology -> times the published batch
CHIPS = {"v5e:4x4": 16, "v5e:16x16": 256, "v5p:2x4x4": 32}
# Beside them: TEAM at the 240 pairs that each of the authors' GPUs had.
MORE = (("team_pretrain.py:clip_l14", "v5e:16x16", 240 * 256),)


def rows() -> list[tuple[str, str, int, int]]:
  """(config, topology, batch, parts), the important ones first."""
  out = []
  for config in CONFIGS:
    c = _load(config)
    out += [(config, name, c.batch_size * times, c.accumulate) for name, times in SLICES.items()]
    out += [(*row, c.accumulate) for row in MORE if row[0] == config]
  first = [row for row in out if row[1].startswith("v5e") and row[0] in CONFIGS[:3]]
  return first + [row for row in out if row not in first]


def _load(name: str) -> Any:
  return config_lib.resolve(config_lib.load(ROOT / "configs" / name))


def _key(row: tuple[str, str, int, int]) -> str:
  return "{} {} {}x{}".format(*row)


def compile_row(row: tuple[str, str, int, int]) -> list[dict[str, Any]]:
  """The entries of a run of compile_check."""
  config, topology, size, parts = row
  devices, e = CHIPS[topology], _load(config).eval
  up = lambda n: -(-n // devices) * devices
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "out.json"
    command = [sys.executable, str(ROOT / "tools/compile_check.py"), "--programs", "train"]
    command += ["--config", str(ROOT / "configs" / config), "--topology", topology]
    command += ["--sizes", f"{size}x{parts}", "--json", str(out)]
    command += [f"--config.eval.batch_size={up(e.batch_size)}"]
    command += [f"--config.eval.block=({up(e.block[0])}, {e.block[1]})"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not out.exists():
      raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(out.read_text())


# --- printing -----------------------------------------------------------------------------------


def table(found: dict[str, list[dict[str, Any]]]) -> str:
  """Markdown: a row per program and slice."""
  head = (
    "config", "slice", "batch", "parts", "state GiB", "temporaries GiB", "of HBM", "collectives MB",
    "waiting ms", "step ms", "examples/s", "MFU", "at best",
  )  # fmt: skip
  lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
  notes = []
  for row in sorted(rows(), key=lambda r: (CONFIGS.index(r[0]), list(SLICES).index(r[1]), r[2])):
    entries = found.get(_key(row))
    if entries is None:
      continue
    e = entries[-1]
    mark = ""
    if e["change"]:
      notes.append(f"[{len(notes) + 1}] {e['change']}: without, {_lack(entries[0])}")
      mark = f" [{len(notes)}]"
    if not e["fits"]:
      lines.append(f"| {row[0]} | {row[1]} | {row[2]:,} | {row[3]} | does not fit: {_lack(e)} |")
      continue
    c = e["cost"]
    moved = ", ".join(
      f"{_short(kind)} {t['bytes'] / 1e6:,.0f}"
      for kind, t in sorted(c["traffic"].items(), key=lambda x: -x[1]["bytes"])
      if t["bytes"] >= 5e5
    )
    cells = (
      row[0] + mark, row[1], f"{row[2]:,}", e["accumulate"], f"{e['arguments'] / GIB:.2f}",
      f"{e['temporaries'] / GIB:.2f}", f"{e['needed'] / e['hbm']:.0%}", moved,
      f"{c['waiting'] * 1e3:.1f}", f"{c['seconds'] * 1e3:.1f}", f"{row[2] / c['seconds']:,.0f}",
      f"{_mfu(e):.1%}", f"{_mfu(e, 'roofline'):.0%}",
    )  # fmt: skip
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join([*lines, "", *notes])


def scaling(found: dict[str, list[dict[str, Any]]]) -> str:
  """Markdown: examples per second and chip on 256 chips against those on 16."""
  lines = [
    "| config | pairs per chip | 16 chips ms | 256 chips ms | efficiency | dearest collective |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for config in CONFIGS:
    c = _load(config)
    pair = [
      found.get(_key((config, name, c.batch_size * SLICES[name], c.accumulate)))
      for name in ("v5e:4x4", "v5e:16x16")
    ]
    if None in pair or not all(p[-1]["fits"] for p in pair):
      continue
    small, large = (p[-1]["cost"] for p in pair)
    worst, t = max(large["sources"].items(), key=lambda x: x[1]["seconds"])
    lines.append(
      f"| {config} | {c.batch_size // 16:,} | {small['seconds'] * 1e3:.1f} | "
      f"{large['seconds'] * 1e3:.1f} | {small['seconds'] / large['seconds']:.0%} | "
      f"{worst}: {t['seconds'] * 1e3:.1f} ms |"
    )
  return "\n".join(lines)


def _mfu(entry: dict[str, Any], bound: str = "") -> float:
  """Of the estimate, or of what the published speeds alone allow, links waited for."""
  c = entry["cost"]
  seconds = c[bound] + c["waiting"] if bound else c["seconds"]
  return entry["model_flops"] / entry["devices"] / seconds / entry["peak"]


def _lack(entry: dict[str, Any]) -> str:
  needed = entry["needed"] / GIB
  return f"{needed:.1f} of {entry['hbm'] / GIB:.2f} GiB" if math.isfinite(needed) else "no memory"


def _short(kind: str) -> str:
  return {"all-reduce": "reduce", "all-gather": "gather", "reduce-scatter": "scatter"}.get(
    kind, kind.removeprefix("collective-")
  )


@cli.program
def main(argv: list[str] | None = None) -> None:
  parser = cli.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", required=True, type=pathlib.Path, help="what was found so far")
  parser.add_argument("--limit", type=int, default=0, help="rows to compile now; 0: all")
  parser.add_argument("--print", action="store_true", help="the tables, compiling nothing")
  parser.add_argument("--into", type=pathlib.Path, help="a file whose tables are replaced by these")
  args = parser.parse_args(argv)
  found = json.loads(args.json.read_text()) if args.json.exists() else {}
  if args.print or args.into:
    text = table(found) + "\n\n" + scaling(found)
    if args.into:
      before, _, rest = args.into.read_text().partition(BEGIN)
      args.into.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    else:
      print(text)
    return
  missing = [row for row in rows() if _key(row) not in found]
  for row in missing[: args.limit or None]:
    print(_key(row), flush=True)
    found[_key(row)] = compile_row(row)
    args.json.write_text(json.dumps(found, indent=1))
  print(f"{len(missing) - min(len(missing), args.limit or len(missing))} rows are left")


if __name__ == "__main__":
  main()
