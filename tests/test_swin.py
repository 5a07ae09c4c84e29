"""The Swin tower: windows, masks, drop-path, scan against loop, sharding, published sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.checkpoints import restore
from xmodal_jax.distributed import sharding
from xmodal_jax.interop import conversion, towers
from xmodal_jax.models import layers
from xmodal_jax.models.layers import positions
from xmodal_jax.models.towers import swin

# Odd and even depths, one and several windows.
TINY = dict(size=16, patch=2, window=4, embed=8, depths=(3, 2), heads=(1, 2))


@functools.cache
def weights(**config) -> dict:
  """Random parameters of a tower, large enough for all of them to affect the output."""
  rng, (_, params) = np.random.default_rng(0), abstract(**config)
  draw = lambda path, v: rng.normal(path.endswith("scale"), 0.2, v.shape).astype(np.float32)
  flat = restore.flat(nnx.to_pure_dict(params))
  return restore.nested({path: jnp.asarray(draw(path, v)) for path, v in flat.items()})


def tower(**changes) -> swin.Swin:
  sizes = {k: v for k, v in (TINY | changes).items() if k in TINY}
  return nnx.merge(abstract(**TINY | changes)[0], weights(**sizes))


def images(count: int, size: int = TINY["size"]):
  return jax.random.normal(jax.random.key(2), (count, size, size, 3))


@jax.jit
def run(model: swin.Swin, x, key=None):
  return model.states(x, key)


def close(have, want):
  """Compares trees, except for key biases, whose gradients are rounding noise around 0."""
  pairs = zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (have, want)), strict=True)
  for (path, a), (_, b) in pairs:
    name = jax.tree_util.keystr(path)
    if "['k']['bias']" not in name:
      np.testing.assert_allclose(
        a, b, rtol=1e-3, atol=1e-4 * abs(np.asarray(b)).max(), err_msg=name
      )


def abstract(**config):
  """(graphdef, parameters without values) of a tower."""
  return nnx.split(nnx.eval_shape(lambda: swin.Swin(**config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(("grid", "window"), [(8, 4), (9, 3), (14, 7), (6, 2), (10, 5)])
def test_a_shift_brings_together_what_is_apart(grid, window):
  """Tokens of a shifted window attend to each other if the unshifted grid has them that close."""
  mask, n = positions.shift_mask(grid, window), grid // window
  assert mask.shape == (n * n, window**2, window**2) and mask.dtype == np.float32
  shift = window // 2
  where = lambda i, j: ((i // window) * n + j // window, i % window * window + j % window)
  want = np.zeros_like(mask)
  for a in np.ndindex(grid, grid):
    for b in np.ndindex(grid, grid):
      (at, query), (other, key) = where(*a), where(*b)
      source = [np.add(x, shift) % grid for x in (a, b)]
      if at == other and abs(source[0] - source[1]).max() >= window:
        want[at, query, key] = -100
  np.testing.assert_array_equal(mask, want)
  assert (want < 0).any() and not mask[0].any()


def test_relative_index():
  window = 3
  index = positions.relative_index(window)
  places = list(np.ndindex(window, window))
  for i, (r, c) in enumerate(places):
    for j, (s, d) in enumerate(places):
      assert index[i, j] == (r - s + window - 1) * (2 * window - 1) + c - d + window - 1
  assert index.dtype == np.int64 and len(np.unique(index)) == (2 * window - 1) ** 2


def by_hand(model: swin.Swin, x, key):
  """The tower as a loop over its blocks, each on a slice of its stack."""
  keys, out = jax.random.split(key, len(model.rates)), []
  x = model.embed(x)
  for i, rates in enumerate(model.rates):
    stage, k = model.stages[str(i)], jax.random.split(keys[i], len(rates))
    for layer, rate in enumerate(rates):
      block = jax.tree.map(lambda a, layer=layer: a[layer], stage.blocks)
      bias = block.table[...][positions.relative_index(stage.window)].transpose(2, 0, 1)
      several = stage.grid > stage.window
      mask = positions.shift_mask(stage.grid, stage.window) if layer % 2 and several else None
      x = block(x, bias, mask, rate=rate, key=k[layer])
    out.append(model.norms[str(i)](x.reshape(len(x), -1, x.shape[-1])))
    x = x if stage.merge is None else stage.merge(x)
  return out


@pytest.mark.full
def test_the_scan_is_the_loop():
  """With drop-path, unrolled and rematerialized."""
  x, key, config = images(4), jax.random.key(3), dict(depths=(5, 1), drop_path=0.3)
  want = jax.jit(by_hand)(tower(**config), x, key)
  close(run(tower(**config, unroll=8, remat="nothing_saveable"), x, key), want)


class _Same(nnx.Module):
  def __call__(self, x):
    return x


def test_drop_path_of_every_branch():
  """Rates grow linearly over blocks, draws are independent, the expectation is unchanged.

  Weights are chosen so that each branch adds 1 to a channel of its own.
  """
  rate, count = 0.6, 4096
  model = tower(drop_path=rate)
  nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
  model.norms = nnx.Dict({str(i): _Same() for i in range(2)})
  for i, depth in enumerate(TINY["depths"]):
    blocks, width = model.stages[str(i)].blocks, TINY["embed"] * 2**i
    for n, part in enumerate((blocks.out, blocks.wo)):
      part.bias[...] = jax.nn.one_hot(2 * np.arange(depth) + n, width)
  x = jnp.zeros((count, 16, 16, 3))
  out = run(model, x, jax.random.key(4))
  draws = []
  for depth, y in zip(TINY["depths"], map(np.asarray, out), strict=True):
    assert (y == y[:, :1]).all()  # a sample is kept or dropped as a whole
    draws.append(y[:, 0, : 2 * depth])
  draws, total = np.concatenate(draws, axis=1), sum(TINY["depths"])
  rates = np.repeat(rate * np.arange(total) / (total - 1), 2)
  np.testing.assert_allclose(draws.max(0), 1 / (1 - rates), rtol=1e-5)
  kept = draws > 0
  np.testing.assert_allclose(draws, kept / (1 - rates), rtol=1e-5)
  spread = 5 / count**0.5
  assert (abs(kept.mean(0) - (1 - rates)) <= spread * np.sqrt(rates * (1 - rates))).all()
  correlation = np.corrcoef(kept[:, 2:].T)  # the first block is never dropped
  assert abs(correlation - np.eye(2 * total - 2)).max() < spread
  # The expectation is that without drop-path.
  assert (abs(draws.mean(0) - 1) <= spread * np.sqrt(rates / (1 - rates))).all()


def test_inference_and_rate_zero_draw_nothing():
  draws = lambda key, **changes: (
    "random_bits" in str(jax.make_jaxpr(run)(tower(**changes), images(2), key))
  )
  key = jax.random.key(0)
  assert draws(key) and not draws(None) and not draws(key, drop_path=0.0)


@pytest.mark.full
def test_eight_devices_are_one():
  """Outputs and gradients in training with data, parameters and heads sharded."""
  mesh = sharding.make_mesh((("data", 2), ("fsdp", 2), ("model", 2)))
  rules = {"heads": "model", "mlp": "model", "embed": "fsdp"}
  config = TINY | dict(depths=(1, 1))
  graphdef, params = abstract(**config, drop_path=0.5)
  places = sharding.param_shardings(params, mesh, rules, min_size=0)
  flat = restore.flat(places)
  assert flat["stages/1/blocks/table"].spec == P(None, None, "model")
  assert flat["stages/1/blocks/q/kernel"].spec == P(None, "fsdp", "model")
  params, x = weights(**config), images(8)

  @jax.jit
  def step(params, x):
    def loss(params):
      out = nnx.merge(graphdef, params).states(x, jax.random.key(5))
      return sum((y * jnp.cos(y)).mean() for y in out), out

    return jax.value_and_grad(loss, has_aux=True)(params)

  want = step(params, x)
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  close(step(jax.device_put(params, places), jax.device_put(x, rows)), want)


@pytest.mark.full
def test_bfloat16():
  """Computed in bfloat16 on float32 parameters."""
  small = dict(depths=(2,), heads=(2,))
  half = tower(**small, dtype=jnp.bfloat16)
  trained = jax.eval_shape(run, half, images(2), jax.random.key(0))
  assert [y.dtype for y in trained] == [jnp.bfloat16]
  for a, b in zip(run(half, images(2)), run(tower(**small), images(2)), strict=True):
    assert a.dtype == jnp.bfloat16
    assert abs(a.astype(jnp.float32) - b).mean() < 0.05 * abs(b).mean()


@pytest.mark.parametrize("name", swin.SIZES)
def test_published_sizes(name):
  """Shapes of stages and parameters, and the config inferred from a file's; only traced."""
  config = swin.SIZES[name]
  graphdef, params = abstract(**config)
  x = jax.ShapeDtypeStruct((2, config["size"], config["size"], 3), jnp.float32)
  stages = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p).states(x), params, x)
  grid, width = config["size"] // 4, config["embed"]
  assert [s.shape for s in stages] == [(2, (grid >> i) ** 2, width << i) for i in range(4)]
  leaves = restore.flat({"image": nnx.to_pure_dict(params)})
  tables = [leaves[f"image/stages/{i}/blocks/table"].shape for i in range(4)]
  rows = (2 * config["window"] - 1) ** 2
  assert tables == [(config["depths"][i], rows, config["heads"][i]) for i in range(4)]
  if name == "base":
    assert sum(math.prod(v.shape) for v in leaves.values()) == 86_745_016
  blank = {k: np.broadcast_to(np.int8(0), v.shape) for k, v in leaves.items()}
  state = conversion.to_torch(blank, towers.swin("", "image"))
  assert towers.swin_config({k: v.shape for k, v in state.items()}) == config
  total = sum(config["depths"])
  assert sum(k.endswith("relative_position_index") for k in state) == total
  assert sum(k.endswith("attn_mask") for k in state) == total // 2 - 1  # not in the last stage


