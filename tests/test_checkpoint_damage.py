"""Checkpoints that are damaged, incomplete or without a manifest are never restored silently."""

import contextlib
import logging
import pathlib
import shutil
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

from xmodal_jax.checkpoints import checkpointer
from xmodal_jax.checkpoints import manifest as manifest_lib
from xmodal_jax.optim import train_state

# Orbax leaves asyncio tasks behind when it reads damaged files.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

META = dict(system="clip", metric="rsum", fingerprint="f", pending=False)
RSUM = {3: 1.0, 6: 3.0, 9: 2.0}


def state_of(step: int) -> train_state.TrainState:
  w = jax.random.normal(jax.random.key(step), (40, 50))
  return train_state.TrainState(jnp.int32(step), {"w": w}, {}, (jnp.full(3, step), {"mu": w + 1}))


def want() -> train_state.TrainState:
  state = state_of(0)
  return checkpointer.abstract_state(state, jax.tree.map(lambda x: x.sharding, state))


def opened(workdir, **kw) -> checkpointer.Checkpoints:
  return checkpointer.Checkpoints(workdir, **dict(keep=3, metric="rsum") | kw)


def same(state: train_state.TrainState, step: int) -> bool:
  return jax.tree.all(jax.tree.map(np.array_equal, state, state_of(step)))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
  """A workdir with steps 3, 6 (the best) and 9."""
  workdir = tmp_path_factory.mktemp("written")
  with contextlib.closing(opened(workdir)) as checkpoints:
    for step, rsum in RSUM.items():
      checkpoints.save(step, state_of(step), META, {"rsum": rsum})
  return workdir


@pytest.fixture
def copied(written, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(written, tmp_path / "run"))


def test_save_returns_after_a_copy_on_the_devices(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpointer, "_room_for_copy", lambda state: True)
  with contextlib.closing(opened(tmp_path)) as checkpoints:
    going, go = threading.Event(), threading.Event()
    real = checkpoints.writer.save

    def slow(folder, args):
      assert args["model"].item["params"]["w"].sharding == rows  # each device copied its own shard
      going.set()
      assert go.wait(60)
      real(folder, args=args)

    monkeypatch.setattr(checkpoints.writer, "save", slow)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for step in (3, 6):
      state = state_of(step)
      state.params["w"] = jax.device_put(state.params["w"], rows)
      checkpoints.save(step, state, META)  # returns before anything is written
      assert going.wait(60) and not checkpoints.pending.done()
      for x in jax.tree.leaves(state):
        x.delete()  # as the donation to the next step does
      go.set()
      checkpoints.wait()
      assert same(checkpoints.restore(step, want()), step)
      going.clear(), go.clear()
    # The next call raises a failure of the background thread.
    monkeypatch.setattr(checkpoints.writer, "save", lambda *args, **kw: 1 / 0)
    checkpoints.save(9, state_of(9), META)
    with pytest.raises(checkpointer.CheckpointError, match="the latest is of step 6"):
      checkpoints.wait()


