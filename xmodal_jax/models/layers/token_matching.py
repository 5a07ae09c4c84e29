"""Token alignment by retrieval, TEAM's blocks (Xie et al., 2022, section 3.2).

Over any two towers that give tokens of one width: every text token retrieves a vector made of image
tokens, block after block, and a pair scores how well the retrieved vectors agree with the tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models import base, layers

Array = jax.Array


class Block(nnx.Module):
  """One round of retrieval. Heads are those of `dim`, LayerNorms have eps 1e-5."""

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
    self, r: Array, texts: Array, mask: Array, images: Array, key: Array | None = None
  ) -> Array:
    """r, texts [N, M, L, D]: what M texts per image have retrieved, and their tokens; mask bool
    [N, M, L]; images [N, P, D] -> r [N, M, L, D].

    The text tokens steer, as a position embedding would: they enter queries and keys and never the
    values or the residual stream. Keys and values of an image are made once for its M texts.
    """
    k_self, k_cross, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
    r, steered = self._steer(r, texts, mask, k_self)
    y = self.cross_attn(steered, images, images).reshape(r.shape)
    return self._mlp(r + layers.dropout(y, self.dropout, k_cross), k_mlp)

  def _steer(self, r: Array, texts: Array, mask: Array, key: Array | None) -> tuple[Array, Array]:
    """(r after the self attention, queries of the cross attention [N, M * L, D])."""
    n, m, length, dim = r.shape
    each = lambda x: x.reshape(n * m, length, dim)
    y = self.ln_1(r)
    steered = each(texts + y)
    y = self.self_attn(steered, steered, each(y), mask.reshape(n * m, length))
    r = r + layers.dropout(y.reshape(r.shape), self.dropout, key)
    return r, (texts + self.ln_2(r)).reshape(n, m * length, dim)

  def _mlp(self, r: Array, key: Array | None) -> Array:
    drop = lambda x, key: layers.dropout(x, self.dropout, key)
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    y = layers.ACTIVATIONS["gelu"](self.wi(layers.flatten_leading(self.ln_3(r))))
    y = self.wo(drop(y, keys[0])).reshape(r.shape)
    # Twice, as in the original: after the second layer and again before the residual is added.
    return r + drop(drop(y, keys[1]), keys[2])

  def look(
    self, r: Array, texts: Array, mask: Array, images: Array, agreement: Callable[[Array], Array]
  ) -> dict[str, Array]:
    """What the cross attention looks at, in inference, mean over heads, rows that sum to 1.

    attention [N, M, L, P]: its weights. relevance [N, M, L, P]: of each weight what it adds to
    agreement(r after the block) [N, M, L], next to attending as before, where that is positive:
    weight times gradient (as Chefer et al., 2021, equation 5), the gradient centred, because
    weights that sum to 1 only ever move from one image token to another.
    """
    r, q = self._steer(r, texts, mask, None)
    q, k, v = self.cross_attn.heads_of(q, images, images)
    s = jnp.einsum("nqhd,nphd->nhqp", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(s * q.shape[-1] ** -0.5, axis=-1)  # [N, H, M * L, P]

    def after(weights):  # a token's agreement depends on its own weights only
      y = jnp.einsum("nhqp,nphd->nqhd", weights.astype(v.dtype), v)
      return agreement(self._mlp(r + self.cross_attn.join(y).reshape(r.shape), None)).sum()

    gain = jax.grad(after)(weights)
    gain = gain - (weights * gain).sum(-1, keepdims=True)
    relevance = jnp.maximum(weights * gain, 0).mean(1)
    relevance = relevance / jnp.maximum(relevance.sum(-1, keepdims=True), 1e-12)
    shape = (*r.shape[:3], -1)
    return dict(attention=weights.mean(1).reshape(shape), relevance=relevance.reshape(shape))


class TokenMatching(nnx.Module):
  """A stack of retrieval blocks and the score after each of them.

  dim: width of both towers' tokens. embed: of the space in which tokens and what they retrieved
  are compared.
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

  def __call__(self, images: Array, texts: Array, mask: Array, key: Array | None = None) -> Array:
    """images [N, P, D], texts [N, M, L, D], mask bool [N, M, L]: M texts for each image.

    Returns float32 [N, M, K], in [-1, 1]: after each of K blocks, the mean over the text's tokens
    of the cosine between the token and what it retrieved. A key: dropout.
    """
    images, texts = images.astype(self.text_fc.dtype), texts.astype(self.text_fc.dtype)
    target = self._project(self.text_fc, texts)  # [N, M, L, E]

    def step(r, layer):
      block, k = layer
      r = layers.constrain_batch(block(r, texts, mask, images, k), self.batch_sharding)
      return r, self._score(self._agreement(r, target), mask)

    depth = layers.depth_of(self.blocks)
    keys = None if key is None else jax.random.split(key, depth)
    # Nothing is retrieved before the first block.
    start, step = jnp.zeros_like(texts), layers.rematerialize(step, self.remat)
    _, scores = jax.lax.scan(step, start, (self.blocks, keys), unroll=self.unroll)
    return jnp.moveaxis(scores, 0, -1)

  def trace(self, images: Array, texts: Array, mask: Array) -> dict[str, Array]:
    """What happens inside, of the same inputs, in inference, block after block.

    retrieved [K, N, M, L, D]; agreement float32 [K, N, M, L], the cosine of each token;
    attention, relevance float32 [K, N, M, L, P], see Block.look.
    """
    target = self._project(self.text_fc, texts)

    agreement = lambda r: self._agreement(r, target)

    def step(r, block):
      seen = block.look(r, texts, mask, images, agreement)
      r = block(r, texts, mask, images)
      return r, seen | dict(retrieved=r, agreement=agreement(r))

    return jax.lax.scan(step, jnp.zeros_like(texts), self.blocks)[1]

  def _project(self, dense: nnx.Linear, x: Array) -> Array:
    """[..., D] -> unit float32 [..., E]."""
    y = dense(layers.flatten_leading(x)).reshape(*x.shape[:-1], -1)
    return base.l2_normalize(y, eps=1e-12)

  def _agreement(self, r: Array, target: Array) -> Array:
    return (self._project(self.image_fc, r) * target).sum(-1)  # [N, M, L]

  @staticmethod
  def _score(agreement: Array, mask: Array) -> Array:
    return (agreement * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
