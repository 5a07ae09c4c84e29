"""NDCG and ROUGE-L against their definitions, relevance files, and reports with NDCG."""

import types

import numpy as np
import pytest
import tiny
from etils import epath

from xmodal_jax.data import inputs
from xmodal_jax.errors import UserError
from xmodal_jax.evaluation import checks, metrics, ndcg, retrieval, scored, tables
from xmodal_jax.evaluation import report as report_lib
from xmodal_jax.runtime import setup


def plain_ndcg(scores, grades, depth):
  """The definition, query by query."""
  out = []
  dcg = lambda values: sum((2.0**v - 1) / np.log2(k + 2) for k, v in enumerate(values[:depth]))
  for row, own in zip(scores, np.asarray(grades, np.float64), strict=True):
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    ideal = dcg(sorted(own, reverse=True))
    out.append(dcg([own[j] for j in order]) / ideal if ideal else 0.0)
  return out


@pytest.mark.parametrize(("depth", "block"), [(25, 2**24), (25, 100), (3, 70), (80, 1)])
def test_ndcg_is_the_definition(depth, block, monkeypatch):
  monkeypatch.setattr(ndcg, "_ELEMENTS", block)
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 9, (11, 40)).astype(np.float32)  # ties everywhere
  grades = rng.random((11, 40), np.float32) * (rng.random((11, 40)) < 0.3)
  grades[4] = 0
  before = scores.copy(), grades.copy()
  ours = ndcg.ndcg(scores, grades, depth)
  np.testing.assert_allclose(ours, plain_ndcg(scores, grades, depth), rtol=1e-12)
  assert ours[4] == 0
  turned = ndcg.ndcg(np.asfortranarray(scores), grades.T.copy().T, depth)
  np.testing.assert_array_equal(turned, ours)
  np.testing.assert_array_equal((scores, grades), before)  # nothing is sorted in place
  np.testing.assert_allclose(ndcg.ndcg(grades, grades, depth)[[0, 4]], [1, 0])
  with pytest.raises(ValueError, match=r"\(11, 40\) do not fit relevances \(11, 39\)"):
    ndcg.ndcg(scores, grades[:, 1:])


def test_means_over_all_and_over_what_is_not_zero():
  i2t, t2i = np.array([0, 0.5, 0.25, 0]), np.array([0, 1.0])
  ours = ndcg.means("x", i2t, t2i)
  assert ours == {"i2t_ndcg_x": 0.1875, "t2i_ndcg_x": 0.5, "ndcg_x": 0.6875}
  ours = ndcg.means("x", i2t, t2i, published=True)
  assert ours == {"i2t_ndcg_x": 0.375, "t2i_ndcg_x": 0.5, "ndcg_x": 0.875}
  assert ndcg.means("x", 0 * i2t, t2i, published=True)["i2t_ndcg_x"] == 0


def plain_rouge(candidate, references):
  words, precision, recall = candidate.lower().split(" "), 0, 0
  for reference in references:
    other = reference.lower().split(" ")
    common = np.zeros((len(words) + 1, len(other) + 1), int)
    for i, a in enumerate(words):
      for j, b in enumerate(other):
        longer = max(common[i, j + 1], common[i + 1, j])
        common[i + 1, j + 1] = common[i, j] + 1 if a == b else longer
    precision = max(precision, common[-1, -1] / len(words))
    recall = max(recall, common[-1, -1] / len(other))
  if not precision * recall:
    return 0.0
  return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


