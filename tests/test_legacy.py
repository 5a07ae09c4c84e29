"""A workdir and a converted directory of an earlier layout of the package resume and load.

legacy/README.md says how the files were made.
"""

import json
import logging
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import model_files, restore
from xmodal_jax.distributed import sharding
from xmodal_jax.models import clip
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.training import loop

LEGACY = pathlib.Path(__file__).parent / "legacy"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> pathlib.Path:
  """A writable copy of the folders `workdir` and `converted`."""
  folder = tmp_path_factory.mktemp("legacy")
  for name in ("workdir", "converted"):
    with tarfile.open(LEGACY / f"{name}.tar.xz") as tar:
      tar.extractall(folder, filter="data")
  return folder


def config_of(workdir: pathlib.Path, data: str):
  """The config in a workdir's config.json, for a dataset in the folder `data`."""
  config = config_lib.base()
  for key, value in json.loads((workdir / "config.json").read_text())["config"].items():
    node, *parents, last = config, *key.split(".")
    for name in parents:
      if name not in node:
        node[name] = {}
      node = node[name]
    with node.ignore_type():
      node[last] = value
  config.data.dir = data
  return config


def test_workdir_resumes(unpacked, tiny_data, monkeypatch, caplog):
  """The run of four steps that was stopped after two ends as the one that was not stopped."""
  workdir = unpacked / "workdir"
  config = config_of(workdir, tiny_data)
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda axes, _=None: make_mesh(axes, jax.devices()[:1])
  )
  with caplog.at_level(logging.INFO):
    loop.train(config, workdir)
  assert "resuming from step 2" in caplog.text
  assert "has a constant decay, which this run keeps" in caplog.text
  want = json.loads((LEGACY / "workdir.json").read_text())
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = {str(r["step"]): r["loss"] for r in rows if r["kind"] == "train"}
  assert losses == pytest.approx(want["losses"], rel=1e-5)
  params = restore.flat(model_files.load_model(workdir / "checkpoints" / "4")["params"])
  assert params.keys() == want["parameters"].keys()
  for path, (norm, *last) in want["parameters"].items():
    assert np.linalg.norm(params[path].astype(np.float64)) == pytest.approx(norm, rel=1e-5), path
    np.testing.assert_allclose(params[path].ravel()[-2:], last, atol=1e-5, err_msg=path)


def test_converted_directory_loads(unpacked):
  """A CLIP RN50 of toy size in float16, whose embeddings are those of the earlier version."""
  folder = unpacked / "converted"
  config = json.loads((folder / "meta.json").read_text())["config"]
  build = lambda: clip.build(config, rngs=nnx.Rngs(0))
  graphdef, params, stats = step_lib.split(nnx.eval_shape(build))
  params, stats, info = restore.load(str(folder), "clip", params, stats)
  assert info["kind"] == "converted directory"
  size, text = config["image"]["size"], config["text"]
  images = np.linspace(-1, 1, 2 * size * size * 3, dtype=np.float32).reshape(2, size, size, 3)
  ids = np.arange(2 * text["context"], dtype=np.int32).reshape(2, -1) % (text["vocab"] - 1)
  ids[:, -3] = text["vocab"] - 1  # the end token

  @jax.jit
  def embed(params, stats, batch):
    model = nnx.merge(graphdef, params, stats)
    return dict(image=model.encode_image(batch)["embed"], text=model.encode_text(batch)["embed"])

  with jax.default_matmul_precision("highest"):
    found = embed(params, stats, dict(image=images, text_ids=ids))
  want = json.loads((LEGACY / "converted.json").read_text())
  for side, value in want.items():
    np.testing.assert_allclose(found[side], value, rtol=1e-5, atol=1e-6, err_msg=side)
