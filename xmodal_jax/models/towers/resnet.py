"""The modified ResNet of CLIP (Radford et al., 2021, section 2.4): three-convolution stem, average
pools in front of strided layers, attention pool at the end. Images are NHWC."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.models import layers

Array = jax.Array


class BatchNorm(nnx.Module):
  """torch's BatchNorm over [B, H, W, C]: normalises with the biased variance of the batch and keeps
  a running one that is unbiased. The batch is the global one on any number of devices."""

  def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1, gamma: float = 1.0):
    self.eps, self.momentum = eps, momentum
    self.scale = nnx.Param(jnp.full(dim, gamma), axes=("embed",))
    self.bias = nnx.Param(jnp.zeros(dim), axes=("embed",))
    self.mean = nnx.BatchStat(jnp.zeros(dim), axes=("embed",))
    self.var = nnx.BatchStat(jnp.ones(dim), axes=("embed",))

  def __call__(self, x: Array, train: bool) -> Array:
    y = x.astype(jnp.float32)
    if train:
      mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
      n = y.size // y.shape[-1]
      move = lambda old, new: (1 - self.momentum) * old + self.momentum * jax.lax.stop_gradient(new)
      self.mean[...] = move(self.mean[...], mean)
      self.var[...] = move(self.var[...], var * (n / (n - 1)))
    else:
      mean, var = self.mean[...], self.var[...]
    y = (y - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
    return y.astype(x.dtype)


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
  """Convolution without bias; axes: of the channels that come in and go out.

  As in a Transformer's MLP, one with channels ("embed", "mlp") and one with ("mlp", "embed") follow
  each other, so that what lies between them is never gathered.
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


def avg_pool(x: Array, k: int) -> Array:
  """[B, H, W, C] -> [B, H/k, W/k, C]."""
  return nnx.avg_pool(x, (k, k), strides=(k, k)) if k > 1 else x


class Bottleneck(nnx.Module):
  """1x1, 3x3, pool, 1x1 with expansion 4; x [B, H, W, C] -> [B, H/stride, W/stride, 4 planes]."""

  def __init__(self, din: int, planes: int, stride: int, *, dtype, rngs: nnx.Rngs):
    make = functools.partial(conv, dtype=dtype, rngs=rngs)
    self.stride = stride
    into, out, plain = ("embed", "mlp"), ("mlp", "embed"), ("embed", None)
    self.conv1, self.bn1 = make(din, planes, 1, plain), BatchNorm(planes)
    self.conv2, self.bn2 = make(planes, planes, 3, into), BatchNorm(planes)
    self.conv3, self.bn3 = make(planes, 4 * planes, 1, out), BatchNorm(4 * planes, gamma=0.0)
    shortcut = stride > 1 or din != 4 * planes
    self.down_conv = nnx.data(make(din, 4 * planes, 1, plain) if shortcut else None)
    self.down_bn = nnx.data(BatchNorm(4 * planes) if shortcut else None)

  def __call__(self, x: Array, train: bool) -> Array:
    y = jax.nn.relu(self.bn1(self.conv1(x), train))
    y = jax.nn.relu(self.bn2(self.conv2(y), train))
    y = self.bn3(self.conv3(avg_pool(y, self.stride)), train)
    if self.down_conv is not None:
      x = self.down_bn(self.down_conv(avg_pool(x, self.stride)), train)
    return jax.nn.relu(x + y)


class Stage(nnx.Module):
  """A first block that changes the shape, and the rest stacked and scanned."""

  batch_sharding: NamedSharding | None = None

  def __init__(
    self, depth: int, din: int, planes: int, stride: int, *, remat: str, dtype, rngs: nnx.Rngs
  ):
    self.remat = remat
    self.first = Bottleneck(din, planes, stride, dtype=dtype, rngs=rngs)
    make = lambda key: Bottleneck(4 * planes, planes, 1, dtype=dtype, rngs=nnx.Rngs(key))
    self.rest = nnx.data(
      jax.vmap(make)(jax.random.split(rngs.params(), depth - 1)) if depth > 1 else None
    )

  def __call__(self, x: Array, train: bool) -> Array:
    x = layers.constrain_batch(
      self.first(layers.constrain_batch(x, self.batch_sharding), train), self.batch_sharding
    )
    if self.rest is None:
      return x

    def body(x, block):
      y = layers.constrain_batch(block(x, train), self.batch_sharding)
      return y, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

    x, stats = jax.lax.scan(layers.rematerialize(body, self.remat), x, self.rest)
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

  def __call__(self, x: Array, train: bool) -> Array:
    for f, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
      x = jax.nn.relu(bn(f(x), train))
    return avg_pool(x, 2)


class AttentionPool(nnx.Module):
  """The mean token asks, all tokens answer. [B, s, s, D] -> [B, E]."""

  batch_sharding: NamedSharding | None = None

  def __init__(self, grid: int, dim: int, heads: int, embed: int, *, dtype, rngs: nnx.Rngs):
    self.heads, self.dtype = heads, dtype
    init = layers.normal(dim**-0.5)
    self.pos = nnx.Param(init(rngs.params(), (grid**2 + 1, dim), jnp.float32), axes=(None, "embed"))
    dense = functools.partial(layers.linear, kernel_init=init, heads=heads, dtype=dtype, rngs=rngs)
    self.q, self.k, self.v = (dense(dim, dim, ("embed", "heads")) for _ in range(3))
    self.c = dense(dim, embed, ("heads", None))

  def __call__(self, x: Array) -> Array:
    x = x.reshape(len(x), -1, x.shape[-1])  # [B, s*s, D]
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    x = layers.constrain_batch(layers.add(x, self.pos[...]), self.batch_sharding)
    split = lambda z: z.reshape(*z.shape[:2], self.heads, -1)  # [B, L, H, D/H]
    y = layers.dot_product_attention(split(self.q(x[:, :1])), split(self.k(x)), split(self.v(x)))
    return self.c(y.reshape(len(x), -1))


class ModifiedResNet(nnx.Module):
  """images [B, S, S, 3] -> [B, E]; with `train` the running statistics are updated in place."""

  def __init__(
    self,
    *,
    size: int,
    width: int,
    depths: tuple[int, int, int, int],
    embed: int,
    remat: str = "",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if size % 32:
      raise ValueError(f"image size {size} is not a multiple of 32")
    self.dtype = dtype
    self.stem = Stem(width, dtype=dtype, rngs=rngs)
    make = functools.partial(Stage, remat=remat, dtype=dtype, rngs=rngs)
    self.stage1 = make(depths[0], width, width, 1)
    self.stage2 = make(depths[1], 4 * width, 2 * width, 2)
    self.stage3 = make(depths[2], 8 * width, 4 * width, 2)
    self.stage4 = make(depths[3], 16 * width, 8 * width, 2)
    heads = width * 32 // 64
    self.pool = AttentionPool(size // 32, 32 * width, heads, embed, dtype=dtype, rngs=rngs)

  def __call__(self, images: Array, train: bool = False) -> Array:
    x = self.stem(images.astype(self.dtype), train)
    for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
      x = stage(x, train)
    return self.pool(x)
