"""Contrastive losses over all pairs of a batch.

Each holds the matrix of all pairs or, given a Ring, tiles of it, for the same numbers: see
losses.ring.
"""

import jax
import jax.numpy as jnp
import numpy as np

from xmodal_jax.losses.pairwise import ring as ring_lib
from xmodal_jax.losses.pairwise.ring import Ring

Array = jax.Array


SAME_IMAGE = ("keep", "zero", "exclude")
FIRST_BIAS = -10.0  # of `sigmoid`: at first no pair seems to match (Zhai et al., 2023, section 3)


def off_diagonal_same(image_id: Array) -> Array:
  """image_id int [B] -> bool [B, B]: pairs of different rows that show the same picture."""
  return (image_id[:, None] == image_id) & ~jnp.eye(len(image_id), dtype=bool)


def infonce(
  images: Array,
  texts: Array,
  scale: Array,
  image_id: Array | None = None,
  same_image: str = "keep",
  ring: Ring | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Symmetric InfoNCE (Radford et al., 2021, figure 3): mean of both cross entropies.

  images, texts float32 [B, E], unit rows, row i of one belongs to row i of the other; scale [].
  same_image says what a pair of different rows with one image_id [B] is: "keep", a negative like
  every other; "exclude", nothing; "zero", TEAM's way, a negative of logit 0 (Xie et al., 2022).
  Returns (loss [], {loss_i2t, loss_t2i, accuracy_i2t, accuracy_t2i}).
  """
  other = {"keep": None, "zero": 0.0, "exclude": -jnp.inf}[same_image]
  if ring is not None:
    return _infonce_in_ring(images, texts, scale, image_id, other, ring)
  # Full precision: at a scale of 100 a bfloat16 product is off by several tenths.
  logits = scale * jnp.dot(images, texts.T, precision="highest")  # [B, B]
  if other is not None:
    logits = jnp.where(off_diagonal_same(image_id), other, logits)
  positive = jnp.diagonal(logits)
  i2t = (jax.nn.logsumexp(logits, axis=1) - positive).mean()
  t2i = (jax.nn.logsumexp(logits, axis=0) - positive).mean()
  metrics = {
    "loss_i2t": i2t,
    "loss_t2i": t2i,
    # Better than all others: a collapsed model, where all are equal, is not accurate.
    "accuracy_i2t": ((logits >= positive[:, None]).sum(1) == 1).mean(),
    "accuracy_t2i": ((logits >= positive).sum(0) == 1).mean(),
  }
  return (i2t + t2i) / 2, metrics


def _infonce_in_ring(images, texts, scale, image_id, other, ring):
  """`infonce`; other: logit of a different row with the same image_id, None if it is its own."""

  def score(scale, left, right, i, j):
    logits = scale * jnp.dot(left["x"], right["x"].T, precision="highest")
    if other is None:
      return logits
    same = (left["id"][:, None] == right["id"]) & (i[:, None] != j)
    return jnp.where(same, other, logits)

  of = {"log": ring_lib.LogSumExp(), "own": ring_lib.OWN, "rival": ring_lib.Rival()}
  side = lambda x: {"x": x} if other is None else {"x": x, "id": image_id}
  rows, columns = ring_lib.reduce(
    score, side(images), side(texts), ring, of_left=of, of_right=of, shared=scale
  )
  loss = lambda of: (of["log"] - of["own"]).mean()
  accuracy = lambda of: (of["own"] > of["rival"]).mean()
  return (loss(rows) + loss(columns)) / 2, {
    "loss_i2t": loss(rows),
    "loss_t2i": loss(columns),
    "accuracy_i2t": accuracy(rows),
    "accuracy_t2i": accuracy(columns),
  }


def pair_logits(queries: Array, candidates: Array, temperature: Array, groups: int = 1) -> Array:
  """Cosine over temperature within `groups` equal runs of rows: [B, E] twice -> [G, B/G, B/G]."""
  split = lambda x: x.reshape(groups, -1, x.shape[-1])
  pairs = jnp.einsum("gqe,gce->gqc", split(queries), split(candidates), precision="highest")
  return pairs / temperature


def nce(
  logits: Array,
  *,
  mix: Array | float = 1.0,
  block: int = 0,
  smoothing: float = 0.0,
  ignore: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Cross entropy of each query with its candidate on the diagonal. logits [G, N, N] -> (loss [],
  {loss_unmixed, accuracy}).

  mix: weight of that target, of the rest of the mass the candidate of the row's mixup partner, see
  `partners`, whose pictures or texts were mixed in (Zhang et al., 2018). smoothing: share of the
  target that is spread over all candidates. ignore [G, N]: 1 for rows whose loss does not count;
  it is still divided by the number of all rows, as ZeroVL does. loss_unmixed is that against the
  diagonal alone, without smoothing. Accuracy is of the rows that count, against the diagonal.
  """
  counts = 1.0 if ignore is None else 1 - ignore
  log_all = jax.nn.logsumexp(logits, axis=-1)  # [G, N]
  own = jnp.diagonal(logits, axis1=-2, axis2=-1)
  partner = jnp.asarray(partners(logits.shape[-1], block))
  other = jnp.take_along_axis(logits, partner[None, :, None], axis=-1)[..., 0]
  target = mix * own + (1 - mix) * other
  if smoothing:
    target = (1 - smoothing) * target + smoothing * logits.mean(-1)
  # Better than all others: a collapsed model, where all are equal, is not accurate.
  first = (logits >= own[..., None]).sum(-1) == 1
  rows = jnp.broadcast_to(jnp.float32(counts), own.shape)
  return ((log_all - target) * counts).mean(), {
    "loss_unmixed": ((log_all - own) * counts).mean(),
    "accuracy": (first * rows).sum() / jnp.maximum(rows.sum(), 1),
  }


def nce_of_both(
  images: Array,
  texts: Array,
  temperature: Array,
  *,
  groups: int = 1,
  gather_gradient: bool = True,
  mix: Array | float = 1.0,
  block: int = 0,
  smoothing: float = 0.0,
  ring: Ring | None = None,
) -> list[tuple[Array, dict[str, Array]]]:
  """`nce` of pictures with texts as candidates and of texts with pictures, [B, E] each.

  groups: see `pair_logits`. gather_gradient False: candidates get no gradient.
  """
  if ring is not None:
    how = dict(groups=groups, gather_gradient=gather_gradient, block=block, smoothing=smoothing)
    return _nce_in_ring(images, texts, temperature, mix, ring, **how)
  still = (lambda x: x) if gather_gradient else jax.lax.stop_gradient
  pairs = (images, still(texts)), (texts, still(images))
  return [
    nce(pair_logits(*pair, temperature, groups), mix=mix, block=block, smoothing=smoothing)
    for pair in pairs
  ]


def _nce_in_ring(
  images, texts, temperature, mix, ring, *, groups, gather_gradient, block, smoothing
):
  rows = len(images) // groups
  block = block or rows
  partners(rows, block)  # raises where the blocks do not divide a group

  def score(temperature, left, right, i, j):
    logits = jnp.dot(left, right.T, precision="highest") / temperature
    return jnp.where((i // rows)[:, None] == j // rows, logits, -jnp.inf)

  def partner(i):
    k = i % rows
    return i - k + k // block * block + block - 1 - k % block

  finite = lambda logits, tile: jnp.where(logits > -jnp.inf, logits, 0)
  of = {"log": ring_lib.LogSumExp(), "own": ring_lib.OWN, "rival": ring_lib.Rival()}
  of |= {"other": ring_lib.score_of(partner)}
  of |= {"all": ring_lib.Sum(finite)} if smoothing else {}
  sides = ring_lib.reduce(
    score,
    images,
    texts,
    ring,
    of_left=of,
    of_right=of,
    shared=temperature,
    still=not gather_gradient,
  )

  def one(side):
    target = mix * side["own"] + (1 - mix) * side["other"]
    if smoothing:
      target = (1 - smoothing) * target + smoothing * side["all"] / rows
    return (side["log"] - target).mean(), {
      "loss_unmixed": (side["log"] - side["own"]).mean(),
      "accuracy": (side["own"] > side["rival"]).mean(),
    }

  return [one(side) for side in sides]


def partners(rows: int, block: int = 0) -> np.ndarray:
  """Row that each of `rows` is mixed with: blocks of so many rows (0: all) are reversed. int [rows]

  Raises ValueError if the blocks do not divide the rows.
  """
  block = block or rows
  if rows % block:
    raise ValueError(f"mixup in blocks of {block} rows does not divide {rows} rows")
  return np.arange(rows).reshape(-1, block)[:, ::-1].ravel()


def sigmoid(
  images: Array, texts: Array, scale: Array, bias: Array, ring: Ring | None = None
) -> tuple[Array, dict[str, Array]]:
  """Every pair for itself: a match on the diagonal, none elsewhere (SigLIP, Zhai et al., 2023).

  images, texts float32 [B, E], unit rows; scale, bias []. The sum over texts, mean over images.
  Returns (loss [], {loss_positive, loss_negative}), which add up to it.
  """
  score = lambda scale, bias, images, texts: (
    scale * jnp.dot(images, texts.T, precision="highest") + bias
  )
  if ring is None:
    total = jax.nn.softplus(score(scale, bias, images, texts)).sum(1)
    own = scale * (images * texts).sum(-1) + bias
  else:
    cost = ring_lib.Sum(lambda logits, tile: jax.nn.softplus(logits))
    rows, _ = ring_lib.reduce(
      lambda shared, left, right, i, j: score(*shared, left, right),
      images,
      texts,
      ring,
      # Both here, or their gradients would be held apart until they are added.
      of_left={"total": cost, "own": ring_lib.OWN},
      shared=(scale, bias),
    )
    total, own = rows["total"], rows["own"]
  # [B] each: what all pairs cost if none of them matches, and the logits of those that do.
  # softplus(-x), the cost of a match, is softplus(x) - x.
  return (total - own).mean(), {
    "loss_positive": jax.nn.softplus(-own).mean(),
    "loss_negative": (total - jax.nn.softplus(own)).mean(),
  }


def mean_squared_error(predicted: Array, target: Array, ignore: Array | None = None) -> Array:
  """Mean over all entries of [B, E] twice; rows with ignore [B] 1 count as 0 -> []."""
  square = jnp.square(predicted - target)
  return (square if ignore is None else square * (1 - ignore)[:, None]).mean()
