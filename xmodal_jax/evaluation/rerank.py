"""The second stage of retrieval: the best candidates of each query, scored pair by pair.

Features that only this stage reads never leave the devices. Pictures stay where they were encoded;
captions, ordered by length, are handed to every device a block at a time, cut to the longest of
the block; each device scores, in calls of few static shapes, the candidate pairs of its own
pictures, several captions of a picture together.
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
from xmodal_jax.evaluation import metrics

_TOKENS = 8  # lengths of captions are rounded up to multiples, so that few programs are compiled


class Bank:
  """Features of one side on the devices: batch after batch in leaves [S, b, ...], b sharded.

  valid: bool [S * b], which rows hold something. floating leaves are kept in `dtype`.
  """

  def __init__(self, steps: int, batch_sharding: NamedSharding, dtype: Any):
    self.steps, self.dtype, self.leaves, self.valid = steps, dtype, {}, []
    self.sharding = NamedSharding(batch_sharding.mesh, P(None, *batch_sharding.spec))

  def add(self, features: dict[str, jax.Array], valid: np.ndarray) -> None:
    """Stores the rows [b, ...] of the next batch."""
    step = len(self.valid)
    if not self.leaves:
      kind = lambda t: self.dtype if jnp.issubdtype(t, jnp.floating) else t
      types = tuple((k, (self.steps, *v.shape), kind(v.dtype)) for k, v in features.items())
      self.leaves = _zeros(types, self.sharding)
    at = sharding_lib.place(np.int32(step), NamedSharding(self.sharding.mesh, P()))
    self.leaves = _store(self.leaves, features, at)
    self.valid.append(valid)

  @property
  def places(self) -> np.ndarray:
    """int [N]: place of each valid row, counted over all batches."""
    return np.flatnonzero(np.concatenate(self.valid))

  def lengths(self) -> np.ndarray:
    """int [S * b]: tokens in each row by the leaf `mask`; the same for all without one."""
    if "mask" not in self.leaves:
      return np.zeros(self.steps * len(self.valid[0]), int)
    whole = NamedSharding(self.sharding.mesh, P())
    return np.asarray(jax.device_get(_count(self.leaves["mask"], whole)))

  def block(self, places: np.ndarray, length: int | None = None) -> dict[str, jax.Array]:
    """Leaves [K, ...] of the rows at `places` [K], whole on every device.

    length: of the token axis, where there is a mask; what is cut off must be padding. None: all.
    """
    whole = NamedSharding(self.sharding.mesh, P())
    step, row = (sharding_lib.place(x, whole) for x in np.divmod(places, len(self.valid[0])))
    return _block(self.leaves, step, row, length, whole)


# Functions of the module, not of an object: what they compile outlives an evaluation.


@jax.jit(static_argnums=(0, 1))
def _zeros(types, sharding):
  zeros = lambda shape, dtype: jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
  return {k: zeros(shape, dtype) for k, shape, dtype in types}


@jax.jit(static_argnums=1)
def _count(mask, whole):
  return jax.lax.with_sharding_constraint(mask.sum(-1).reshape(-1), whole)


@jax.jit(donate_argnums=0)
def _store(leaves, features, step):
  put = lambda bank, x: jax.lax.dynamic_update_index_in_dim(bank, x.astype(bank.dtype), step, 0)
  return {k: put(leaves[k], features[k]) for k in leaves}


@jax.jit(static_argnums=(3, 4))
def _block(leaves, step, row, length, whole):
  full = leaves["mask"].shape[2] if length is not None and "mask" in leaves else None

  def one(x):
    x = x[:, :, :length] if x.ndim > 2 and x.shape[2] == full else x
    return jax.lax.with_sharding_constraint(x[step, row], whole)

  return jax.tree.map(one, leaves)


def make_rerank_step(
  graphdef: nnx.GraphDef, batch_sharding: NamedSharding
) -> Callable[..., jax.Array]:
  """jitted (params, stats, picture bank, caption block, picture [N], caption [N, M]) -> [N, M].

  N is sharded like the rows of a batch. picture counts a device's own rows of the bank, caption
  the rows of the block. The scores, float32, are whole on every device.
  """
  spec, whole = batch_sharding.spec, NamedSharding(batch_sharding.mesh, P())
  banked = P(None, *spec)

  def fetch(bank, block, picture, caption):
    pick = lambda x: x.reshape(-1, *x.shape[2:])[picture]
    return jax.tree.map(pick, bank), jax.tree.map(lambda x: x[caption], block)

  fetch = jax.shard_map(
    fetch, mesh=batch_sharding.mesh, in_specs=(banked, P(), spec, spec), out_specs=(spec, spec)
  )

  def step(params, stats, bank, block, picture, caption):
    images, texts = fetch(bank, block, picture, caption)
    return nnx.merge(graphdef, params, stats).rerank(images, texts).astype(jnp.float32)

  return jax.jit(step, out_shardings=whole)


class Calls(NamedTuple):
  """What each call scores: picture int32 [C, N], caption int32 [C, N, M], pair int64 [C, N, M] the
  number of the pair, -1 for filling."""

  picture: np.ndarray
  caption: np.ndarray
  pair: np.ndarray


def schedule(
  picture: np.ndarray,
  caption: np.ndarray,
  *,
  batch: int,
  devices: int,
  block: int,
  shape: tuple[int, int],
) -> dict[int, Calls]:
  """Spreads pairs over devices and calls, by the number of the block of captions.

  picture: int [N], places in a bank whose batches have `batch` rows spread evenly over `devices`.
  caption: int [N], of which `block` neighbours make a block. shape: pictures and captions of a
  device's call.
  """
  share = batch // devices  # rows of a batch on a device
  device, step = picture % batch // share, picture // batch
  local = step * share + picture % share
  per_call, width = shape
  out = {}
  for first in range(0, int(caption.max(initial=-1)) + 1, block):
    pairs = np.flatnonzero((caption >= first) & (caption < first + block))
    pairs = pairs[np.lexsort((caption[pairs], local[pairs], device[pairs]))]
    if not len(pairs):
      continue
    # Pairs of one picture are neighbours now; every `width` of them begin a new row of a call.
    key = device[pairs] * (local.max() + 1) + local[pairs]
    change = np.flatnonzero(np.diff(key, prepend=-1))
    run = np.searchsorted(change, np.arange(len(pairs)), "right") - 1
    place = np.arange(len(pairs)) - change[run]
    begins = place % width == 0
    row = np.cumsum(begins) - 1  # over all devices
    owner = device[pairs[begins]]
    row -= np.searchsorted(owner, device[pairs])  # within the device
    calls = -(-(row.max() + 1) // per_call)
    at = (row // per_call, device[pairs] * per_call + row % per_call)
    n = (calls, devices * per_call)
    pictures, captions = np.zeros(n, np.int32), np.zeros((*n, width), np.int32)
    numbers = np.full((*n, width), -1)
    pictures[at] = local[pairs]
    captions[(*at, place % width)] = caption[pairs] - first
    numbers[(*at, place % width)] = pairs
    out[first // block] = Calls(pictures, captions, numbers)
  return out


class Reranker:
  """Second-stage scores of candidates. block: captions on every device at a time."""

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
    picture: np.ndarray,
    caption: np.ndarray,
    stop: Callable[[], None] = lambda: None,
  ) -> np.ndarray:
    """float32 [N]: scores of pairs of places in the banks. Raises NonFiniteError."""
    batch = len(images.valid[0])
    lengths = texts.lengths()
    order = np.argsort(lengths, kind="stable")  # neighbours in a block are as long as each other
    size = min(self.block, len(order))
    planned = schedule(
      picture,
      np.argsort(order)[caption],
      batch=batch,
      devices=batch // self.batch_sharding.shard_shape((batch,))[0],
      block=size,
      shape=self.shape,
    )
    out = np.full(len(picture), np.nan, np.float32)
    put = lambda x: sharding_lib.place(x, self.batch_sharding)
    pending = None
    for n, calls in planned.items():
      places = np.resize(order[n * size : (n + 1) * size], size)
      block = texts.block(places, -(-int(lengths[places].max()) // _TOKENS) * _TOKENS)
      for pictures, captions, numbers in zip(*calls, strict=True):
        stop()
        scores = self.step(
          state.params, state.stats, images.leaves, block, put(pictures), put(captions)
        )
        # One call stays in flight, so that the host never makes the device wait.
        self._take(pending, out)
        pending = scores, numbers
    self._take(pending, out)
    metrics.check_finite("second-stage scores", out[:, None])
    return out

  @staticmethod
  def _take(pending, out: np.ndarray) -> None:
    if pending is not None:
      scores, numbers = jax.device_get(pending[0]), pending[1]
      out[numbers[numbers >= 0]] = scores[numbers >= 0]


def promote(first: np.ndarray, candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """First-stage scores [Q, N] in which the candidates [Q, k] of each row lead in the order of
  their second-stage `scores` [Q, k]; the others keep their order behind them.

  What leads is a place, written as a number above all first-stage scores: second-stage scores of
  any size keep their order, and equal ones go to the lower position.
  """
  k = candidates.shape[1]
  order = np.argsort(-scores, axis=1, kind="stable")  # candidates ascend
  place = np.empty_like(order)
  np.put_along_axis(place, order, np.arange(k)[None], 1)
  out = np.array(first, np.float32)
  lead = np.ceil(max(float(out.max()), 0.0)) + 1
  np.put_along_axis(out, candidates, (lead + k - place).astype(np.float32), 1)
  return out


def combine(first: metrics.Ranked, *shortlists: tuple[np.ndarray, np.ndarray]) -> metrics.Ranked:
  """A ranking in which the shortlists of pictures and captions, each (candidates [Q, k], their
  second-stage scores [Q, k]), lead: see `promote`."""
  by_image, by_text = shortlists
  t2i = np.ascontiguousarray(promote(first.i2t.T, *by_text).T)
  return first._replace(i2t=promote(first.i2t, *by_image), t2i=t2i, shortlists=shortlists)
