"""Evaluation: blocks, unreadable images, collapsed and diverged models."""

import functools
import gzip
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from xmodal_jax.data import inputs, pipeline, records
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError, UserError
from xmodal_jax.evaluation import batching, checks, coco, metrics, rerank, retrieval, scored
from xmodal_jax.evaluation import report as report_lib
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib


@pytest.fixture(scope="module")
def config(tiny_data):
  return tiny.config(tiny_data)


@pytest.fixture(scope="module")
def built(config):
  return setup.build(config)


def make_state(built):
  params, stats = jax.jit(lambda: step_lib.split(built.init_model())[1:])()
  pure = lambda s: jax.tree.map(jnp.asarray, step_lib.nnx.to_pure_dict(s))
  return train_state.TrainState(None, pure(params), pure(stats), None)


def evaluator(config, built):
  return retrieval.from_config(config, inputs.from_config(config), built)


def test_scores_do_not_depend_on_blocks(config, built):
  state, ev = make_state(built), evaluator(config, built)
  split = ev.inputs.split("test")
  images, _ = ev.encode(state, "image", ev.inputs.images(split))
  texts, _ = ev.encode(state, "text", ev.inputs.texts(split))
  assert images["embed"].shape == (tiny.SIZES["test"], 16)
  assert texts["embed"].shape == (5 * tiny.SIZES["test"], 16)
  whole = images["embed"] @ texts["embed"].T
  for block in ((8, 7), (16, 64), (64, 13)):
    other = config.copy_and_resolve_references()
    other.eval.block = block
    scores = evaluator(other, built).scores(state, images, texts)
    np.testing.assert_allclose(scores, whole, atol=1e-6)
    if block == (8, 7):
      first = scores
    np.testing.assert_array_equal(np.argsort(-scores), np.argsort(-first))


def test_collapsed_model_scores_chance(config, built):
  state = make_state(built)
  params = jax.tree.map(jnp.zeros_like, state.params)
  for tower in ("image", "text"):  # a non-zero constant for all inputs
    norm = "ln_post" if tower == "image" else "ln_final"
    params[tower][norm]["bias"] = jnp.ones_like(params[tower][norm]["bias"])
    params[tower]["proj"]["kernel"] = jnp.ones_like(params[tower]["proj"]["kernel"])
  report = evaluator(config, built)(state.replace(params=params), "test")
  n = tiny.SIZES["test"]
  assert report["t2i_r1"] == pytest.approx(100 / n)
  assert report["i2t_r1"] == pytest.approx(100 / n)


def test_non_finite_embeddings_are_an_error(config, built):
  state = make_state(built)
  params = dict(state.params)
  params["text"] = params["text"] | {"token": {"embedding": jnp.full((714, 32), jnp.nan)}}
  with pytest.raises(metrics.NonFiniteError, match=r"text features\['embed'\]: 60 of 60 rows"):
    evaluator(config, built)(state.replace(params=params), "test")


def test_positions_without_a_bad_picture():
  row, kept = scored.positions(np.array([0, 2, 3]), np.array([0, 0, 1, 2, 3, 3, 4]))
  np.testing.assert_array_equal(row, [0, 0, 1, 2, 2])
  np.testing.assert_array_equal(kept, [True, True, False, True, True, True, False])


def test_batch_that_does_not_divide(config, built):
  other = config.copy_and_resolve_references()
  other.eval.batch_size = 12
  with pytest.raises(ValueError, match=r"config\.eval\.batch_size has 12 rows"):
    evaluator(other, built)


def test_cached_features(config, built, tmp_path):
  cached = config.copy_and_resolve_references()
  cached.eval.cache = True
  state, ev = make_state(built), evaluator(cached, built)
  path = ev.cache_path(tmp_path, ev.inputs.split("test"), {"step": 1})
  plain = evaluator(config, built)
  assert plain.cache_path(tmp_path, ev.inputs.split("test"), {"step": 1}) is None
  assert path != ev.cache_path(tmp_path, ev.inputs.split("test"), {"step": 2})
  first = ev(state, "test", path)
  assert path.exists()
  broken = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
  assert ev(broken, "test", path) == first  # read from the cache


def test_cache_depends_on_what_embeddings_depend_on(config, built, tmp_path):
  def path(**changes):
    other = config.copy_and_resolve_references()
    other.eval.cache = True
    for key, value in changes.items():
      section, _, name = key.rpartition("__")
      (other[section] if section else other)[name] = value
    ev = evaluator(other, built)
    return ev.cache_path(tmp_path, ev.inputs.split("test"), {"step": 1})

  changed = (dict(precision="highest"), dict(dtype="bfloat16"), dict(eval__batch_size=8))
  assert len({path(), *(path(**change) for change in changed)}) == 4
  assert path() == path(eval__folds=5, log_every=7)


def one_stage(scores, caption_image, part):
  rows, columns = part
  own = caption_image[columns] - (rows.start or 0)
  return metrics.Ranked(scores[part], scores[part], own)


