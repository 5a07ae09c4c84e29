"""TGDT's golden checkpoint: conversion both ways, tied tensors, the order of the optimizer."""

import pathlib
import runpy

import golden_files
import numpy as np
import pytest
import tgdt_golden
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.interop import tgdt as tgdt_rules
from xmodal_jax.models import tgdt
from xmodal_jax.runtime import step as step_lib

TIED = "img_txt_enc.txt_enc.word_embeddings.weight"


@pytest.fixture(scope="module")
def tool():
  file = pathlib.Path(__file__).parents[1] / "tools" / "convert.py"
  return runpy.run_path(str(file))["main"]


def same_tensors(a: pathlib.Path, b: pathlib.Path):
  ours, theirs = torch_files.state_dict(a)[0], torch_files.state_dict(b)[0]
  assert list(ours) == list(theirs)
  for key, value in theirs.items():
    x, y = value.read(), ours[key].read()
    assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes(), key


def test_conversion_both_ways(tool, tmp_path):
  source = golden_files.path("tgdt", tgdt_golden.CHECKPOINT)
  out, back = tmp_path / "ours", tmp_path / "back.pth"
  tool(["--system", "tgdt", "--checkpoint", str(source), "--out", str(out)])
  meta = meta_lib.read_meta(out)
  assert meta["wrapper"] == ["model"] and meta["format"] == "legacy"
  tool(["--system", "tgdt", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  same_tensors(back, source)


def without(state, *prefixes):
  return {k: v for k, v in state.items() if not k.removeprefix("img_txt_enc.").startswith(prefixes)}


UPPER = ("transformer_encoder_text", "transformer_encoder_img", "text_agg", "img_agg")
FIRST = ("img_first_emb", "cap_first_emb")


@pytest.mark.parametrize("shared", [False, True])
def test_layouts_of_the_first_stage(shared, tool, tmp_path):
  more = ("transformer_encoder_2",) if shared else ()
  state = without(tgdt_golden.state_dict(), *UPPER, *FIRST, *more)
  source, out, back = tmp_path / "a.pth", tmp_path / "out", tmp_path / "b.pth"
  torch_files.write(source, state)
  tool(["--system", "tgdt", "--checkpoint", str(source), "--out", str(out)])
  config = meta_lib.read_meta(out)["config"]
  assert config["upper"] == {} and config["shared"] == shared
  tool(["--system", "tgdt", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  same_tensors(back, source)


def test_tied_tensors_have_to_agree():
  state = dict(tgdt_golden.state_dict())
  params = step_lib.split(
    nnx.eval_shape(lambda: tgdt.build(tgdt_golden.config(), rngs=nnx.Rngs(0)))
  )[1]
  want = restore.flat(nnx.to_pure_dict(params))
  state[TIED] = state[TIED] + 1
  with pytest.raises(conversion.ConversionError, match=r"1 tied and different:\s+" + TIED):
    conversion.to_jax(state, tgdt_rules.RULES, want)
  del state[TIED]  # newer programs may leave it out
  flat, _ = conversion.to_jax(state, tgdt_rules.RULES, want)
  assert TIED not in conversion.to_torch(flat, tgdt_rules.RULES, order=list(state))
  assert TIED in conversion.to_torch(flat, tgdt_rules.RULES)


def test_missing_parts_are_named():
  state = without(tgdt_golden.state_dict(), "cap_proj", *UPPER)
  params = step_lib.split(
    nnx.eval_shape(lambda: tgdt.build(tgdt_golden.config(), rngs=nnx.Rngs(0)))
  )[1]
  with pytest.raises(conversion.ConversionError) as e:
    conversion.to_jax(state, tgdt_rules.RULES, restore.flat(nnx.to_pure_dict(params)))
  assert "img_txt_enc.cap_proj.weight -> text_proj/kernel" in str(e.value)
  assert "transformer_encoder_img.layers.0.norm1.weight" in str(e.value)
  with pytest.raises(conversion.ConversionError, match=r"not a TGDT state dict .*OpenAI CLIP"):
    tgdt_rules.infer_config({"visual.conv1.weight": (8, 3, 4, 4)})


def test_config_from_shapes():
  state = tgdt_golden.state_dict()
  found = tgdt_rules.infer_config({k: v.shape for k, v in state.items()})
  want = tgdt_golden.config()
  for part in ("image", "text", "lower", "upper"):
    found[part].pop("heads")  # in no file
    assert found[part].items() <= want[part].items(), part
  assert (found["embed"], found["shared"]) == (want["embed"], False)


def test_order_of_the_optimizer():
  state = tgdt_golden.state_dict()
  golden = tgdt_golden.Golden()
  shapes = {k: v.shape for k, v in restore.flat(golden.params).items()}
  names = conversion.parameter_names(tgdt_rules.RULES, shapes, state)
  want = tgdt_golden.goldens()["optimizer_param_order"]
  assert tgdt_rules.optimizer_names(names, [len(g) for g in want]) == [n for g in want for n in g]
  assert tgdt_rules.optimizer_names(names, [len(want[0])]) == want[0]


def test_public_bert(tmp_path):
  """A file with more layers than the model gives its first ones."""
  section = tgdt_golden.config()
  params = step_lib.split(nnx.eval_shape(lambda: tgdt.build(section, rngs=nnx.Rngs(0))))[1]
  file = golden_files.path("tgdt", "bert_pretrained.pth")
  leaves = restore.load_tower(str(file), "text", "tgdt", params)
  state, _ = torch_files.state_dict(file)
  used = tgdt_golden.SIZES["bert_layers_used"]
  kernels = leaves["text/blocks/wo/kernel"]
  assert len(kernels) == used
  for i, kernel in enumerate(kernels):
    name = next(k for k in state if k.endswith(f"layer.{i}.output.dense.weight"))
    np.testing.assert_array_equal(kernel, state[name].read().T)
