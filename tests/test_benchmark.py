"""tools/benchmark.py at toy sizes: that it runs and that both sides compute the same."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest


def run(folder, *args: str) -> dict:
  """The result of one run of the tool, which must succeed."""
  command = [sys.executable, "tools/benchmark.py", *args, "--json", f"{folder}/out.json"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads((folder / "out.json").read_text())


@pytest.mark.full
def test_rerank(tmp_path):
  toy = ["rerank", "--scale", "0.004", "--width", "64", "--blocks", "2", "--slice", "64"]
  against = ["--against", "torch", "--no_compile"] if importlib.util.find_spec("torch") else []
  out = run(tmp_path, *toy, "--repeats", "1", "--warmup", "0", "--rerank_block", "4", "8", *against)
  if not against:
    assert out["sides"]["ours"]["examples_per_s"] > 0
    pytest.skip("ours ran; torch is not there to compare with")
  assert list(out["kinds"]) == ["query", "batch", "shared"]
  for kind in out["kinds"].values():
    assert kind["largest_difference"] < 1e-4 and kind["same_parameters"]
    # 20 images with 16 captions each, 100 captions with 16 images each.
    assert kind["sides"]["ours"]["info"]["examples"] == 1920
    assert kind["sides"]["ours"]["info"]["unique"] <= 1920


@pytest.mark.full
def test_local_scores(tmp_path):
  toy = ["local_scores", "--scale", "0.002", "--width", "32", "--repeats", "1", "--warmup", "0"]
  against = ["--against", "torch", "--no_compile"] if importlib.util.find_spec("torch") else []
  out = run(tmp_path, *toy, *against)
  if not against:
    assert out["sides"]["ours"]["examples_per_s"] > 0
    pytest.skip("ours ran; torch is not there to compare with")
  assert list(out["kinds"]) == ["expanded", "query", "einsum"]
  for kind in out["kinds"].values():
    assert kind["largest_difference"] < 1e-4
    info = kind["sides"]["ours"]["info"]
    assert info["examples"] == 500 and info["padded_flops"] == 2 * 500 * 36 * 40 * 32
    # 6 words at the least, 10 in the mean, of 40.
    assert 6 / 40 < info["flops"] / info["padded_flops"] < 14 / 40


@pytest.mark.full
def test_hierarchical_scores(tmp_path):
  toy = ["hierarchical_scores", "--scale", "0.002", "--regions", "20", "--words", "16"]
  toy += ["--width", "32", "--direction", "both", "--repeats", "1", "--warmup", "0"]
  against = ["--against", "torch", "--no_compile"] if importlib.util.find_spec("torch") else []
  out = run(tmp_path, *toy, *against)
  if not against:
    assert out["sides"]["ours"]["examples_per_s"] > 0
    pytest.skip("ours ran; torch is not there to compare with")
  assert list(out["kinds"]) == ["attended", "gram"]
  for kind in out["kinds"].values():
    assert kind["largest_difference"] < 1e-5
    info = kind["sides"]["ours"]["info"]
    assert info["examples"] == 500
    # Products of tokens, and of the weights with both sides' Gram matrices.
    assert info["padded_flops"] == 500 * 2 * 20 * 16 * (32 + 16 + 20)


@pytest.mark.full
@pytest.mark.parametrize("command", ["encode", "step", "data", "checkpoint"])
def test_our_side_of_a_workload(command, tmp_path, tiny_data):
  toy = [command, "--repeats", "1", "--warmup", "0", "--batch", "4"]
  if command == "data":
    toy += ["--data_dir", tiny_data, "--size", "16", "--batches", "2"]
  else:
    toy += ["--model", "tiny"]
  ours = run(tmp_path, *toy)["sides"]["ours"]
  assert ours["wall"] > 0
  if command == "checkpoint":
    assert ours["facts"]["restore_s"] > 0
  else:
    assert ours["examples_per_s"] > 0


@pytest.mark.slow  # starts three processes with torch or TensorFlow
def test_steps_on_a_data_set(tmp_path, tiny_data):
  toy = ["step", "--model", "tiny", "--batch", "4", "--run_steps", "2", "--data_dir", tiny_data]
  against = ["--against", "torch", "--form", "sdpa fused"]
  against = against if importlib.util.find_spec("torch") else []
  out = run(tmp_path, *toy, "--repeats", "1", "--warmup", "0", *against)
  for side in out["sides"].values():
    assert side["info"]["examples"] == 8
    assert side["info"]["loss"] == pytest.approx(math.log(4), rel=0.3)
  if not against:
    pytest.skip("ours ran; torch is not there to compare with")
  assert out["same_parameters"]