def coco_split(images: int, folder: pathlib.Path) -> list[records.Record]:
  """Records with two captions each, and files in which an image has its own captions only."""
  for name in ("cxc", "eccv"):
    to_captions = {i: [10 * i, 10 * i + 1] for i in range(images)}
    to_images = {caption: [i] for i, own in to_captions.items() for caption in own}
    for query, table in (("image_to_caption", to_captions), ("caption_to_image", to_images)):
      (folder / f"{name}_{query}.json").write_text(json.dumps(table))
  return [records.Record(b"", i, "", ("a", "b"), (10 * i, 10 * i + 1)) for i in range(images)]


@pytest.mark.parametrize("folds", [0, 5, 2])
def test_coco_folds_have_candidates_of_their_own(config, tmp_path, folds):
  """Also with ECCV Caption beside them.

  The second stage is always right. Shortlists of all images have no positive, those of a fold have
  all of them.
  """
  split, owner, k = coco_split(20, tmp_path), np.repeat(np.arange(20), 2), 8
  options = config.copy_and_resolve_references().eval
  options.eccv_dir, options.folds = str(tmp_path), folds
  fold = np.arange(20) // 4
  scores = -(fold[:, None] == fold[owner]).astype(np.float32)  # the own fold scores worst

  def rank(part):
    first = one_stage(scores, owner, part)
    right = first.caption_image == np.arange(len(first.i2t))[:, None]
    lists = []
    for own, hits in ((first.i2t, right), (first.i2t.T, right.T)):
      candidates = metrics.top(own, k)
      lists.append((candidates, np.take_along_axis(hits, candidates, 1).astype(np.float32)))
    return rerank.combine(first, *lists)

  report = report_lib.report(options, split, rank, {}, is_test=True)
  assert report["rsum"] == 0 and {"cxc_rsum", "eccv_i2t_map_at_r"} <= report.keys()
  assert report["coco_1k_rsum"] == 600
  of_folds = {key for key in report if key.startswith("folds")}
  assert bool(of_folds) == bool(folds)
  if folds == 5:
    assert {f"folds5_{k.removeprefix('coco_1k_')}" for k in report if "coco_1k" in k} == of_folds
    assert report["folds5_rsum"] == 600


def test_coco_needs_its_files_and_every_image(config, tmp_path):
  split, owner = coco_split(20, tmp_path), np.repeat(np.arange(19), 2)
  options = config.copy_and_resolve_references().eval
  options.eccv_dir = str(tmp_path)
  rank = functools.partial(one_stage, np.zeros((19, 38), np.float32), owner)
  with pytest.raises(UserError, match=r"eccv_dir: ECCV Caption needs every .* 1 of 20 could not"):
    report_lib.report(options, split, rank, {}, is_test=True)
  coco.check_files(tmp_path)
  (tmp_path / "cxc_caption_to_image.json").rename(tmp_path / "other.json")
  with pytest.raises(UserError, match=r"has no cxc_caption_to_image.json or .json.gz; expected"):
    coco.check_files(tmp_path)


def test_coco_protocol(config, shared_data):
  """ECCV Caption and CxC are reported beside the plain numbers, by the ids in the records."""
  folder = shared_data / "coco_splits"
  with gzip.open(folder / "dataset_coco_karpathy_test5k.json.gz") as f:
    images = json.load(f)["images"]
  split = [
    records.Record(b"", i["cocoid"], "", (), tuple(s["sentid"] for s in i["sentences"]))
    for i in images
  ]
  caption_image = np.repeat(np.arange(len(split)), 5)
  rng = np.random.default_rng(0)
  image, noise = (rng.standard_normal((n, 8), np.float32) for n in (len(split), 5 * len(split)))
  scores = image @ (image[caption_image] + noise).T
  other = config.copy_and_resolve_references()
  other.eval.eccv_dir = str(folder / "eccv_caption")
  rank = functools.partial(one_stage, scores, caption_image)
  report = report_lib.report(other.eval, split, rank, {}, is_test=True)
  assert report["i2t_r10"] == metrics.summarise(scores, caption_image)["i2t_r10"]
  assert report["coco_1k_i2t_r10"] > report["i2t_r10"]
  assert 0 < report["eccv_i2t_map_at_r"] < 100 and report["cxc_t2i_r1"] >= report["t2i_r1"]
  plain = report_lib.report(other.eval, split, rank, {}, is_test=False)
  assert not any(key.startswith("eccv") for key in plain)


