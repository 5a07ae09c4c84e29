"""Swin Transformer (Liu et al., 2021) in the form of timm 0.4.12: the tokens of every stage.

All blocks of a stage have parameters of the same shapes and are stacked. A scan runs over pairs of
blocks: one with plain windows, one with shifted windows.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from xmodal_jax.errors import ConfigError
from xmodal_jax.models import layers
from xmodal_jax.models.layers import positions
from xmodal_jax.models.towers.base import ImageTower

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


def _windows(x: Float[Array, "b g g c"], w: int) -> Float[Array, "b n t c"]:
  """Cuts a grid into n = (g/w)^2 windows of w x w tokens, both row-major."""
  return rearrange(x, "b (i y) (j x) c -> b (i j) (y x) c", y=w, x=w)


def _grid(x: Float[Array, "b n t c"], w: int) -> Float[Array, "b g g c"]:
  """The inverse of `_windows`."""
  side = math.isqrt(x.shape[1])
  return rearrange(x, "b (i j) (y x) c -> b (i y) (j x) c", i=side, y=w)


def drop_path(
  x: Float[Array, "b ..."], rate: Float[Array, ""] | float, key: PRNGKeyArray | None
) -> Float[Array, "b ..."]:
  """Stochastic depth (Huang et al., 2016): zeroes whole samples with probability `rate` and scales
  the others up; the identity without a key."""
  if key is None:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, (len(x), *(1,) * (x.ndim - 1)))
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
  """Pre-norm block with attention inside windows. x [B, g, g, D] -> [B, g, g, D].

  Matrices and the table of relative position biases start as N(0, 0.02), which timm truncates at
  100 standard deviations; other biases as 0.
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
    x: Float[Array, "b g g d"],
    bias: Float[Array, "h t t"],
    mask: Float[np.ndarray, "n t t"] | None = None,
    *,
    rate: Float[Array, ""] | float = 0.0,
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "b g g d"]:
    """t = window^2 tokens. bias, mask: float32, added to the logits; with a mask, windows are
    shifted by half a window. rate: of stochastic depth, drawn for each branch; with a key only.
    """
    k_attn, k_mlp = (None, None) if key is None else jax.random.split(key)
    shift = 0 if mask is None else self.window // 2
    y = self.ln_1(x)
    y = _windows(jnp.roll(y, (-shift, -shift), (1, 2)) if shift else y, self.window)
    y = _grid(self._attention(y, bias, mask), self.window)
    x = x + drop_path(jnp.roll(y, (shift, shift), (1, 2)) if shift else y, rate, k_attn)
    y = self.wo(layers.ACTIVATIONS["gelu"](self.wi(layers.flatten_leading(self.ln_2(x)))))
    return x + drop_path(y.reshape(x.shape), rate, k_mlp)

  def _attention(self, y: Float[Array, "b n t d"], bias, mask) -> Float[Array, "b n t d"]:
    b, n = y.shape[:2]
    q, k, v = (
      rearrange(f(layers.flatten_leading(y)), "(b n t) (h d) -> b n t h d", b=b, n=n, h=self.heads)
      for f in (self.q, self.k, self.v)
    )
    q = q * q.shape[-1] ** -0.5
    s = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, preferred_element_type=jnp.float32) + bias
    s = s if mask is None else s + mask[:, None]
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    z = jnp.einsum("bnhqk,bnkhd->bnqhd", p, v)
    return self.out(rearrange(z, "b n q h d -> (b n q) (h d)")).reshape(y.shape)


