"""The golden checkpoint files of CLIP: three formats, one model each, read without torch."""

import golden_files
import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.models import clip

MODELS = ("vit", "rn")


def load(model: str, name: str):
  return torch_files.state_dict(golden_files.path("clip", model, name), verify=True)


@pytest.mark.parametrize("model", MODELS)
def test_archive_and_state_dict_hold_the_same_weights(model):
  manifest = golden_files.manifest("clip")["models"][model]
  plain, info = load(model, "state_dict.pth")
  archive, archive_info = load(model, "released_style.pt")
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
  plain, _ = load(model, "state_dict.pth")
  trained, info = load(model, "itm_epoch1.pt")
  assert info["wrapper"] == ("state_dict",)
  assert (info["extras"]["epoch"], info["extras"]["name"]) == (1, "CLIP_ITM")
  layout = lambda state: {k: (v.shape, v.dtype) for k, v in state.items()}
  assert layout(trained) == layout(plain)
  finals = [k for k in outputs if k.startswith("train_half/final/")]
  assert len(finals) > 5
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
@pytest.mark.parametrize("name", ["state_dict.pth", "itm_epoch1.pt"])
def test_same_as_torch_load(model, name):
  torch = pytest.importorskip("torch")
  state, info = load(model, name)
  file = golden_files.path("clip", model, name)
  tree = torch.load(file, map_location="cpu", weights_only=False)
  for key in info["wrapper"]:
    tree = tree[key]
  assert list(tree) == list(state)
  for key, tensor in tree.items():
    same_bits(state[key], tensor.numpy(), key)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["released_style.pt", "state_dict.pth", "itm_epoch1.pt"])
def test_converts_and_comes_back(model, name):
  manifest = golden_files.manifest("clip")["models"][model]
  state, info = load(model, name)
  config = clip_rules.infer_config({k: v.shape for k, v in state.items()}, info["scalars"])
  image, text = config["image"], config["text"]
  assert config["embed"] == manifest["embed_dim"]
  assert image["size"] == manifest["image_resolution"]
  assert image["width"] == manifest["vision_width"]
  depth = image["depth"] if image["kind"] == "vit" else list(image["depths"])
  assert depth == manifest["vision_layers"]
  assert image.get("patch") == manifest["vision_patch_size"]
  assert (text["context"], text["vocab"]) == (manifest["context_length"], manifest["vocab_size"])
  assert (text["width"], text["depth"], text["heads"]) == (
    manifest["text_width"],
    manifest["text_layers"],
    manifest["text_heads"],
  )
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
