"""The released models of all systems at full size, with random bits: conversion in both directions
is bit-exact and needs bounded memory. The tool runs in its own process."""

import functools
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion, rules, tables, torch_files
from xmodal_jax.interop import hat as hat_rules
from xmodal_jax.interop import team as team_rules
from xmodal_jax.interop import tgdt as tgdt_rules
from xmodal_jax.interop import zerovl as zerovl_rules
from xmodal_jax.models import clip, hat, team, tgdt, zerovl

ROOT = pathlib.Path(__file__).parents[1]
MAX_MEMORY = 2.5  # times the file, interpreter and libraries included

# Peak memory after exec; ru_maxrss would include that of pytest.
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
# Name in the list of keys -> preset and number of parameters (TEAM spec, section 1).
TEAM = {
  "team_vitb16": ("vit_b16", 238_855_938),
  "team_clipl14": ("clip_l14", 490_886_658),
  "modelscope_chinese_large": ("chinese_l14", 421_195_264),
}

# Name in the list of keys -> preset, whether it needs --variant, number of parameters (ZeroVL spec,
# section 7).
ZEROVL = {
  "zerovl": ("pretrain", False, 195_476_736),
  "zerovl_100m_eval": ("100m", True, 195_476_737),
  "linear_prob_imagenet": ("linear_probe", False, 86_567_656),
}

HAT_PARAMETERS = 199_377_592  # of both published configs, without the pooler
# The same for TGDT and its first stage, and the tensor that its files contain twice.
TGDT = {
  "f30k_all": ("tgdt", 255_372_032),
  "stage1_teran_unshared": ("teran", None),
  "stage1_teran_sharedTE": ("teran_shared", None),
}
_BERT = "img_txt_enc.txt_enc."
TIED = {
  _BERT + "word_embeddings.weight": _BERT + "bert_model.embeddings.word_embeddings.weight",
}


def layout(name: str, system: str = "clip") -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  shared = pathlib.Path(os.environ.get("XMODAL_SHARED", ROOT.parent / "shared"))
  file = shared / "specs" / f"{system}_state_dict.json"
  if not file.exists():
    pytest.skip(f"no list of keys at {file} (set XMODAL_SHARED)")
  keys = json.loads(file.read_text())[name]
  return {k: (tuple(shape), np.dtype(dtype)) for k, (*shape, dtype) in keys.items()}


def shapes_of(name: str, system: str = "clip") -> dict[str, tuple[int, ...]]:
  return {k: shape for k, (shape, _) in layout(name, system).items()}


def bits(shape, dtype, seed: int) -> np.ndarray:
  """Random bits, which include NaNs and denormals."""
  n = int(np.prod(shape)) * dtype.itemsize
  words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-n // 8), np.uint64)
  return words.view(np.uint8)[:n].view(dtype).reshape(shape)


def tool(system: str, *args: str) -> tuple[str, int]:
  """The output of the tool, and its peak memory in bytes."""
  command = [sys.executable, "-c", RUN, str(ROOT / "tools" / "convert.py"), "--system", system]
  done = subprocess.run([*command, *args], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  *text, peak = done.stdout.strip().splitlines()
  return "\n".join(text), int(peak) * 1024


def constants(system: str, keys) -> dict[str, np.ndarray]:
  """The values of constant buffers."""
  out = {}
  for rule in tables.rule_table(system).RULES:
    if isinstance(rule, rules.Constant):
      pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.torch)))
      for key in keys:
        if m := pattern.fullmatch(key):
          numbers = {k: int(v) for k, v in m.groupdict().items()}
          out[key] = rule.value(keys[rule.of.format(**numbers)][0], **numbers)
  return out


def there_and_back(system: str, keys, tmp_path, prefix: str = "", variant: str = "") -> str:
  """Converts a file of random bits with these keys and back, and compares the files.

  Returns the output of the tool.
  """
  source, out, back = tmp_path / "a.pt", tmp_path / "dir", tmp_path / "b.pth"
  make = lambda i, shape, dtype: torch_files.Lazy(shape, dtype, lambda: bits(shape, dtype, i))
  seeds = {k: list(keys).index(TIED.get(k, k)) for k in keys}
  fixed = constants(system, keys)
  value = lambda k, v: fixed[k] if k in fixed else make(seeds[k], *v)
  torch_files.write(source, {prefix + k: value(k, v) for k, v in keys.items()})
  size = source.stat().st_size
  named = ["--variant", variant] if variant else []
  text, there = tool(system, "--checkpoint", str(source), "--out", str(out), *named)
  _, again = tool(system, "--checkpoint", str(out), "--out", str(back), "--to", "torch")
  print(f"{text}\n{size / 1e6:.0f} MB; peak {there / 1e6:.0f} MB, back {again / 1e6:.0f} MB")
  assert there < MAX_MEMORY * size and again < MAX_MEMORY * size
  # Names, order, dtypes, layout and values: the files themselves are equal.
  assert torch_files.sha256(source) == torch_files.sha256(back)
  for path in (source, back):
    path.unlink()
  shutil.rmtree(out)
  return text


needs_proc = pytest.mark.skipif(
  not os.path.exists("/proc/self/status"), reason="reads Linux's memory peaks"
)


