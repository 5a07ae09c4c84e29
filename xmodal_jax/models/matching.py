"""Token alignment by retrieval, TEAM's blocks (Xie et al., 2022, section 3.2).

Over any two towers that give tokens of one width: every text token retrieves a vector made of image
tokens, block after block, and a pair scores how well the retrieved vectors agree with the tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xmodal_jax.models import layers, system

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
    self.self_attn = layers.Attention(dim, heads, dtype=dtype, rngs=rngs)
    self.cross_attn = layers.Attention(dim, heads, dtype=dtype, rngs=rngs)
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
    n, m, length, dim = r.shape
    keys = (None,) * 4 if key is None else jax.random.split(key, 4)
    drop = lambda x, key: layers.dropout(x.reshape(r.shape), self.dropout, key)
    each = lambda x: x.reshape(n * m, length, dim)
    y = self.ln_1(r)
    steered = each(texts + y)
    y = self.self_attn(steered, steered, each(y), mask.reshape(n * m, length))
    r = r + drop(y, keys[0])
    steered = (texts + self.ln_2(r)).reshape(n, m * length, dim)
    r = r + drop(self.cross_attn(steered, images, images), keys[1])
    y = layers.ACTIVATIONS["gelu"](self.wi(layers.rows(self.ln_3(r))))
    y = self.wo(layers.dropout(y, self.dropout, keys[2])).reshape(r.shape)
    # Twice, as in the original: after the second layer and again before the residual is added.
    k_out, k_add = (None, None) if key is None else jax.random.split(keys[3])
    return r + drop(drop(y, k_out), k_add)

  def attention(self, r: Array, texts: Array, mask: Array, images: Array) -> Array:
    """Weights of the cross attention, mean over heads [N, M, L, P], for pictures of them."""
    n, m, length, dim = r.shape
    each = lambda x: x.reshape(n * m, length, dim)
    y = self.ln_1(r)
    steered = each(texts + y)
    y = self.self_attn(steered, steered, each(y), mask.reshape(n * m, length))
    r = r + y.reshape(r.shape)
    q = (texts + self.ln_2(r)).reshape(n, m * length, dim)
    q, k, _ = self.cross_attn.heads_of(q, images, images)
    s = jnp.einsum("nqhd,nphd->nhqp", q, k, preferred_element_type=jnp.float32)
    s = jax.nn.softmax(s * q.shape[-1] ** -0.5, axis=-1).mean(1)  # [N, M * L, P]
    return s.reshape(n, m, length, -1)


class TokenMatching(nnx.Module):
  """A stack of retrieval blocks and the score after each of them.

  dim: width of both towers' tokens. embed: of the space in which tokens and what they retrieved
  are compared.
  """

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
      r = block(r, texts, mask, images, k)
      return r, self._score(self._agreement(r, target), mask)

    depth = layers.depth_of(self.blocks)
    keys = None if key is None else jax.random.split(key, depth)
    # Nothing is retrieved before the first block.
    start, step = jnp.zeros_like(texts), layers.recompute(step, self.remat)
    _, scores = jax.lax.scan(step, start, (self.blocks, keys), unroll=self.unroll)
    return jnp.moveaxis(scores, 0, -1)

  def trace(self, images: Array, texts: Array, mask: Array) -> dict[str, Array]:
    """What happens inside, of the same inputs, in inference, block after block.

    retrieved [K, N, M, L, D]; agreement float32 [K, N, M, L], the cosine of each token;
    attention float32 [K, N, M, L, P], mean over heads.
    """
    target = self._project(self.text_fc, texts)

    def step(r, block):
      attention = block.attention(r, texts, mask, images)
      r = block(r, texts, mask, images)
      return r, dict(retrieved=r, agreement=self._agreement(r, target), attention=attention)

    return jax.lax.scan(step, jnp.zeros_like(texts), self.blocks)[1]

  def _project(self, dense: nnx.Linear, x: Array) -> Array:
    """[..., D] -> unit float32 [..., E]."""
    y = dense(layers.rows(x)).reshape(*x.shape[:-1], -1)
    return system.l2_normalize(y, eps=1e-12)

  def _agreement(self, r: Array, target: Array) -> Array:
    return (self._project(self.image_fc, r) * target).sum(-1)  # [N, M, L]

  @staticmethod
  def _score(agreement: Array, mask: Array) -> Array:
    return (agreement * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
