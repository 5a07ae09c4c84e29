"""The table that a written dataset is summed up in, and sizes in words."""

from collections.abc import Mapping, Sequence

LeftOut = Mapping[str, int]  # reason -> number


def table(rows: Mapping[str, tuple[int, int, int, float | None, LeftOut]]) -> str:
  """split -> (images, captions, bytes, seconds if they are known, left out) to lines of text.

  >>> print(table({"train": (12, 6000, 3_100_000, 2.04, {"missing": 3}), "val": (5, 25, 9, 0, {})}))
  split  images  captions   bytes  seconds  left out
  train      12     6,000  3.1 MB      2.0  3 missing
  val         5        25     9 B      0.0  nothing
  """
  lines = [("split", "images", "captions", "bytes", "seconds", "left out")]
  for split, (images, captions, size_, seconds, left_out) in rows.items():
    time = "?" if seconds is None else f"{seconds:.1f}"
    numbers = (f"{images:,}", f"{captions:,}", size(size_), time)
    lines.append((split, *numbers, reasons(left_out)))
  widths = [max(len(line[i]) for line in lines) for i in range(5)]
  return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
  first, *numbers, last = cells
  aligned = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
  return "  ".join([first.ljust(widths[0]), *aligned, last])


def reasons(left_out: LeftOut) -> str:
  """Counts by reason in one line, for instance "3 missing, 1 damaged"."""
  return ", ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items()) if n) or "nothing"


def size(count: int) -> str:
  """Bytes in decimal units.

  >>> size(1_630_000_000)
  '1.6 GB'
  """
  value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
  while value >= 999.5 and len(units) > 1:
    value /= 1000
    units.pop(0)
  return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