@needs_proc
@pytest.mark.parametrize("name", [pytest.param("ViT-B/32", marks=pytest.mark.full), *SLOW])
def test_round_trip(name, tmp_path):
  assert f"clip {NAMES[name]}:" in there_and_back("clip", layout(name), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_config_from_shapes_is_the_preset(name):
  assert clip_rules.infer_config(shapes_of(name)) == clip.PRESETS[NAMES[name]]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("name", TEAM)
def test_team_round_trip(name, prefix, tmp_path):
  text = there_and_back("team", layout(name, "team"), tmp_path, prefix)
  variant, count = TEAM[name]
  assert f"team {variant}: {count:,} values" in text
  assert (", in module." in text) == bool(prefix)


@pytest.mark.parametrize("name", TEAM)
def test_team_config_from_shapes_is_the_preset(name):
  variant, count = TEAM[name]
  shapes = shapes_of(name, "team")
  assert team_rules.infer_config(shapes) == team.PRESETS[variant]
  assert sum(np.prod(s, dtype=int) for k, s in shapes.items() if "position_ids" not in k) == count


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("name", ZEROVL)
def test_zerovl_round_trip(name, prefix, tmp_path):
  variant, named, count = ZEROVL[name]
  text = there_and_back(
    "zerovl", layout(name, "zerovl"), tmp_path, prefix, variant if named else ""
  )
  assert f"zerovl {variant}: {count:,} values" in text


@pytest.mark.parametrize("name", ZEROVL)
def test_zerovl_config_from_shapes_is_that_of_the_presets(name):
  variant, named, count = ZEROVL[name]
  shapes = shapes_of(name, "zerovl")
  found = zerovl_rules.infer_config(shapes)
  fit = [k for k, preset in zerovl.PRESETS.items() if preset == preset | found]
  assert fit == (["14m", "100m"] if named else [variant])
  assert sum(np.prod(s, dtype=int) for k, s in shapes.items() if "position_ids" not in k) == count


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", TGDT)
def test_tgdt_round_trip(name, tmp_path):
  assert f"tgdt {TGDT[name][0]}:" in there_and_back("tgdt", layout(name, "tgdt"), tmp_path)


@pytest.mark.parametrize("name", TGDT)
def test_tgdt_config_from_shapes_is_that_of_the_preset(name):
  variant, count = TGDT[name]
  shapes = shapes_of(name, "tgdt")
  found, want = tgdt_rules.infer_config(shapes), tgdt.PRESETS[variant]
  assert found == want
  if count is not None:
    assert sum(np.prod(s, dtype=int) for k, s in shapes.items() if k not in TIED) == count


@needs_proc
@pytest.mark.slow
def test_hat_round_trip(tmp_path):
  assert "hat swin_b:" in there_and_back("hat", layout("flickr30k", "hat"), tmp_path)


def test_hat_config_from_shapes_is_the_preset():
  shapes = shapes_of("flickr30k", "hat")
  found, want = hat_rules.infer_config(shapes), hat.PRESETS["swin_b"]
  assert found == want
  buffers = ("relative_position_index", "attn_mask")
  count = sum(np.prod(s, dtype=int) for k, s in shapes.items() if not k.endswith(buffers))
  assert count == HAT_PARAMETERS


def test_files_that_fit_two_presets_need_a_variant(tmp_path):
  """The file has zeros: only names and shapes are read before the error."""
  source = tmp_path / "a.pth"
  zeros = {
    k: np.broadcast_to(np.int8(0), s) for k, s in shapes_of("zerovl_14m_eval", "zerovl").items()
  }
  torch_files.write(source, zeros)
  main = runpy.run_path(str(ROOT / "tools" / "convert.py"))["main"]
  arguments = ["--system", "zerovl", "--checkpoint", str(source), "--out", str(tmp_path / "out")]
  with pytest.raises(SystemExit, match=r"14m or 100m, which differ .*mean, std.*--variant"):
    main(arguments)
  with pytest.raises(SystemExit, match="not of variant 'pretrain': it fits 14m or 100m"):
    main([*arguments, "--variant", "pretrain"])


@functools.cache
def team_shapes(variant: str) -> dict[str, nnx.Variable]:
  """{path: abstract parameter} of a released TEAM; nothing is allocated."""
  model = nnx.eval_shape(lambda: team.build(team.preset(variant), rngs=nnx.Rngs(0)))
  return restore.flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_team_optimizer_groups():
  """314 tensors of the CLIP config, then the 296 of the image tower (TEAM spec, 4.1)."""
  keys = shapes_of("team_clipl14", "team")
  want = {k: v.shape for k, v in team_shapes("clip_l14").items()}
  names = conversion.parameter_names(team_rules.RULES, want, keys)
  assert names == [k for k in keys if "position_ids" not in k]
  ours = team_rules.optimizer_names(names, [314, 296])
  assert sorted(ours) == sorted(names)
  slow = [n.startswith("image_model.") for n in ours]
  assert slow == [False] * 314 + [True] * 296
  for part in (False, True):  # each group in the order of the file
    group = [n for n in ours if n.startswith("image_model.") == part]
    assert group == [n for n in names if n in set(group)]


@pytest.mark.parametrize(
  "name, kind, variant",
  [
    ("init_deit_base_patch16_224", "deit", "vit_b16"),
    ("init_clip_vit_l_14_visual", "clip", "clip_l14"),
  ],
)
def test_towers_that_team_starts_from(name, kind, variant):
  """The lists of keys fill the whole tower; only the class head is dropped."""
  tower = f"image/{kind}/"
  want = {k: v for k, v in team_shapes(variant).items() if k.startswith(tower)}
  if kind == "deit":
    del want[tower + "proj/kernel"]  # new in TEAM
  # Zero-stride arrays of bytes need little memory.
  state = {k: np.broadcast_to(np.int8(0), s) for k, s in shapes_of(name, "team").items()}
  flat, report = conversion.to_jax(state, team_rules.TOWERS["image"], want, check_shapes=False)
  assert report.dropped == [k for k in state if k.startswith("head.")]
  wrong = {k for k in want if flat[k].shape != want[k].shape}
  assert wrong == ({"image/deit/pos"} if kind == "deit" else set())  # 224 pixels, then 256
