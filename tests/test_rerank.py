"""The second stage: candidates, their schedule over devices, scores against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xmodal_jax.data import inputs
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import metrics, rerank, retrieval
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib


def test_top_is_the_stable_order():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, (40, 30)).astype(np.float32)  # ties everywhere
  for k in (1, 4, 29, 30, 50):
    want = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(metrics.top(scores, k), want)


def test_promote_keeps_both_orders():
  rng = np.random.default_rng(1)
  first = rng.standard_normal((5, 12)).astype(np.float32)
  candidates = metrics.top(first, 4)
  second = rng.integers(0, 3, candidates.shape).astype(np.float32) * 1e-9 + 1e6  # equal in float32
  second[:, 0] = -1e6
  out = rerank.promote(first, candidates, second)
  for q in range(5):
    order = np.argsort(-out[q], kind="stable")
    chosen = candidates[q][np.argsort(-second[q], kind="stable")]
    rest = [c for c in np.argsort(-first[q], kind="stable") if c not in chosen]
    np.testing.assert_array_equal(order, [*chosen, *rest])


def test_promote_of_scores_beyond_the_integers_of_float32():
  first = np.array([[3e8, 2e8, 1e8, 5.0, 5.0]], np.float32)
  out = rerank.promote(first, np.array([[0, 1, 2]]), np.array([[1.0, 3.0, 2.0]], np.float32))
  np.testing.assert_array_equal(np.argsort(-out[0], kind="stable"), [1, 2, 0, 3, 4])


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize(("block", "shape"), [(8, (2, 3)), (64, (1, 1)), (24, (16, 8))])
def test_schedule_visits_every_pair_once(devices, block, shape):
  rng = np.random.default_rng(2)
  batch, share = 8, 8 // devices
  image, caption = rng.integers(0, 24, 300), rng.integers(0, 40, 300)
  seen = np.zeros(300, int)
  plans = rerank.schedule(image, caption, batch=batch, devices=devices, block=block, shape=shape)
  for n, calls in plans.items():
    assert calls.image.shape[1:] == (devices * shape[0],)
    assert calls.caption.shape[1:] == (devices * shape[0], shape[1])
    for images, captions, pairs in zip(*calls, strict=True):
      for row, local in enumerate(images):
        device = row // shape[0]
        for column in np.flatnonzero(pairs[row] >= 0):
          pair = pairs[row, column]
          seen[pair] += 1
          step, place = divmod(local, share)
          assert image[pair] == step * batch + device * share + place
          assert caption[pair] == n * block + captions[row, column]
  assert (seen == 1).all()


def test_merged_directions():
  rng = np.random.default_rng(3)
  a, b = rng.standard_normal((2, 6, 12)).astype(np.float32)
  owner = np.repeat(np.arange(6), 2)
  first, second = metrics.summarise(a, owner), metrics.summarise(b, owner)
  both = metrics.merge_directions(first, second)
  assert both["i2t_r1"] == first["i2t_r1"] and both["t2i_r1"] == second["t2i_r1"]
  assert both["rsum"] == sum(both[f"{d}_r{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10))
  assert metrics.merge_directions(first, first) == first


def run(config, devices=8):
  built = setup.build(config, jax.devices()[:devices])
  params = jax.jit(lambda: step_lib.nnx.to_pure_dict(step_lib.split(built.init_model())[1]))()
  state = train_state.TrainState(None, jax.tree.map(np.asarray, params), {}, None)
  read = inputs.from_config(config)
  ev = retrieval.from_config(config, read, built)
  return ev, state, ev.inputs.split("test")


def second_scores(config, devices=8):
  ev, state, split = run(config, devices)
  batches = lambda n: -(-n // config.eval.batch_size)
  banks = [ev.bank(batches(n)) for n in (len(split), int(split.captions_per_record.sum()))]
  images, _ = ev.encode(state, "image", ev.inputs.images(split), banks[0])
  texts, _ = ev.encode(state, "text", ev.inputs.texts(split), banks[1])
  scores = ev.scores(state, images, texts)
  kept = np.ones(scores.shape[1], bool)
  return scores, ev.second_scores(state, scores, *banks, kept), (ev, state, split)


def test_scores_against_the_plain_loop_on_any_devices(tiny_data):
  config = tiny.team(tiny_data)
  _, (by_image, by_text), (ev, state, split) = second_scores(config)
  model = step_lib.nnx.merge(setup.build(config).graphdef, state.params, {})
  rows = lambda batches, encode: [
    {k: np.asarray(v)[i] for k, v in f.items()}
    for b in batches
    for f in [jax.jit(encode)(model, jax.tree.map(jnp.asarray, b))]
    for i in np.flatnonzero(b["valid"])
  ]
  images = rows(ev.inputs.images(split), lambda m, b: m.encode_image(b))
  texts = rows(ev.inputs.texts(split), lambda m, b: m.encode_text(b))
  one = jax.jit(lambda m, i, t: m.rerank(i, t))
  lead = lambda f, n: {k: v[(None,) * n] for k, v in f.items()}
  rng = np.random.default_rng(0)
  for candidates, out, flip in ((*by_image, False), (*by_text, True)):
    assert out.shape == candidates.shape
    for q in rng.permutation(len(candidates))[:6]:
      for c, score in zip(candidates[q], out[q], strict=True):
        i, t = (c, q) if flip else (q, c)
        want = one(model, lead(images[i], 1), lead(texts[t], 2))[0, 0]
        np.testing.assert_allclose(score, want, atol=2e-6)
  # The same on one device, in calls and blocks of another shape.
  other = tiny.team(tiny_data, eval__rerank_block=(3, 5), eval__block=(16, 16))
  _, (one_image, one_text), _ = second_scores(other, devices=1)
  np.testing.assert_array_equal(by_image[0], one_image[0])
  np.testing.assert_allclose(by_image[1], one_image[1], atol=2e-6)
  np.testing.assert_allclose(by_text[1], one_text[1], atol=2e-6)


@pytest.mark.full
def test_report_has_both_stages_and_the_mix(tiny_data, caplog):
  every = dict(eval__top_k_text=60, eval__top_k_image=12)
  ev, state, _ = run(tiny.team(tiny_data, **every))
  both = ev(state, "test")
  with jax.log_compiles(), caplog.at_level("WARNING"):
    assert ev(state, "test") == both
  assert not [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
  off, state, _ = run(tiny.team(tiny_data, eval__top_k_text=0, eval__top_k_image=0))
  first = off(state, "test")
  assert {k.removeprefix("first_"): v for k, v in both.items() if k[:6] == "first_"} == first
  # A first stage of overwhelming weight gives the first-stage order.
  mixed, state, _ = run(tiny.team(tiny_data, **every, eval__stage_mix=1e6))
  report = mixed(state, "test")
  assert {k: report[k] for k in first} == first
  assert any(both[k] != first[k] for k in first)
  # Of several weights, the one that is best on val.
  on_val = {0.0: run(tiny.team(tiny_data, **every))[0](state, "val")["rsum"]}
  on_val[1e6] = mixed(state, "val")["rsum"]
  choosing, state, _ = run(tiny.team(tiny_data, **every, eval__stage_mixes=(0.0, 1e6)))
  best = max(on_val, key=on_val.get)
  assert choosing(state, "test") == {0.0: both, 1e6: report}[best] | {"stage_mix": best}


def test_non_finite_second_stage_is_an_error(tiny_data):
  ev, state, _ = run(tiny.team(tiny_data))
  params = dict(state.params)
  params["matching"] = jax.tree.map(lambda x: np.full_like(x, np.nan), params["matching"])
  with pytest.raises(metrics.NonFiniteError, match="second-stage scores"):
    ev(state.replace(params=params), "test")


def test_second_stage_needs_a_system_with_one(tiny_data):
  with pytest.raises(ValueError, match=r"CLIP has none"):
    run(tiny.config(tiny_data, eval__top_k_text=4, eval__top_k_image=4))
  with pytest.raises(ValueError, match=r"a second stage needs both"):
    run(tiny.team(tiny_data, eval__top_k_text=0))


def test_bank_keeps_the_rows_of_its_device():
  mesh = sharding.make_mesh((("data", -1),), jax.devices()[:4])
  rows = sharding.batch_sharding(mesh)
  bank = rerank.Bank(3, rows, jnp.bfloat16)
  x = np.arange(3 * 8 * 2, dtype=np.float32).reshape(3, 8, 2)
  for step in range(3):
    batch = {"tokens": jax.device_put(x[step], rows), "mask": jax.device_put(x[step] > 4, rows)}
    bank.add(batch, np.arange(8) != 7)
  assert bank.leaves["tokens"].dtype == jnp.bfloat16 and bank.leaves["mask"].dtype == bool
  assert bank.leaves["tokens"].addressable_shards[0].data.shape == (3, 2, 2)
  np.testing.assert_array_equal(bank.places, [i for i in range(24) if i % 8 != 7])
  places = np.array([3, 17, 3, 22])
  np.testing.assert_array_equal(bank.block(places)["tokens"], x.reshape(24, 2)[places])


def test_captions_are_cut_to_the_longest_of_a_block():
  rows = sharding.batch_sharding(sharding.make_mesh((("data", -1),), jax.devices()[:2]))
  bank = rerank.Bank(1, rows, jnp.float32)
  mask = np.arange(30) < np.array([3, 9, 30, 1])[:, None]
  tokens = np.random.default_rng(0).standard_normal((4, 30, 5)).astype(np.float32)
  other = np.ones((4, 7), np.float32)  # has no token axis
  leaves = dict(tokens=tokens, mask=mask, other=other)
  bank.add({k: jax.device_put(v, rows) for k, v in leaves.items()}, np.ones(4, bool))
  np.testing.assert_array_equal(bank.lengths(), [3, 9, 30, 1])
  block = bank.block(np.array([3, 1]), 16)
  assert {k: v.shape for k, v in block.items()} == dict(
    tokens=(2, 16, 5), mask=(2, 16), other=(2, 7)
  )
  np.testing.assert_array_equal(block["tokens"], tokens[[3, 1], :16])
