"""A workdir: its config, changes on purpose, its claim, and what a resumed run writes again."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import child_process
import numpy as np
import pytest
import tiny
from test_train import lines

from xmodal_jax import config as config_lib
from xmodal_jax.runtime import claims, cli, metric_writers, preemption, workdir
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.training import loop


def flat(**changes) -> dict:
  return config_lib.flatten(tiny.config("unused", **changes))


@pytest.fixture
def begun(tmp_path):
  """A workdir in which a step was saved."""
  workdir.record(tmp_path, flat(), 0, {})
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "checkpoints" / "manifests").write_text("whole")
  return tmp_path


def written(folder) -> dict:
  return json.loads((folder / "config.json").read_text())


def test_refusal_says_what_to_type(begun):
  assert workdir.check(begun, flat(log_every=7, recipes__other={"optim/lr": 1.0})) == {}
  with pytest.raises(workdir.WorkdirError) as found:
    workdir.check(begun, flat(optim__lr=0.5, accumulate=2))
  text = str(found.value)
  assert "  accumulate: 1 -> 2\n  optim.lr: 0.01 -> 0.5\n" in text
  assert text.endswith("add --change=accumulate,optim.lr")
  changed = workdir.check(begun, flat(optim__lr=0.5, accumulate=2), ["accumulate", "optim.lr"])
  assert changed == {"accumulate": (1, 2), "optim.lr": (0.01, 0.5)}
  assert workdir.check(begun, flat(optim__lr=0.5), ["optim"]) == {"optim.lr": (0.01, 0.5)}
  with pytest.raises(workdir.WorkdirError, match=r"--change optim\.lrr: there is no such key"):
    workdir.check(begun, flat(), ["optim.lrr"])


def test_changes_are_recorded_with_their_step(begun):
  for step, lr in ((10, 0.5), (20, 0.25)):
    changed = workdir.check(begun, flat(optim__lr=lr), ["optim.lr"])
    workdir.record(begun, flat(optim__lr=lr), step, changed)
  content = written(begun)
  assert content["config"]["optim.lr"] == 0.25
  assert [(c["step"], c["changed"]) for c in content["changes"]] == [
    (10, {"optim.lr": [0.01, 0.5]}),
    (20, {"optim.lr": [0.5, 0.25]}),
  ]
  assert workdir.check(begun, flat(optim__lr=0.25)) == {}  # the same command again, or without it
  with pytest.raises(workdir.WorkdirError, match=r"optim\.lr: 0\.25 -> 0\.01"):
    workdir.check(begun, flat())


@pytest.mark.parametrize("key", ["batch_size", "seed", "init", "optim__ema"])
def test_what_cannot_be_changed(key, begun):
  changed = flat(**{key: {"init": "a.pt", "optim__ema": 0.5}.get(key, 64)})
  name = key.replace("__", ".")
  with pytest.raises(workdir.WorkdirError, match=f"that has steps, {name} cannot be changed"):
    workdir.check(begun, changed, [name])


def test_without_a_saved_step_any_config_may_start(begun, caplog):
  (begun / "checkpoints" / "manifests").write_text("")
  with caplog.at_level(logging.WARNING):
    assert workdir.check(begun, flat(optim__lr=0.5, batch_size=64)) == {}
  assert "no step was saved" in caplog.text and "optim.lr: 0.01 -> 0.5" in caplog.text
  workdir.record(begun, flat(optim__lr=0.5), 0, {})
  assert written(begun)["config"]["optim.lr"] == 0.5


def test_key_of_a_newer_version_had_its_default(begun):
  content = written(begun)
  del content["config"]["optim.cycles"], content["config"]["model.image.width"]
  (begun / "config.json").write_text(json.dumps(content))
  assert workdir.check(begun, flat()) == {}
  with pytest.raises(workdir.WorkdirError, match=r"optim\.cycles: 0\.5 -> 2"):
    workdir.check(begun, flat(optim__cycles=2.0))


def test_home_folder_is_expanded_everywhere(begun, monkeypatch):
  monkeypatch.setenv("HOME", str(begun / "home"))
  config = tiny.config("~/a,~/b")
  config.init, config.text.vocab = "~/a.pt", "none/~"
  config = config_lib.resolve(config)
  assert config.data.dir == f"{begun}/home/a,{begun}/home/b"
  assert (config.init, config.text.vocab) == (f"{begun}/home/a.pt", "none/~")
  assert workdir.absolute("~/run") == begun / "home" / "run"
  (begun / "config.json").write_text(json.dumps({"config": workdir.json_like(flat(init="~/a.pt"))}))
  assert workdir.check(begun, flat(init=config.init)) == {}
  seen = cli.program(lambda argv: argv)(["--out=~/x.png", "~/y", "--name", "a~b"])
  assert seen == [f"--out={begun}/home/x.png", f"{begun}/home/y", "--name", "a~b"]


def test_damaged_config_is_named(begun):
  (begun / "config.json").write_text('{"config": ')
  with pytest.raises(workdir.WorkdirError, match=r"config\.json is not a config\.json of a run"):
    workdir.check(begun, flat())


def test_failed_first_start_leaves_nothing(tiny_data, tmp_path):
  with pytest.raises(ValueError, match="no split 'dev'"):
    loop.train(tiny.config(tiny_data, data__val="dev"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_lengthened_with_another_rate_and_clipping(tiny_data, tmp_path):
  """What NonFiniteLossError advises, and a longer total: optimizer and position are kept."""
  short = dict(
    total="4 steps", checkpoint__every="2 steps", eval__every="4 steps", eval__test=False
  )
  loop.train(tiny.config(tiny_data, **short), tmp_path)
  longer = tiny.config(tiny_data, **short | dict(total="6 steps", optim__grad_clip=1e-9))
  with pytest.raises(workdir.WorkdirError, match=r"add --change=optim\.grad_clip,total"):
    loop.train(longer, tmp_path)
  loop.train(longer, tmp_path, change=["optim.grad_clip", "total"])
  rows = lines(tmp_path, "train")
  assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
  assert [c["step"] for c in written(tmp_path)["changes"]] == [4]


def test_non_finite_loss_says_how_to_go_on():
  with pytest.raises(step_lib.NonFiniteLossError, match=r"--change=optim\.lr"):
    step_lib.check_finite({"loss": np.nan, "grad_norm": 1.0}, 3, 4)


# --- one workdir, one run -----------------------------------------------------------------------


def test_second_run_is_refused(tmp_path):
  folder = tmp_path / "run"
  with claims.hold(folder) as claim:
    assert json.loads((folder / claims.FILE).read_text())["pid"] == os.getpid()
    refused = pytest.raises(workdir.WorkdirError, match=f"in use: process {os.getpid()} on")
    with refused, claims.hold(folder):
      pass
    claim.check()
  assert not folder.exists()  # it was made for the claim alone
  (tmp_path / "kept").write_text("")
  with claims.hold(tmp_path):
    pass
  assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_claim_of_a_killed_process_is_taken_over(tmp_path, caplog):
  process = subprocess.Popen(["sleep", "60"])
  facts = claims.Claim(tmp_path).facts
  facts |= dict(token="x", pid=process.pid, started=claims._started(process.pid))
  (tmp_path / claims.FILE).write_text(json.dumps(facts))
  with pytest.raises(workdir.WorkdirError, match="is in use"), claims.hold(tmp_path):
    pass
  process.kill()
  process.wait()
  begin = time.monotonic()
  with caplog.at_level(logging.WARNING), claims.hold(tmp_path):
    assert time.monotonic() - begin < 10
  assert f"taking over {tmp_path} from process {process.pid} on" in caplog.text


@pytest.mark.parametrize("text", ["machine", "", "[1]"])
def test_claim_of_another_machine(text, tmp_path, monkeypatch, caplog):
  """Its heartbeat tells: taken over if the file stays the same, refused if it changes."""
  monkeypatch.setattr(claims, "STALE", 0.3)
  monkeypatch.setattr(claims, "_SETTLE", 0.01)
  path = tmp_path / claims.FILE
  if text == "machine":
    text = json.dumps(dict(host="other", machine="other", pid=1, token="x", since="noon"))
  path.write_text(text)
  with caplog.at_level(logging.WARNING), claims.hold(tmp_path):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert "for a sign of it" in caplog.text and "taking over" in caplog.text
  path.write_text(text)
  monkeypatch.setattr(claims, "STALE", 5.0)
  beat = threading.Timer(0.2, lambda: path.write_text(text + " "))
  beat.start()
  with pytest.raises(workdir.WorkdirError, match="is in use"), claims.hold(tmp_path):
    pass
  beat.join()


def test_run_whose_claim_was_taken_over_stops(tmp_path, monkeypatch):
  monkeypatch.setattr(claims, "PERIOD", 0.02)
  with claims.hold(tmp_path) as claim:
    path = tmp_path / claims.FILE
    deadline = time.monotonic() + 10
    while json.loads(path.read_text())["beat"] < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
    claim.check()
    path.write_text(json.dumps(dict(token="other", pid=7, host="there")))
    while not claim.lost and time.monotonic() < deadline:
      time.sleep(0.01)
    with pytest.raises(workdir.WorkdirError, match="process 7 on there has taken over"):
      claim.check()
  assert json.loads(path.read_text())["token"] == "other"


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_requests_a_stop(number):
  before = signal.getsignal(number)
  with preemption.handled() as stop:
    assert not stop()
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not stop() and time.monotonic() < deadline:
      time.sleep(0.01)
    assert stop()
  assert signal.getsignal(number) == before


TWICE = """
import os, signal, time
from xmodal_jax.runtime import preemption
with preemption.handled():
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
  time.sleep(60)