@pytest.mark.parametrize(
  "limit, in_use, peak, fits",
  [
    (60_000, 9_000, 20_000, True),
    (60_000, 9_000, 40_000, False),  # 20 kB left, for a copy of 8 and 31 of a step
    (None, 9_000, 20_000, False),
  ],
)
def test_room_beside_a_step(limit, in_use, peak, fits):
  stats = {"bytes_in_use": in_use, "peak_bytes_in_use": peak}
  stats |= {"bytes_limit": limit} if limit else {}

  class Device:
    memory_stats = staticmethod(lambda: stats)

  halves = types.SimpleNamespace(shard_shape=lambda s: (s[0] // 2,), device_set={Device()})
  x = types.SimpleNamespace(shape=(2000,), dtype=np.dtype("float64"), sharding=halves)
  assert checkpointer._room_for_copy([x]) == fits


def files_of(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
  folder = workdir / "checkpoints" / str(step)
  return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(path: pathlib.Path, bit: int) -> None:
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


@contextlib.contextmanager
def changed(path: pathlib.Path, change):
  """Applies change(path); restores the file and the name of its folder afterwards."""
  data = path.read_bytes() if path.exists() else None
  change(path)
  try:
    yield
  finally:
    step = next(p for p in path.parents if p.parent.name == "checkpoints")
    if (aside := step.parent / f"{step.name}.damaged").exists():
      aside.replace(step)
    path.unlink(missing_ok=True)
    if data is not None:
      path.write_bytes(data)


def falls_back(workdir: pathlib.Path, path: pathlib.Path, caplog, read_only: bool = False) -> bool:
  """Whether step 6 is restored instead of 9, with a warning that names the damaged file."""
  caplog.clear()
  with contextlib.closing(opened(workdir, read_only=read_only)) as checkpoints:
    step, meta, state = checkpoints.restore_latest(want())
  name = str(path.relative_to(workdir / "checkpoints" / "9"))
  warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
  warnings = [m for m in warnings if m.startswith("checkpoint of step 9 is damaged and not used: ")]
  aside = (workdir / "checkpoints" / "9.damaged").exists()
  named = len(warnings) == 1 and f"{name} " in warnings[0]
  return step == 6 and meta == META and same(state, 6) and named and aside != read_only


def count_fall_backs(workdir: pathlib.Path, caplog, flips: int, seed: int) -> int:
  """How many of `flips` flips of a random bit in a random file of step 9 were detected."""
  rng, files, noticed = np.random.default_rng(seed), files_of(workdir, 9), 0
  for i in range(flips):
    # Each file once before any file twice.
    if i % len(files) == 0:
      order = rng.permutation(len(files))
    path = files[order[i % len(files)]]
    bit = int(rng.integers(8 * path.stat().st_size))
    with changed(path, lambda p: flip(p, bit)):
      noticed += falls_back(workdir, path, caplog, read_only=bool(i % 2))
  return noticed


def test_intact(copied, caplog):
  checkpoints = opened(copied)
  step, meta, state = checkpoints.restore_latest(want())
  assert (step, meta) == (9, META) and same(state, 9) and not caplog.records
  step, _, model = checkpoints.restore_best()
  assert step == checkpoints.best() == 6
  np.testing.assert_array_equal(model["params"]["w"], state_of(6).params["w"])
  with pytest.raises(ValueError, match="not at step 9"):
    checkpoints.restore_latest(want(), check=refuse)


def refuse(step, meta):
  raise ValueError(f"not at step {step}")


@pytest.mark.parametrize("plans", [1 << 20, 0], ids=["first", "while_reading"])
def test_any_flipped_bit(written, caplog, monkeypatch, plans):
  """Files are checked before Orbax reads them, or at the same time."""
  monkeypatch.setattr(checkpointer, "_CHECK_FIRST", plans)
  assert count_fall_backs(written, caplog, 40, seed=plans) == 40
  assert len(files_of(written, 9)) < 40


@pytest.mark.slow
def test_thousand_flipped_bits(written, caplog, monkeypatch):
  started = time.monotonic()
  noticed = count_fall_backs(written, caplog, 700, seed=1)
  monkeypatch.setattr(checkpointer, "_CHECK_FIRST", 0)
  noticed += count_fall_backs(written, caplog, 300, seed=2)
  print(f"{noticed} of 1,000 flips fell back, in {time.monotonic() - started:.0f} s")
  assert noticed == 1000


def test_every_file_truncated_or_missing(written, caplog):
  for i, path in enumerate(files_of(written, 9)):
    size = path.stat().st_size
    shorter = lambda p: p.write_bytes(p.read_bytes()[: size // 2])
    with changed(path, shorter):
      assert falls_back(written, path, caplog), path
      if path.name != manifest_lib.MANIFEST:
        assert f"has {size // 2} bytes, {size} were written" in caplog.text
    with changed(path, pathlib.Path.unlink):
      assert falls_back(written, path, caplog, read_only=bool(i % 2)), path
      assert "is missing" in caplog.text


def test_foreign_file_or_manifest(written, caplog):
  path = written / "checkpoints" / "9" / "train" / "d" / "junk"
  with changed(path, lambda p: p.write_text("junk")):
    assert falls_back(written, path, caplog)
    assert "train/d/junk does not belong to this checkpoint" in caplog.text
  manifest = written / "checkpoints" / "9" / manifest_lib.MANIFEST
  other = written / "checkpoints" / "6" / manifest_lib.MANIFEST
  with changed(manifest, lambda p: shutil.copy(other, p)):
    assert falls_back(written, manifest, caplog)
    assert "manifest is that of step 6" in caplog.text


def test_one_step_by_its_number(copied):
  path = files_of(copied, 9)[-1]
  flip(path, 3)
  checkpoints = opened(copied, read_only=True)
  with pytest.raises(checkpointer.CheckpointError, match=f"step 9 .* is damaged: .*{path.name}"):
    checkpoints.restore(9, want())
  assert same(checkpoints.restore(6, want()), 6)


def test_damaged_best(copied):
  """The next best is used, whether the parameters or only the metrics are damaged."""
  flip(copied / "checkpoints" / "6" / "metrics" / "metrics", 20)
  assert opened(copied, read_only=True).best() == 9
  assert opened(copied, read_only=True).restore_best()[0] == 9
  flip(copied / "checkpoints" / "9" / "model" / "manifest.ocdbt", 20)
  checkpoints = opened(copied)
  assert checkpoints.restore_best()[0] == 3
  assert sorted(p.name for p in (copied / "checkpoints").glob("*.damaged")) == [
    "6.damaged",
    "9.damaged",
  ]
  assert checkpoints.latest() == 3


def test_nothing_intact_is_an_error(copied, caplog):
  for step in RSUM:
    flip(files_of(copied, step)[-1], 0)
  name = files_of(copied, 9)[-1].name
  with pytest.raises(
    checkpointer.CheckpointError, match=f"(?s)no intact .*step 9: .*{name} .*step 3: "
  ):
    opened(copied, read_only=True).restore_best()
  for _ in range(2):  # running again does not restart from step 0
    with pytest.raises(checkpointer.CheckpointError, match=r"(?s)no intact .*Put back a copy") as e:
      opened(copied).restore_latest(want())
  assert "set aside: 3.damaged, 6.damaged, 9.damaged" in str(e.value)
  shutil.rmtree(copied / "checkpoints")
  assert opened(copied).restore_latest(want()) is None


def killed_before_manifest(workdir, step) -> None:
  """The state of the disk if the process is killed after Orbax has committed."""
  with contextlib.closing(opened(workdir)) as checkpoints:
    checkpoints._finish = lambda step: checkpoints.writer.wait_until_finished()
    checkpoints.save(step, state_of(step), META)
    checkpoints.wait()
    assert checkpoints.latest() != step  # nor is it complete for a running process


def test_killed_before_the_manifest(copied, caplog):
  killed_before_manifest(copied, 12)
  assert opened(copied, read_only=True).latest() == 9
  checkpoints = opened(copied)
  assert f"removing {copied}/checkpoints/12: the save was interrupted" in caplog.text
  assert {p.name for p in (copied / "checkpoints").iterdir()} == {"3", "6", "9", "manifests"}
  step, _, state = checkpoints.restore_latest(want())
  assert step == 9 and same(state, 9)
  checkpoints.save(12, state_of(12), META)  # the same step is saved again
  checkpoints.wait()
  assert checkpoints.restore_latest(want())[0] == 12


def test_lost_manifest_keeps_the_step(copied, caplog):
  """It was whole once: nothing of it is removed, also if it happens again."""
  for names in ({"9.damaged"}, {"9.damaged", "9.damaged-2"}):
    (copied / "checkpoints" / "9" / manifest_lib.MANIFEST).unlink()
    checkpoints = opened(copied)
    assert "checkpoint of step 9 is damaged and not used: manifest is missing" in caplog.text
    assert {p.name for p in (copied / "checkpoints").glob("*.damaged*")} == names
    assert checkpoints.restore_latest(want())[0] == 6
    checkpoints.save(9, state_of(9), META)
    checkpoints.close()


def test_killed_in_the_first_save(tmp_path):
  """Without a complete checkpoint the run starts from step 0."""
  killed_before_manifest(tmp_path, 3)
  assert opened(tmp_path).restore_latest(want()) is None
  assert opened(tmp_path).restore_latest(want()) is None


def test_leftovers_of_interrupted_saves(copied):
  folder = copied / "checkpoints"
  shutil.copytree(folder / "9", folder / f"12{ocp.path.step.TMP_DIR_SUFFIX}")
  shutil.copytree(folder / "9", folder / "2.removed.orbax-checkpoint-tmp")
  (folder / "9.manifest.orbax-checkpoint-tmp").write_text("half")
  names = lambda: {p.name for p in folder.iterdir()}
  opened(copied, read_only=True).restore_latest(want())
  assert len(names()) == 7  # a reader keeps them: the run may be active
  opened(copied)
  assert names() == {"3", "6", "9", "manifests"}


def test_killed_while_a_step_is_replaced(copied):
  """A step that is saved again with its metrics is never missing on the disk."""
  (copied / "checkpoints" / "9").replace(copied / "checkpoints" / "9.replaced")
  killed_before_manifest(copied / "other", 9)
  shutil.copytree(copied / "other" / "checkpoints" / "9", copied / "checkpoints" / "9")
  checkpoints = opened(copied)
  assert checkpoints.restore_latest(want())[0] == 9 and checkpoints.metrics(9) == {"rsum": 2.0}
  checkpoints.save(9, state_of(9), META, {"rsum": 7.0})
  checkpoints.close()
  assert {p.name for p in (copied / "checkpoints").iterdir()} == {"3", "6", "9", "manifests"}
  assert opened(copied, read_only=True).metrics(9) == {"rsum": 7.0}


def test_checkpoints_without_manifests(copied, caplog):
  folder = copied / "checkpoints"
  for path in folder.rglob(manifest_lib.MANIFEST):
    path.unlink()
  (folder / "manifests").unlink()
  reader = opened(copied, read_only=True)
  assert reader.restore_best()[0] == reader.best() == 6
  assert "damage cannot be detected" in caplog.text
  caplog.clear()
  assert opened(copied).restore_latest(want())[0] == 9
  assert "they get manifests now, as they are" in caplog.text
  flip(files_of(copied, 9)[-1], 5)
  assert opened(copied).restore_latest(want())[0] == 6
  # If only some steps have no manifest, they are damaged.
  (folder / "6" / manifest_lib.MANIFEST).unlink()
  assert opened(copied).restore_latest(want())[0] == 3


def test_optimizer_with_and_without_clipping(tmp_path):
  """The moments are kept when a part without arrays comes into an optimizer, or goes."""
  plain = state_of(3)
  clipped = plain.replace(opt_state=(optax.EmptyState(), *plain.opt_state))
  longer = plain.replace(opt_state=(*plain.opt_state, jnp.zeros(3)))
  shapes = lambda x: checkpointer.abstract_state(x, jax.tree.map(lambda x: x.sharding, x))
  for name, saved, wanted in (("plain", plain, clipped), ("clipped", clipped, plain)):
    with contextlib.closing(opened(tmp_path / name)) as checkpoints:
      checkpoints.save(3, saved, META)
      checkpoints.wait()
      found = checkpoints.restore_latest(shapes(wanted))[2]
      assert jax.tree.structure(found) == jax.tree.structure(wanted)
      assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))
      with pytest.raises(checkpointer.CheckpointError, match="does not fit the config"):
        checkpoints.restore_latest(shapes(longer))


def test_which_steps_are_kept(tmp_path):
  """The latest, and the best: of equal ones the newest, never a damaged one."""
  checkpoints = opened(tmp_path, keep=1)
  steps = lambda: {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  for step, rsum, kept in ((1, 5, {"1"}), (2, 5, {"2"}), (3, 1, {"2", "3"}), (4, None, {"2", "4"})):
    checkpoints.save(step, state_of(step), META, {"rsum": rsum} if rsum else None)
    checkpoints.wait()
    assert steps() == kept
  flip(tmp_path / "checkpoints" / "2" / "metrics" / "metrics", 9)
  checkpoints.save(5, state_of(5), META, {"rsum": 2})
  checkpoints.close()
  assert steps() == {"5"}


def test_shares_of_several_processes(tmp_path, monkeypatch):
  """A file of many blocks: the shares cover all bytes, and one process finds the damaged block."""
  monkeypatch.setattr(manifest_lib, "BLOCK", 64)
  data = np.random.default_rng(0).bytes(1000)
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "large").write_bytes(data)
  (tmp_path / "small").write_bytes(b"")
  tmp_path = epath.Path(tmp_path)
  files = manifest_lib.sizes(tmp_path)
  assert files == {"a/large": 1000, "small": 0}
  parts = [manifest_lib.hashes(tmp_path, files, (i, 3), 2) for i in range(3)]
  assert sum(len(blocks) for part in parts for blocks in part.values()) == 17
  manifest_lib.write(tmp_path, 4, files, parts)
  listed = manifest_lib.read(tmp_path, 4)
  assert [manifest_lib.content_problems(tmp_path, listed, (i, 3)) for i in range(3)] == [[]] * 3
  (tmp_path / "a" / "large").write_bytes(data[:700] + b"?" + data[701:])
  found = [manifest_lib.content_problems(tmp_path, listed, (i, 3)) for i in range(3)]
  assert [len(x) for x in found] == [0, 1, 0]  # block 10
  assert "a/large is not what was written" in found[1][0] and "from 640 on" in found[1][0]


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_0_or_less_keeps_all(tmp_path, keep):
  with contextlib.closing(opened(tmp_path, keep=keep)) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_of(step), META)
  with contextlib.closing(opened(tmp_path, keep=keep)) as checkpoints:
    assert same(checkpoints.restore_latest(want())[2], 3)
    assert checkpoints.folders.complete_steps() == [1, 2, 3]
