"""Programs end on an expected error with one message, and on a fault with its traceback."""

import pathlib
import subprocess
import sys

import child_process
import numpy as np
import plot_metrics
import pytest
import test_configs

from xmodal_jax import config as config_lib
from xmodal_jax import errors
from xmodal_jax.runtime import cli, metric_writers

ROOT = child_process.ROOT
MAIN = ("-m", "xmodal_jax.main", "--workdir=WORKDIR")
SHAPES = "--config=configs/shapes.py"


def run(*command: str, workdir: pathlib.Path) -> tuple[int, str]:
  """(exit code, stderr) of `python command`."""
  command = [sys.executable, *(part.replace("WORKDIR", str(workdir)) for part in command)]
  env = child_process.environment(JAX_PLATFORMS="cpu", TFDS_DATA_DIR=str(workdir / "tfds"))
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
  return done.returncode, done.stderr


@pytest.mark.parametrize(
  ("arguments", "code", "text"),
  [
    ((*MAIN, SHAPES, "--config.optim.lrr=1"), 2, "no key 'lrr'. Did you mean \"lr\""),
    pytest.param((*MAIN, "--config=configs/coco_ft.py", "--config.init="), 1,
                 "run `tfds build coco_captions`", marks=pytest.mark.full),
    pytest.param((*MAIN, f"{SHAPES}:clop"), 2, "shapes.py: there is no variant 'clop'; there are c",
                 marks=pytest.mark.full),
    pytest.param((*MAIN, SHAPES, "--mode=eval", "--config.init=none.pt"), 1, "config.init: none.pt",
                 marks=pytest.mark.full),
    pytest.param((*MAIN, "--config=none.py"), 2, "there is no config file none.py",
                 marks=pytest.mark.full),
    pytest.param((*MAIN, SHAPES, "--mod=eval"), 2, "Unknown command line flag 'mod'",
                 marks=pytest.mark.full),
    pytest.param((*MAIN, SHAPES, "rest"), 2, "unexpected arguments ['rest']",
                 marks=pytest.mark.full),
    pytest.param(("tools/compile_check.py", f"{SHAPES}:clop"), 2, "no variant 'clop'",
                 marks=pytest.mark.full),
  ],
)  # fmt: skip
def test_expected_error_is_one_message(arguments, code, text, tmp_path):
  found, stderr = run(*arguments, workdir=tmp_path)
  assert found == code and "Traceback" not in stderr
  assert text in stderr.strip().splitlines()[-1]


@pytest.mark.full
def test_debug_brings_the_traceback(tmp_path):
  code, stderr = run(*MAIN, f"{SHAPES}:clop", "--debug", workdir=tmp_path)
  assert code == 1 and "Traceback" in stderr and "no variant 'clop'" in stderr


@pytest.mark.parametrize(
  ("error", "text"),
  [
    (errors.ConfigError("optim.lr is -1"), "optim.lr is -1"),
    (FileNotFoundError(2, "No such file or directory", "a.pt"), "a.pt: No such file or directory"),
    (OSError("disk full"), "disk full"),
  ],
)
def test_program_exits_with_the_message(error, text, monkeypatch):
  @cli.program
  def main(argv):
    raise error

  with pytest.raises(SystemExit) as found:
    main([])
  assert str(found.value) == f"test_cli.py: {text}"
  monkeypatch.setattr(sys, "argv", ["program", "--debug"])
  with pytest.raises(type(error)):
    main()


@pytest.mark.parametrize("error", [RuntimeError("x"), ValueError("x"), KeyError("x")])
def test_fault_keeps_its_traceback(error):
  @cli.program
  def main(argv):
    raise error

  with pytest.raises(type(error)):
    main([])


def test_debug_may_stand_behind_a_subcommand():
  parser = cli.ArgumentParser()
  parser.add_subparsers(dest="command").add_parser("csv")
  assert parser.parse_args(["--debug", "csv"]).debug and parser.parse_args(["csv", "--debug"]).debug


@pytest.mark.parametrize("name", test_configs.CONFIGS)
def test_unknown_variant_lists_those_that_exist(name):
  with pytest.raises(errors.ConfigError) as found:
    config_lib.load(ROOT / "configs" / f"{name}.py:clop")
  text = str(found.value)
  assert text.startswith(f"{ROOT / 'configs' / name}.py: there is no variant 'clop'; there are ")
  assert "\n" not in text
  for variant in test_configs.CONFIGS[name]:
    assert variant in text


@pytest.mark.parametrize(
  ("code", "text"),
  [
    ("def get_config():\n  return lr\n", "line 2: NameError: name 'lr' is not defined"),
    ("def get_config(:\n", "line 1: SyntaxError: "),
    ("x = 1\n", "has no function get_config"),
  ],
)
def test_fault_of_a_config_file_is_named_with_its_line(code, text, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(code)
  with pytest.raises(errors.ConfigError, match=r"mine\.py") as found:
    config_lib.load(path)
  assert text in str(found.value)


def test_plot_of_a_killed_run(tmp_path):
  jsonl = metric_writers.JsonlWriter(tmp_path)
  for step in (1, 2):
    jsonl.write(step, "train", {"loss": np.float32(1 / step)})
  with jsonl.path.open("a") as f:
    f.write('{"step": 3, "kind": "tr')
  out = tmp_path / "curve.png"
  plot_metrics.main([f"--workdir={tmp_path}", f"--out={out}"])
  assert out.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(SystemExit, match=r"none/metrics.jsonl: No such file"):
    plot_metrics.main([f"--workdir={tmp_path / 'none'}", f"--out={out}"])
  with pytest.raises(SystemExit, match=r"\.xyz is no format of images"):
    plot_metrics.main([f"--workdir={tmp_path}", "--out=curve.xyz"])