"""


def test_second_interrupt_ends_at_once():
  command = [sys.executable, "-c", TWICE]
  env = child_process.environment(JAX_PLATFORMS="cpu")
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
  assert done.returncode == 130 and done.stderr.endswith("ending without saving\n")


# --- what a resumed run writes again ------------------------------------------------------------


def events(folder) -> list[tuple[int, str]]:
  import tensorflow as tf

  out = []
  for path in folder.glob("events.out.tfevents.*"):
    for record in tf.compat.v1.io.tf_record_iterator(str(path)):
      event = tf.compat.v1.Event.FromString(record)
      out += [(event.step, v.tag) for v in event.summary.value]
  return sorted(out)


def test_tensorboard_has_each_step_once(tmp_path):
  """As metrics.jsonl after a crash behind the last checkpoint."""
  writer = metric_writers.Writer(tmp_path)
  for step in (1, 2, 3):
    writer.scalars(step, "train", {"loss": 1.0, "lr": 0.1})
  writer.scalars(2, "val", {"rsum": 5.0})
  writer.scalars(2, "test", {"rsum": 5.0})
  writer.close()
  [path] = tmp_path.glob("events*")
  path.write_bytes(path.read_bytes()[:-3])  # killed while writing
  writer = metric_writers.Writer(tmp_path)
  writer.resume(2)
  writer.scalars(3, "train", {"loss": 2.0})
  writer.close()
  train = [(step, f"train/{key}") for step in (1, 2) for key in ("loss", "lr")]
  assert events(tmp_path) == [*train, (2, "val/rsum"), (3, "train/loss")]
  assert {(r["step"], r["kind"]) for r in metric_writers.read_rows(tmp_path)} == {
    (step, tag.split("/")[0]) for step, tag in events(tmp_path)
  }