@pytest.mark.full
def test_a_training_step_of_swin_b_has_gradients_for_all():
  graphdef, params = abstract(**swin.SIZES["base"], remat="nothing_saveable", dtype=jnp.bfloat16)

  def loss(params, x, key):
    return sum(y.astype(jnp.float32).mean() for y in nnx.merge(graphdef, params).states(x, key))

  x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  grads = jax.eval_shape(jax.grad(loss), params, x, jax.eval_shape(lambda: jax.random.key(0)))
  for a, b in zip(*map(jax.tree.leaves, (grads, params)), strict=True):
    assert (a.shape, a.dtype) == (b.shape, jnp.float32)


@pytest.mark.parametrize(
  ("changes", "words"),
  {
    "patches": (dict(size=33), "image size 33 is not a multiple of the patch size 2"),
    "windows": (dict(size=20), "stage 0 has a grid of 10, which is not of whole windows"),
    "merging": (dict(size=18, window=9), "stage 0 has a grid of 9, which is odd"),
    "heads": (dict(heads=(1, 3)), "stage 1 is 16 wide, which 3 heads do not divide"),
    "lengths": (dict(heads=(1, 2, 4)), "one of each for every stage"),
  }.values(),
)
def test_what_does_not_divide(changes, words):
  with pytest.raises(ValueError, match=words):
    abstract(**TINY | changes)


