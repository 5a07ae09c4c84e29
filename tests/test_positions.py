"""Resizing of position tables against torch's bicubic interpolation."""

import numpy as np
import pytest

from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.models import clip
from xmodal_jax.models.layers import positions


@pytest.mark.parametrize(("old", "new"), [(14, 16), (7, 12), (3, 5), (4, 2), (5, 5)])
def test_matches_torch(old, new):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  table = rng.standard_normal((1 + old * old, 6)).astype(np.float32)
  grid = torch.tensor(table[1:].reshape(1, old, old, 6)).permute(0, 3, 1, 2)
  want = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
  want = want.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
  ours = positions.resize_table(table, 1 + new * new)
  np.testing.assert_array_equal(ours[:1], table[:1])
  np.testing.assert_allclose(ours[1:], want, atol=1e-5)  # torch interpolates in float32
  if old == new:
    np.testing.assert_array_equal(ours, table)


def test_only_square_grids():
  with pytest.raises(ValueError, match="position table of 12 rows cannot become one of 17"):
    positions.resize_table(np.zeros((12, 4), np.float32), 17)


def test_system_resizes_image_positions_only():
  table = np.zeros((17, 4), np.float32)
  assert clip_rules.resize("image/pos", table, (26, 4)).shape == (26, 4)
  assert clip_rules.resize("text/pos", table, (26, 4)) is table


def test_file_of_another_resolution_through_init():
  import clip_golden
  import golden_files
  from flax import nnx

  from xmodal_jax.checkpoints import restore
  from xmodal_jax.runtime import step as step_lib

  config = clip_golden.config("vit")
  patch, old = config["image"]["patch"], config["image"]["size"]
  config["image"]["size"] = old + 2 * patch
  build = lambda: clip.build(config, rngs=nnx.Rngs(0))
  _, params, stats = step_lib.split(nnx.eval_shape(build))
  path = str(golden_files.path("clip", "vit", "released_style.pt"))
  ours, _, _ = restore.load(path, "clip", params, stats)
  file = clip_golden.Golden("vit", "released_style.pt").params["image"]["pos"]
  want = positions.resize_table(np.asarray(file), (old // patch + 2) ** 2 + 1)
  np.testing.assert_array_equal(ours["image"]["pos"], want)
