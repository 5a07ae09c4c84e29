"""What `--mode eval` evaluates, and which results it may replace."""

import json
import shutil

import pytest
import tiny

from xmodal_jax.evaluation import retrieval
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.runtime import results, workdir
from xmodal_jax.training import loop

FILE = dict(kind="zip", source="ViT-B-32.pt", sha256="1f")


def write(folder, source, *, data="d1", task=None, run=False):
  protocol = {"split": "test"} | ({"task": task} if task else {})
  facts = dict(protocol=protocol, dataset="coco", fingerprint=data, source=source, run=run)
  return results.write(workdir.absolute(folder), {"rsum": 1.0}, **facts)


def names(folder) -> list[str]:
  return sorted(p.name for p in folder.glob("results*.json"))


def source_of(path) -> dict:
  return json.loads(path.read_text())["checkpoint"]


def test_results_of_something_else_have_a_name_of_their_own(tmp_path):
  own = lambda step: dict(kind="checkpoint", source=str(tmp_path), step=step)
  (tmp_path / "checkpoints").mkdir()
  write(tmp_path, FILE)  # before the run is finished
  (first,) = names(tmp_path)
  assert first.startswith("results-ViT-B-32.pt-")
  write(tmp_path, own(5), run=True)
  assert names(tmp_path) == [first, "results.json"]
  # Evaluated again, also as a later step with a digest: results of the same run.
  write(tmp_path, own(7) | {"sha256": "2e"})
  assert names(tmp_path) == [first, "results.json"]
  assert source_of(tmp_path / "results.json")["step"] == 7
  write(tmp_path, FILE)
  assert names(tmp_path) == [first, "results.json"]
  # Another version of the file, other data and another task are something else.
  write(tmp_path, FILE | {"sha256": "3d"})
  write(tmp_path, own(7), data="d2")
  write(tmp_path, own(7), task="zero-shot classification")
  assert len(names(tmp_path)) == 5 and source_of(tmp_path / "results.json") == own(7) | {
    "sha256": "2e"
  }


def test_a_folder_without_a_run(tmp_path, caplog):
  """Its first results are results.json, until a run needs the name."""
  write(tmp_path, FILE)
  write(tmp_path, FILE)
  assert names(tmp_path) == ["results.json"]
  other = FILE | {"source": "a/b.pt"}
  write(tmp_path, other)
  assert len(names(tmp_path)) == 2 and source_of(tmp_path / "results.json") == FILE
  own = dict(kind="checkpoint", source=str(tmp_path), step=1)
  write(tmp_path, own, run=True)
  assert source_of(tmp_path / "results.json") == own and "renamed to results-ViT" in caplog.text
  assert sorted(source_of(p)["source"] for p in tmp_path.glob("results-*")) == [
    "ViT-B-32.pt",
    "a/b.pt",
  ]
  (tmp_path / "results.json").write_text("[]")
  write(tmp_path, own, run=True)
  assert "results-unknown.json" in names(tmp_path)


def test_eval_of_a_finished_run_is_of_its_best_checkpoint(tiny_data, tmp_path, caplog):
  """The same command as for training: config.init is then what the run started from."""
  folder, before = tmp_path / "run", tmp_path / "before"
  with tiny.toy_registered():
    config = tiny.toy(tiny_data, total="2 steps", eval__every="2 steps", eval__metric="rsum")
    loop.train(config, before)
    config.init, config.optim.lr = str(before), 0.5
    trained = loop.train(config, folder)
    assert names(folder) == ["results.json"]
    with caplog.at_level("INFO"):
      again = retrieval.evaluate(config, folder)
    assert again["test"] == trained["test"]
    assert again["checkpoint"]["source"] == str(folder) and names(folder) == ["results.json"]
    title = f"test, checkpoint of step 2: {folder}"
    assert title in caplog.text and f"not config.init={before}" in caplog.text
    given = retrieval.evaluate(config, folder, init_given=True)
    assert given["checkpoint"]["source"] == str(before)
    assert source_of(folder / "results.json")["source"] == str(folder)
    assert len(names(folder)) == 2
    # Without a checkpoint config.init is evaluated.
    fresh = retrieval.evaluate(config, tmp_path / "fresh")
    assert fresh["test"] == given["test"] and names(tmp_path / "fresh") == ["results.json"]
    with pytest.raises(ValueError, match="none"):
      config.init = ""
      retrieval.evaluate(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_cached_features_are_of_the_run_that_is_there(tiny_data, tmp_path):
  """A workdir that was removed and trained again, with the cache left behind."""
  with tiny.toy_registered():
    config = tiny.toy(tiny_data, total="1 steps", eval__cache=True)
    first = loop.train(config, tmp_path)
    (old,) = tmp_path.glob("embeddings-*.npz")
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "config.json").unlink()
    config.optim.lr, config.seed = 0.5, 1
    second = loop.train(config, tmp_path)
    assert len(list(tmp_path.glob("embeddings-*.npz"))) == 2 and old.exists()
    assert first["test"] != second["test"]


def test_descriptions():
  assert state_lib.describe(FILE) == "zip: ViT-B-32.pt"
