"""Losses over all pairs against Python loops over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from xmodal_jax.losses import contrastive, triplet
from xmodal_jax.models import base, clip, zerovl

B, E = 12, 5


def pair(seed: int = 0, rows: int = B):
  rng = np.random.default_rng(seed)
  make = lambda: base.l2_normalize(jnp.asarray(rng.standard_normal((rows, E)), jnp.float32))
  return make(), make()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_nce_is_the_loop(groups, block, smoothing):
  a, b = pair()
  mix, tau = 0.3, 0.1
  ignore = np.zeros(B)
  ignore[[1, 7]] = 1
  logits = contrastive.pair_logits(a, b, tau, groups)
  loss, metrics = contrastive.nce(
    logits, mix=mix, block=block, smoothing=smoothing, ignore=ignore.reshape(groups, -1)
  )
  n = B // groups
  total, unmixed, right = 0.0, 0.0, []
  for i in range(B):
    first = i // n * n  # of the row's group
    k, size = i - first, block or n
    partner = k // size * size + size - 1 - k % size
    s = np.asarray(a, np.float64)[i] @ np.asarray(b, np.float64)[first : first + n].T / tau
    log_p = s - np.log(np.exp(s).sum())
    target = np.full(n, smoothing / n)
    target[k] += (1 - smoothing) * mix
    target[partner] += (1 - smoothing) * (1 - mix)
    total -= (1 - ignore[i]) * target @ log_p
    unmixed -= (1 - ignore[i]) * log_p[k]
    if not ignore[i]:
      right.append(s.argmax() == k)
  np.testing.assert_allclose(loss, total / B, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss_unmixed"], unmixed / B, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


IDS = np.array([0, 1, 2, 3, 4, 5, 6, 6, 4, 1, 10, 1], np.int32)  # partners of block 2: 6 and 7


def without_same_image(i: int, partner: int | None = None) -> list[int]:
  """The rows that are candidates of row i."""
  return [j for j in range(B) if j in (i, partner) or IDS[j] != IDS[i]]


@pytest.mark.parametrize("mixed", [False, True])
def test_nce_without_other_rows_of_the_same_image(mixed):
  """The loss of each row over the candidates that are left; a mixup partner is left."""
  a, b = pair()
  mix, tau, smoothing = 0.3 if mixed else 1.0, 0.1, 0.2
  nce = lambda a, b: contrastive.bidirectional_nce(
    a,
    b,
    tau,
    mix=mix,
    block=2,
    smoothing=smoothing,
    image_id=IDS,
    same_image="exclude",
    mixed=mixed,
  )
  grads, both = jax.jit(jax.grad(lambda a, b: ((x := nce(a, b))[0][0] + x[1][0], x), has_aux=True))(
    a, b
  )
  assert np.isfinite(grads).all()
  x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
  for (loss, _), s in zip(both, (x @ y.T / tau, y @ x.T / tau), strict=True):
    total = 0.0
    for i in range(B):
      rows = without_same_image(i, i ^ 1 if mixed else None)
      log_p = s[i] - np.log(np.exp(s[i, rows]).sum())
      target = (1 - smoothing) * (mix * log_p[i] + ((1 - mix) * log_p[i ^ 1] if mixed else 0))
      total -= target + smoothing * log_p[rows].mean()
    np.testing.assert_allclose(loss, total / B, rtol=1e-5)


def test_sigmoid_and_triplet_without_other_rows_of_the_same_image():
  a, b = pair()
  same = dict(image_id=IDS, same_image="exclude")
  sides, score = contrastive.mask_same_image(triplet.dot, a, b, **same)
  sigmoid, _ = contrastive.sigmoid(a, b, jnp.float32(10), jnp.float32(-3), **same)
  hinges, _ = triplet.triplet_loss(score, *sides, 0.2, "sum")
  s = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
  want, hinge = 0.0, 0.0
  for i in range(B):
    for j in without_same_image(i):
      want += np.log1p(np.exp((10 * s[i, j] - 3) * (-1 if i == j else 1))) / B
      if i != j:
        hinge += max(0.2 + s[i, j] - s[i, i], 0) + max(0.2 + s[j, i] - s[i, i], 0)
  np.testing.assert_allclose(sigmoid, want, rtol=1e-5)
  np.testing.assert_allclose(hinges, hinge, rtol=1e-5)


def test_rows_of_the_same_image_are_counted():
  count = jax.jit(contrastive.same_image_metrics)
  assert count({"image_id": IDS})["same_image_rows"] == 7
  assert count({"image_id": np.arange(5)})["same_image_rows"] == 0
  assert count({"image_id": np.zeros(5, int)})["same_image_rows"] == 5
  assert contrastive.same_image_metrics({}) == {}


@pytest.mark.parametrize("system", [tiny.config, tiny.zerovl])
def test_systems_leave_out_rows_of_the_same_image(system):
  """Two captions of one image in a batch change the objective only where they are negatives."""
  config = system("unused").model.to_dict()
  module = clip if config["system"] == "clip" else zerovl
  if "mixup" in config:
    config["mixup"] = dict(beta=0.0, block=0)
  images, texts = ({"embed": x} for x in pair())
  losses = {}
  for same_image in ("keep", "exclude"):
    model = module.build(config | dict(same_image=same_image), rngs=nnx.Rngs(0))
    for name, ids in (("some", IDS), ("none", np.arange(B))):
      batch = {"image_id": jnp.asarray(ids)}
      loss, metrics = model.objective(images, texts, batch, jax.random.key(0))
      losses[same_image, name] = float(loss)
      assert metrics["same_image_rows"] == (7 if name == "some" else 0)
  assert losses["keep", "some"] == losses["keep", "none"]
  assert losses["exclude", "none"] == pytest.approx(losses["keep", "none"], rel=1e-6)
  assert losses["exclude", "some"] < losses["keep", "some"] - 1e-3
  with pytest.raises(ValueError, match=r"model\.same_image is 'none'; there are keep, zero"):
    module.build(config | dict(same_image="none"), rngs=nnx.Rngs(0))


def test_collapsed_model_is_not_accurate():
  same = jnp.ones((1, B, B))
  assert contrastive.nce(same)[1]["accuracy"] == 0


def test_partners():
  np.testing.assert_array_equal(contrastive.mixup_partners(6), [5, 4, 3, 2, 1, 0])
  np.testing.assert_array_equal(contrastive.mixup_partners(6, 2), [1, 0, 3, 2, 5, 4])
  with pytest.raises(ValueError, match="blocks of 4 rows does not divide 6 rows"):
    contrastive.mixup_partners(6, 4)


def test_sigmoid_is_the_loop():
  a, b = pair()
  x, y = (np.asarray(z, np.float64) for z in (a, b))
  want = 0.0
  for i in range(B):
    for j in range(B):
      sign = 1 if i == j else -1
      want += np.log1p(np.exp(-sign * (10 * x[i] @ y[j] - 3)))
  loss, metrics = contrastive.sigmoid(a, b, jnp.float32(10), jnp.float32(-3))
  np.testing.assert_allclose(loss, want / B, rtol=1e-5)
  np.testing.assert_allclose(sum(metrics.values()), loss, rtol=1e-5)


@pytest.mark.parametrize("reduce", triplet.REDUCTIONS)
def test_triplet_is_the_loop(reduce):
  scores = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
  want = 0.0
  for s in (scores, scores.T):
    for i in range(6):
      hinges = [max(0.0, 0.2 + s[i, j] - s[i, i]) for j in range(6) if j != i]
      want += max(hinges) if reduce == "max" else sum(hinges) / (5 if reduce == "mean" else 1)
  np.testing.assert_allclose(
    triplet.triplet_from_scores(jnp.asarray(scores), 0.2, reduce), want, rtol=1e-5
  )
  with pytest.raises(ValueError, match="reduce is 'least'; expected one of max, sum, mean"):
    triplet.triplet_from_scores(jnp.asarray(scores), 0.2, "least")


@pytest.mark.parametrize(
  ("module", "changes"),
  [
    (clip, dict(loss="sigmoid")),
    (zerovl, dict(loss=dict(name="sigmoid"))),
    (zerovl, dict(loss=dict(name="triplet"))),
    (zerovl, dict(loss=dict(name="nce", gather_gradient=False, groups=2))),
  ],
)
def test_objectives_of_the_systems(module, changes):
  """Each has a finite loss and a gradient for both sides."""
  make, mixup = (tiny.config, {}) if module is clip else (tiny.zerovl, dict(mixup=None))
  config = make("unused").model.to_dict() | mixup | changes
  config["text"]["vocab"] = 16
  model = jax.jit(lambda: module.build(config, rngs=nnx.Rngs(0)))()
  f = lambda a, b: model.objective({"embed": a}, {"embed": b}, {}, jax.random.key(0))[0]
  loss, grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*pair())
  assert np.isfinite(loss)
  assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)
  assert (model.logit_bias is not None) == ("sigmoid" in str(changes))


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    (dict(loss=dict(name="nse")), "model.loss.name is 'nse'; there are nce, sigmoid, triplet"),
    (
      dict(loss=dict(name="triplet", smoothing=0.1)),
      "model.loss.smoothing is no option of triplet",
    ),
    (
      dict(loss=dict(name="sigmoid"), mixup=dict(beta=0.1, block=0)),
      "mixup needs model.loss.name=.nce.",
    ),
  ],
)
def test_objectives_that_do_not_exist(changes, error):
  config = tiny.zerovl("unused").model.to_dict() | changes
  with pytest.raises(ValueError, match=error):
    nnx.eval_shape(lambda: zerovl.build(config, rngs=nnx.Rngs(0)))