class Merge(nnx.Module):
  """Patch merging: four neighbours become one token. [B, g, g, D] -> [B, g/2, g/2, 2D]."""

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

  def __call__(self, x: Float[Array, "b g g d"]) -> Float[Array, "b m m e"]:
    b, g, _, _ = x.shape
    # The four neighbours are concatenated column by column, as timm does.
    x = self.ln(rearrange(x, "b (i y) (j x) d -> b i j (x y d)", y=2, x=2))
    return self.reduction(layers.flatten_leading(x)).reshape(b, g // 2, g // 2, -1)


class Stage(nnx.Module):
  """Blocks of one width on one grid. x [B, g, g, D] -> [B, g, g, D].

  Where the grid has several windows, every second block shifts them. `merge`, None for the last
  stage, is applied by the caller. remat, unroll: see Swin.
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

  def biases(self) -> Float[Array, "depth h t t"]:
    """Relative position biases of all blocks, looked up in their tables at once; float32."""
    table = self.blocks.table[...].swapaxes(1, 2)  # [depth, H, (2w-1)^2]
    return jnp.take(table, positions.relative_index(self.window), axis=2, mode="clip")

  def masks(self) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Attention masks of the plain and of the shifted blocks, None where nothing is masked."""
    shifted = self.grid > self.window and self.window > 1
    return None, positions.shift_mask(self.grid, self.window) if shifted else None

  def __call__(
    self, x: Float[Array, "b g g d"], rates: Sequence[float], key: PRNGKeyArray | None = None
  ) -> Float[Array, "b g g d"]:
    """rates: of stochastic depth, one for each block."""
    depth, (remat, unroll) = layers.depth_of(self.blocks), self.loop
    pairs = depth // 2
    drop = None
    if key is not None and any(rates):
      drop = jnp.asarray(rates, jnp.float32), jax.random.split(key, depth)

    def apply(mask, x, layer):
      block, bias, drop = layer
      rate, key = drop or (0.0, None)
      return layers.constrain_batch(block(x, bias, mask, rate=rate, key=key), self.batch_sharding)

    def rematerialized(mask, once):
      return layers.rematerialize(functools.partial(apply, mask), remat, once=once)

    # Blocks are rematerialized one by one: the backward pass holds one block's activations at a
    # time, not those of a pair.
    plain, shifted = (rematerialized(mask, pairs == 1) for mask in self.masks())

    def pair(x, two):
      first, second = (jax.tree.map(lambda a, i=i: a[i], two) for i in range(2))
      return shifted(plain(x, first), second), None

    each, x = (self.blocks, self.biases(), drop), layers.constrain_batch(x, self.batch_sharding)
    if pairs:
      halves = jax.tree.map(lambda a: a[: 2 * pairs].reshape(pairs, 2, *a.shape[1:]), each)
      x, _ = jax.lax.scan(pair, x, halves, unroll=min(unroll, pairs))
    if depth % 2:
      x = rematerialized(None, True)(x, jax.tree.map(lambda a: a[-1], each))
    return x


class Swin(ImageTower):
  """Patches, then stages of windowed blocks. images [B, S, S, 3] -> tokens of every stage.

  size: S. A stage's grid must divide into windows, and be even where it is merged, else
    ValueError; a grid not larger than `window` is one window.
  embed: width of the first stage.
  drop_path: rate of stochastic depth of the last block; rates grow linearly from 0 at the first.
  remat: name of a `jax.checkpoint_policies` entry, applied to each block, "" for none.
  unroll: pairs of blocks per scan iteration.
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
    self.widths = tuple(embed * 2**i for i in range(len(depths)))
    self.rates = _drop_path_rates(drop_path, depths)
    self.patch = layers.PatchEmbed(embed, patch, dtype=dtype, rngs=rngs)
    self.patch_ln = layers.layer_norm(embed, **kw)
    self.stages = nnx.Dict(
      {
        str(i): Stage(
          width,
          heads[i],
          depth=depths[i],
          grid=grid,
          window=min(window, grid),
          mlp_dim=mlp_ratio * width,
          last=i == len(depths) - 1,
          remat=remat,
          unroll=unroll,
          **kw,
        )
        for i, (width, grid) in enumerate(zip(self.widths, grids, strict=True))
      }
    )
    self.norms = nnx.Dict(
      {str(i): layers.layer_norm(width, **kw) for i, width in enumerate(self.widths)}
    )

  def embed(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b g g d"]:
    """The input of the first block."""
    if images.shape[1:] != (self.size, self.size, 3):
      raise ConfigError(
        f"images {list(images.shape)} for a Swin of size {self.size}: its windows are fixed when "
        f"it is built; expected [B, {self.size}, {self.size}, 3]"
      )
    side = self.size // self.patch.kernel.shape[0]
    return rearrange(self.patch_ln(self.patch(images)), "b (i j) d -> b i j d", i=side)

  def states(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> list[Float[Array, "b p d"]]:
    """The output of each stage through a LayerNorm; the next stage reads it without the norm."""
    keys = [None] * len(self.rates) if key is None else jax.random.split(key, len(self.rates))
    x, out = self.embed(images), []
    for i, rates in enumerate(self.rates):
      stage = self.stages[str(i)]
      x = stage(x, rates, keys[i])
      out.append(self.norms[str(i)](rearrange(x, "b i j d -> b (i j) d")))
      x = x if stage.merge is None else stage.merge(x)
    return out


def _drop_path_rates(last: float, depths: Sequence[int]) -> tuple[tuple[float, ...], ...]:
  """For each stage, the rates of its blocks."""
  rates, ends = np.linspace(0, last, sum(depths)).tolist(), np.cumsum(depths).tolist()
  return tuple(tuple(rates[end - depth : end]) for end, depth in zip(ends, depths, strict=True))


def _grids(
  size: int, patch: int, window: int, embed: int, depths: Sequence[int], heads: Sequence[int]
) -> list[int]:
  """Side of each stage's grid. Raises ConfigError for sizes that do not divide."""
  if not len(depths) == len(heads) or 0 in depths:
    raise ConfigError(
      f"depths {tuple(depths)} and heads {tuple(heads)}: one of each for every stage"
    )
  if size % patch:
    raise ConfigError(f"image size {size} is not a multiple of the patch size {patch}")
  out, grid = [], size // patch
  for i, h in enumerate(heads):
    where = f"Swin of size {size}, patch {patch}, window {window}: stage {i}"
    if grid > window and grid % window:
      raise ConfigError(f"{where} has a grid of {grid}, which is not of whole windows")
    if i < len(heads) - 1 and grid % 2:
      raise ConfigError(f"{where} has a grid of {grid}, which is odd and cannot be merged")
    if embed * 2**i % h:
      raise ConfigError(f"{where} is {embed * 2**i} wide, which {h} heads do not divide")
    out.append(grid)
    grid //= 2
  return out
