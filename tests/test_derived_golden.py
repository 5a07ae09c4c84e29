"""The golden tests on sets of other sizes, derived from the carried ones without the originals.

Only tests that compile next to nothing; tests/derive_golden.py makes sets for all of them.
"""

import collections
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import derive_golden
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
CARRIED = HERE / "golden"

TESTS = (
  "clip_data",
  "clip_eval",
  "hat_eval::test_metrics_of_a_matrix",
  "hat_eval::test_folds_of_a_matrix",
  "team_eval::test_metrics",
  "team_files::test_another_resolution",
  "team_files::test_config_from_shapes",
  "team_lamb::test_learning_rates_of_a_run",
  "team_lamb::test_optimizer_file_of_the_original",
  "team_preprocess",
  "team_text",
  "tgdt_data::test_table_of_bottom_up_attention",
  "tgdt_data::test_token_ids",
  "tgdt_metrics::test_local_scores",
  "tgdt_metrics::test_score_matrix",
  "zerovl_augment",
  "zerovl_files::test_ranks_of_a_score_matrix",
  "zerovl_files::test_rows_of_caption_pairs",
  "zerovl_model::test_schedules",
  "zerovl_order",
)


@pytest.fixture(scope="module")
def derived(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("golden") / "derived"
  derive_golden.derive(CARRIED, out)
  return out


def sizes(root: pathlib.Path) -> dict[str, tuple]:
  """Some sizes and names that golden tests once had written into them."""
  load = lambda *parts: np.load(root.joinpath(*parts))
  folds = {k.split("/")[0] for k in load("clip", "eval", "outputs.npz") if k.startswith("fold")}
  return {
    "folds": (len(folds),),
    "score matrix": load("clip", "eval", "inputs.npz")["plain"].shape,
    "text lengths": tuple(load("clip", "tokenizer", "ids.npz")),
    "image sizes": tuple(load("team", "preprocess", "eval_transform.npz")),
    "folds of HAT": load("hat", "evaluation.npz")["a/fold_i2t_metrics"].shape,
    "optimizer": tuple(root.glob("team/*/epoch0_opt.pth")),
    "checkpoints": tuple(p.relative_to(root) for p in root.glob("*/*.pth")),
  }


def test_sizes_differ(derived):
  before, after = sizes(CARRIED), sizes(derived)
  assert not [name for name in before if before[name] == after[name]]


def test_scores_tie(derived):
  """Repeated captions tie exactly, and some rank depends on it."""
  scores = np.load(derived / "clip" / "eval" / "inputs.npz")["plain"]
  assert len(np.unique(scores, axis=1).T) < scores.shape[1]


@pytest.mark.full
def test_golden_tests_pass(derived, tmp_path):
  report = tmp_path / "report.xml"
  files = [f"test_golden_{name.replace('::', '.py::')}" for name in TESTS]
  files = [name if "::" in name else f"{name}.py" for name in files]
  command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
  env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
  env |= {"XMODAL_GOLDEN": str(derived)}
  run = subprocess.run(
    [*command, f"--junitxml={report}", *(str(HERE / f) for f in files)],
    env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
  passed = collections.Counter()
  for case in ET.parse(report).getroot().iter("testcase"):
    file, test = case.get("classname").split(".")[-1], case.get("name").split("[")[0]
    for name in (file, f"{file}::{test}"):
      passed[name.removeprefix("test_golden_")] += not len(case)
  assert not [name for name in TESTS if not passed[name]]  # nothing was skipped altogether
