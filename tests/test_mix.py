"""Training on several datasets: the dataset of each batch, restarts and processes."""

import dataclasses
import hashlib
import pathlib
import subprocess
import sys

import child_process
import jax
import numpy as np
import pytest
import tiny
from test_pipeline import FakeSplit, assert_same, join, stream, take

from xmodal_jax import config as config_lib
from xmodal_jax.data import image, inputs, mix, order, pipeline, records
from xmodal_jax.data.preparing import annotations, builder, shapes, sources
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.distributed import sharding
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import results, setup, workdir
from xmodal_jax.training import loop

ROOT = pathlib.Path(__file__).parents[1]
BATCH = 8


def write_shapes(folder, seed: int, train: int) -> str:
  sizes = {"train": train, "val": 12, "test": 12}
  return str(shapes.write(folder, seed=seed, sizes=sizes, name=f"shapes_{seed}"))


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory) -> list[str]:
  folder = tmp_path_factory.mktemp("mixed")
  return [write_shapes(folder, 1, 50), write_shapes(folder, 2, 30)]


@pytest.fixture(scope="module", params=["rendered", "photographs"])
def three_sets(request, two_sets, tmp_path_factory) -> list[str]:
  """Folders of datasets of 50, 30 and 35 images; the third is rendered or of photographs."""
  folder = tmp_path_factory.mktemp("third")
  if request.param == "rendered":
    return [*two_sets, write_shapes(folder, 3, 35)]
  source = request.getfixturevalue("shared_data") / "flickr8k_mini"
  found = sources.read_karpathy(source / "dataset_flickr8k_mini.json", source / "images")
  examples = {"train": annotations.examples(found["train"][:35])}
  path = builder.write_dataset(folder, "flickr8k_mini", "1.0.0", examples, description="x")
  return [*two_sets, str(path)]


def config(folders, mode="debias", **changes):
  fixed = dict(batch_size=BATCH, data__captions="all", data__eval_dir=folders[0], seed=5)
  return tiny.config(",".join(folders), data__mix=mode, **(fixed | changes))


def joined(folders) -> mix.Joined:
  return mix.Joined([records.open_split(f, "train") for f in folders], folders)


def first(n: int, found: inputs.Inputs, step: int = 0) -> list[dict]:
  batches = found.train(step)
  out = [next(batches) for _ in range(n)]
  batches.close()
  return out


def test_debias_draws_in_proportion_to_the_samples(three_sets):
  split = joined(three_sets)
  sizes = np.array(mix.sample_counts(split, "all"))
  assert sizes.tolist() == [250, 150, 175]
  mixture = mix.mixture(split, "all", "debias", BATCH, seed=5)
  drawn = np.bincount([mixture(step)[0] for step in range(2000)], minlength=3)
  share = sizes / sizes.sum()
  assert (abs(drawn - 2000 * share) < 3 * np.sqrt(2000 * share * (1 - share))).all()


def test_every_debiased_batch_is_of_one_data_set(three_sets):
  found = inputs.from_config(config(three_sets))
  split = found.split("train")
  offsets = order.caption_offsets(split.captions_per_record)
  batches = first(12, found)
  assert {int(b["dataset"][0]) for b in batches} == {0, 1, 2}
  for step, b in enumerate(batches):
    assert b["dataset"].dtype == np.int32 and b["dataset"].shape == (BATCH,)
    (source,) = set(b["dataset"].tolist())
    assert source == mix.mixture(split, "all", "debias", BATCH, 5)(step)[0]
    # Rows equal the records of that dataset that their ids name.
    own = records.open_split(three_sets[source], "train")
    for row, (i, caption) in enumerate(zip(b["image_id"], b["caption_id"], strict=True)):
      record = own.read(int(i - split.starts[source]))
      np.testing.assert_array_equal(b["image"][row], image.load(record.image, found.transform))
      ids, _ = found.tokenizer([record.captions[caption - offsets[i]]], 24)
      np.testing.assert_array_equal(b["text_ids"][row], ids[0])


