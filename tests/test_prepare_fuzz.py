"""Mutated small inputs of every reader, in a process of its own for each."""

import json
import pathlib
import subprocess
import sys

import child_process
import fuzz_readers
import pytest

WORKER = pathlib.Path(__file__).with_name("fuzz_readers.py")


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_mutated_inputs(tmp_path, reader, count):
  """None ends in a traceback, takes 2 s or 200 MB, or differs silently from a plain reader."""
  if reader == "parquet":
    pytest.importorskip("pyarrow")
  command = [sys.executable, WORKER, reader, str(count), tmp_path]
  env = child_process.environment()
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  counts = json.loads(done.stdout)
  assert counts.pop("MB") < 200
  assert sum(counts.values()) == count and counts["refused"] < 0.97 * count
