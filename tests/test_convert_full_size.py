"""The nine released models of CLIP at full size, of random bits: both ways bit-exact, in bounded
memory. The tool runs as a process of its own, as a user would run it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from xmodal_jax import torch_files
from xmodal_jax.models import clip_itm

ROOT = pathlib.Path(__file__).parents[1]
MAX_MEMORY = 2.5  # times the file, interpreter and libraries included

# The peak of the program after exec; ru_maxrss would begin at what pytest has.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
  runpy.run_path(sys.argv[0], run_name="__main__")
finally:
  print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
NAMES = {
  "RN50": "rn50", "RN101": "rn101", "RN50x4": "rn50x4", "RN50x16": "rn50x16",
  "RN50x64": "rn50x64", "ViT-B/32": "vit_b32", "ViT-B/16": "vit_b16", "ViT-L/14": "vit_l14",
  "ViT-L/14@336px": "vit_l14_336",
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "ViT-B/32"]


def layout(name: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  shared = pathlib.Path(os.environ.get("XMODAL_SHARED", ROOT.parent / "shared"))
  file = shared / "specs" / "clip_state_dict.json"
  if not file.exists():
    pytest.skip(f"no list of keys at {file} (set XMODAL_SHARED)")
  keys = json.loads(file.read_text())[name]
  return {k: (tuple(shape), np.dtype(dtype)) for k, (*shape, dtype) in keys.items()}


def bits(shape, dtype, seed: int) -> np.ndarray:
  """Random bits, not random numbers: NaNs and denormals have to survive as well."""
  n = int(np.prod(shape)) * dtype.itemsize
  words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-n // 8), np.uint64)
  return words.view(np.uint8)[:n].view(dtype).reshape(shape)


def tool(*args: str) -> tuple[str, int]:
  """What the tool printed, and its peak memory in bytes."""
  command = [sys.executable, "-c", RUN, str(ROOT / "tools" / "convert.py"), "--system", "clip"]
  done = subprocess.run([*command, *args], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  *text, peak = done.stdout.strip().splitlines()
  return "\n".join(text), int(peak) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's memory peaks")
@pytest.mark.parametrize("name", ["ViT-B/32", *SLOW])
def test_round_trip(name, tmp_path):
  source, out, back = tmp_path / "a.pt", tmp_path / "dir", tmp_path / "b.pth"
  make = lambda i, shape, dtype: torch_files.Lazy(shape, dtype, lambda: bits(shape, dtype, i))
  torch_files.write(source, {k: make(i, *v) for i, (k, v) in enumerate(layout(name).items())})
  size = source.stat().st_size
  text, there = tool("--checkpoint", str(source), "--out", str(out))
  assert f"clip {NAMES[name]}:" in text
  _, again = tool("--checkpoint", str(out), "--out", str(back), "--to", "torch")
  print(f"{name}: {size / 1e6:.0f} MB; peak {there / 1e6:.0f} MB, back {again / 1e6:.0f} MB")
  assert there < MAX_MEMORY * size and again < MAX_MEMORY * size
  # Names, order, dtypes, layout and values: the files themselves are equal.
  assert torch_files.sha256(source) == torch_files.sha256(back)
  for path in (source, back):
    path.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_config_from_shapes_is_the_preset(name):
  shapes = {k: shape for k, (shape, _) in layout(name).items()}
  assert clip_itm.infer_config(shapes) == clip_itm.PRESETS[NAMES[name]]