READER = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import numpy as np
import test_mix
from xmodal_jax.data import inputs
for batch in inputs.from_config(test_mix.config({folders!r})).train(0):
  print(test_mix.digest(batch), flush=True)
"""


def digest(batch) -> str:
  out = hashlib.sha256()
  for key in sorted(batch):
    out.update(np.ascontiguousarray(batch[key]))
  return out.hexdigest()


@pytest.mark.full
def test_killed_and_started_again(two_sets):
  code = READER.format(tests=str(ROOT / "tests"), folders=two_sets)
  env = child_process.environment(JAX_PLATFORMS="cpu")
  process = subprocess.Popen(
    [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True
  )
  before = [process.stdout.readline().strip() for _ in range(7)]
  process.kill()
  process.communicate()
  assert process.returncode == -9
  c = config(two_sets)
  straight = [digest(b) for b in first(12, inputs.from_config(c))]
  assert before == straight[:7]
  assert [digest(b) for b in first(5, inputs.from_config(c), step=7)] == straight[7:]


@dataclasses.dataclass
class Case:
  """Two datasets in memory, the second with images that cannot be read or decoded."""

  large: FakeSplit
  small: FakeSplit

  @property
  def split(self) -> mix.Joined:
    return mix.Joined([self.large, self.small], ["large", "small"])


@pytest.fixture
def case() -> Case:
  return Case(FakeSplit(n=13), FakeSplit(n=10, unreadable={2}, broken={7}))


KW = dict(max_bad_fraction=0.2)


@pytest.mark.parametrize("mode", order.MIXES)
def test_restarts_threads_and_processes_do_not_change_the_data(case, mode):
  kw = {"mix": mode, **KW}
  whole = take(20, case.split, threads=4, **kw)
  for step in (1, 13, 14, 17):
    assert_same(whole[step:][:3], take(3, case.split, step=step, threads=1, **kw))
  halves = [take(3, case.split, rows=range(4 * p, 4 * p + 4), step=13, **kw) for p in range(2)]
  for want, *rows in zip(whole[13:16], *halves, strict=True):
    for p in range(2):
      assert_same([rows[p]], [{k: v[4 * p : 4 * p + 4] for k, v in want.items()}])


@pytest.mark.parametrize("mode", ["sequential", "debias"])
def test_a_bad_record_is_replaced_inside_its_data_set(case, mode):
  """8 + 6 batches are an epoch; 40 of them meet both bad records of the second dataset."""
  seen = []
  batches = take(
    40, case.split, mix=mode, on_bad=lambda record, why: seen.append((record, why)), **KW
  )
  assert all(len(set(b["dataset"].tolist())) == 1 for b in batches)
  for b in batches:
    np.testing.assert_array_equal(b["dataset"], b["image_id"] >= 13)
  assert not {15, 20} & set(join(batches)["image_id"].tolist())
  assert {record for record, _ in seen} == {
    15,
    20,
  }  # numbered over both datasets; named by number in their own
  reasons = " ".join(why for _, why in sorted(seen))
  assert "record 2 of split 'fake' in shard: crc differs" in reasons
  assert "record 7 (7.png) of split 'fake' of dataset small: OSError" in reasons
  good = mix.Joined([FakeSplit(n=13), FakeSplit(n=10)], ["large", "small"])
  for a, b in zip(batches, take(40, good, mix=mode), strict=True):
    same = ~np.isin(b["image_id"], [15, 20])
    np.testing.assert_array_equal(a["caption_id"][same], b["caption_id"][same])


def test_a_bad_record_is_replaced_inside_its_data_set_in_a_shuffle(case):
  good = mix.Joined([FakeSplit(n=13), FakeSplit(n=10)], ["large", "small"])
  pairs = zip(take(28, case.split, **KW), take(28, good), strict=True)
  met = 0
  for a, b in pairs:
    np.testing.assert_array_equal(a["dataset"], b["dataset"])
    met += (a["image_id"] != b["image_id"]).sum()
  assert met > 10


def test_bad_records_are_counted_over_all_data_sets(case):
  with pytest.raises(pipeline.DataError, match="of the 23 records of split 'fake of large"):
    take(40, case.split, max_bad_fraction=0.05)
  assert len(take(40, case.split, max_bad_fraction=0.1)) == 40  # two of 23


@pytest.mark.parametrize("captions", ["all", "one"])
def test_sequential_visits_each_data_set_in_turn(captions):
  sizes = (13, 20)
  split = mix.Joined([FakeSplit(n=n, captions=lambda i: 2) for n in sizes], ["a", "b"])
  key, counts = ("caption_id", (26, 40)) if captions == "all" else ("image_id", sizes)
  steps = [n // BATCH for n in counts]
  batches = take(2 * sum(steps), split, mix="sequential", captions=captions)
  sets = [int(b["dataset"][0]) for b in batches]
  assert sets == ([0] * steps[0] + [1] * steps[1]) * 2
  epochs = [join(batches[: sum(steps)]), join(batches[sum(steps) :])]
  for epoch in epochs:
    for source in range(2):
      ids = epoch[key][epoch["dataset"] == source]
      assert len(set(ids.tolist())) == len(ids) == steps[source] * BATCH
  assert (epochs[0][key] != epochs[1][key]).mean() > 0.8


def test_data_sets_of_one_size_are_in_orders_of_their_own():
  split = mix.Joined([FakeSplit(n=8), FakeSplit(n=8)], ["a", "b"])
  ids = join(take(10, split, mix="sequential"))["caption_id"]
  assert (ids[:40] == ids[40:] - 40).sum() < 8


def test_shuffle_is_one_permutation_of_all():
  split = mix.Joined([FakeSplit(n=10), FakeSplit(n=4, captions=lambda i: 3)], ["a", "b"])  # 50 + 12
  batches = take(14, split, batch_size=BATCH)
  want = [order.permute(np.arange(56), 62, 3, epoch) for epoch in (0, 1)]
  np.testing.assert_array_equal(join(batches)["caption_id"], np.concatenate(want))
  np.testing.assert_array_equal(join(batches)["dataset"], np.concatenate(want) >= 50)


@pytest.mark.parametrize("mode", ["sequential", "debias"])
def test_one_data_set_is_what_it_was(mode):
  plain = take(5, FakeSplit(), step=16)
  assert "dataset" not in plain[0]
  assert_same(take(5, FakeSplit(), step=16, mix=mode), plain)


def test_a_joined_split_reads_its_parts():
  parts = [FakeSplit(n=3), FakeSplit(n=2)]
  parts[0].class_names = parts[1].class_names = ("x", "y")
  split = mix.Joined(parts, ["a", "b"])
  assert len(split) == 5 and split.class_names == ("x", "y")
  assert [r.filename for r in split] == ["0.png", "1.png", "2.png", "0.png", "1.png"]
  for i in (-1, 5):
    with pytest.raises(IndexError):
      split.read(i)
  parts[1].class_names = ("y", "x")
  with pytest.raises(ValueError, match="a and b have different classes"):
    _ = split.class_names


def test_what_cannot_be_mixed_is_found_at_once():
  large, small = FakeSplit(n=13), FakeSplit(n=1)
  with pytest.raises(ValueError, match="dataset small has 5 samples, fewer than a batch of 8"):
    stream(mix.Joined([large, small], ["large", "small"]), mix="debias")
  with pytest.raises(ValueError, match="images has no captions in split 'fake', and large has"):
    mix.Joined([large, FakeSplit(captions=lambda i: 0)], ["large", "images"])
  with pytest.raises(ValueError, match=r"dataset b: records without a caption.*\[1, 3"):
    both = mix.Joined([large, FakeSplit(captions=lambda i: 1 - i % 2)], ["a", "b"])
    stream(both, captions="one")
  with pytest.raises(ValueError, match="a given order"):
    stream(large, order=lambda epoch: np.arange(20), mix="debias")
  with pytest.raises(ValueError, match=r"data\.mix is 'mixed'"):
    stream(large, mix="mixed")


def test_config_names_the_data_sets(two_sets, monkeypatch):
  a, b = two_sets
  c = config([f" {a} ", b])
  found = inputs.from_config(c)
  assert found.samples() == 250 + 150
  steps = lambda m: inputs.from_config(config(two_sets, m, batch_size=32)).steps_per_epoch()
  assert [steps(m) for m in order.MIXES] == [400 // 32, 7 + 4, 7 + 4]  # 12, 11, 11
  assert len(found.split("val")) == 12
  prints = {
    inputs.from_config(config(folders, mode)).fingerprint()
    for folders in (two_sets, two_sets[::-1], [a])
    for mode in ("shuffle", "debias")
  }
  assert len(prints) == 5  # one dataset has the same for every mix
  assert records.open_split(a, "train").fingerprint in prints

  several = config(two_sets, data__eval_dir="")
  assert len(inputs.from_config(several).split("train")) == 80
  with pytest.raises(DatasetError, match=r"set config\.data\.eval_dir .* 'val' is used as val"):
    inputs.from_config(several).split("val")
  for bad in (f"{a},", f"{a},{a}"):
    with pytest.raises(ValueError, match="names of different datasets"):
      inputs.from_config(config([bad])).split("train")

  rendered = []
  monkeypatch.setattr(shapes, "ensure", lambda home: rendered.append(home) or a)
  assert inputs.from_config(config(["shapes", b])).split("train").names == ("shapes", b)
  assert len(rendered) == 1


def test_an_epoch_of_a_run_is_the_sum_of_whole_batches(two_sets):
  c = config(two_sets, batch_size=16, data__captions="one")
  found = inputs.from_config(c)
  assert found.steps_per_epoch() == 4  # 50 // 16 + 30 // 16; 80 // 16 is 5
  assert loop._run_length(found, c.batch_size, "3 epochs").total_steps == 12
  assert schedules.RunLength(80, 16, "3 epochs").total_steps == 15
  assert schedules.RunLength(80, 16, "3 epochs", 4).total_steps == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_takes_such_batches(two_sets, accumulate):
  c = config(two_sets, batch_size=16, accumulate=accumulate)
  built = setup.build(c)
  (host,) = first(1, inputs.from_config(c))
  batch = sharding.put_batch(host, sharding.batch_sharding(built.mesh))
  assert batch["dataset"].shape == (16,)
  loss = lambda batch: built.init_model().loss(batch, jax.random.key(0))[0]
  assert jax.eval_shape(loss, batch).shape == ()


def test_a_workdir_knows_what_was_trained_and_evaluated(two_sets, tmp_path):
  c = config(two_sets, data__eval_dir=two_sets[1])
  folder = workdir.absolute(tmp_path)
  workdir.record(folder, config_lib.flatten(c), 0, {})
  (folder / "checkpoints").mkdir()
  (folder / "checkpoints" / "manifests").write_text("whole")  # a step was saved
  split = inputs.from_config(c).split("test")
  facts = dict(protocol={"split": "test"}, source={"kind": "random weights"})
  facts |= dict(dataset=results.dataset_name(c.data), fingerprint=split.fingerprint)
  written = results.write(folder, {}, **facts)
  assert written["data"]["name"] == two_sets[1]
  with pytest.raises(workdir.WorkdirError, match=r"data\.mix: 'debias' -> 'shuffle'"):
    changed = config(two_sets, "shuffle", data__eval_dir=two_sets[1])
    workdir.check(folder, config_lib.flatten(changed))