def test_pictures_of_another_size():
  with pytest.raises(ValueError, match=r"images \[2, 32, 32, 3\] for a Swin of size 16"):
    tower()(images(2, 32))


def test_a_stage_of_one_window():
  """Its window is its grid, and is not shifted."""
  masks = lambda model: [model.stages[str(i)].masks()[1] is None for i in range(2)]
  assert masks(tower()) == [False, True]
  small = tower(window=9)
  assert masks(small) == [True, True]
  assert [small.stages[str(i)].blocks.table.shape[1] for i in range(2)] == [225, 49]


def test_tables_that_are_no_square_are_refused():
  with pytest.raises(ValueError, match="24 rows cannot become one of 9"):
    towers.resize_swin_tables("image/stages/0/blocks/table", np.zeros((2, 24, 3)), (2, 9, 3))
  other = np.zeros((4, 7))
  assert towers.resize_swin_tables("image/patch/kernel", other, (3, 3)) is other
  shapes = {"layers.0.blocks.0.attn.relative_position_bias_table": (16, 1)}
  shapes |= {"layers.0.blocks.0.mlp.fc1.weight": (32, 8), "patch_embed.proj.weight": (8, 3, 4, 4)}
  with pytest.raises(
    conversion.ConversionError, match="16 rows are not the square of an odd number"
  ):
    towers.swin_config(shapes)
  with pytest.raises(conversion.ConversionError, match=r"not a Swin .*patch_embed\.proj\.weight"):
    towers.swin_config({"visual.conv1.weight": (8, 3, 4, 4)})


def test_recomputation_of_a_single_iteration_is_kept_apart():
  """XLA unrolls a loop of one iteration, and would undo the rematerialization by CSE."""
  once = lambda flag: str(
    jax.make_jaxpr(jax.grad(layers.rematerialize(jnp.sin, "nothing_saveable", once=flag)))(1.0)
  )
  assert "prevent_cse=True" in once(True) and "prevent_cse=False" in once(False)
