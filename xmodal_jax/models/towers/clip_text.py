"""The text Transformer of CLIP (Radford et al., 2021, section 2.4)."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.models import layers


class TextTransformer(nnx.Module):
  """ids int [B, L] -> the residual stream after the last block [B, L, W]; L at most `context`.

  act: a name of layers.ACTIVATIONS. causal: positions attend to themselves and those before, as
  published; False: to all, padding included.
  """

  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    *,
    vocab: int,
    context: int,
    width: int,
    depth: int,
    heads: int,
    embed: int,
    act: str = "quick_gelu",
    causal: bool = True,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("model.text.act", act, layers.ACTIVATIONS)
    self.dtype, self.loop = dtype, dict(remat=remat, unroll=unroll)
    self.token = nnx.Embed(
      vocab,
      width,
      embedding_init=layers.normal(0.02),
      embedding_metadata={"axes": ("vocab", "embed")},
      dtype=dtype,
      rngs=rngs,
    )
    pos = layers.normal(0.01)(rngs.params(), (context, width), jnp.float32)
    self.pos = nnx.Param(pos, axes=(None, "embed"))
    self.blocks = layers.stack(
      depth,
      width,
      heads,
      mlp_dim=4 * width,
      act=act,
      causal=causal,
      std=(width**-0.5, width**-0.5 * (2 * depth) ** -0.5, (2 * width) ** -0.5),
      dtype=dtype,
      rngs=rngs,
    )
    self.ln_final = layers.layer_norm(width, dtype=dtype, rngs=rngs)
    self.proj = layers.linear(
      width,
      embed,
      ("embed", None),
      kernel_init=layers.normal(width**-0.5),
      use_bias=False,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l w"]:
    context = self.pos.shape[0]
    if ids.shape[1] > context:
      raise ConfigError(f"text of length {ids.shape[1]}, but the position table has {context} rows")
    x = layers.lookup(self.token.embedding[...], ids, self.dtype, self.batch_sharding)
    x = layers.add(x, self.pos[: ids.shape[1]])
    return layers.scan(self.blocks, x, batch_sharding=self.batch_sharding, **self.loop)

  def pool(self, x: Float[Array, "b l w"], ids: Int[Array, "b l"]) -> Float[Array, "b e"]:
    """The projected output at the end-of-text token, the position of the (first) largest id.

    The norm and the projection act on each position alone, so they run on that position only.
    """
    x = jnp.take_along_axis(x, ids.argmax(-1)[:, None, None], axis=1)[:, 0]  # [B, W]
    return self.proj(self.ln_final(x))
