"""A post-norm Transformer like torch.nn.TransformerEncoder, and a tower of region features."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xmodal_jax.models import layers


class Block(nnx.Module):
  """torch.nn.TransformerEncoderLayer. x [B, L, D], mask bool [B, L] or None -> [B, L, D].

  Positions where the mask is False are not attended to, but have outputs. Dropout with a key.
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

  def __call__(
    self,
    x: Float[Array, "b l d"],
    mask: Bool[Array, "b l"] | None = None,
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "b l d"]:
    k_weights, k_attn, k_inner, k_mlp = (None,) * 4 if key is None else jax.random.split(key, 4)
    y = layers.flatten_leading(x)
    q, k, v = (layers.split_heads(f(y), len(x), self.heads) for f in (self.q, self.k, self.v))
    y = layers.dot_product_attention(q, k, v, mask=mask, rate=self.dropout, key=k_weights)
    y = self.out(layers.merge_heads(y)).reshape(x.shape)
    x = self.ln_1(x + layers.dropout(y, self.dropout, k_attn))
    y = jax.nn.relu(self.wi(layers.flatten_leading(x)))
    y = self.wo(layers.dropout(y, self.dropout, k_inner)).reshape(x.shape)
    return self.ln_2(x + layers.dropout(y, self.dropout, k_mlp))


class Encoder(nnx.Module):
  """`depth` blocks, without a final norm. x [B, L, D], mask bool [B, L] or None -> [B, L, D]."""

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

  def __call__(
    self,
    x: Float[Array, "b l d"],
    mask: Bool[Array, "b l"] | None = None,
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "b l d"]:
    return layers.scan(
      self.blocks, x, mask, key=key, batch_sharding=self.batch_sharding, **self.loop
    )


class RegionTower(nnx.Module):
  """Region features and boxes -> tokens [B, 1 + R, D]; token 0 stands for the whole image.

  regions [B, R, D]; boxes [B, R, 4]: x1, y1, x2, y2 as fractions of the image; mask bool [B, R].
  A two-layer MLP embeds each region's features concatenated with its box and the box's area. Token
  0 has zeros as its input (TGDT and TERAN): its content comes from biases and attention.
  """

  def __init__(self, *, features: int, dtype=jnp.float32, rngs: nnx.Rngs, **encoder):
    dense = functools.partial(layers.linear, dtype=dtype, rngs=rngs)
    self.wi = dense(features + 5, features, (None, "mlp"))
    self.wo = dense(features, features, ("mlp", "embed"))
    self.encoder = Encoder(features, dtype=dtype, rngs=rngs, **encoder)

  def embed(
    self, regions: Float[Array, "b r d"], boxes: Float[Array, "b r 4"]
  ) -> Float[Array, "b l d"]:
    """The input of the first block, L = 1 + R."""
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    x = jnp.concatenate([regions, boxes, area[..., None]], axis=-1)
    x = jnp.pad(x, [(0, 0), (1, 0), (0, 0)])
    y = self.wo(jax.nn.relu(self.wi(layers.flatten_leading(x))))
    return y.reshape(*x.shape[:2], -1)

  def __call__(
    self,
    regions: Float[Array, "b r d"],
    boxes: Float[Array, "b r 4"],
    mask: Bool[Array, "b r"],
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "b l d"]:
    return self.encoder(self.embed(regions, boxes), with_first(mask), key)


def with_first(mask: Bool[Array, "b r"]) -> Bool[Array, "b l"]:
  """Prepends True for token 0: [B, R] -> [B, 1 + R]."""
  return jnp.pad(mask, [(0, 0), (1, 0)], constant_values=True)
