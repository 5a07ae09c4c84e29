"""Swin Transformer (Liu et al., 2021) in the form of timm 0.4.12: the tokens of every stage.

Where the parameters of a stage differ between its blocks, only their values do: all blocks of a
stage are one stack, which a scan walks in pairs, a plain block and a shifted one.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models import layers
from xmodal_jax.models.layers import positions

Array = jax.Array

_DEPTHS = dict(shallow=(2, 2, 6, 2), deep=(2, 2, 18, 2))


def _size(embed: int, depths: str, size: int = 224, window: int = 7) -> dict[str, Any]:
  heads = tuple(embed // 32 * 2**i for i in range(4))  # 32 wide everywhere
  return dict(size=size, window=window, embed=embed, depths=_DEPTHS[depths], heads=heads)


# The published models: arguments of `Swin`.
SIZES: Mapping[str, Mapping[str, Any]] = {
  "tiny": _size(96, "shallow"),
  "small": _size(96, "deep"),
  "base": _size(128, "deep"),
  "large": _size(192, "deep"),
  "base_384": _size(128, "deep", 384, 12),
  "large_384": _size(192, "deep", 384, 12),
}


def _windows(x: Array, window: int) -> Array:
  """[B, g, g, C] -> [B, (g/w)^2, w*w, C]"""
  b, g, c, n = len(x), x.shape[1], x.shape[3], x.shape[1] // window
  x = x.reshape(b, n, window, n, window, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, (g // window) ** 2, window**2, c)


def _grid(x: Array, window: int) -> Array:
  """The inverse of `_windows`."""
  b, n, c = len(x), math.isqrt(x.shape[1]), x.shape[3]
  x = x.reshape(b, n, n, window, window, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, n * window, n * window, c)


def drop_path(x: Array, rate: Array | float, key: Array | None) -> Array:
  """Zeroes whole samples of [B, ...] with probability `rate` and scales the others up."""
  if key is None:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, (len(x), *(1,) * (x.ndim - 1)))
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
  """Pre-norm block whose attention stays inside windows. x [B, g, g, D] -> [B, g, g, D].

  Matrices, table: N(0, 0.02), which timm truncates at 100 standard deviations; biases are 0.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    *,
    window: int,
    mlp_dim: int,
    eps: float,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    normal = layers.normal(0.02)
    dense = functools.partial(
      layers.linear,
      kernel_init=normal,
      bias_init=layers.zeros,
      heads=heads,
      dtype=dtype,
      rngs=rngs,
    )
    self.heads, self.window = heads, window
    self.ln_1 = layers.layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    self.q, self.k, self.v = (dense(dim, dim, ("embed", "heads")) for _ in range(3))
    self.out = dense(dim, dim, ("heads", "embed"))
    self.table = nnx.Param(
      normal(rngs.params(), ((2 * window - 1) ** 2, heads), jnp.float32), axes=(None, "heads")
    )
    self.ln_2 = layers.layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    self.wi = dense(dim, mlp_dim, ("embed", "mlp"))
    self.wo = dense(mlp_dim, dim, ("mlp", "embed"))

  def __call__(
    self,
    x: Array,
    bias: Array,
    mask: np.ndarray | None = None,
    *,
    rate: Array | float = 0.0,
    key: Array | None = None,
  ) -> Array:
    """bias [H, w*w, w*w], mask [(g/w)^2, w*w, w*w] where the windows are shifted: both float32.

    rate: of samples whose branches are left out, each by a draw of its own; with a key only.
    """
    k_attn, k_mlp = (None, None) if key is None else jax.random.split(key)
    shift = 0 if mask is None else self.window // 2
    y = self.ln_1(x)
    y = _windows(jnp.roll(y, (-shift, -shift), (1, 2)) if shift else y, self.window)
    split = lambda z: z.reshape(*y.shape[:3], self.heads, -1)  # [B, n, w*w, H, D/H]
    z = layers.flatten_leading(y)
    q, k, v = (split(f(z)) for f in (self.q, self.k, self.v))
    q = q * q.shape[-1] ** -0.5
    s = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, preferred_element_type=jnp.float32) + bias
    s = s if mask is None else s + mask[:, None]
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)  # [B, n, H, w*w, w*w]
    y = self.out(layers.flatten_leading(jnp.einsum("bnhqk,bnkhd->bnqhd", p, v).reshape(y.shape)))
    y = _grid(y.reshape(*p.shape[:2], -1, x.shape[-1]), self.window)
    x = x + drop_path(jnp.roll(y, (shift, shift), (1, 2)) if shift else y, rate, k_attn)
    y = self.wo(layers.ACTIVATIONS["gelu"](self.wi(layers.flatten_leading(self.ln_2(x)))))
    return x + drop_path(y.reshape(x.shape), rate, k_mlp)


