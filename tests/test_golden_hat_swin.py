"""HAT's golden vectors of the image tower: stages, another resolution, public files, tables."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import restore
from xmodal_jax.interop import conversion, torch_files, towers
from xmodal_jax.models.towers import swin

MANIFEST = golden_files.manifest("hat")
CONFIG, TOLERANCE = MANIFEST["config"], MANIFEST["tolerance"]
FEATURES = TOLERANCE["features"]
TABLES = TOLERANCE["pretrained_tables"]["atol"]
PREFIX = "vit_model."
RULES = towers.swin(PREFIX, "image")
PUBLIC = [*towers.swin("", "image"), *towers.SWIN_REST]


def sizes(config) -> dict:
  return dict(
    size=config["image_size"],
    patch=CONFIG["patch_size"],
    window=config["window_size"],
    embed=config["embed_dim"],
    depths=config["depths"],
    heads=config["num_heads"],
    mlp_ratio=CONFIG["mlp_ratio"],
    drop_path=CONFIG["drop_path_rate"],
    eps=CONFIG["swin_layer_norm_eps"],
  )


FILES = {
  "hat.pth": sizes(CONFIG),
  "vit_other_resolution.pth": sizes(CONFIG["other_resolution"]),
}


@functools.cache
def state_dict(*file: str) -> dict[str, np.ndarray]:
  """The image tower of a file."""
  state, _ = torch_files.state_dict(golden_files.path("hat", *file))
  bare = not any(k.startswith(PREFIX) for k in state)
  return {k: v.read() for k, v in state.items() if bare or k.startswith(PREFIX)}


def abstract(config):
  """(graphdef, {path: shape}) of a tower under "image"."""
  tower = nnx.eval_shape(lambda: swin.Swin(**config, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(tower)
  return graphdef, restore.flat({"image": nnx.to_pure_dict(params)})


def read(file: str):
  graphdef, want = abstract(FILES[file])
  flat, _ = conversion.to_jax(state_dict(file), RULES, want)
  params = jax.tree.map(jnp.asarray, restore.nested(flat)["image"])
  return nnx.merge(graphdef, nnx.State(params))


def close_stages(tower, images, recorded):
  """Stages of the first rows of a batch, channels first as the original has it."""
  images = jnp.asarray(images.transpose(0, 2, 3, 1))
  with jax.default_matmul_precision("highest"):
    ours = jax.jit(lambda x: tower.states(x))(images)
  stages = {int(k.rsplit("_", 1)[1]): v for k, v in recorded.items() if "vit_stage_" in k}
  assert sorted(stages) == list(range(len(ours)))
  for i, want in stages.items():
    have = ours[i][: len(want)]
    assert have.shape == want.shape and ours[i].shape[1:] == want.shape[1:]
    np.testing.assert_allclose(have, want, **FEATURES, err_msg=f"stage {i}")


def test_stages():
  tower, recorded = read("hat.pth"), golden_files.arrays("hat", "outputs.npz")
  images = golden_files.arrays("hat", "inputs.npz")["batch0/images"]
  close_stages(tower, images, recorded)
  want = recorded["vit_patch_embed"]
  with jax.default_matmul_precision("highest"):
    have = tower.embed(jnp.asarray(images[: len(want)].transpose(0, 2, 3, 1)))
  np.testing.assert_allclose(have.reshape(want.shape), want, **FEATURES)


def test_stages_of_another_resolution():
  recorded = golden_files.arrays("hat", "other_resolution.npz")
  close_stages(read("vit_other_resolution.pth"), recorded["images"], recorded)


@pytest.mark.parametrize("file", FILES)
def test_conversion_both_ways(file):
  """Bit for bit, buffers and order included; and from the parameters alone, all keys."""
  state = state_dict(file)
  flat, report = conversion.to_jax(state, RULES, abstract(FILES[file])[1])
  assert not report.kept and not report.dropped and not report.filled
  back = dict(conversion.arrays(conversion.to_torch(flat, RULES, order=report.keys)))
  alone = dict(conversion.arrays(conversion.to_torch(flat, RULES)))
  assert list(back) == list(state) and alone.keys() == state.keys()
  for name, want in state.items():
    for have in (back[name], alone[name]):
      assert (have.shape, have.dtype) == (want.shape, want.dtype), name
      assert have.tobytes() == want.tobytes(), name


@pytest.mark.parametrize("file", FILES)
def test_config_from_shapes(file):
  found = towers.swin_config({k: v.shape for k, v in state_dict(file).items()}, PREFIX)
  assert found == {k: tuple(v) if isinstance(v, list) else v for k, v in FILES[file].items()
                   if k in found}  # fmt: skip
  assert {"size", "window", "embed", "depths", "heads"} <= found.keys()


def first(state, end: str) -> str:
  """The first key with that ending; skips where there is none."""
  for key in state:
    if key.endswith(end):
      return key
  pytest.skip(f"no {end} in this golden set: no stage has shifted windows")


def test_buffers_that_the_model_does_not_compute_are_refused():
  state, want = dict(state_dict("hat.pth")), abstract(FILES["hat.pth"])[1]
  index, mask = first(state, "relative_position_index"), first(state, "attn_mask")
  off = lambda name: np.concatenate([state[name].ravel()[:-1], [1]]).reshape(state[name].shape)
  for name in (index, mask):
    changed = state | {name: off(name).astype(state[name].dtype)}
    words = rf"1 not what the model computes:\s+{name}: 1 of \d+ values differ"
    with pytest.raises(conversion.ConversionError, match=words):
      conversion.to_jax(changed, RULES, want)
  with pytest.raises(conversion.ConversionError, match=rf"{mask} \[1, .*\], expected \["):
    conversion.to_jax(state | {mask: state[mask][:1]}, RULES, want)
  plain = mask.replace("blocks.1", "blocks.0")  # even blocks are not shifted
  with pytest.raises(conversion.ConversionError, match=rf"1 extra:\s+{plain}"):
    conversion.to_jax(state | {plain: state[mask]}, RULES, want)


def test_buffers_can_be_absent_or_of_half_precision():
  state, want = dict(state_dict("hat.pth")), abstract(FILES["hat.pth"])[1]
  index, mask = first(state, "relative_position_index"), first(state, "attn_mask")
  del state[index]
  state[mask] = state[mask].astype(np.float16)
  flat, report = conversion.to_jax(state, RULES, want)
  back = conversion.to_torch(flat, RULES, kept=report.kept, order=report.keys)
  assert list(back) == list(state) and back[mask].make().dtype == np.float16


def test_a_public_file():
  """Position tables are resized, the head is dropped, norms that are not in the file start at 1."""
  config = FILES["hat.pth"]
  state = state_dict("pretrained", "swin_pretrained.pth")
  want = abstract(config)[1]
  flat, report = conversion.to_jax(state, PUBLIC, want, check_shapes=False)
  assert report.dropped and all(k.startswith("head.") for k in report.dropped)
  assert {n.split(".")[0] for n in report.filled} == {"norm_0", "norm_1", "norm_2"}
  flat = {k: towers.resize_swin_tables(k, v, want[k].shape) for k, v in flat.items()}
  ours = dict(conversion.arrays(conversion.to_torch(flat, RULES)))
  recorded = golden_files.arrays("hat", "pretrained_outputs.npz")
  fresh = {k.removeprefix("fresh/"): v for k, v in recorded.items() if f"fresh/{PREFIX}" in k}
  assert fresh
  for name, value in fresh.items():
    if name.endswith("table"):
      np.testing.assert_allclose(ours[name], value, rtol=0, atol=TABLES, err_msg=name)
    else:
      np.testing.assert_array_equal(ours[name], value, name)


def test_tables_of_other_windows():
  """At image size 384 the original does not resize tables: it needs a file of that size."""
  recorded = golden_files.arrays("hat", "pretrained_outputs.npz")
  source = next(v for k, v in recorded.items() if k.startswith("table_") and "adapted" not in k)
  adapted = {int(k.rsplit("_", 1)[1]): v for k, v in recorded.items() if "table_adapted" in k}
  assert adapted
  for size, want in adapted.items():
    assert size == 384 or len(want) == (2 * (size // 32) - 1) ** 2
    layers = np.stack([source, 2 * source])  # every layer of a stack is resized
    have = towers.resize_swin_tables("image/stages/0/blocks/table", layers, (2, *want.shape))
    assert have.dtype == source.dtype
    for x, scale in zip(have, (1, 2), strict=True):
      np.testing.assert_allclose(x, scale * want, rtol=0, atol=scale * TABLES, err_msg=str(size))