@pytest.mark.parametrize("longest", [3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 150, 300])
def test_rouge_l_is_the_definition(longest, monkeypatch):
  """All integer widths, one and several integers per caption, blocks that do not divide evenly."""
  for name, value in (("_ROWS", 10), ("_LANES", 3), ("_REFERENCES", 4)):
    monkeypatch.setattr(ndcg, name, value)
  rng = np.random.default_rng(longest)
  few = max(2, longest // 8)  # few different words: many matches, and carries between integers
  sentence = lambda n: " ".join(rng.choice([f"w{i}" for i in range(few)], n))
  lengths = [1, longest, longest, *rng.integers(1, longest + 1, 10 if longest < 100 else 3)]
  flat = [sentence(n) for n in rng.permutation(lengths)]
  captions = [flat[:1], flat[1:4], flat[4:]]
  ours = ndcg.rouge_l(captions)
  want = [[plain_rouge(c, references) for references in captions] for c in flat]
  np.testing.assert_array_equal(ours, np.array(want, np.float32))


def test_rouge_l_words():
  captions = [["A dog  runs", "a cat"], ["The end."], ["", "the END"]]
  ours = ndcg.rouge_l(captions)
  np.testing.assert_array_equal(ours[[0, 1, 2, 3, 4], [0, 0, 1, 2, 2]], 1)
  assert ours[2, 2] == np.float32(plain_rouge("the end.", ["", "the end"]))  # "end." is not "end"
  assert ours[0, 2] == np.float32(plain_rouge("a dog  runs", ["", "the end"])) > 0  # "" is a word
  assert ours[4, 0] == 0
  with pytest.raises(ValueError, match="1 of 2 images have no caption"):
    ndcg.rouge_l([["a"], []])


def test_files(tmp_path):
  folder = epath.Path(tmp_path)
  values = np.random.default_rng(0).random((6, 4)).astype(np.float32)
  path = folder / "below" / "f30k-test-spice.npy"
  ndcg.write(path, iter((values[:4], values[4:])))
  assert path.read_bytes() == values.tobytes()
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  read = ndcg.read(path, 6, 4)
  assert isinstance(read, np.memmap)
  np.testing.assert_array_equal(read, values)
  # The mapped file is read-only, which is sufficient.
  np.testing.assert_allclose(ndcg.ndcg(np.asarray(read), read), 1)
  np.testing.assert_allclose(ndcg.ndcg(np.asarray(read).T, read.T), 1)
  assert ndcg.find(path.parent, "test", "spice") == path
  assert ndcg.find(path.parent, "test", "rougeL") is None
  with pytest.raises(ValueError, match=r"f30k-test-spice.npy has 96 bytes; 6 captions x 5 .* 120:"):
    ndcg.read(path, 6, 5)
  values[1, 2], values[3, 0], values[5, 1] = -1, -1, np.nan
  ndcg.write(path, iter((values,)))
  with pytest.raises(ValueError, match=r"spice.npy: 3 of 24 relevances .* 2 of them -1"):
    ndcg.read(path, 6, 4)
  with pytest.raises(FileNotFoundError, match=r"none: no such folder; .* \*-test-spice.npy"):
    ndcg.find(folder / "none", "test", "spice")
  (path.parent / "coco-test-spice.npy").write_bytes(b"")
  with pytest.raises(ValueError, match=r"coco-test-spice.npy, f30k-test-spice.npy"):
    ndcg.find(path.parent, "test", "spice")


def test_relevances_of_another_order_are_noticed(tiny_data, tmp_path, caplog):
  config = tiny.config(tiny_data, eval__ndcg="rougeL", eval__relevance_dir=str(tmp_path))
  split = inputs.from_config(config).split("test")
  own = (OWNER[:, None] == np.arange(12)) * np.float32(0.5) + np.float32(0.2)
  path = epath.Path(tmp_path / "tiny-test-rougeL.npy")
  ndcg.write(path, iter((own,)))
  report_lib.grades(config.eval, split)
  assert not caplog.records
  ndcg.write(path, iter((np.roll(own, 3, axis=1),)))
  report_lib.grades(config.eval, split)
  assert "tiny-test-rougeL.npy: captions are no more relevant to their own" in caplog.text


def test_published_ranks():
  scores = np.array([[1, 5, 3], [2, 2, 1], [9, 9, 9], [1, 2, 3]], np.float32)
  hits = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 1]], bool)
  np.testing.assert_array_equal(metrics.published_ranks(hits, scores), [2, 1, 0, 0])


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("XMODAL_DATA", str(tmp_path / "home"))
  return tmp_path / "home"


@pytest.fixture(scope="module")
def built(tiny_data):
  return {name: setup.build(getattr(tiny, name)(tiny_data)) for name in ("config", "team")}


OWNER = np.repeat(np.arange(12), 5)


