"""The golden checkpoint files of CLIP in three formats, read without torch."""

import re

import clip_golden
import golden_files
import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.models import clip

MODELS = list(golden_files.manifest("clip")["models"])
KINDS = ("released", "state_dict", "trained")


def file_of(model: str, kind: str):
  names = {"released": "released_style.pt", "state_dict": "state_dict.pth"}
  name = names.get(kind) or clip_golden.trained_file(model)
  return golden_files.path("clip", model, name)


def load(model: str, kind: str):
  return torch_files.state_dict(file_of(model, kind), verify=True)


@pytest.mark.parametrize("model", MODELS)
def test_archive_and_state_dict_hold_the_same_weights(model):
  manifest = golden_files.manifest("clip")["models"][model]
  plain, info = load(model, "state_dict")
  archive, archive_info = load(model, "released")
  assert (info["format"], info["wrapper"], info["scalars"]) == ("zip", (), {})
  assert archive_info["format"] == "torchscript"
  assert archive_info["scalars"] == {
    "input_resolution": manifest["image_resolution"],
    "context_length": manifest["context_length"],
    "vocab_size": manifest["vocab_size"],
  }
  assert archive.keys() == plain.keys()
  for name, ref in plain.items():
    same_bits(archive[name], ref, name)
  buffers = ("running_mean", "running_var", "num_batches_tracked")
  counted = sum(v.size for k, v in plain.items() if not k.endswith(buffers))
  assert counted == manifest["n_parameters"]


@pytest.mark.parametrize("model", MODELS)
def test_training_checkpoint(model):
  manifest = golden_files.manifest("clip")["models"][model]
  outputs = golden_files.arrays("clip", model, "outputs.npz")
  plain, _ = load(model, "state_dict")
  trained, info = load(model, "trained")
  assert info["wrapper"] == ("state_dict",)
  epoch = int(re.search(r"\d+", file_of(model, "trained").name)[0])
  assert (info["extras"]["epoch"], info["extras"]["name"]) == (epoch, "CLIP_ITM")
  layout = lambda state: {k: (v.shape, v.dtype) for k, v in state.items()}
  assert layout(trained) == layout(plain)
  finals = [k for k in outputs if k.startswith("train_half/final/")]
  assert finals
  for key in finals:
    value = np.asarray(trained[key.removeprefix("train_half/final/")], np.float32)
    np.testing.assert_array_equal(value, outputs[key], key)
  for name, norm in zip(outputs["param_names"], outputs["train_half/final_norm"], strict=True):
    have = np.linalg.norm(np.asarray(trained[str(name)], np.float64))
    np.testing.assert_allclose(have, norm, rtol=1e-12, err_msg=str(name))
  optimizer = info["extras"]["optimizer"]
  lr = optimizer["param_groups"][0]["lr"]
  assert isinstance(lr, np.float64)  # a pickled numpy scalar
  np.testing.assert_allclose(lr, outputs["train_half/lr"][-1], rtol=1e-9)
  moments = optimizer["state"][0]
  assert moments["exp_avg"].dtype == np.float32
  assert moments["exp_avg"].shape == (manifest["context_length"], manifest["text_width"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["state_dict", "trained"])
def test_same_as_torch_load(model, kind):
  torch = pytest.importorskip("torch")
  state, info = load(model, kind)
  tree = torch.load(file_of(model, kind), map_location="cpu", weights_only=False)
  for key in info["wrapper"]:
    tree = tree[key]
  assert list(tree) == list(state)
  for key, tensor in tree.items():
    same_bits(state[key], tensor.numpy(), key)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_both_ways(model, kind):
  manifest = golden_files.manifest("clip")["models"][model]
  state, info = load(model, kind)
  config = clip_rules.infer_config({k: v.shape for k, v in state.items()}, info["scalars"])
  image, text = config["image"], config["text"]
  assert config["embed"] == manifest["embed_dim"]
  assert image["size"] == manifest["image_resolution"]
  assert image["width"] == manifest["vision_width"]
  depth = image["depth"] if image["kind"] == "vit" else list(image["depths"])
  assert depth == manifest["vision_layers"]
  assert image.get("patch") == manifest["vision_patch_size"]
  assert (text["context"], text["vocab"]) == (manifest["context_length"], manifest["vocab_size"])
  assert (text["width"], text["depth"]) == (manifest["text_width"], manifest["text_layers"])
  if manifest["text_width"] == 64 * manifest["text_heads"]:  # shapes do not give the heads
    assert text["heads"] == manifest["text_heads"]
  module = nnx.eval_shape(lambda: clip.build(config, rngs=nnx.Rngs(0)))
  abstract = restore.flat(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
  flat, report = conversion.to_jax(state, clip_rules.RULES, abstract)
  assert flat.keys() == abstract.keys()
  back = conversion.to_torch(flat, clip_rules.RULES, kept=report.kept, order=report.keys)
  assert list(back) == list(state)
  for key, array in conversion.arrays(back):
    same_bits(array, state[key], key)


def same_bits(a, b, name: str) -> None:
  a, b = np.asarray(a), np.asarray(b)
  assert (a.shape, a.dtype) == (b.shape, b.dtype), name
  assert a.tobytes() == b.tobytes(), name
