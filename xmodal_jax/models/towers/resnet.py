"""The modified ResNet of CLIP (Radford et al., 2021, section 2.4): a stem of three convolutions,
average pooling before strided layers, attention pooling at the end. Images are NHWC."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from xmodal_jax.errors import ConfigError
from xmodal_jax.models import layers
from xmodal_jax.models.towers.base import ImageTower


class BatchNorm(nnx.Module):
  """torch's BatchNorm over [B, H, W, C]: normalises with the biased variance of the batch, and
  keeps the unbiased one in the running statistics. The batch is global on any number of devices.

  held: bool [], or [layers] in a stack, set while training: where True, it normalises with the
  running statistics and keeps them, as in evaluation. None: nowhere.
  """

  def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1, gamma: float = 1.0):
    self.eps, self.momentum = eps, momentum
    self.scale = nnx.Param(jnp.full(dim, gamma), axes=("embed",))
    self.bias = nnx.Param(jnp.zeros(dim), axes=("embed",))
    self.mean = nnx.BatchStat(jnp.zeros(dim), axes=("embed",))
    self.var = nnx.BatchStat(jnp.ones(dim), axes=("embed",))
    self.held = nnx.data(None)

  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    y = x.astype(jnp.float32)
    if train:
      mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
      n = y.size // y.shape[-1]
      moved_mean = self._moved(self.mean[...], mean)
      moved_var = self._moved(self.var[...], var * (n / (n - 1)))
      if self.held is not None:
        held = functools.partial(jnp.where, self.held)
        mean, var = held(self.mean[...], mean), held(self.var[...], var)
        moved_mean, moved_var = held(mean, moved_mean), held(var, moved_var)
      self.mean[...], self.var[...] = moved_mean, moved_var
    else:
      mean, var = self.mean[...], self.var[...]
    y = (y - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
    return y.astype(x.dtype)

  def _moved(self, average, new):
    return (1 - self.momentum) * average + self.momentum * jax.lax.stop_gradient(new)


def conv(
  din: int,
  dout: int,
  size: int,
  axes: tuple[str | None, str | None],
  *,
  stride: int = 1,
  dtype,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """Convolution without bias. axes: logical axes of the input and the output channels.

  As in a Transformer's MLP, a convolution with axes ("embed", "mlp") is followed by one with
  ("mlp", "embed"), so that the activations between them stay sharded.
  """
  pad = size // 2
  return nnx.Conv(
    din,
    dout,
    (size, size),
    strides=stride,
    padding=((pad, pad), (pad, pad)),
    use_bias=False,
    kernel_init=layers.uniform((size * size * din) ** -0.5),
    kernel_metadata={"axes": (None, None, *axes)},
    dtype=dtype,
    rngs=rngs,
  )


def avg_pool(x: Float[Array, "b h w c"], k: int) -> Float[Array, "b i j c"]:
  """[B, H, W, C] -> [B, H/k, W/k, C]."""
  return nnx.avg_pool(x, (k, k), strides=(k, k)) if k > 1 else x


class Bottleneck(nnx.Module):
  """1x1, 3x3, pool, 1x1 with expansion 4; x [B, H, W, C] -> [B, H/stride, W/stride, 4 planes]."""

  def __init__(self, din: int, planes: int, stride: int, *, dtype, rngs: nnx.Rngs):
    make = functools.partial(conv, dtype=dtype, rngs=rngs)
    self.stride = stride
    self.conv1, self.bn1 = make(din, planes, 1, ("embed", None)), BatchNorm(planes)
    self.conv2, self.bn2 = make(planes, planes, 3, ("embed", "mlp")), BatchNorm(planes)
    self.conv3 = make(planes, 4 * planes, 1, ("mlp", "embed"))
    self.bn3 = BatchNorm(4 * planes, gamma=0.0)
    shortcut = stride > 1 or din != 4 * planes
    self.down_conv = nnx.data(make(din, 4 * planes, 1, ("embed", None)) if shortcut else None)
    self.down_bn = nnx.data(BatchNorm(4 * planes) if shortcut else None)

  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b i j d"]:
    y = jax.nn.relu(self.bn1(self.conv1(x), train))
    y = jax.nn.relu(self.bn2(self.conv2(y), train))
    y = self.bn3(self.conv3(avg_pool(y, self.stride)), train)
    if self.down_conv is not None:
      x = self.down_bn(self.down_conv(avg_pool(x, self.stride)), train)
    return jax.nn.relu(x + y)


class Stage(nnx.Module):
  """A first block that changes the shape; the other blocks are stacked and scanned."""

  batch_sharding: NamedSharding | None = None

  def __init__(
    self,
    depth: int,
    din: int,
    planes: int,
    stride: int,
    *,
    remat: str,
    unroll: int,
    dtype,
    rngs: nnx.Rngs,
  ):
    self.remat, self.unroll = remat, unroll
    self.first = Bottleneck(din, planes, stride, dtype=dtype, rngs=rngs)
    make = lambda key: Bottleneck(4 * planes, planes, 1, dtype=dtype, rngs=nnx.Rngs(key))
    self.rest = nnx.data(
      jax.vmap(make)(jax.random.split(rngs.params(), depth - 1)) if depth > 1 else None
    )

  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b i j d"]:
    constrain = functools.partial(layers.constrain_batch, batch_sharding=self.batch_sharding)
    x = constrain(self.first(constrain(x), train))
    if self.rest is None:
      return x

    def body(x, block):
      y = constrain(block(x, train))
      return y, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

    body = layers.rematerialize(body, self.remat)
    x, stats = jax.lax.scan(body, x, self.rest, unroll=self.unroll)
    if train:
      nnx.update(self.rest, stats)
    return x


class Stem(nnx.Module):
  """Three 3x3 convolutions and a pool. [B, S, S, 3] -> [B, S/4, S/4, width]."""

  def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
    half = width // 2
    make = functools.partial(conv, dtype=dtype, rngs=rngs)
    self.conv1, self.bn1 = make(3, half, 3, (None, "embed"), stride=2), BatchNorm(half)
    self.conv2, self.bn2 = make(half, half, 3, ("embed", "mlp")), BatchNorm(half)
    self.conv3, self.bn3 = make(half, width, 3, ("mlp", "embed")), BatchNorm(width)

  def __call__(self, x: Float[Array, "b s s 3"], train: bool) -> Float[Array, "b g g c"]:
    for f, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
      x = jax.nn.relu(bn(f(x), train))
    return avg_pool(x, 2)


class AttentionPool(nnx.Module):
  """Attention pooling with the mean token as query. [B, P, D] -> [B, E]; positions: P + 1."""

  batch_sharding: NamedSharding | None = None

  def __init__(self, positions: int, dim: int, heads: int, embed: int, *, dtype, rngs: nnx.Rngs):
    self.heads = heads
    init = layers.normal(dim**-0.5)
    pos = init(rngs.params(), (positions, dim), jnp.float32)
    self.pos = nnx.Param(pos, axes=(None, "embed"))
    dense = functools.partial(layers.linear, kernel_init=init, heads=heads, dtype=dtype, rngs=rngs)
    self.q, self.k, self.v = (dense(dim, dim, ("embed", "heads")) for _ in range(3))
    self.c = dense(dim, embed, ("heads", None))

  def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b e"]:
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    x = layers.constrain_batch(layers.add(x, self.pos[...]), self.batch_sharding)
    q, k, v = (
      rearrange(y, "b l (h d) -> b l h d", h=self.heads)
      for y in (self.q(x[:, :1]), self.k(x), self.v(x))
    )
    return self.c(rearrange(layers.dot_product_attention(q, k, v), "b 1 h d -> b (h d)"))


class ModifiedResNet(ImageTower):
  """images [B, S, S, 3] -> tokens [B, (S/32)^2, 32 width]; `states` has those of all four stages.

  With a key (training), BatchNorm uses the statistics of the batch and updates its running ones in
  place. output_dim: attention pooling that gives vectors of this width; None: the mean over tokens.
  heads: of the attention pooling; 0: of 64 units each. remat, unroll: see layers.scan.
  """

  projects = True

  def __init__(
    self,
    *,
    size: int,
    width: int,
    depths: Sequence[int],
    heads: int = 0,
    output_dim: int | None = None,
    remat: str = "",
    unroll: int = 1,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if size % 32:
      raise ConfigError(f"image size {size} is not a multiple of 32")
    self.dtype, self.widths = dtype, tuple(4 * width * 2**i for i in range(4))
    kw = dict(dtype=dtype, rngs=rngs)
    self.stem = Stem(width, **kw)
    make = functools.partial(Stage, remat=remat, unroll=unroll, **kw)
    self.stage1 = make(depths[0], width, width, 1)
    self.stage2 = make(depths[1], 4 * width, 2 * width, 2)
    self.stage3 = make(depths[2], 8 * width, 4 * width, 2)
    self.stage4 = make(depths[3], 16 * width, 8 * width, 2)
    self.pool = nnx.data(None)
    if output_dim is not None:
      positions, heads = (size // 32) ** 2 + 1, heads or width * 32 // 64
      self.pool = nnx.data(AttentionPool(positions, 32 * width, heads, output_dim, **kw))

  def states(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> list[Float[Array, "b p d"]]:
    """The output of each of the four stages."""
    train = key is not None
    x, out = self.stem(images.astype(self.dtype), train), []
    for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
      x = stage(x, train)
      out.append(rearrange(x, "b i j d -> b (i j) d"))
    return out

  def pooled(self, x: Float[Array, "b p d"]) -> Float[Array, "b v"]:
    """The attention pool's output, which is projected already, or the mean."""
    return super().pooled(x) if self.pool is None else self.pool(x)

  def project(self, pooled: Float[Array, "b e"]) -> Float[Array, "b e"]:
    return pooled
