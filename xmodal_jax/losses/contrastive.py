"""Contrastive losses over all image-text pairs of a batch.

Without `ring` a loss computes the whole score matrix. With one it computes the same values and
gradients blockwise, for batches whose matrix does not fit: see losses.pairwise.ring.

    images, texts = l2_normalize(images), l2_normalize(texts)  # [B, E]
    loss, metrics = infonce(images, texts, jnp.exp(logit_scale))
    loss, metrics = infonce(images, texts, jnp.exp(logit_scale), ring=Ring(chunk=256))
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from xmodal_jax.errors import ConfigError
from xmodal_jax.losses.pairwise import ring as ring_lib
from xmodal_jax.losses.pairwise import statistics
from xmodal_jax.losses.pairwise.ring import Ring

Scalar = Float[Array, ""]
Metrics = dict[str, Array]

# How a loss treats a pair of different rows that show the same image, see `infonce`: the score that
# it has instead of its own.
SAME_IMAGE = {"keep": None, "zero": 0.0, "exclude": -jnp.inf}
# Initial bias of `sigmoid`: at first no pair is predicted to match (Zhai et al., 2023, section 3).
INITIAL_BIAS = -10.0


def infonce(
  images: Float[ArrayLike, "b e"],
  texts: Float[ArrayLike, "b e"],
  scale: Float[ArrayLike, ""],
  image_id: Int[ArrayLike, " b"] | None = None,
  same_image: str = "keep",
  ring: Ring | None = None,
) -> tuple[Scalar, Metrics]:
  """Symmetric InfoNCE: the mean of both cross entropies (Radford et al., 2021, figure 3).

  Args:
    images, texts: float32 with unit rows; row i of images matches row i of texts.
    scale: inverse temperature.
    image_id: equal for rows that show the same image. Needed unless same_image is "keep".
    same_image: how to treat a pair of different rows with the same image: "keep", as a negative;
      "exclude", left out; "zero", as a negative with logit 0 (TEAM, Xie et al., 2022).
    ring: computes the loss blockwise.

  Returns (loss, {loss_i2t, loss_t2i, accuracy_i2t, accuracy_t2i}).
  """
  same_image_logit = SAME_IMAGE[same_image]
  if ring is not None:
    return _infonce_blockwise(images, texts, scale, image_id, same_image_logit, ring)
  # Full precision: at a scale of 100 a bfloat16 product is off by several tenths.
  logits = scale * jnp.dot(images, texts.T, precision="highest")  # [B, B]
  row, side = jnp.arange(len(logits)), {"id": image_id}
  logits = _mask_same_image(same_image_logit, None, logits, side, side, row, row)
  positive = jnp.diagonal(logits)
  i2t = (jax.nn.logsumexp(logits, axis=1) - positive).mean()
  t2i = (jax.nn.logsumexp(logits, axis=0) - positive).mean()
  metrics = {
    "loss_i2t": i2t,
    "loss_t2i": t2i,
    # Strictly larger than all others: a collapsed model with equal scores has accuracy 0.
    "accuracy_i2t": ((logits >= positive[:, None]).sum(1) == 1).mean(),
    "accuracy_t2i": ((logits >= positive).sum(0) == 1).mean(),
  }
  return (i2t + t2i) / 2, metrics


def same_image_metrics(batch: Mapping[str, ArrayLike]) -> Metrics:
  """{same_image_rows}: the number of rows whose image another row shows, too.

  batch: {} is returned where it has no image_id.
  """
  if "image_id" not in batch:
    return {}
  ids = jnp.sort(batch["image_id"])
  as_next = jnp.append(ids[1:] == ids[:-1], False)
  return {"same_image_rows": (as_next | jnp.roll(as_next, 1)).sum().astype(jnp.float32)}


def _infonce_blockwise(images, texts, scale, image_id, same_image_logit, ring):
  def score(scale, left, right, i, j):
    logits = scale * jnp.dot(left["x"], right["x"].T, precision="highest")
    return _mask_same_image(same_image_logit, None, logits, left, right, i, j)

  ids = {} if same_image_logit is None else {"id": image_id}
  stats = {
    "logsumexp": statistics.LogSumExp(),
    "positive": statistics.POSITIVE,
    "max_negative": statistics.MaxNegative(),
  }
  rows, columns = ring_lib.reduce(
    score,
    {"x": images} | ids,
    {"x": texts} | ids,
    ring,
    left_stats=stats,
    right_stats=stats,
    shared=scale,
  )
  i2t, t2i = ((side["logsumexp"] - side["positive"]).mean() for side in (rows, columns))
  accuracy_i2t, accuracy_t2i = (
    (side["positive"] > side["max_negative"]).mean() for side in (rows, columns)
  )
  return (i2t + t2i) / 2, {
    "loss_i2t": i2t,
    "loss_t2i": t2i,
    "accuracy_i2t": accuracy_i2t,
    "accuracy_t2i": accuracy_t2i,
  }


def pair_logits(
  queries: Float[ArrayLike, "b e"],
  candidates: Float[ArrayLike, "b e"],
  temperature: Float[ArrayLike, ""],
  groups: int = 1,
) -> Float[Array, "g n n"]:
  """Dot products over temperature within `groups` contiguous groups of n = B / groups rows."""
  grouped = lambda x: x.reshape(groups, -1, x.shape[-1])  # [G, N, E]
  logits = jnp.einsum("gqe,gce->gqc", grouped(queries), grouped(candidates), precision="highest")
  return logits / temperature


def nce(
  logits: Float[ArrayLike, "g n n"],
  *,
  mix: Float[ArrayLike, ""] = 1.0,
  block: int = 0,
  smoothing: float = 0.0,
  ignore: Num[ArrayLike, "g n"] | None = None,
) -> tuple[Scalar, Metrics]:
  """Cross entropy of each query with the candidate on the diagonal as its target.

  Args:
    logits: queries x candidates of each group, see `pair_logits`; -inf: no candidate.
    mix: mixup weight of the target (Zhang et al., 2018); the rest goes to the candidate of the
      row's mixup partner, see `mixup_partners`.
    block: rows of a mixup block; 0: the whole group.
    smoothing: share of the target that is spread uniformly over all candidates.
    ignore: 1 for rows that the loss leaves out. The sum is still divided by the number of all rows,
      as ZeroVL does.

  Returns (loss, {loss_unmixed, accuracy}). loss_unmixed is the cross entropy against the diagonal
  alone, without mixup and smoothing; accuracy is that of the rows that are not ignored.
  """
  weight = 1.0 if ignore is None else 1 - ignore
  logsumexp = jax.nn.logsumexp(logits, axis=-1)  # [G, N]
  positive = jnp.diagonal(logits, axis1=-2, axis2=-1)
  partner = jnp.asarray(mixup_partners(logits.shape[-1], block))
  partner_logit = jnp.take_along_axis(logits, partner[None, :, None], axis=-1)[..., 0]
  partner_logit = jnp.where(partner_logit > -jnp.inf, partner_logit, 0)  # excluded: not mixed
  target = mix * positive + (1 - mix) * partner_logit
  if smoothing:
    candidate = logits > -jnp.inf
    mean = jnp.where(candidate, logits, 0).sum(-1) / candidate.sum(-1)
    target = (1 - smoothing) * target + smoothing * mean
  # Strictly larger than all others: a collapsed model with equal scores has accuracy 0.
  correct = (logits >= positive[..., None]).sum(-1) == 1
  weights = jnp.broadcast_to(jnp.float32(weight), positive.shape)
  return ((logsumexp - target) * weight).mean(), {
    "loss_unmixed": ((logsumexp - positive) * weight).mean(),
    "accuracy": (correct * weights).sum() / jnp.maximum(weights.sum(), 1),
  }


def bidirectional_nce(
  images: Float[ArrayLike, "b e"],
  texts: Float[ArrayLike, "b e"],
  temperature: Float[ArrayLike, ""],
  *,
  groups: int = 1,
  gather_gradient: bool = True,
  mix: Float[ArrayLike, ""] = 1.0,
  block: int = 0,
  smoothing: float = 0.0,
  image_id: Int[ArrayLike, " b"] | None = None,
  same_image: str = "keep",
  mixed: bool = False,
  ring: Ring | None = None,
) -> list[tuple[Scalar, Metrics]]:
  """`nce` with images as queries and texts as candidates, then with texts as queries.

  gather_gradient: whether candidates get a gradient. mixed: whether rows have mixup partners, which
  remain targets if they show the same image. The other arguments: see `nce` and `infonce`.
  """
  group_size = len(images) // groups
  partner = _partner_of(group_size, block) if mixed else None
  mask = functools.partial(_mask_same_image, SAME_IMAGE[same_image], partner)
  ids = {} if same_image == "keep" else {"id": image_id}
  if ring is not None:
    sides = {"x": images} | ids, {"x": texts} | ids
    options = dict(group_size=group_size, block=block, smoothing=smoothing)
    return _nce_blockwise(
      *sides, temperature, mix, ring, mask, gather_gradient=gather_gradient, **options
    )
  candidates = (images, texts)
  if not gather_gradient:
    candidates = jax.lax.stop_gradient(candidates)
  pairs = (images, candidates[1]), (texts, candidates[0])
  rows = {k: x.reshape(groups, -1) for k, x in ids.items()}
  index = jnp.arange(group_size)

  def masked(logits):  # [G, N, N]
    return jax.vmap(lambda x, side: mask(x, side, side, index, index))(logits, rows)

  logits = [pair_logits(*pair, temperature, groups) for pair in pairs]
  logits = [masked(x) if ids else x for x in logits]
  return [nce(x, mix=mix, block=block, smoothing=smoothing) for x in logits]


def _partner_of(group_size: int, block: int) -> Callable[[Array], Array]:
  """The row of the mixup partner of each row, as `mixup_partners` in every group."""
  block = block or group_size
  mixup_partners(group_size, block)  # raises ConfigError if the blocks do not divide a group

  def partner(i):
    k = i % group_size
    return i - k + k // block * block + block - 1 - k % block

  return partner


def _mask_same_image(logit, partner, scores, left, right, i, j):
  """The scores of rows i of left and j of right, those of other rows with the same image `logit`.

  logit: one of SAME_IMAGE. left, right: dicts with `id`. partner: of a row, which is kept, or None.
  """
  if logit is None:
    return scores
  same = (left["id"][:, None] == right["id"]) & (i[:, None] != j)
  if partner is not None:
    same &= partner(i)[:, None] != j
  return jnp.where(same, logit, scores)


def mask_same_image(
  score: Callable[[Array, Array], Array],
  images: Float[ArrayLike, "b e"],
  texts: Float[ArrayLike, "b e"],
  image_id: Int[ArrayLike, " b"] | None = None,
  same_image: str = "keep",
) -> tuple[tuple[Any, Any], Callable[[Any, Any], Array]]:
  """((images, texts), score) for losses such as `triplet.triplet_loss`; see `infonce`."""
  if same_image == "keep":
    return (images, texts), score
  rows = {"id": image_id, "row": jnp.arange(len(images), dtype=jnp.int32)}

  def masked(left, right):
    scores, i, j = score(left["x"], right["x"]), left["row"], right["row"]
    return _mask_same_image(SAME_IMAGE[same_image], None, scores, left, right, i, j)

  return ({"x": images} | rows, {"x": texts} | rows), masked


def _nce_blockwise(
  images, texts, temperature, mix, ring, mask, *, group_size, gather_gradient, block, smoothing
):
  partner = _partner_of(group_size, block)

  def score(temperature, left, right, i, j):
    logits = jnp.dot(left["x"], right["x"].T, precision="highest") / temperature
    logits = mask(logits, left, right, i, j)
    return jnp.where((i // group_size)[:, None] == j // group_size, logits, -jnp.inf)

  def finite(logits, tile):
    return jnp.where(logits > -jnp.inf, logits, 0)

  stats = {
    "logsumexp": statistics.LogSumExp(),
    "positive": statistics.POSITIVE,
    "max_negative": statistics.MaxNegative(),
    "partner": statistics.score_at(partner),
  }
  if smoothing:
    stats["sum"] = statistics.Sum(finite)
    stats["candidates"] = statistics.Sum(lambda logits, tile: jnp.float32(logits > -jnp.inf))
  sides = ring_lib.reduce(
    score,
    images,
    texts,
    ring,
    left_stats=stats,
    right_stats=stats,
    shared=temperature,
    stop_candidate_gradient=not gather_gradient,
  )

  def loss(side):
    mixed = jnp.where(side["partner"] > -jnp.inf, side["partner"], 0)
    target = mix * side["positive"] + (1 - mix) * mixed
    if smoothing:
      target = (1 - smoothing) * target + smoothing * side["sum"] / side["candidates"]
    return (side["logsumexp"] - target).mean(), {
      "loss_unmixed": (side["logsumexp"] - side["positive"]).mean(),
      "accuracy": (side["positive"] > side["max_negative"]).mean(),
    }

  return [loss(side) for side in sides]


def mixup_partners(rows: int, block: int = 0) -> np.ndarray:
  """int [rows]: the row that each row is mixed with, by reversing each block of `block` rows.

  block 0: one block of all rows. Raises ConfigError if the blocks do not divide the rows.

      >>> mixup_partners(6, block=2)
      array([1, 0, 3, 2, 5, 4])
  """
  block = block or rows
  if rows % block:
    raise ConfigError(f"mixup in blocks of {block} rows does not divide {rows} rows")
  return np.arange(rows).reshape(-1, block)[:, ::-1].ravel()


def sigmoid(
  images: Float[ArrayLike, "b e"],
  texts: Float[ArrayLike, "b e"],
  scale: Float[ArrayLike, ""],
  bias: Float[ArrayLike, ""],
  ring: Ring | None = None,
  image_id: Int[ArrayLike, " b"] | None = None,
  same_image: str = "keep",
) -> tuple[Scalar, Metrics]:
  """Binary cross entropy of every pair, matching or not (SigLIP, Zhai et al., 2023).

  images, texts: float32 with unit rows. image_id, same_image: see `infonce`. Summed over texts,
  averaged over images. Returns (loss, {loss_positive, loss_negative}), where the loss is
  the sum of the two.
  """

  ids = {} if same_image == "keep" else {"id": image_id}
  sides = {"x": images} | ids, {"x": texts} | ids

  def score(parameters, left, right, i, j):
    scale, bias = parameters
    logits = scale * jnp.dot(left["x"], right["x"].T, precision="highest") + bias
    return _mask_same_image(SAME_IMAGE[same_image], None, logits, left, right, i, j)

  if ring is None:
    rows = jnp.arange(len(images))
    total = jax.nn.softplus(score((scale, bias), *sides, rows, rows)).sum(1)
    positive = scale * (images * texts).sum(-1) + bias
  else:
    cost = statistics.Sum(lambda logits, tile: jax.nn.softplus(logits))
    rows, _ = ring_lib.reduce(
      score,
      *sides,
      ring,
      # Both as statistics of the same side: their gradients then share one buffer.
      left_stats={"total": cost, "positive": statistics.POSITIVE},
      shared=(scale, bias),
    )
    total, positive = rows["total"], rows["positive"]
  # total [B] counts every pair as a non-match, softplus(x). A match costs softplus(-x), which is
  # softplus(x) - x.
  return (total - positive).mean(), {
    "loss_positive": jax.nn.softplus(-positive).mean(),
    "loss_negative": (total - jax.nn.softplus(positive)).mean(),
  }
