"""A Swin of today's timm, whose stages begin with their downsampling, as config.init_image."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, hat, torch_files
from xmodal_jax.models.towers import swin

SIZES = dict(size=128, window=4, embed=16, depths=(1, 2, 1, 1), heads=(1, 2, 4, 8))
CLOSE = 2e-5


def model():
  class Tower(nnx.Module):
    def __init__(self):
      self.image = nnx.Dict({"swin": swin.Swin(**SIZES, rngs=nnx.Rngs(0))})

  return Tower()


def abstract():
  return nnx.split(nnx.eval_shape(model), nnx.Param)


@pytest.fixture(scope="module")
def timm_model():
  pytest.importorskip("torch")
  import torchvision_ops

  torchvision_ops.declare()
  pytest.importorskip("timm")
  import torch
  from timm.models.swin_transformer import SwinTransformer

  torch.manual_seed(0)
  return SwinTransformer(
    img_size=128, window_size=4, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8),
    num_classes=5,
  ).eval()  # fmt: skip


def test_as_timm_computes(timm_model, tmp_path):
  import torch

  file = tmp_path / "swin.pth"
  torch.save(timm_model.state_dict(), file)
  graphdef, params = abstract()
  have = restore.load_tower(str(file), "image", "hat", params)
  pixels = np.random.default_rng(0).normal(size=(2, 128, 128, 3)).astype(np.float32)
  with torch.no_grad():
    want = timm_model.forward_features(torch.tensor(pixels).permute(0, 3, 1, 2)).numpy()

  @jax.jit
  def run(params, pixels):
    return nnx.merge(graphdef, params).image["swin"](pixels)

  ours = np.asarray(run(restore.nested(have), pixels)).reshape(want.shape)
  np.testing.assert_allclose(ours, want, atol=CLOSE * np.abs(want).max())


def random_file(names):
  """A state dict of random values under today's or the old names."""
  _, params = abstract()
  shapes = restore.flat(nnx.to_pure_dict(params))
  rng = np.random.default_rng(0)
  flat = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}
  rules = [r for r in hat.TOWERS["image"] if not getattr(r, "unless", "")]
  state = dict(conversion.arrays(conversion.to_torch(flat, rules)))
  state = {k: v for k, v in state.items() if "norm_" not in k and "attn_mask" not in k}
  if names == "new":
    for i in (2, 1, 0):
      state = {
        k.replace(f"layers.{i}.downsample.", f"layers.{i + 1}.downsample."): v
        for k, v in state.items()
      }
  return state | {"head.fc.weight" if names == "new" else "head.weight": np.zeros((5, 128))}


def test_both_names_of_the_downsampling_are_read(tmp_path):
  _, params = abstract()
  read = functools.partial(restore.load_tower, side="image", system="hat", params=params)
  both = []
  for names in ("old", "new"):
    file = tmp_path / f"{names}.pth"
    torch_files.write(file, random_file(names))
    both.append(read(str(file)))
  assert both[0].keys() == both[1].keys()
  for path, value in both[0].items():
    np.testing.assert_array_equal(value, both[1][path], path)
