"""BERT's encoder (Devlin et al., 2019): post-norm blocks, every layer's output at hand."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models import layers

Array = jax.Array


class Block(nnx.Module):
  """Post-norm Transformer block. x [B, L, D], mask bool [B, L] -> [B, L, D]; a key: dropout."""

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
    # BERT's 0.02 at BERT-base's width; at others what keeps the outputs as large.
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

  def __call__(self, x: Array, mask: Array, key: Array | None = None) -> Array:
    k_weights, k_attn, k_mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
    split = lambda z: z.reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, D/H]
    y = layers.flatten_leading(x)
    y = layers.dot_product_attention(
      split(self.q(y)),
      split(self.k(y)),
      split(self.v(y)),
      mask=mask,
      rate=self.attention_dropout,
      key=k_weights,
    )
    y = self.out(layers.flatten_leading(y.reshape(x.shape))).reshape(x.shape)
    x = self.ln_1(x + layers.dropout(y, self.dropout, k_attn))
    y = self.wo(layers.ACTIVATIONS["gelu"](self.wi(layers.flatten_leading(x)))).reshape(x.shape)
    return self.ln_2(x + layers.dropout(y, self.dropout, k_mlp))


class Bert(nnx.Module):
  """ids int [B, L], mask bool [B, L] -> last hidden state [B, L, D]; L up to `context`.

  Padding is never attended to, but its positions have hidden states too. All token types are 0.
  pooler: BERT's own tanh head on the first token, for systems that use it.
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
    param = lambda *shape: normal(rngs.params(), shape, jnp.float32)
    self.word = nnx.Embed(
      vocab,
      width,
      embedding_init=normal,
      embedding_metadata={"axes": ("vocab", "embed")},
      dtype=dtype,
      rngs=rngs,
    )
    self.pos = nnx.Param(param(context, width), axes=(None, "embed"))
    self.type = nnx.Param(param(types, width), axes=(None, "embed"))
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

  def embed(self, ids: Array, key: Array | None = None) -> Array:
    """ids int [B, L] -> [B, L, D]: the input of the first block."""
    length, context = ids.shape[1], self.pos.shape[0]
    if length > context:
      raise ValueError(f"text of length {length}, but the position table has {context} rows")
    table = self.pos[:length] + self.type[0]
    x = layers.lookup(self.word.embedding[...], ids, self.dtype, self.batch_sharding)
    x = self.ln(layers.add(x, table))
    return layers.dropout(x, self.dropout, key)

  def __call__(self, ids: Array, mask: Array, key: Array | None = None) -> Array:
    k_embed, k_blocks = (None, None) if key is None else jax.random.split(key)
    x = self.embed(ids, k_embed)
    return layers.scan(
      self.blocks, x, mask, key=k_blocks, batch_sharding=self.batch_sharding, **self.loop
    )

  def states(self, ids: Array, mask: Array, key: Array | None = None) -> Array:
    """Every hidden state [N + 1, B, L, D]: the embeddings, then the output of each block."""
    k_embed, k_blocks = (None, None) if key is None else jax.random.split(key)
    x = self.embed(ids, k_embed)
    kw = dict(key=k_blocks, batch_sharding=self.batch_sharding, **self.loop)
    each = layers.scan(self.blocks, x, mask, collect=True, **kw)
    return jnp.concatenate([x[None], each])

  def pool(self, states: Array) -> Array:
    """[B, L, D] -> [B, D]: the pooler on the first token."""
    return jnp.tanh(self.pooler(states[:, 0]))
