"""A training process that is terminated, killed and restarted gives the uninterrupted result."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny
from test_train import lines

from xmodal_jax.training import loop

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import tiny
def get_config():
  return tiny.config({data!r}, total="24 steps", checkpoint__every="4 steps", eval__every="8 steps")
"""


def start(folder: pathlib.Path, config: pathlib.Path) -> subprocess.Popen:
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  command = [sys.executable, "-m", "xmodal_jax.main", f"--config={config}", f"--workdir={folder}"]
  root = pathlib.Path(__file__).parents[1]
  return subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder: pathlib.Path, step: int, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 180
  while time.monotonic() < deadline and process.poll() is None:
    path = folder / "metrics.jsonl"
    complete = path.read_text().split("\n")[:-1] if path.exists() else []
    if complete and json.loads(complete[-1])["step"] >= step:
      return
    time.sleep(0.01)
  raise AssertionError(f"no step {step}: {process.communicate()[1][-3000:]}")


@pytest.mark.full
def test_terminated_and_killed(tiny_data, tmp_path):
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(tests=str(pathlib.Path(__file__).parent), data=tiny_data))
  folder = tmp_path / "run"

  process = start(folder, config)
  wait_for_step(folder, 2, process)
  process.send_signal(signal.SIGTERM)
  signalled = time.monotonic()
  _, log = process.communicate(timeout=60)
  assert process.returncode == 0, log[-3000:]
  assert time.monotonic() - signalled < 30
  stopped = lines(folder)[-1]["step"]
  assert stopped < 24 and (folder / "checkpoints" / str(stopped)).is_dir()

  process = start(folder, config)
  wait_for_step(folder, stopped + 6, process)
  process.kill()
  process.communicate()
  assert lines(folder)[-1]["step"] < 24

  process = start(folder, config)
  _, log = process.communicate(timeout=300)
  assert process.returncode == 0, log[-3000:]
  assert "resuming from step" in log

  straight = tmp_path / "straight"
  changes = dict(total="24 steps", checkpoint__every="4 steps", eval__every="8 steps")
  loop.train(tiny.config(tiny_data, **changes), straight)
  assert lines(folder) == lines(straight)
  results = [json.loads((f / "results.json").read_text())["test"] for f in (folder, straight)]
  assert results[0] == results[1]
