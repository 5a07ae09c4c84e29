"""Models of open_clip that differ only in what keys and shapes do not say: activation, width of
heads, pooling, mask. Converted, they compute what open_clip computes, or a line says what was
assumed."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import facts, restore
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import clip

CLOSE = 1e-5  # of unit vectors in float32

VISION = dict(image_size=16, patch_size=8, width=128, layers=2)
TEXT = dict(context_length=9, vocab_size=70, width=64, heads=1, layers=2)
# Changes of (model, vision, text), and the flags of tools/convert.py that say them.
MODELS = {
  "ViT-B-32": (dict(), dict(), dict(), ["--act", "gelu"]),
  "ViT-B-32-quickgelu": (dict(quick_gelu=True), dict(), dict(), ["--act", "quick_gelu"]),
  "heads of 80": (
    dict(quick_gelu=True), dict(width=320, head_width=80), dict(heads=2), ["--heads", "4,2"],
  ),
  "mean": (dict(quick_gelu=True), dict(pool_type="avg"), dict(), ["--pool", "mean"]),
  "not causal": (dict(quick_gelu=True), dict(), dict(no_causal_mask=True), ["--causal", "false"]),
}  # fmt: skip
LATER = ("ViT-B-32-quickgelu", "not causal")
CASES = [pytest.param(n, marks=pytest.mark.full) if n in LATER else n for n in MODELS]


@pytest.fixture(scope="module")
def open_clip():
  pytest.importorskip("torch")
  import torchvision_ops

  torchvision_ops.declare()
  return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def tool():
  path = pathlib.Path(__file__).parents[1] / "tools" / "convert.py"
  return runpy.run_path(str(path))["main"]


def make(open_clip, name: str, folder: pathlib.Path) -> tuple[pathlib.Path, dict, dict]:
  """(file of a random model, its open_clip config, its embeddings of fixed inputs)."""
  import torch

  change, vision, text, _ = MODELS[name]
  cfg = dict(embed_dim=16, vision_cfg=VISION | vision, text_cfg=TEXT | text) | change
  torch.manual_seed(0)
  model = open_clip.CLIP(**cfg).eval()
  with torch.no_grad():
    for p in model.parameters():  # of a size at which activations are far from linear
      p.copy_(torch.randn_like(p) * 2 / max(p.shape[-1], 4) ** 0.5 if p.ndim else p)
    pixels, ids = inputs()
    image = model.encode_image(torch.tensor(pixels).permute(0, 3, 1, 2), normalize=True)
    words = model.encode_text(torch.tensor(ids), normalize=True)
  file = folder / "model.pt"
  torch.save(model.state_dict(), file)
  return file, dict(model_cfg=cfg), dict(image=image.numpy(), text=words.numpy())


def inputs() -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 69, (3, 9))
  ids[0, 4], ids[1, 8], ids[2, 2] = 69, 69, 69  # the end of the text
  ids[0, 5:], ids[2, 3:] = 0, 0
  return rng.normal(size=(3, 16, 16, 3)).astype(np.float32), ids.astype(np.int32)


def embeddings(source, config: dict) -> dict[str, np.ndarray]:
  """Ours, of config.init=source."""
  model = nnx.eval_shape(lambda: clip.build(config, rngs=nnx.Rngs(0)))
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, stats, _ = restore.load(str(source), "clip", params, stats)

  @jax.jit
  def run(params, stats, pixels, ids):
    model = nnx.merge(graphdef, params, stats)
    image, text = model.encode_image({"image": pixels}), model.encode_text({"text_ids": ids})
    return dict(image=image["embed"], text=text["embed"])

  return jax.device_get(run(params, stats, *map(jnp.asarray, inputs())))


def error(ours, theirs) -> float:
  return max(np.abs(ours[side] - theirs[side]).max() for side in theirs)


@pytest.mark.parametrize("name", CASES)
def test_converted_as_open_clip_computes(name, open_clip, tool, tmp_path, capsys, caplog):
  """Given by flags, read from the json, and a config that names it: equal. Assumed: said."""
  file, cfg, theirs = make(open_clip, name, tmp_path)
  convert = lambda out, *flags: tool(
    ["--system", "clip", "--checkpoint", str(file), "--out", str(tmp_path / out), *flags]
  )
  convert("given", *MODELS[name][3])
  given = meta_lib.read_meta(tmp_path / "given")["config"]
  ours = embeddings(tmp_path / "given", given)
  assert error(ours, theirs) < CLOSE

  capsys.readouterr()
  convert("assumed")
  assert "assumed act=quick_gelu, image.heads=" in (out := capsys.readouterr().out)
  assert "act=gelu" in out  # whom it concerns
  assumed = meta_lib.read_meta(tmp_path / "assumed")["config"]
  right = name == "ViT-B-32-quickgelu"
  assert (assumed == given) == right

  with caplog.at_level("WARNING"):
    restore.load(str(file), "clip", *abstract(given), facts.of({"model": given}))
  assert "model.pt: assumed act=" in caplog.text

  (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
  capsys.readouterr()
  convert("read")
  assert "assumed" not in (out := capsys.readouterr().out) and "open_clip_config.json: " in out
  read = meta_lib.read_meta(tmp_path / "read")
  assert facts.of_converted(read) == (facts.of({"model": given}), "")
  wrong = facts.of({"model": assumed})
  if not right:
    for source in (file, tmp_path / "read", tmp_path / "given"):
      with pytest.raises(restore.CheckpointError, match=r"there, .* in this config"):
        restore.load(str(source), "clip", *abstract(given), wrong)


def abstract(config: dict) -> tuple[nnx.State, nnx.State]:
  model = nnx.eval_shape(lambda: clip.build(config, rngs=nnx.Rngs(0)))
  return nnx.split(model, nnx.Param, nnx.BatchStat)[1:]
