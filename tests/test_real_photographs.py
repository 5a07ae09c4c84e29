"""COCO photographs through the COCO path; needs the shared data folder."""

import pathlib
import subprocess
import sys

import child_process
import numpy as np
import pytest
from test_configs import ROOT, get_config

from xmodal_jax.data import records
from xmodal_jax.training import loop


@pytest.mark.full
def test_coco_photographs(shared_data, tmp_path):
  source = shared_data / "coco_mini"
  command = [sys.executable, "tools/prepare_data.py", "karpathy", "--out", tmp_path]
  command += ["--annotations", source / "dataset_coco_mini.json", "--images", source / "images"]
  command = [str(c) for c in (*command, "--name", "coco_mini")]
  subprocess.run(command, cwd=ROOT, env=child_process.environment(), check=True)
  c = get_config("coco_ft", "tiny")
  c.data.dir, c.data.train = str(tmp_path / "coco_mini"), "train+restval"
  c.model.image.depth = c.model.text.depth = 1
  c.batch_size, c.total, c.log_every = 32, "4 steps", 2
  c.eval.every, c.optim.warmup, c.eval.batch_size = "4 steps", "1 steps", 16
  results = loop.train(c, tmp_path / "run")
  assert results["protocol"]["images"] == 22 and results["protocol"]["captions"] == 110
  assert np.isfinite(results["test"]["rsum"])
  split = records.open_split(tmp_path / "coco_mini", "train+restval")
  assert len(split) == 78
  stored = split.read(0)
  assert stored.image == (pathlib.Path(source) / "images" / stored.filename).read_bytes()
