"""The interface of a retrieval system, which training, evaluation and conversion rely on."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num, PRNGKeyArray

from xmodal_jax.errors import ConfigError
from xmodal_jax.losses.pairwise.ring import Ring

Batch = Mapping[str, Array | np.ndarray]
Features = dict[str, Array]

# Methods of a system that are computed at its `precision`.
_COMPUTED = (
  "prepare", "encode_image", "encode_text", "probe_features", "score", "rerank", "token_attention",
  "objective", "loss",
)  # fmt: skip


def _at_precision(method: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(method)
  def computed(self, *args, **kwargs):
    if self.precision is None:
      return method(self, *args, **kwargs)
    with jax.default_matmul_precision(self.precision):
      return method(self, *args, **kwargs)

  return computed


class System(nnx.Module):
  """Base of every system: encoders of images and texts, scores of pairs, a training objective.

  Subclasses define `encode_image`, `encode_text`, `score` and `objective`; those with a second
  stage also `rerank`. Batches and features are dicts of arrays with a leading batch axis. A key
  means training; without one, encoders are deterministic.

  Class attributes of a system:
    mean, std: pixel statistics, three floats each, for images in [0, 1].
    top_k_text, top_k_image: captions re-ranked for each image, images re-ranked for each caption;
      0 without a second stage.
    stage_mix: weight of the first-stage score, added to the `rerank` scores of the candidates.
    second_stage: features that only `rerank` reads. If texts have a `mask` [B, L] among them,
      features of length L along their second axis may be cut to fewer positions where all positions
      cut off are padding: `rerank` may not depend on padding.
    stream: True if image features are too large to keep; images are then scored batch by batch
      against all texts, as soon as they are encoded.

  Set after construction, from the run's config and mesh:
    batch_sharding: sharding of the batch axis; None on one device.
    accumulate: number of chunks that a training batch is encoded in, see `chunked`.
    loss_chunk: rows of a tile of pairs in the objective, see `ring`; 0: all pairs at once.
    precision: of float32 matmuls, as for jax.default_matmul_precision; None: the process's own. It
      belongs to the model and not to the process, because programs are traced at their first call:
      by then a process may have built another model with another precision.

  Example:

    model = clip.build(clip.preset("vit_b32"), rngs=nnx.Rngs(0))
    images = model.encode_image({"image": pixels})          # uint8 [I, 224, 224, 3]
    texts = model.encode_text({"text_ids": ids})            # int32 [T, 77]
    scores = model.score(images, texts)                     # float32 [I, T]
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  top_k_text: int = 0
  top_k_image: int = 0
  stage_mix: float = 0.0
  second_stage: tuple[str, ...] = ()
  stream: bool = False
  batch_sharding: NamedSharding | None = None
  accumulate: int = 1
  loss_chunk: int = 0
  precision: str | None = None

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    for name in _COMPUTED:
      if name in vars(cls):
        setattr(cls, name, _at_precision(vars(cls)[name]))

  @property
  def ring(self) -> Ring | None:
    """Blockwise reduction over pairs for the objective; None: the objective holds all pairs."""
    return Ring(self.loss_chunk, self.batch_sharding) if self.loss_chunk else None

  def pixels(self, image: Num[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """uint8 pixels -> normalised float32; floats are taken as normalised and returned as is."""
    image = jnp.asarray(image)
    if jnp.issubdtype(image.dtype, jnp.floating):
      return image
    return (image.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)

  def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
    """Batch-level hook of training before encoding (mixup); the identity here."""
    del key
    return batch

  def encode_image(self, batch: Batch, key: PRNGKeyArray | None = None) -> Features:
    raise NotImplementedError(f"{type(self).__name__} has no image tower")

  def encode_text(self, batch: Batch, key: PRNGKeyArray | None = None) -> Features:
    raise NotImplementedError(f"{type(self).__name__} has no text tower")

  def probe_features(self, batch: Batch) -> Float[Array, "b d"]:
    """Input of a linear classifier of images, float32: the image tower's pooled vectors before
    projection and normalisation."""
    raise NotImplementedError(f"{type(self).__name__} has no vector for each image to classify")

  def score(self, images: Features, texts: Features) -> Float[Array, "i t"]:
    """First-stage scores of all pairs, float32."""
    raise NotImplementedError(f"{type(self).__name__} has no first stage")

  def rerank(self, images: Features, texts: Features) -> Float[Array, "g m"]:
    """Second-stage scores of M captions for each of G images, float32.

    images: features [G, ...]; texts: features [G, M, ...].
    """
    raise NotImplementedError(f"{type(self).__name__} has no second stage")

  def token_attention(self, images: Features, texts: Features) -> dict[str, Array]:
    """Attention of text tokens over image tokens for N pairs, for visualisation; float32.

    attention [N, L, P]: weights of each text token over the image tokens, rows sum to 1.
    relevance [N, L, P]: each weight's share of the token's score, rows sum to 1 or are 0.
    agreement [N, L]: each text token's contribution to the pair's score.
    """
    raise NotImplementedError(f"{type(self).__name__} does not align tokens")

  def objective(
    self, images: Features, texts: Features, batch: Batch, key: PRNGKeyArray
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The training objective on features of the global batch -> (loss, dict of scalars)."""
    raise NotImplementedError(f"{type(self).__name__} has no objective")

  def loss(self, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The training loss of a global batch, written as if on one device -> (loss, metrics)."""
    k_prepare, k_image, k_text, k_objective = jax.random.split(key, 4)
    batch = self.prepare(batch, k_prepare)
    images = self.chunked(self.encode_image, batch, k_image)
    texts = self.chunked(self.encode_text, batch, k_text)
    return self.objective(images, texts, batch, k_objective)

  def chunked(self, f: Callable[[Any, Any], Any], inputs: Any, key: PRNGKeyArray | None) -> Any:
    """f(inputs, key) in `accumulate` chunks, one after another. inputs: arrays [B, ...].

    f must treat batch rows independently. Activations of a chunk are discarded after the forward
    pass and recomputed in the backward pass with the same key, so dropout is the same. The result
    and its gradient are those of the whole batch at the memory of one chunk: gradient accumulation
    that is exact for losses over all pairs (GradCache, Gao et al., 2021).
    """
    n = self.accumulate
    if n == 1:
      return f(inputs, key)

    def split(x):  # chunk j takes rows j, j + n, ...: every device keeps its own rows
      return self._constrain_chunks(jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1))

    def join(x):
      return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    def one(chunk):
      return f(*chunk)

    keys = None if key is None else jax.random.split(key, n)
    chunks = jax.tree.map(split, dict(inputs)), keys
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(one, prevent_cse=False), chunks))

  def _constrain_chunks(self, x: Array) -> Array:
    """[n, B / n, ...] with the second axis sharded as the batch."""
    if self._on_one_device():
      return x
    spec = PartitionSpec(None, *self.batch_sharding.spec)
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.batch_sharding.mesh, spec))

  def replicate(self, x: Any) -> Any:
    """Arrays [B, ...] sharded along the batch -> the same arrays whole on every device."""
    if self._on_one_device():
      return x
    whole = NamedSharding(self.batch_sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(x, whole)

  def _on_one_device(self) -> bool:
    return self.batch_sharding is None or self.batch_sharding.mesh.size == 1


def pixel_statistics(
  mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """(mean, std) as tuples. Raises ConfigError unless they are three numbers, std above 0."""
  for name, values in (("mean", mean), ("std", std)):
    if len(values) != 3 or (name == "std" and min(values) <= 0):
      raise ConfigError(f"model.{name} is {tuple(values)}, expected three numbers, std above 0")
  return tuple(mean), tuple(std)


def l2_normalize(x: Float[Array | np.ndarray, "*n e"], eps: float = 0.0) -> Float[Array, "*n e"]:
  """x / max(|x|, eps) over the last axis, in float32."""
  x = jnp.asarray(x, jnp.float32)
  if not eps:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  # The maximum is taken of the square: the gradient of the root at 0 would be NaN.
  return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), eps**2))
