"""What a run of prepare_data.py leaves when it is killed or has no space, and what it logs."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import child_process
import pytest
from PIL import Image
from test_records import encoded_image

from tools import prepare_data
from xmodal_jax.data import progress, records
from xmodal_jax.data.preparing import ahead, builder, publish, summary

ROOT = pathlib.Path(__file__).parents[1]


def examples(caption: str, count: int = 3):
  for i in range(count):
    yield {"image": encoded_image(i), "image_id": i, "filename": f"{i}.jpg", "captions": [caption]}


def write(out: pathlib.Path, caption: str = "old", given=None, **kw) -> pathlib.Path:
  splits = {"train": given or examples(caption)}
  return pathlib.Path(
    builder.write_dataset(out, "toy", "1.0.0", splits, description="", overwrite=True, **kw)
  )


def caption(folder: pathlib.Path) -> str:
  return records.open_split(folder, "train").read(0).captions[0]


def names(out: pathlib.Path) -> list[str]:
  return sorted(p.name for p in (out / "toy").iterdir())


# A run that dies by SIGKILL after it has written the files of another dataset. Without TensorFlow.
KILLED = """if True:
  import os, shutil, signal, sys
  sys.path.insert(0, {root!r})
  from xmodal_jax.data.preparing import publish
  rename, exchange = os.rename, publish._exchange
  def die():
    os.kill(os.getpid(), signal.SIGKILL)
  def rename_and_die(a, b):
    rename(a, b)
    die()
  def exchange_and_die(a, b):
    assert exchange(a, b)
    die()
  final = publish.dataset_dir({out!r}, "toy", "1.0.0")
  with publish.publishing(final, ["train"], overwrite=True) as folder:
    shutil.copytree({new!r}, folder, dirs_exist_ok=True)
    {then}
