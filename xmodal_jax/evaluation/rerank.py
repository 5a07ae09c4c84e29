"""The second stage of retrieval: rescores the best candidates of each query pair by pair.

Features that only this stage reads never leave the devices. Image features stay on the device that
encoded them. Captions are sorted by length and replicated one block at a time, cut to the block's
longest. Each device scores the candidate pairs of its own images, several captions of an image
together, in calls of few static shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding as sharding_lib
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import metrics
from xmodal_jax.evaluation.metrics import Shortlist
from xmodal_jax.models.base import System

_TOKENS = 8  # caption lengths are rounded up to multiples of this, to compile few programs


class SecondStage(NamedTuple):
  """Candidates: captions per image, images per caption. mix: weight of the first-stage score.

  mixes: weights of which the best on the validation split is used; (): `mix`.
  """

  top_k_text: int
  top_k_image: int
  mix: float
  mixes: tuple[float, ...] = ()


def second_stage(options: Any, system: System) -> SecondStage | None:
  """The second stage by config.eval, None values being the system's own; None: one stage.

  Raises ConfigError if the system has none, or only one number of candidates is 0.
  """

  def choose(option, default):
    return default if option is None else option

  top_k_text = choose(options.top_k_text, system.top_k_text)
  top_k_image = choose(options.top_k_image, system.top_k_image)
  if top_k_text == top_k_image == 0:
    if options.stage_mixes:
      raise ConfigError(
        f"config.eval.stage_mixes is {tuple(options.stage_mixes)}, and there is one stage: set "
        "it to (), or config.eval.top_k_text and top_k_image to numbers of candidates"
      )
    return None
  if not system.second_stage or min(top_k_text, top_k_image) <= 0:
    raise ConfigError(
      f"config.eval.top_k_text and top_k_image are {top_k_text} and {top_k_image}: a second stage "
      f"needs both, and {type(system).__name__} {'has' if system.second_stage else 'has none'}"
    )
  try:
    mixes = tuple(map(float, options.stage_mixes))
  except (TypeError, ValueError) as e:
    raise ConfigError(
      f"config.eval.stage_mixes is {options.stage_mixes!r}: expected numbers, as in (0.0, 0.5, 1.0)"
    ) from e
  mix = choose(options.stage_mix, system.stage_mix)
  return SecondStage(top_k_text, top_k_image, mix, mixes)


class Bank:
  """Features of one side on the devices, all batches in leaves [S, b, ...] with b sharded.

  steps: S, the number of batches. Floating-point leaves are stored in `dtype`. A row's place is its
  number over all batches.
  """

  def __init__(self, steps: int, batch_sharding: NamedSharding, dtype: Any):
    self.steps, self.dtype, self.leaves = steps, dtype, {}
    self.valid: list[np.ndarray] = []  # bool [b] of each batch: rows that are no padding
    self.sharding = NamedSharding(batch_sharding.mesh, P(None, *batch_sharding.spec))
    self.replicated = NamedSharding(batch_sharding.mesh, P())

  def add(self, features: dict[str, jax.Array], valid: np.ndarray) -> None:
    """Stores the next batch: features [b, ...], valid bool [b]."""
    step = len(self.valid)
    if not self.leaves:
      self.leaves = _zeros(
        tuple((k, (self.steps, *v.shape), self._stored(v.dtype)) for k, v in features.items()),
        self.sharding,
      )
    at = sharding_lib.place(np.int32(step), self.replicated)
    self.leaves = _store(self.leaves, features, at)
    self.valid.append(valid)

  def _stored(self, dtype: Any) -> Any:
    return self.dtype if jnp.issubdtype(dtype, jnp.floating) else dtype

  @property
  def places(self) -> np.ndarray:
    """int [N]: places of the valid rows."""
    return np.flatnonzero(np.concatenate(self.valid))

  def lengths(self) -> np.ndarray:
    """int [S * b]: number of tokens of each row by the leaf `mask`; zeros without that leaf."""
    if "mask" not in self.leaves:
      return np.zeros(self.steps * len(self.valid[0]), int)
    return np.asarray(jax.device_get(_count_tokens(self.leaves["mask"], self.replicated)))

  def block(self, places: np.ndarray, length: int | None = None) -> dict[str, jax.Array]:
    """Leaves [K, ...] of the rows at `places` int [K], replicated.

    length: cuts the token axis of leaves beside a mask; all that is cut must be padding.
    """
    at = np.divmod(places, len(self.valid[0]))
    step, row = (sharding_lib.place(x, self.replicated) for x in at)
    return _block(self.leaves, step, row, length, self.replicated)


# Module-level functions, so that their compilations are shared by all banks.


@jax.jit(static_argnums=(0, 1))
def _zeros(types, sharding):
  """types: ((name, shape, dtype), ...) -> {name: zeros}."""
  zeros = {k: jnp.zeros(shape, dtype) for k, shape, dtype in types}
  return jax.lax.with_sharding_constraint(zeros, sharding)


@jax.jit(static_argnums=1)
def _count_tokens(mask, replicated):
  return jax.lax.with_sharding_constraint(mask.sum(-1).reshape(-1), replicated)


@jax.jit(donate_argnums=0)
def _store(leaves, features, step):
  def put(bank, x):
    return jax.lax.dynamic_update_index_in_dim(bank, x.astype(bank.dtype), step, 0)

  return {k: put(leaves[k], features[k]) for k in leaves}


@jax.jit(static_argnums=(3, 4))
def _block(leaves, step, row, length, replicated):
  full = leaves["mask"].shape[2] if length is not None and "mask" in leaves else None

  def take(x):
    x = x[:, :, :length] if x.ndim > 2 and x.shape[2] == full else x
    return jax.lax.with_sharding_constraint(x[step, row], replicated)

  return jax.tree.map(take, leaves)


def make_rerank_step(
  graphdef: nnx.GraphDef, batch_sharding: NamedSharding
) -> Callable[..., jax.Array]:
  """jitted (params, stats, bank, block, image, caption) -> replicated scores float32 [N, M].

  bank: the leaves of the image bank. block: replicated caption features [K, ...]. image: int [N],
  sharded like a batch, rows of the device's own shard of the bank. caption: int [N, M], sharded
  alike, rows of the block.
  """
  spec = batch_sharding.spec

  def gather(bank, block, image, caption):
    images = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[image], bank)
    texts = jax.tree.map(lambda x: x[caption], block)
    return images, texts

  gather = jax.shard_map(
    gather,
    mesh=batch_sharding.mesh,
    in_specs=(P(None, *spec), P(), spec, spec),
    out_specs=(spec, spec),
  )

  def rerank_step(params, stats, bank, block, image, caption):
    images, texts = gather(bank, block, image, caption)
    return nnx.merge(graphdef, params, stats).rerank(images, texts).astype(jnp.float32)

  return jax.jit(rerank_step, out_shardings=NamedSharding(batch_sharding.mesh, P()))


class Calls(NamedTuple):
  """The arguments of C calls of the rerank step, N images with M captions each.

  image: int32 [C, N]. caption: int32 [C, N, M]. pair: int64 [C, N, M], number of the pair, -1 for
  padding.
  """

  image: np.ndarray
  caption: np.ndarray
  pair: np.ndarray


def unique_pairs(
  captions: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The distinct pairs of candidate captions [I, k] of images and images [T, k'] of captions.

  Returns (image int [N], caption int [N], inverse): inverse [I * k + T * k'] is the number of the
  pair of each candidate, those of the images first. Pairs of both directions are scored once.
  """
  n_images, n_captions = len(captions), len(images)
  image = np.concatenate([np.repeat(np.arange(n_images), captions.shape[1]), images.ravel()])
  caption = np.concatenate([captions.ravel(), np.repeat(np.arange(n_captions), images.shape[1])])
  pair, inverse = np.unique(image * n_captions + caption, return_inverse=True)
  image, caption = np.divmod(pair, n_captions)
  return image, caption, inverse