def test_damaged_record_is_left_out_where_allowed(config, built, tiny_data, tmp_path):
  folder = pathlib.Path(shutil.copytree(tiny_data, tmp_path / "data"))
  index = records.open_split(folder, "test")._indices[0]
  shard = next(folder.glob("*test*.tfrecord-00000-of-00001"))
  data = bytearray(shard.read_bytes())
  data[int(index.offsets[3]) + 40] ^= 1
  shard.write_bytes(data)
  other = config.copy_and_resolve_references()
  other.data.dir = str(folder)
  with pytest.raises(pipeline.DataError, match="max_bad_fraction = 0"):
    evaluator(other, built)(make_state(built), "test")
  other.data.eval_max_bad_fraction = 0.1
  ev, state = evaluator(other, built), make_state(built)
  assert len(ev.encode(state, "image", ev.inputs.images(ev.inputs.split("test")))[1]) == 11
  assert len(ev.encode(state, "text", ev.inputs.texts(ev.inputs.split("test")))[1]) == 55
  report, scored = ev.evaluate(state, "test")
  assert report["i2t_r10"] > 0
  facts = scored.facts()
  assert (facts["images"], facts["captions"]) == (11, 55)
  (left,) = facts["left_out"]
  assert (
    left["record"] == 3 and left["captions"] == 5 and "record 3 of split 'test'" in left["reason"]
  )
  # The reasons are kept with cached features; folds are those of the split.
  other.eval.cache, other.eval.folds = True, 3
  ev, path = evaluator(other, built), epath.Path(tmp_path / "features.npz")
  first = ev.evaluate(state, "test", path)
  assert first[1].facts() == facts and "folds3_rsum" in first[0]
  again = ev.evaluate(state, "test", path)
  assert again[0] == first[0] and again[1].facts() == facts


def test_few_blocks_of_texts_are_on_their_way(monkeypatch):
  """A text block is transferred once the last but one is scored: devices never hold all texts."""
  mesh = sharding.make_mesh((("data", -1),), jax.devices()[:1])
  batch_sharding = sharding.batch_sharding(mesh)
  events, batch = [], {"valid": np.ones(2, bool), "image_id": np.arange(2)}
  evaluator = types.SimpleNamespace(
    options=types.SimpleNamespace(block=(2, 4)),
    batch_sharding=batch_sharding, replicated=None, stop=lambda: False, _check_stop=lambda: None,
    embed_sharded=lambda params, stats, batch: (batch, None),
    score=lambda params, stats, images, texts: jnp.full((2, 4), float(texts)),
  )  # fmt: skip
  wait = jax.block_until_ready
  heard = lambda parts: events.extend(("scored", float(p[0, 0])) for p in wait(parts))
  monkeypatch.setattr(jax, "block_until_ready", heard)
  send = lambda texts, start, size, to: events.append(("sent", start // 4)) or start // 4
  monkeypatch.setattr(batching, "put_block", send)
  state = types.SimpleNamespace(params=None, stats=None)
  scores, _ = retrieval.Evaluator.stream(evaluator, state, iter([batch]), {"x": np.zeros(18)})
  np.testing.assert_array_equal(scores[0], np.arange(18) // 4)
  for k in range(2, 5):
    assert events.index(("scored", k - 2)) < events.index(("sent", k))


def metric_options(**changes):
  options = tiny.config("unused").eval
  for key, value in changes.items():
    options[key] = value
  return options


ONE_STAGE = types.SimpleNamespace(top_k_text=0, top_k_image=0, stage_mix=0.0, second_stage=())
TWO_STAGES = types.SimpleNamespace(top_k_text=4, top_k_image=4, stage_mix=0.0, second_stage=("x",))


@pytest.mark.parametrize(
  ("changes", "system"),
  [
    (dict(metric="rsun"), ONE_STAGE),
    (dict(metric=""), ONE_STAGE),
    (dict(metric="first_rsum"), ONE_STAGE),
    (dict(metric="i2t_medr"), ONE_STAGE),  # lower is better
    (dict(metric="ndcg_rougeL"), ONE_STAGE),
    (dict(metric="folds5_rsum", folds=5), ONE_STAGE),  # on the test split only
    (dict(metric="stage_mix", stage_mixes=(0.0, 1.0)), TWO_STAGES),
  ],
)
def test_an_unknown_metric_is_an_error_that_lists_those_that_exist(changes, system):
  with pytest.raises(ConfigError, match=r"config\.eval\.metric is .*: expected .* i2t_r1, i2t_r5"):
    checks.check_metric(metric_options(**changes), system)


def test_metrics_that_exist():
  for changes, system in [
    (dict(metric="rsum"), ONE_STAGE),
    (dict(metric="mean_r1"), TWO_STAGES),
    (dict(metric="first_t2i_r1"), TWO_STAGES),
    (dict(metric="i2t_ndcg_rougeL", ndcg="rougeL"), ONE_STAGE),
    (dict(metric="folds5_rsum", folds=5, select="test"), ONE_STAGE),
    (dict(metric="published_rsum", protocol="original"), TWO_STAGES),
    (dict(metric="eccv_i2t_map_at_r", eccv_dir="DIR", select="test"), ONE_STAGE),
  ]:
    checks.check_metric(metric_options(**changes), system)


def test_reports_have_the_names_that_are_known_before():
  options = metric_options(folds=3, ndcg="rougeL", protocol="original")
  scores = np.eye(6, dtype=np.float32)

  def rank(part):
    return metrics.Ranked(scores[part], scores[part], np.arange(len(scores[part])))

  report = report_lib.report(
    options, range(6), rank, {"rougeL": scores}, is_test=True, published=True
  )
  assert set(report) == set(report_lib.names(options, is_test=True, two_stages=False))