"""


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> pathlib.Path:
  return write(tmp_path_factory.mktemp("new"), "new")


def kill(out: pathlib.Path, new: pathlib.Path, then: str) -> None:
  code = KILLED.format(root=str(ROOT), out=str(out), new=str(new), then=then)
  done = subprocess.run([sys.executable, "-c", code], env=child_process.environment())
  assert done.returncode == -signal.SIGKILL


def clean(out: pathlib.Path) -> None:
  publish.make_way(out, "toy", "1.0.0", overwrite=True)


def test_a_killed_run_is_removed_by_the_next_and_named(tmp_path, new, caplog):
  folder = write(tmp_path)
  kill(tmp_path, new, "die()")
  assert len(names(tmp_path)) == 3 and caption(folder) == "old"  # with a folder and its lock
  with caplog.at_level("WARNING"):
    write(tmp_path, "newer")
  assert names(tmp_path) == ["1.0.0"] and caption(folder) == "newer"
  assert ".1.0.0.incomplete-" in caplog.text and "left by a run that was killed" in caplog.text
  # Those of versions without locks, too.
  left = tmp_path / "toy" / ".1.0.0.incomplete-1"
  left.mkdir()
  (left / "shard").write_bytes(b"x" * 1500)
  with pytest.raises(publish.OutputExistsError):
    publish.make_way(tmp_path, "toy", "1.0.0", overwrite=False)
  assert names(tmp_path) == ["1.0.0"] and f"removed {left} (1.5 kB)" in caplog.text


def test_a_living_run_is_left_alone(tmp_path, caplog):
  inside, finish = threading.Event(), threading.Event()

  def slow():
    yield from examples("slow")
    inside.set()
    finish.wait(60)

  thread = threading.Thread(target=write, args=(tmp_path,), kwargs={"given": slow()})
  thread.start()
  inside.wait(60)
  with caplog.at_level("WARNING"):
    assert caption(write(tmp_path, "quick")) == "quick"
  finish.set()
  thread.join()
  assert "is being written by another run" in caplog.text
  assert names(tmp_path) == ["1.0.0"] and caption(tmp_path / "toy") == "slow"


def test_overwriting_keeps_a_dataset_under_its_name(tmp_path, new):
  """Killed right after the exchange of the two folders."""
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  if not publish._exchange(tmp_path / "a", tmp_path / "b"):
    pytest.skip("this file system cannot exchange two folders")
  folder = write(tmp_path)
  kill(tmp_path, new, "publish._exchange = exchange_and_die")
  assert caption(folder) == "new" and len(names(tmp_path)) == 3  # the old set and its lock
  clean(tmp_path)
  assert names(tmp_path) == ["1.0.0"] and caption(folder) == "new"


def test_overwriting_without_an_exchange(tmp_path, new, caplog, monkeypatch):
  """Killed between two renames: the next run undoes the first."""
  folder = write(tmp_path)
  kill(tmp_path, new, "publish._exchange, os.rename = lambda a, b: False, rename_and_die")
  assert not folder.exists()
  with caplog.at_level("WARNING"), pytest.raises(publish.OutputExistsError):
    publish.make_way(tmp_path, "toy", "1.0.0", overwrite=False)
  assert names(tmp_path) == ["1.0.0"] and caption(folder) == "old"
  assert "it is back in its place" in caplog.text
  monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
  assert caption(write(tmp_path, "new")) == "new" and names(tmp_path) == ["1.0.0"]


def test_an_object_store(tmp_path, caplog, monkeypatch):
  """No locks, and files are moved one by one: what is left of other runs is named, not removed."""
  monkeypatch.setattr(publish, "_is_local", lambda path: False)
  assert caption(write(tmp_path)) == "old" and names(tmp_path) == ["1.0.0"]
  left = tmp_path / "toy" / ".1.0.0.incomplete-1"
  left.mkdir()
  with caplog.at_level("WARNING"):
    assert caption(write(tmp_path, "new")) == "new"
  assert names(tmp_path) == [left.name, "1.0.0"]
  assert f"{left} is of another run: remove it if none is running" in caplog.text
  assert "until that is done, the old dataset is in" in caplog.text


def test_a_lock_that_cannot_be_taken_is_named(tmp_path, caplog, monkeypatch):
  left = tmp_path / "toy" / ".1.0.0.incomplete-1"
  left.mkdir(parents=True)
  publish._lock_path(left).touch()

  def flock(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  with caplog.at_level("WARNING"):
    assert caption(write(tmp_path, "new")) == "new"
  assert left.exists() and "cannot be locked here: remove its folder" in caplog.text


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
  folder = write(tmp_path)
  cases = (
    (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk after"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the disk after"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error; nothing is left"),
  )
  for error, message in cases:

    def full(*args, error=error):
      raise error

    with monkeypatch.context() as m, pytest.raises(builder.DatasetError, match=message) as e:
      m.setattr(builder.tfrecord, "frame", full)
      write(tmp_path, "new")
    assert str(e.value).startswith(str(tmp_path / "toy")) and "choose another --out" in str(e.value)
    assert names(tmp_path) == ["1.0.0"] and caption(folder) == "old"

  def absent():
    yield {"image": (tmp_path / "no.jpg").read_bytes()}

  with pytest.raises(FileNotFoundError):  # a file with a name is not the disk
    write(tmp_path, given=absent())


def pairs(root: pathlib.Path, count: int = 6) -> tuple:
  """A csv with `count` images; -> arguments."""
  root.mkdir(exist_ok=True)
  lines = ["image,caption,split"]
  for i in range(count):
    (root / f"{i}.jpg").write_bytes(encoded_image(i))
    lines.append(f"{i}.jpg,number {i},{'val' if i == 5 else 'train'}")
  (root / "a.csv").write_text("\n".join(lines) + "\n")
  return ("pairs", "--annotations", root / "a.csv", "--images", root, "--out", root / "out")


def run(*args) -> None:
  prepare_data.main([str(a) for a in args])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_run_leaves_nothing(tmp_path, monkeypatch, capsys, number):
  args, frame = pairs(tmp_path), builder.tfrecord.frame
  before = signal.getsignal(number)

  def ends(payload):
    os.kill(os.getpid(), number)
    return frame(payload)

  monkeypatch.setattr(builder.tfrecord, "frame", ends)
  with pytest.raises(SystemExit) as e:
    run(*args)
  assert e.value.code == 128 + number and signal.getsignal(number) == before
  assert f"ended by {signal.Signals(number).name}; the dataset was not" in capsys.readouterr().err
  assert list((tmp_path / "out" / "pairs").iterdir()) == []


def test_broken_images_can_be_left_out(tmp_path, caplog):
  """One of each kind; the images that turn blank are named and kept."""
  args = pairs(tmp_path)
  (tmp_path / "0.jpg").write_bytes(b"")
  (tmp_path / "1.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
  (tmp_path / "2.jpg").write_bytes(encoded_image(2, size=32)[:-500])
  (tmp_path / "3.jpg").write_bytes(encoded_image(3, size=40))
  grey = Image.new("I;16", (8, 8), 40000)
  grey.save(tmp_path / "4.jpg", "PNG")
  (tmp_path / "5.jpg").unlink()
  (tmp_path / "a.csv").open("a").write("4.jpg,again,train\n" + "6.jpg,six,val\n")
  (tmp_path / "6.jpg").write_bytes(encoded_image(6))
  options = ("--max_missing", "1", "--max_pixels", "1500")
  with pytest.raises(SystemExit) as e:
    run(*args, *options, "--check_images")
  reasons = "1 damaged, 1 empty, 1 too large, 1 unknown format"
  assert f"4 of 6 images are broken ({reasons})" in str(e.value)
  assert "--check_images=leave_out" in str(e.value)
  assert "3.jpg (40 x 40 pixels, more than max_pixels = 1500)" in str(e.value)
  with caplog.at_level("INFO"):
    run(*args, *options, "--check_images=leave_out")
  assert f"left out 4 broken images ({reasons}):" in caplog.text
  assert (
    f"1 of 6 images lose their content in 8 bits, and are kept:\n  {tmp_path}/4.jpg: 16-bit g"
    in (caplog.text)
  )
  folder = tmp_path / "out" / "pairs" / "1.0.0"
  assert [r.filename for r in records.open_split(folder, "train")] == ["4.jpg"]
  assert json.loads((folder / "source.json").read_text())["left_out"] == {
    "train": {"empty": 1, "unknown format": 1, "damaged": 1, "too large": 1},
    "val": {"missing": 1},
  }
  lines = [line.split() for line in caplog.text.splitlines()]
  train = next(line for line in lines if line[:1] == ["train"])
  assert train[1:3] == ["1", "2"] and " ".join(train[6:]) == reasons
  assert next(line for line in lines if line[:1] == ["val"])[6:] == ["1", "missing"]


def test_progress_is_logged_while_one_item_takes_long(monkeypatch, caplog):
  monkeypatch.setattr(progress, "SECONDS", 0.02)
  with caplog.at_level("INFO"), progress.Progress("checking", "images", 8) as p:
    p.add(2)
    time.sleep(0.2)
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) > 3 and "checking: 2 of 8 images (25%), " in lines[0]
  assert lines[-1].startswith("checking: 2 images in 0:00:00, ")
  caplog.clear()
  with caplog.at_level("INFO"), progress.Progress("indexing", "records", 8, last=False) as p:
    p.add(8)
  assert not caplog.records


def test_a_line_of_progress():
  p = progress.Progress("writing", "images", 100_000)
  assert p.line(5) == "0 of 100,000 images (0%), 0 a second, unknown time left"
  p.add(20_000)
  line = "20,000 of 100,000 images (20%), 400 a second, 0:03:20 left"
  assert p.line(50) == line
  p = progress.Progress("writing", "shards")
  p.add(3)
  assert p.line(60) == "3 shards, 0.05 a second"


def test_all_work_has_progress_and_a_table(tmp_path, caplog, monkeypatch):
  with caplog.at_level("INFO"):
    run(*pairs(tmp_path), "--check_images")
  for line in ("checking: 6 images in", "writing train: 5 images in", "writing val: 1 images in"):
    assert line in caplog.text
  table = "split  images  captions   bytes  seconds  left out\ntrain       5         5  "
  assert table in caplog.text and "nothing" in caplog.text
  # The index of a dataset without one is made when it is opened.
  folder = tmp_path / "out" / "pairs" / "1.0.0"
  for path in folder.glob("*.index"):
    path.unlink()
  monkeypatch.setattr(progress, "SECONDS", 0.02)
  count = records.count_captions
  monkeypatch.setattr(records, "count_captions", lambda payload: time.sleep(0.02) or count(payload))
  with caplog.at_level("INFO"):
    assert len(records.open_split(folder, "train")) == 5
  assert "indexing split 'train': 5 records in 0:00:00" in caplog.text


def test_files_are_read_ahead_in_order():
  running, most, lock = [], [], threading.Lock()

  def read(i):
    with lock:
      running.append(i)
      most.append(len(running))
    time.sleep(0.005 if i % 3 else 0.02)
    running.remove(i)
    if i == 90:
      raise OSError("of the ninety-first")
    return i

  taken, found = 0, []

  def items():
    nonlocal taken
    for i in range(100):
      taken += 1
      yield i

  results = ahead.ordered(read, items(), ahead=20)
  for result in results:
    found.append(result)
    assert taken <= len(found) + 20
    if result == 89:
      break
  assert found == list(range(90)) and max(most) > 4
  with pytest.raises(OSError, match="ninety-first"):
    next(results)


def test_sizes():
  assert [summary.size(n) for n in (0, 999, 999_500, 1_630_000_000)] == [
    "0 B", "999 B", "1.0 MB", "1.6 GB"
  ]  # fmt: skip
