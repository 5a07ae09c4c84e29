"""BERT's encoder (Devlin et al., 2019): post-norm blocks with padding masks and dropout."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xmodal_jax.errors import ConfigError
from xmodal_jax.models import layers


class Block(nnx.Module):
  """Post-norm Transformer block. x [B, L, D], mask bool [B, L] -> [B, L, D]; dropout with a key."""

  def __init__(
    self,
    dim: int,
    heads: int,
    *,
    mlp_dim: int,
    eps: float,
    dropout: float,
    attention_dropout: float,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    # 0.02 at BERT-base's width, as published, scaled so that outputs keep their size at others.
    dense = functools.partial(
      layers.linear,
      kernel_init=layers.normal(0.02 * (768 / dim) ** 0.5),
      bias_init=layers.zeros,
      heads=heads,
      dtype=dtype,
      rngs=rngs,
    )
    self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
    self.q, self.k, self.v = (dense(dim, dim, ("embed", "heads")) for _ in range(3))
    self.out = dense(dim, dim, ("heads", "embed"))
    self.ln_1 = layers.layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
    self.wi = dense(dim, mlp_dim, ("embed", "mlp"))
    self.wo = dense(mlp_dim, dim, ("mlp", "embed"))
    self.ln_2 = layers.layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b l d"],
    mask: Bool[Array, "b l"],
    key: PRNGKeyArray | None = None,
  ) -> Float[Array, "b l d"]:
    k_weights, k_attn, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
    y = layers.flatten_leading(x)
    q, k, v = (layers.split_heads(f(y), len(x), self.heads) for f in (self.q, self.k, self.v))
    y = layers.dot_product_attention(q, k, v, mask=mask, rate=self.attention_dropout, key=k_weights)
    y = self.out(layers.merge_heads(y)).reshape(x.shape)
    x = self.ln_1(x + layers.dropout(y, self.dropout, k_attn))
    y = self.wo(layers.ACTIVATIONS["gelu"](self.wi(layers.flatten_leading(x)))).reshape(x.shape)
    return self.ln_2(x + layers.dropout(y, self.dropout, k_mlp))


class Bert(nnx.Module):
  """ids int [B, L], mask bool [B, L] -> last hidden state [B, L, D]; L at most `context`.

  mask: False at padding, which is not attended to; its positions have hidden states all the same.
  Token types are 0. pooler: with BERT's tanh head on the first token, see `pool`.
  """

  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    *,
    vocab: int,
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    context: int = 512,
    types: int = 2,
    eps: float = 1e-12,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    pooler: bool = False,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype, self.dropout, self.loop = dtype, dropout, dict(remat=remat, unroll=unroll)
    normal = layers.normal(0.02)
    self.word = nnx.Embed(
      vocab,
      width,
      embedding_init=normal,
      embedding_metadata={"axes": ("vocab", "embed")},
      dtype=dtype,
      rngs=rngs,
    )
    pos = normal(rngs.params(), (context, width), jnp.float32)
    self.pos = nnx.Param(pos, axes=(None, "embed"))
    types = normal(rngs.params(), (types, width), jnp.float32)
    self.type = nnx.Param(types, axes=(None, "embed"))
    self.ln = layers.layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
    self.blocks = layers.stack(
      depth,
      width,
      heads,
      block=Block,
      mlp_dim=mlp,
      eps=eps,
      dropout=dropout,
      attention_dropout=attention_dropout,
      dtype=dtype,
      rngs=rngs,
    )
    head = dict(kernel_init=normal, bias_init=layers.zeros, dtype=dtype, rngs=rngs)
    self.pooler = nnx.data(layers.linear(width, width, ("embed", None), **head) if pooler else None)

  def embed(self, ids: Int[Array, "b l"], key: PRNGKeyArray | None = None) -> Float[Array, "b l d"]:
    """The input of the first block. Raises ConfigError for L greater than `context`."""
    length, context = ids.shape[1], self.pos.shape[0]
    if length > context:
      raise ConfigError(f"text of length {length}, but the position table has {context} rows")
    table = self.pos[:length] + self.type[0]
    x = layers.lookup(self.word.embedding[...], ids, self.dtype, self.batch_sharding)
    x = self.ln(layers.add(x, table))
    return layers.dropout(x, self.dropout, key)

  def __call__(
    self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], key: PRNGKeyArray | None = None
  ) -> Float[Array, "b l d"]:
    k_embed, k_blocks = (None, None) if key is None else jax.random.split(key)
    return self._blocks(self.embed(ids, k_embed), mask, k_blocks)

  def states(
    self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], key: PRNGKeyArray | None = None
  ) -> Float[Array, "n b l d"]:
    """All hidden states: the embeddings, then the output of each of n - 1 blocks."""
    k_embed, k_blocks = (None, None) if key is None else jax.random.split(key)
    x = self.embed(ids, k_embed)
    return jnp.concatenate([x[None], self._blocks(x, mask, k_blocks, collect=True)])

  def _blocks(self, x, mask, key, **kw):
    kw |= dict(key=key, batch_sharding=self.batch_sharding)
    return layers.scan(self.blocks, x, mask, **self.loop, **kw)

  def pool(self, states: Float[Array, "b l d"]) -> Float[Array, "b d"]:
    """The pooler's output for the first token."""
    return jnp.tanh(self.pooler(states[:, 0]))
