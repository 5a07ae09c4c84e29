"""TGDT's evaluation: vectors and tokens of a split in the original's batches, scores, ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tgdt_golden
from tgdt_golden import GLOBAL, LOCAL, TIED, UNIT, outputs

from xmodal_jax.evaluation import metrics
from xmodal_jax.losses import local


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def close(ours, theirs, atol, what=""):
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol, err_msg=what)


def per_image() -> int:
  """Captions of each image of the test split."""
  n_images, n_texts = outputs()["enc_global_scores"].shape
  return n_texts // n_images


@functools.cache
def encoded(size: int) -> tuple[dict, dict]:
  """Features of the test split, encoded in consecutive batches of captions with their images."""
  split = tgdt_golden.captions("test")
  model = tgdt_golden.Golden().model()
  step = jax.jit(lambda b: (model.encode_image(b), model.encode_text(b)))
  images, texts = [], []
  with jax.default_matmul_precision("highest"):
    for first in range(0, len(split), size):
      index = np.arange(first, min(first + size, len(split)))
      # The last batch is filled up with its last row, which does not change the longest caption.
      b = tgdt_golden.rows("test", np.pad(index, (0, size - len(index)), mode="edge"))
      v, t = jax.device_get(step(b))
      cut = lambda tree: jax.tree.map(lambda x: x[: len(index)], tree)
      images.append(cut(v))
      texts.append(cut(t))
  join = lambda parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)
  first_caption = lambda tree: jax.tree.map(lambda x: x[:: per_image()], tree)
  return first_caption(join(images)), join(texts)


def test_features():
  images, texts = encoded(tgdt_golden.SIZES["batch_size"])
  for ours, side in ((images, "img"), (texts, "txt")):
    want = outputs()[f"enc_{side}_tokens"]
    close(ours["embed"], want[:, 0], UNIT, side)
    length = outputs()[f"enc_{side}_len"]
    keep = np.arange(want.shape[1] - 1) < (length - 1)[:, None]
    tokens = ours["tokens"][:, : keep.shape[1]]
    close(np.where(keep[..., None], tokens, 0), np.where(keep[..., None], want[:, 1:], 0), UNIT)


def test_batches_of_another_size():
  images, texts = encoded(tgdt_golden.SIZES["bs2"])
  close(images["embed"], outputs()["enc_bs2_img_global"], UNIT)
  close(texts["embed"], outputs()["enc_bs2_txt_global"], UNIT)


@functools.cache
def scores() -> tuple[np.ndarray, np.ndarray]:
  images, texts = encoded(tgdt_golden.SIZES["batch_size"])
  model = tgdt_golden.Golden().model()
  with jax.default_matmul_precision("highest"):
    run = jax.jit(lambda v, t: (model.score(v, t), model.local_scores(v, t)))
    return tuple(np.asarray(x) for x in run(images, texts))


def test_scores():
  ours = scores()
  close(ours[0], outputs()["enc_global_scores"], GLOBAL)
  close(ours[1], outputs()["enc_local_scores"], LOCAL)


def same_ranks(ours, theirs, score, axis, gap):
  """Equal, or the scores at both ranks differ by less than `gap`: many local scores are 0."""
  for q in np.flatnonzero(ours != theirs):
    row = np.sort(score[q] if axis else score[:, q])[::-1]
    a, b = sorted((ours[q], theirs[q]))
    assert row[int(a)] - row[int(b)] < gap, q


@pytest.mark.parametrize("which", ["global", "local"])
def test_ranks(which):
  score = scores()[which == "local"]
  owner, gap = np.arange(score.shape[1]) // per_image(), TIED[which]
  i2t, t2i = metrics.retrieval_ranks(score, owner)
  same_ranks(i2t, outputs()[f"eval_{which}_i2t_ranks"], score, True, gap)
  same_ranks(t2i, outputs()[f"eval_{which}_t2i_ranks"], score, False, gap)


def test_second_stage_scores_candidates_alike():
  """`rerank` gives the local scores of shortlisted captions, here of the first images."""
  first, second = scores()
  images, texts = encoded(tgdt_golden.SIZES["batch_size"])
  model = tgdt_golden.Golden().model()
  candidates = metrics.top(first, model.top_k_text)[:8]  # [8, k]
  v = {k: images[k][:8] for k in model.second_stage}
  t = {k: texts[k][candidates] for k in ("tokens", "mask")}
  with jax.default_matmul_precision("highest"):
    ours = model.rerank(v, t)
  close(ours, np.take_along_axis(second[:8], candidates, 1), LOCAL)


def test_scores_of_given_tokens():
  """syneval: images have different numbers of regions and are padded with zeros."""
  x = tgdt_golden.inputs()
  v, t = jnp.asarray(x["syneval_img_tokens"]), jnp.asarray(x["syneval_txt_tokens"])
  (want,) = (v for k, v in outputs().items() if k.startswith("syneval_local_scores_first"))
  regions, words = x["syneval_img_len"] - 1, x["syneval_txt_len"] - 3
  mask = lambda count, n: jnp.asarray(np.arange(n) < count[:, None])
  v, t = v[: len(want), 1:], t[:, 1:]
  zero = jnp.asarray(regions[: len(want)] < v.shape[1])
  vm, tm = mask(regions[: len(want)], v.shape[1]), mask(words, t.shape[1])
  ours = 10 * local.local_scores(v, vm, t, tm, image_zero=zero)
  close(ours, want, LOCAL)
