"""The contract of a system: see docs/architecture.md."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from xmodal_jax.losses.pairwise.ring import Ring

Array = jax.Array
Batch = Mapping[str, Array]
Features = dict[str, Array]


class System(nnx.Module):
  """Base of every system. Subclasses define `encode_image`, `encode_text`, `score` and `objective`.

  `mean`, `std` (three floats each) are the pixel statistics that the system was trained with.
  A system with a second stage defines `rerank` and says how it is used: `top_k_text` captions of
  each picture and `top_k_image` pictures of each caption are candidates, ordered by `rerank` plus
  `stage_mix` times the first stage; `second_stage` names the features that only it reads. Of texts
  with a `mask` [B, L] among these, whatever is as long as it along the second axis may be cut to
  fewer positions, as long as all of them are padding: `rerank` may not depend on padding.
  `stream`: pictures have features too large to keep, so they are scored as they are encoded.
  `rows` is the sharding of a batch's rows, None for one device; `accumulate` the number of parts
  that a batch is encoded in while training; `loss_chunk` the rows of a tile of pairs, 0 for all
  pairs at once: who builds it for a mesh sets the three.
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

  @property
  def ring(self) -> Ring | None:
    """How an objective walks all pairs; None: it holds them."""
    return Ring(self.loss_chunk, self.batch_sharding) if self.loss_chunk else None

  def pixels(self, image: Array) -> Array:
    """uint8 [B, H, W, 3] -> normalised float32; floats are taken as already normalised."""
    if jnp.issubdtype(image.dtype, jnp.floating):
      return image
    return (image.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)

  def prepare(self, batch: Batch, key: Array) -> Batch:
    """What has to see pixels or ids before the towers do (mixup); the identity here."""
    del key
    return batch

  def encode_image(self, batch: Batch, key: Array | None = None) -> Features:
    raise NotImplementedError(f"{type(self).__name__} has no image tower")

  def encode_text(self, batch: Batch, key: Array | None = None) -> Features:
    raise NotImplementedError(f"{type(self).__name__} has no text tower")

  def probe_features(self, batch: Batch) -> Array:
    """What a linear classifier of pictures reads -> float32 [B, D]: the image tower's vector of
    each picture, before it is projected and brought to unit length."""
    raise NotImplementedError(f"{type(self).__name__} has no vector for each picture to classify")

  def score(self, images: Features, texts: Features) -> Array:
    """First-stage scores of all pairs -> float32 [I, T]."""
    raise NotImplementedError(f"{type(self).__name__} has no first stage")

  def rerank(self, images: Features, texts: Features) -> Array:
    """Second-stage scores of M captions for each of G pictures -> float32 [G, M].

    images: features [G, ...]; texts: features [G, M, ...].
    """
    raise NotImplementedError(f"{type(self).__name__} has no second stage")

  def token_attention(self, images: Features, texts: Features) -> dict[str, Array]:
    """What the tokens of N texts look at in their N pictures, for people to see.

    attention float32 [N, L, P]: weights of each text token over the image tokens, in rows that sum
    to 1; relevance, like it: of those the ones that its score is due to; agreement float32 [N, L]:
    what each text token scores.
    """
    raise NotImplementedError(f"{type(self).__name__} does not align tokens")

  def objective(
    self, images: Features, texts: Features, batch: Batch, key: Array
  ) -> tuple[Array, dict[str, Array]]:
    """The objective on encoded features over the global batch -> (scalar, dict of scalars)."""
    raise NotImplementedError(f"{type(self).__name__} has no objective")

  def loss(self, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """The training loss of a global batch, written as if on one device -> (scalar, metrics)."""
    k_prepare, k_image, k_text, k_align = jax.random.split(key, 4)
    batch = self.prepare(batch, k_prepare)
    images = self.chunked(self.encode_image, batch, k_image)
    texts = self.chunked(self.encode_text, batch, k_text)
    return self.objective(images, texts, batch, k_align)

  def chunked(self, f: Callable[[Any, Array | None], Any], rows: Any, key: Array | None) -> Any:
    """f(rows, key) in `accumulate` parts, one after another, for an f that treats rows apart.

    rows: arrays [B, ...]. What f keeps for its gradient is dropped and computed again, part by
    part, when the gradient comes back; with the same keys, so that dropout is the same. The result
    and its gradient are those of the whole batch, and memory is that of one part: gradient
    accumulation that is exact for losses over all pairs (GradCache, Gao et al., 2021).
    """
    n = self.accumulate
    if n == 1:
      return f(rows, key)
    # Part j takes rows j, j + n, ...: each device goes on with rows of its own.
    cut = lambda x: self._place(jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1))
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    keys = None if key is None else jax.random.split(key, n)
    part = jax.checkpoint(lambda part: f(*part), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(part, (jax.tree.map(cut, dict(rows)), keys)))

  def replicate(self, x: Any) -> Any:
    """The rows of a sharded batch, arrays [B, ...], on every device."""
    if self.batch_sharding is None or self.batch_sharding.mesh.size == 1:
      return x
    whole = NamedSharding(self.batch_sharding.mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(x, whole)

  def _place(self, parts: Array) -> Array:
    """[n, B / n, ...] with the second axis over the devices that have the rows."""
    if self.batch_sharding is None or self.batch_sharding.mesh.size == 1:
      return parts
    spec = jax.sharding.PartitionSpec(None, *self.batch_sharding.spec)
    return jax.lax.with_sharding_constraint(parts, NamedSharding(self.batch_sharding.mesh, spec))


def l2_normalize(x: Array, eps: float = 0.0) -> Array:
  """x / max(|x|, eps) over the last axis in float32. [..., E] -> float32 [..., E]."""
  x = x.astype(jnp.float32)
  if not eps:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  # The square is bounded, not its root, whose gradient at 0 would be NaN.
  return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), eps**2))
