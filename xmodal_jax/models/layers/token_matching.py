"""TEAM's token matching (Xie et al., 2022, section 3.2): text tokens cross-attend to image tokens.

Each text token retrieves a vector from the image tokens by cross-attention, refined block by block.
The score of a pair is the mean cosine between text tokens and their retrieved vectors. Works with
any two towers whose tokens have one width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xmodal_jax.models import base, layers


class Block(nnx.Module):
  """Self-attention among text tokens, cross-attention to image tokens, an MLP; pre-norm.

  The residual stream r [N, M, L, D] holds the retrieved vectors of M texts per image. Text tokens
  are added to queries and keys, like a position embedding, never to values or the residual stream.
  """

  def __init__(
    self, dim: int, heads: int, *, mlp_dim: int, dropout: float, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    norm = functools.partial(layers.layer_norm, dim, dtype=dtype, rngs=rngs)
    dense = functools.partial(layers.linear, dtype=dtype, rngs=rngs)
    self.dropout = dropout
    self.ln_1, self.ln_2, self.ln_3 = norm(), norm(), norm()
    self.self_attn = layers.MultiHeadAttention(dim, heads, dtype=dtype, rngs=rngs)
    self.cross_attn = layers.MultiHeadAttention(dim, heads, dtype=dtype, rngs=rngs)
    self.wi = dense(dim, mlp_dim, ("embed", "mlp"))
    self.wo = dense(mlp_dim, dim, ("mlp", "embed"))

  def __call__(
    self,
    r: Float[Array, "n m l d"],
    texts: Float[Array, "n m l d"],
    mask: Bool[Array, "n m l"],
    images: Float[Array, "n p d"],
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "n m l d"]:
    """texts, images: tokens; mask: text tokens that are not padding. Dropout with a key.

    Keys and values of an image are computed once for its M texts.
    """
    k_self, k_cross, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
    r, queries = self._self_attention(r, texts, mask, k_self)
    y = self.cross_attn(queries, images, images).reshape(r.shape)
    return self._mlp(r + layers.dropout(y, self.dropout, k_cross), k_mlp)

  def _self_attention(self, r, texts, mask, key):
    """(r after self-attention [N, M, L, D], queries of the cross-attention [N, M * L, D])."""
    y = self.ln_1(r)
    queries, values = (rearrange(x, "n m l d -> (n m) l d") for x in (texts + y, y))
    y = self.self_attn(queries, queries, values, rearrange(mask, "n m l -> (n m) l"))
    r = r + layers.dropout(y.reshape(r.shape), self.dropout, key)
    return r, rearrange(texts + self.ln_2(r), "n m l d -> n (m l) d")

  def _mlp(self, r, key):
    k_inner, k_first, k_second = (None,) * 3 if key is None else jax.random.split(key, 3)
    y = layers.ACTIVATIONS["gelu"](self.wi(layers.flatten_leading(self.ln_3(r))))
    y = self.wo(layers.dropout(y, self.dropout, k_inner)).reshape(r.shape)
    # Dropout twice, as in the original: after the second layer, and again before the residual.
    y = layers.dropout(y, self.dropout, k_first)
    return r + layers.dropout(y, self.dropout, k_second)

  def attention_maps(
    self,
    r: Float[Array, "n m l d"],
    texts: Float[Array, "n m l d"],
    mask: Bool[Array, "n m l"],
    images: Float[Array, "n p d"],
    agreement: Callable[[Array], Array],
  ) -> dict[str, Float[Array, "n m l p"]]:
    """Maps of the cross-attention at inference, mean over heads, float32.

    attention: the weights; rows sum to 1.
    relevance: each weight times the gradient of agreement(output of the block) [N, M, L] with
      respect to it (as Chefer et al., 2021, equation 5), positive part, rows normalised to 1. The
      gradient is centred by its mean under the weights, since they are constrained to sum to 1.
    """
    r, queries = self._self_attention(r, texts, mask, None)
    q, k, v = self.cross_attn.project(queries, images, images)
    s = jnp.einsum("nqhd,nphd->nhqp", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(s * q.shape[-1] ** -0.5, axis=-1)  # [N, H, M * L, P]

    def total_agreement(weights):  # a token's agreement depends on its own weights only
      y = jnp.einsum("nhqp,nphd->nqhd", weights.astype(v.dtype), v)
      return agreement(self._mlp(r + self.cross_attn.join(y).reshape(r.shape), None)).sum()

    gradient = jax.grad(total_agreement)(weights)
    gradient = gradient - (weights * gradient).sum(-1, keepdims=True)
    relevance = jnp.maximum(weights * gradient, 0).mean(1)
    relevance = relevance / jnp.maximum(relevance.sum(-1, keepdims=True), 1e-12)
    shape = (*r.shape[:3], -1)
    return dict(attention=weights.mean(1).reshape(shape), relevance=relevance.reshape(shape))


class TokenMatching(nnx.Module):
  """A stack of matching blocks, with a score of each pair after each block.

  dim: width of the tokens of both towers. embed: width of the space where text tokens and
  retrieved vectors are compared. remat, unroll: see layers.scan.
  """

  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    *,
    dim: int,
    depth: int,
    heads: int,
    embed: int,
    mlp_ratio: int = 2,
    dropout: float = 0.1,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.remat, self.unroll = remat, unroll
    self.blocks = layers.stack(
      depth,
      dim,
      heads,
      block=Block,
      mlp_dim=mlp_ratio * dim,
      dropout=dropout,
      dtype=dtype,
      rngs=rngs,
    )
    dense = functools.partial(layers.linear, dim, embed, ("embed", None), dtype=dtype, rngs=rngs)
    self.text_fc, self.image_fc = dense(), dense()

  def __call__(
    self,
    images: Float[Array, "n p d"],
    texts: Float[Array, "n m l d"],
    mask: Bool[Array, "n m l"],
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "n m k"]:
    """Scores of M texts per image after each of K blocks, float32 in [-1, 1]; dropout with a key.

    A score is the mean over a text's tokens of the cosine of the token and its retrieved vector.
    """
    images, texts = images.astype(self.text_fc.dtype), texts.astype(self.text_fc.dtype)
    targets = self._project(self.text_fc, texts)

    def step(r, layer):
      block, key = layer
      r = layers.constrain_batch(block(r, texts, mask, images, key), self.batch_sharding)
      return r, self._score(self._agreement(r, targets), mask)

    keys = None if key is None else jax.random.split(key, layers.depth_of(self.blocks))
    body = layers.rematerialize(step, self.remat)
    start = jnp.zeros_like(texts)  # nothing is retrieved before the first block
    _, scores = jax.lax.scan(body, start, (self.blocks, keys), unroll=self.unroll)
    return jnp.moveaxis(scores, 0, -1)

  def trace(
    self,
    images: Float[Array, "n p d"],
    texts: Float[Array, "n m l d"],
    mask: Bool[Array, "n m l"],
  ) -> dict[str, Float[Array, "k n m l _"] | Float[Array, "k n m l"]]:
    """Intermediate results of each of K blocks at inference.

    retrieved [K, N, M, L, D]; agreement float32 [K, N, M, L]: the cosine of each text token and its
    retrieved vector; attention, relevance float32 [K, N, M, L, P]: see Block.attention_maps.
    """
    agreement = functools.partial(self._agreement, targets=self._project(self.text_fc, texts))

    def step(r, block):
      maps = block.attention_maps(r, texts, mask, images, agreement)
      r = block(r, texts, mask, images)
      return r, maps | dict(retrieved=r, agreement=agreement(r))

    return jax.lax.scan(step, jnp.zeros_like(texts), self.blocks)[1]

  def _project(self, dense: nnx.Module, x: Float[Array, "*n d"]) -> Float[Array, "*n e"]:
    """Unit vectors, float32."""
    return base.l2_normalize(layers.apply_dense(dense, x), eps=1e-12)

  def _agreement(self, r, targets) -> Float[Array, "n m l"]:
    return (self._project(self.image_fc, r) * targets).sum(-1)

  @staticmethod
  def _score(agreement: Float[Array, "n m l"], mask) -> Float[Array, "n m"]:
    return (agreement * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
