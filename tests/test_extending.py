"""A system that is registered from outside of the package trains, evaluates and converts."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from xmodal_jax.evaluation import retrieval
from xmodal_jax.interop import torch_files
from xmodal_jax.models import registry
from xmodal_jax.training import loop


@pytest.fixture(autouse=True)
def toy():
  registry.register("toy", model="toy.model", interop="toy.rules")
  yield registry.system_module("toy")
  del registry.SYSTEMS["toy"]


def load_tool(name: str):
  path = pathlib.Path(__file__).parents[1] / "tools" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config(data_dir: str, **changes):
  c = tiny.config(data_dir, total="2 steps", eval__every="2 steps", checkpoint__every="2 steps")
  c.model = registry.system_module("toy").preset("base")
  for key, value in changes.items():
    c[key] = value
  return c


def test_train_evaluate_convert(toy, tiny_data, tmp_path):
  run = tmp_path / "run"
  results = loop.train(config(tiny_data), run)
  assert results["test"]["rsum"] > 0

  convert = load_tool("convert")
  file = tmp_path / "toy.pth"
  convert.main(["--system", "toy", "--to", "torch", "--checkpoint", str(run), "--out", str(file)])
  state, _ = torch_files.state_dict(file)
  assert list(state) == ["image.proj.weight", "image.proj.bias", "word.weight"]

  out = tmp_path / "converted"
  convert.main(["--system", "toy", "--checkpoint", str(file), "--out", str(out)])
  for source in (file, out):
    again = retrieval.evaluate(config(tiny_data, init=str(source)), tmp_path / "eval")
    assert again["test"] == results["test"]


def test_every_parameter_has_a_rule(toy):
  from xmodal_jax.interop import conversion, tables

  model = nnx.eval_shape(lambda: toy.build(toy.preset("base"), rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  groups = conversion.tensors_of(tables.rule_table("toy").RULES, params)
  assert sum(len(paths) for paths, _ in groups) == len(jax.tree.leaves(params))
  assert np.prod(params["word"].shape) == 714 * 8


def test_a_name_is_taken_once():
  registry.register("toy", model="toy.model", interop="toy.rules")  # the same again is no error
  with pytest.raises(ValueError, match="'clip' is already registered"):
    registry.register("clip", model="toy.model", interop="toy.rules")