def evaluator(config, built, scores, second=None):
  """An evaluator with given first- and second-stage scores [12, 60] in place of a model."""
  ev = retrieval.from_config(config, inputs.from_config(config), built)
  ids = {"image": np.arange(12), "text": OWNER}
  ev.encode = lambda state, side, batches, bank: ({}, ids[side])
  ev.scores = lambda *_: scores
  places = types.SimpleNamespace(places=2 * np.arange(60))  # every other row of a bank is padding
  ev.bank = lambda steps: places if ev.second else None
  ev.reranker.scores = lambda _, images, texts, image, caption, check_stop: second[
    image // 2, caption // 2
  ]
  return ev


def test_report_of_one_stage(tiny_data, built, home, monkeypatch):
  config = tiny.config(tiny_data, eval__ndcg="rougeL", eval__folds=3, eval__protocol="original")
  scores = np.random.default_rng(0).random((12, 60), np.float32)
  ev = evaluator(config, built["config"], scores)
  checks.check_splits(config.eval, ev.inputs)
  assert not home.exists()  # check_splits computes no ROUGE-L
  out = ev(None, "test")
  graded = ndcg.rouge_l([record.captions for record in ev.inputs.split("test")])
  (file,) = (home / "relevances").iterdir()
  assert file.read_bytes() == graded.tobytes()
  assert out["i2t_ndcg_rougeL"] == pytest.approx(ndcg.ndcg(scores, graded.T).mean())
  assert out["t2i_ndcg_rougeL"] == pytest.approx(ndcg.ndcg(scores.T, graded).mean())
  parts = [(slice(4 * n, 4 * n + 4), slice(20 * n, 20 * n + 20)) for n in range(3)]
  want = np.mean([ndcg.ndcg(scores[i, t].T, graded[t, i]).mean() for i, t in parts])
  assert out["folds3_t2i_ndcg_rougeL"] == pytest.approx(want)
  assert out["published_folds3_rsum"] == pytest.approx(6 * out["folds3_rsum"])
  same = ("rsum", "i2t_r1", "t2i_meanr", "folds3_i2t_medr", "t2i_ndcg_rougeL")
  assert all(out[f"published_{k}"] == out[k] for k in same)
  assert len([k for k in out if k.startswith("published_")]) * 2 == len(out)
  monkeypatch.setattr(ndcg, "rouge_l_rows", None)  # read from the cache
  assert ev(None, "test") == out
  plain = evaluator(tiny.config(tiny_data, eval__folds=3), built["config"], scores)(None, "test")
  folds = metrics.folds(scores, OWNER, 3)
  want = metrics.summarise(scores, OWNER) | {f"folds3_{k}": v for k, v in folds.items()}
  assert plain == want == {k: out[k] for k in want}


def test_given_relevances(tiny_data, home, tmp_path):
  rng = np.random.default_rng(1)
  scores, given = rng.random((12, 60), np.float32), {}
  config = tiny.config(tiny_data, eval__ndcg="rougeL, spice", eval__relevance_dir=str(tmp_path))
  read = inputs.from_config(config)
  rank = lambda part: metrics.Ranked(scores, scores, np.repeat(np.arange(12), 5))
  with pytest.raises(FileNotFoundError, match=r"names spice.* has no \*-(test|val)-spice.npy"):
    checks.check_splits(config.eval, read)
  for method in ("spice", "rougeL"):
    given[method] = rng.random((60, 12), np.float32)
    ndcg.write(epath.Path(tmp_path / f"tiny-test-{method}.npy"), iter((given[method],)))
  graded = report_lib.grades(config.eval, read.split("test"))
  out = report_lib.report(config.eval, read.split("test"), rank, graded, is_test=True)
  for method, values in given.items():
    assert out[f"i2t_ndcg_{method}"] == pytest.approx(ndcg.ndcg(scores, values.T).mean())
  assert not home.exists()  # ROUGE-L is not computed if there is a file
  fewer = lambda part: metrics.Ranked(scores[:11, :55], scores[:11, :55], np.repeat(range(11), 5))
  with pytest.raises(UserError, match=r"ndcg: NDCG needs every image .* 1 of 12 could not be read"):
    report_lib.report(config.eval, read.split("test"), fewer, graded, is_test=True)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("ndcg", "rouge", r"config.eval.ndcg is 'rouge': .* different names out of rougeL, spice"),
    ("ndcg", "spice,spice", "expected a comma-separated list of different names"),
    ("protocol", "published", "config.eval.protocol is 'published': expected"),
  ],
)
def test_unknown_names(tiny_data, key, value, message):
  with pytest.raises(ValueError, match=message):
    report_lib.check(tiny.config(tiny_data, **{f"eval__{key}": value}).eval)


