"""torch.nn.TransformerEncoder: post-norm blocks with ReLU, and a tower of region features on it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models import layers

Array = jax.Array


class Block(nnx.Module):
  """torch.nn.TransformerEncoderLayer. x [B, L, D], mask bool [B, L] or None -> [B, L, D].

  Positions that the mask hides are not attended to, but have outputs too. A key: dropout.
  """

  def __init__(
    self, dim: int, heads: int, *, mlp_dim: int, dropout: float, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    dense = functools.partial(layers.linear, heads=heads, dtype=dtype, rngs=rngs)
    self.heads, self.dropout = heads, dropout
    xavier = layers.uniform((6 / (4 * dim)) ** 0.5)  # on the fused [3D, D] matrix
    self.q, self.k, self.v = (
      dense(dim, dim, ("embed", "heads"), kernel_init=xavier, bias_init=layers.zeros)
      for _ in range(3)
    )
    self.out = dense(dim, dim, ("heads", "embed"), bias_init=layers.zeros)
    self.ln_1 = layers.layer_norm(dim, dtype=dtype, rngs=rngs)
    self.wi = dense(dim, mlp_dim, ("embed", "mlp"))
    self.wo = dense(mlp_dim, dim, ("mlp", "embed"))
    self.ln_2 = layers.layer_norm(dim, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array, mask: Array | None = None, key: Array | None = None) -> Array:
    k_weights, k_attn, k_inner, k_mlp = (None,) * 4 if key is None else jax.random.split(key, 4)
    drop = lambda y, k: layers.dropout(y, self.dropout, k)
    split = lambda z: z.reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, D/H]
    y = layers.flatten_leading(x)
    q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
    y = layers.dot_product_attention(q, k, v, mask=mask, rate=self.dropout, key=k_weights)
    y = self.out(layers.flatten_leading(y.reshape(x.shape))).reshape(x.shape)
    x = self.ln_1(x + drop(y, k_attn))
    y = drop(jax.nn.relu(self.wi(layers.flatten_leading(x))), k_inner)
    return self.ln_2(x + drop(self.wo(y).reshape(x.shape), k_mlp))


class Encoder(nnx.Module):
  """`depth` blocks, without a norm behind them."""

  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    dim: int,
    *,
    depth: int,
    heads: int,
    mlp: int = 2048,
    dropout: float = 0.1,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.loop = dict(remat=remat, unroll=unroll)
    kw = dict(mlp_dim=mlp, dropout=dropout, dtype=dtype, rngs=rngs)
    self.blocks = layers.stack(depth, dim, heads, block=Block, **kw)

  def __call__(self, x: Array, mask: Array | None = None, key: Array | None = None) -> Array:
    return layers.scan(
      self.blocks, x, mask, key=key, batch_sharding=self.batch_sharding, **self.loop
    )


class RegionTower(nnx.Module):
  """Features of regions and their boxes -> tokens [B, 1 + R, D]; the first stands for the picture.

  regions [B, R, D]; boxes [B, R, 4] x1, y1, x2, y2 as shares of the picture; mask bool [B, R]. The
  first token has no input but zeros (TGDT and TERAN): what it holds comes from biases and
  attention. Boxes and their areas are concatenated to the features, and a two-layer MLP follows.
  """

  def __init__(self, *, features: int, dtype=jnp.float32, rngs: nnx.Rngs, **encoder):
    dense = functools.partial(layers.linear, dtype=dtype, rngs=rngs)
    self.wi = dense(features + 5, features, (None, "mlp"))
    self.wo = dense(features, features, ("mlp", "embed"))
    self.encoder = Encoder(features, dtype=dtype, rngs=rngs, **encoder)

  def embed(self, regions: Array, boxes: Array) -> Array:
    """[B, 1 + R, D]: the input of the first block."""
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    x = jnp.concatenate([regions, boxes, area[..., None]], axis=-1)
    x = jnp.pad(x, [(0, 0), (1, 0), (0, 0)])
    y = self.wo(jax.nn.relu(self.wi(layers.flatten_leading(x))))
    return y.reshape(*x.shape[:2], -1)

  def __call__(self, regions: Array, boxes: Array, mask: Array, key: Array | None = None) -> Array:
    return self.encoder(self.embed(regions, boxes), with_first(mask), key)


def with_first(mask: Array) -> Array:
  """bool [B, R] -> [B, 1 + R]: the first token always counts."""
  return jnp.pad(mask, [(0, 0), (1, 0)], constant_values=True)