class Merge(nnx.Module):
  """Four neighbours become one token of twice the width. [B, g, g, D] -> [B, g/2, g/2, 2D]"""

  def __init__(self, dim: int, *, eps: float, dtype=jnp.float32, rngs: nnx.Rngs):
    self.ln = layers.layer_norm(4 * dim, eps=eps, dtype=dtype, rngs=rngs)
    self.reduction = layers.linear(
      4 * dim,
      2 * dim,
      ("embed", None),
      kernel_init=layers.normal(0.02),
      use_bias=False,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: Array) -> Array:
    b, g, _, d = x.shape
    # Neighbours column by column: (even, even), (odd, even), (even, odd), (odd, odd) of (row,
    # column).
    x = x.reshape(b, g // 2, 2, g // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
    x = self.ln(x.reshape(b, g // 2, g // 2, 4 * d))
    return self.reduction(layers.flatten_leading(x)).reshape(b, g // 2, g // 2, 2 * d)


class Stage(nnx.Module):
  """Blocks of one width on one grid: every second one has shifted windows, where there are several.

  x [B, g, g, D] -> [B, g, g, D]; `merge`, None for the last stage, is for the caller to apply.
  """

  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    dim: int,
    heads: int,
    *,
    depth: int,
    grid: int,
    window: int,
    mlp_dim: int,
    last: bool,
    eps: float,
    remat: str,
    unroll: int,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.grid, self.window, self.loop = grid, window, (remat, unroll)
    kw = dict(eps=eps, dtype=dtype, rngs=rngs)
    self.blocks = layers.stack(depth, dim, heads, block=Block, window=window, mlp_dim=mlp_dim, **kw)
    self.merge = nnx.data(None if last else Merge(dim, **kw))

  def biases(self) -> Array:
    """float32 [depth, H, w*w, w*w]: the tables of all blocks, looked up at once."""
    table = self.blocks.table[...].swapaxes(1, 2)  # [depth, H, (2w-1)^2]
    return jnp.take(table, positions.relative_index(self.window), axis=2, mode="clip")

  def masks(self) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Masks of the plain and of the shifted blocks."""
    shifted = self.grid > self.window and self.window > 1
    return None, positions.shift_mask(self.grid, self.window) if shifted else None

  def __call__(self, x: Array, rates: Sequence[float], key: Array | None = None) -> Array:
    """rates: of drop-path, for each block."""
    depth, (remat, unroll) = layers.depth_of(self.blocks), self.loop
    drop = None
    if key is not None and any(rates):
      drop = jnp.asarray(rates, jnp.float32), jax.random.split(key, depth)

    def apply(mask, x, layer):
      block, bias, drop = layer
      rate, key = drop or (0.0, None)
      return layers.constrain_batch(block(x, bias, mask, rate=rate, key=key), self.batch_sharding)

    # Recomputed one by one: the backward pass of a pair then holds one block's activations.
    pairs = depth // 2
    wrap = lambda mask, once: layers.rematerialize(functools.partial(apply, mask), remat, once=once)
    plain, shifted = (wrap(mask, pairs == 1) for mask in self.masks())

    def pair(x, two):
      first, second = (jax.tree.map(lambda a, i=i: a[i], two) for i in range(2))
      return shifted(plain(x, first), second), None

    each, x = (self.blocks, self.biases(), drop), layers.constrain_batch(x, self.batch_sharding)
    if pairs:
      halves = jax.tree.map(lambda a: a[: 2 * pairs].reshape(pairs, 2, *a.shape[1:]), each)
      x, _ = jax.lax.scan(pair, x, halves, unroll=min(unroll, pairs))
    if depth % 2:
      x = wrap(None, True)(x, jax.tree.map(lambda a: a[-1], each))
    return x


class Swin(nnx.Module):
  """Patches, then stages of windowed blocks. images [B, S, S, 3] -> tokens of every stage.

  size: S; a stage's grid has to be of whole windows, and even where it is merged, else ValueError.
  A stage that is not larger than `window` is one window. drop_path: the rate of the last block,
  which grows evenly from 0 at the first. remat: name of a `jax.checkpoint_policies` entry, for
  blocks, "" for none. unroll: pairs of blocks per scan iteration.
  """

  def __init__(
    self,
    *,
    size: int = 224,
    patch: int = 4,
    window: int = 7,
    embed: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    heads: Sequence[int] = (4, 8, 16, 32),
    mlp_ratio: int = 4,
    drop_path: float = 0.1,
    eps: float = 1e-5,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    grids = _grids(size, patch, window, embed, depths, heads)
    kw = dict(eps=eps, dtype=dtype, rngs=rngs)
    self.size, self.dtype = size, dtype
    rates = np.linspace(0, drop_path, sum(depths)).tolist()
    ends = np.cumsum(depths).tolist()
    self.rates = tuple(
      tuple(rates[end - depth : end]) for end, depth in zip(ends, depths, strict=True)
    )
    fan_in = layers.uniform((3 * patch**2) ** -0.5)  # torch's default, which timm leaves here
    self.patch = nnx.Conv(
      3,
      embed,
      (patch, patch),
      kernel_init=fan_in,
      bias_init=fan_in,
      kernel_metadata={"axes": (None, None, None, "embed")},
      bias_metadata={"axes": ("embed",)},
      rngs=rngs,
    )
    self.patch_ln = layers.layer_norm(embed, **kw)
    self.stages = nnx.Dict(
      {
        str(i): Stage(
          embed * 2**i,
          heads[i],
          depth=depths[i],
          grid=grid,
          window=min(window, grid),
          mlp_dim=mlp_ratio * embed * 2**i,
          last=i == len(depths) - 1,
          remat=remat,
          unroll=unroll,
          **kw,
        )
        for i, grid in enumerate(grids)
      }
    )
    self.norms = nnx.Dict(
      {str(i): layers.layer_norm(embed * 2**i, **kw) for i in range(len(depths))}
    )

  def embed(self, images: Array) -> Array:
    """images [B, S, S, 3] -> [B, g, g, D]: the input of the first block."""
    b, s, p = len(images), images.shape[1], self.patch.kernel.shape[0]
    if images.shape[1:] != (self.size, self.size, 3):
      raise ValueError(
        f"images {list(images.shape)} for a Swin of size {self.size}: its windows are fixed when "
        f"it is built; expected [B, {self.size}, {self.size}, 3]"
      )
    g = s // p
    # A convolution with kernel = stride is a matmul over patches, which every backend does well.
    x = images.astype(self.dtype).reshape(b, g, p, g, p, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b * g * g, p * p * 3) @ self.patch.kernel[...].astype(self.dtype).reshape(
      p * p * 3, -1
    )
    x = layers.add(x, self.patch.bias[...])
    return self.patch_ln(x.reshape(b, g, g, -1))

  def __call__(self, images: Array, key: Array | None = None) -> list[Array]:
    """One [B, g_i * g_i, D_i] for each stage, through its own LayerNorm; with a key, drop-path.

    The next stage reads the tokens without that norm. What is not used costs nothing under jit.
    """
    keys = [None] * len(self.rates) if key is None else jax.random.split(key, len(self.rates))
    x, out = self.embed(images), []
    for i, rates in enumerate(self.rates):
      stage = self.stages[str(i)]
      x = stage(x, rates, keys[i])
      out.append(self.norms[str(i)](x.reshape(len(x), -1, x.shape[-1])))
      x = x if stage.merge is None else stage.merge(x)
    return out


def _grids(size, patch, window, embed, depths, heads) -> list[int]:
  """Sides of the stages' grids. Raises ValueError for what does not divide."""
  if not len(depths) == len(heads) or 0 in depths:
    raise ValueError(
      f"depths {tuple(depths)} and heads {tuple(heads)}: one of each for every stage"
    )
  if size % patch:
    raise ValueError(f"image size {size} is not a multiple of the patch size {patch}")
  out, grid = [], size // patch
  for i, h in enumerate(heads):
    where = f"Swin of size {size}, patch {patch}, window {window}: stage {i}"
    if grid > window and grid % window:
      raise ValueError(f"{where} has a grid of {grid}, which is not of whole windows")
    if i < len(heads) - 1 and grid % 2:
      raise ValueError(f"{where} has a grid of {grid}, which is odd and cannot be merged")
    if embed * 2**i % h:
      raise ValueError(f"{where} is {embed * 2**i} wide, which {h} heads do not divide")
    out.append(grid)
    grid //= 2
  return out