def test_report_of_two_stages(tiny_data, built, home):
  """Each fold has its own shortlists; published_* give rank 0 to queries without a hit in them."""
  changes = dict(eval__folds=2, eval__protocol="original", eval__ndcg="rougeL")
  config = tiny.team(tiny_data, **changes)
  scores, second = np.random.default_rng(2).random((2, 12, 60), np.float32)
  ev = evaluator(config, built["team"], scores, second)
  out = ev(None, "test")
  top_text, top_image, mix, _ = ev.second
  assert (top_text, top_image, mix) == (4, 3, 0)
  graded = ndcg.rouge_l([record.captions for record in ev.inputs.split("test")])
  reports = []
  for size in (12, 6):
    for start in range(0, 12, size):
      part = slice(start, start + size), slice(5 * start, 5 * (start + size))
      owner = OWNER[: 5 * size]
      right, theirs, gains = [], [], []
      for first, last, own, k in (
        (scores[part], second[part], owner == np.arange(size)[:, None], top_text),
        (scores[part].T, second[part].T, owner[:, None] == np.arange(size), top_image),
      ):
        order = []
        for q in range(len(first)):
          by_first = list(np.argsort(-first[q]))
          order.append(sorted(by_first[:k], key=lambda c: -last[q, c]) + by_first[k:])
        hits = np.take_along_axis(own, np.array(order), 1)
        right.append(hits.argmax(1))
        theirs.append(np.where(hits[:, :k].any(1), hits.argmax(1), 0))
        grades = graded[part[::-1]]
        place = -np.argsort(order, axis=1).astype(np.float32)
        gains.append(ndcg.ndcg(place, grades.T if len(first) == size else grades))
      reports.append(
        (
          {f"{d}_r1": 100 * np.mean(r == 0) for d, r in zip(("i2t", "t2i"), right, strict=True)}
          | ndcg.means("rougeL", *gains),
          {f"{d}_r1": 100 * np.mean(r == 0) for d, r in zip(("i2t", "t2i"), theirs, strict=True)}
          | ndcg.means("rougeL", *gains, published=True),
        )
      )
  (right, theirs), *folds = reports
  assert theirs["t2i_r1"] > right["t2i_r1"] + 20
  for prefix, want in (("", right), ("published_", theirs)):
    assert {k: out[prefix + k] for k in want} == pytest.approx(want)
  for n, prefix in enumerate(("folds2_", "published_folds2_")):
    want = {k: np.mean([fold[n][k] for fold in folds]) for k in right}
    assert {k: out[prefix + k] for k in want} == pytest.approx(want)
  assert out["published_folds2_rsum"] == pytest.approx(36 * out["published_folds2_mean_r"])
  first = {k.removeprefix("first_"): v for k, v in out.items() if k.startswith("first_")}
  assert {k: first[k] for k in metrics.summarise(scores, OWNER)} == metrics.summarise(scores, OWNER)
  assert first["i2t_ndcg_rougeL"] == pytest.approx(ndcg.ndcg(scores, graded.T).mean())
  assert not any(k.startswith("published") for k in first)