def schedule(
  image: np.ndarray,
  caption: np.ndarray,
  *,
  batch: int,
  devices: int,
  block: int,
  shape: tuple[int, int],
) -> dict[int, Calls]:
  """Distributes pairs over caption blocks, calls and devices.

  Args:
    image: int [N], places in a bank whose batches have `batch` rows, spread evenly over `devices`.
    caption: int [N]; captions block * n .. block * (n + 1) - 1 are block n.
    shape: images and captions of each image in one device's share of a call.

  Returns:
    The calls of each block that has pairs.
  """
  rows_per_device = batch // devices
  step, row = np.divmod(image, batch)
  device, row = np.divmod(row, rows_per_device)
  local = step * rows_per_device + row  # row of the device's own shard of the bank
  out = {}
  for first in range(0, int(caption.max(initial=-1)) + 1, block):
    pairs = np.flatnonzero((caption >= first) & (caption < first + block))
    if len(pairs):
      pairs = pairs[np.lexsort((caption[pairs], local[pairs], device[pairs]))]
      out[first // block] = _fill_calls(
        pairs, device[pairs], local[pairs], caption[pairs] - first, devices, shape
      )
  return out


def _fill_calls(
  pairs: np.ndarray,
  device: np.ndarray,
  local: np.ndarray,
  caption: np.ndarray,
  devices: int,
  shape: tuple[int, int],
) -> Calls:
  """The calls for the pairs [n] of one block, sorted by device, then by image."""
  per_call, width = shape
  # Pairs of an image are adjacent; every `width` of them fill one row of a call.
  key = device * (local.max() + 1) + local
  change = np.flatnonzero(np.diff(key, prepend=-1))  # first pair of each image
  own = np.searchsorted(change, np.arange(len(pairs)), "right") - 1
  rank = np.arange(len(pairs)) - change[own]  # within the pairs of the image
  starts_row = rank % width == 0
  row = np.cumsum(starts_row) - 1  # over all devices
  row -= np.searchsorted(device[starts_row], device)  # within the device
  n_calls = -(-(row.max() + 1) // per_call)
  call, slot, column = row // per_call, device * per_call + row % per_call, rank % width
  size = (n_calls, devices * per_call)
  calls = Calls(
    np.zeros(size, np.int32), np.zeros((*size, width), np.int32), np.full((*size, width), -1)
  )
  calls.image[call, slot] = local
  calls.caption[call, slot, column] = caption
  calls.pair[call, slot, column] = pairs
  return calls


class Reranker:
  """Scores candidate pairs. block: captions replicated at a time. shape: as for `schedule`."""

  def __init__(
    self, graphdef: nnx.GraphDef, batch_sharding: NamedSharding, *, block: int, shape: Sequence[int]
  ):
    self.batch_sharding, self.block, self.shape = batch_sharding, block, tuple(shape)
    self.step = make_rerank_step(graphdef, batch_sharding)

  def scores(
    self,
    state: Any,
    images: Bank,
    texts: Bank,
    image: np.ndarray,
    caption: np.ndarray,
    check_stop: Callable[[], None] = lambda: None,
  ) -> np.ndarray:
    """Scores float32 [N] of pairs of places in the banks, image int [N] and caption int [N].

    check_stop: called before every call, may raise. Raises NonFiniteError.
    """
    batch = len(images.valid[0])
    lengths = texts.lengths()
    order = np.argsort(lengths, kind="stable")  # captions of a block have similar lengths
    size = min(self.block, len(order))
    blocks = schedule(
      image,
      np.argsort(order)[caption],
      batch=batch,
      devices=batch // self.batch_sharding.shard_shape((batch,))[0],
      block=size,
      shape=self.shape,
    )
    out = np.full(len(image), np.nan, np.float32)
    pending = None
    for n, calls in blocks.items():
      places = np.resize(order[n * size : (n + 1) * size], size)
      length = -(-int(lengths[places].max()) // _TOKENS) * _TOKENS
      block = texts.block(places, length)
      for call in zip(*calls, strict=True):
        check_stop()
        rows, columns = (sharding_lib.place(x, self.batch_sharding) for x in call[:2])
        scores = self.step(state.params, state.stats, images.leaves, block, rows, columns)
        # One call stays in flight, so that the devices do not wait for the host.
        _store_scores(pending, out)
        pending = scores, call[2]
    _store_scores(pending, out)
    metrics.check_finite("second-stage scores", out[:, None])
    return out


def _store_scores(pending: tuple[jax.Array, np.ndarray] | None, out: np.ndarray) -> None:
  """Fetches (scores, pair), both [N, M], and writes the scores that are not padding into `out`."""
  if pending is not None:
    scores, pair = jax.device_get(pending[0]), pending[1]
    out[pair[pair >= 0]] = scores[pair >= 0]


Lists = tuple[Shortlist, Shortlist]  # those of the images and those of the captions


def mixed(first: np.ndarray, lists: Lists, mix: float) -> Lists:
  """Second-stage shortlists with `mix` times the first-stage score of each candidate added.

  first: first-stage scores [I, T].
  """
  if not mix:
    return lists
  add = lambda own, items, scores: scores + np.float32(mix) * np.take_along_axis(own, items, 1)
  (captions, of_images), (images, of_captions) = lists
  return (
    (captions, add(first, captions, of_images)),
    (images, add(first.T, images, of_captions)),
  )


def promote(first: np.ndarray, candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """Scores [Q, N] that rank the candidates of each row first and the rest in first-stage order.

  first: first-stage scores [Q, N]. candidates: int [Q, k], ascending, ordered by their second-stage
  `scores` [Q, k]. Candidates get integers above all first-stage scores, so that second-stage scores
  of any magnitude keep their order; ties go to the lower position.

  >>> promote(np.array([[0.9, 0.8, 0.1]]), np.array([[0, 1]]), np.array([[-7.0, 3.0]]))
  array([[3. , 4. , 0.1]], dtype=float32)
  """
  k = candidates.shape[1]
  order = np.argsort(-scores, axis=1, kind="stable")
  rank = np.empty_like(order)
  np.put_along_axis(rank, order, np.arange(k)[None], 1)
  out = np.array(first, np.float32)
  lead = np.ceil(max(float(out.max()), 0.0)) + 1
  if lead + k > 2**24:  # float32 cannot tell such integers apart: places take the scores' place
    place = np.argsort(np.argsort(-out, axis=1, kind="stable"), axis=1)
    out, lead = -place.astype(np.float32), 1.0
  np.put_along_axis(out, candidates, (lead + k - rank).astype(np.float32), 1)
  return out


def combine(first: metrics.Ranked, of_images: Shortlist, of_captions: Shortlist) -> metrics.Ranked:
  """A first-stage ranking with the shortlists of images and of captions on top; see `promote`."""
  return first._replace(
    i2t=promote(first.i2t, *of_images),
    t2i=np.ascontiguousarray(promote(first.i2t.T, *of_captions).T),
    shortlists=(of_images, of_captions),
  )
