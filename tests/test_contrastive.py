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