def test_mix_is_chosen_on_val(tiny_data, built, home, caplog):
  """Of several weights the best on val is used, there and on test, in all folds."""
  rng = np.random.default_rng(2)
  own, noise = np.arange(12)[:, None] == OWNER, rng.random((3, 12, 60), np.float32)
  second = own + 1.5 * noise[0]
  first = {"val": own + 2 * noise[1], "test": own + 4 * noise[2]}
  everything = scored.match(np.arange(12), OWNER, [])

  def run(key, **changes):
    config = tiny.team(tiny_data, eval__folds=2, **changes)
    ev = evaluator(config, built["team"], None, second)
    ev._first_stage = lambda state, split, *_: (first[split.name], everything)
    return ev(None, key)

  mixes = (0.0, 0.5, 100.0)
  every = {mix: run("val", eval__stage_mix=mix) for mix in mixes}
  best = max(mixes, key=lambda mix: every[mix]["rsum"])
  assert best == 0.5
  chosen = dict(eval__stage_mix=7.0, eval__stage_mixes=mixes)
  with caplog.at_level("INFO"):
    assert run("val", **chosen) == every[best] | {"stage_mix": best}
  assert "stage_mix 0.5 has the best rsum (0: " in caplog.text
  tested = run("test", **chosen)
  assert tested == run("test", eval__stage_mix=best) | {"stage_mix": best}
  assert "folds2_rsum" in tested
  with pytest.raises(
    UserError, match=r"eval\.metric, which is 'accuracy'; the second stage has i2t"
  ):
    run("val", eval__metric="accuracy", **chosen)


def test_what_mixes_need(tiny_data, built):
  same = tiny.team(tiny_data, eval__stage_mixes=(0.0, 1.0), data__val="test")
  with pytest.raises(UserError, match=r"chosen on config\.data\.val, which is the test"):
    checks.check_splits(same.eval, inputs.from_config(same))
  words = tiny.team(tiny_data, eval__stage_mixes=("much",))
  with pytest.raises(UserError, match=r"stage_mixes is \('much',\): expected numbers"):
    retrieval.from_config(words, inputs.from_config(words), built["team"])
  one_stage = tiny.config(tiny_data, eval__stage_mixes=(0.0, 1.0))
  with pytest.raises(UserError, match=r"stage_mixes is \(0.0, 1.0\), and there is one stage"):
    retrieval.from_config(one_stage, inputs.from_config(one_stage), built["config"])


def test_table_names_a_second_stage_that_lowers_the_measure(caplog):
  owner, rng = np.repeat(np.arange(6), 2), np.random.default_rng(0)
  report = metrics.summarise(rng.random((6, 12), np.float32), owner)
  better = {f"first_{k}": v for k, v in report.items()} | {"first_rsum": report["rsum"] + 3}
  with caplog.at_level("INFO"):
    tables.log_retrieval("step 5", report | better)
  text = f"lowers rsum from {report['rsum'] + 3:.2f} to {report['rsum']:.2f}; config.eval.stage_mix"
  assert "the second stage lowers rsum by 3.00" in caplog.text and text in caplog.text
  caplog.clear()
  with caplog.at_level("INFO"):
    tables.log_retrieval("step 5", report | better, "t2i_r1")
  assert "lowers" not in caplog.text


def test_table(monkeypatch):
  rows = []
  monkeypatch.setattr(tables.logging, "info", lambda _, text: rows.extend(text.split("\n")))
  rng = np.random.default_rng(0)
  scores, graded = rng.random((6, 12), np.float32), rng.random((12, 6), np.float32)
  report = metrics.summarise(scores, np.repeat(np.arange(6), 2))
  tables.log_retrieval("val", report)
  assert rows[0] == "val" and "NDCG" not in rows[1] and len(rows) == 6
  assert rows[-1].split()[::2] == ["mean_r", "mean_r1"]
  rows.clear()
  gains = ndcg.ndcg(scores, graded.T), ndcg.ndcg(scores.T, graded)
  report |= ndcg.means("rougeL", *gains)
  every = report | {f"first_{k}": v for k, v in report.items()}
  every |= {f"published_{k}": v for k, v in report.items()} | {"folds5_ndcg_rougeL": 0.12345}
  tables.log_retrieval("test", every)
  titles = [row for row in rows if row.startswith("test")]
  assert titles == ["test, first stage", "test, second stage", "test, published protocol"]
  assert rows[1].endswith("NDCG rougeL") and rows[2].endswith(f"{gains[0].mean():.4f}")
  assert "folds5_ndcg_rougeL 0.1235" in rows[-1] or "folds5_ndcg_rougeL 0.1234" in rows[-1]
