"""The package's layout: imports go down only, and documentation names files that exist."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_imports_go_down_only():
  command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
  done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_the_root_holds_entry_points_only():
  names = {p.name for p in (ROOT / "xmodal_jax").glob("*.py")}
  assert names == {"__init__.py", "main.py", "errors.py"}


def test_no_file_changes_the_import_path():
  files = [*(ROOT / "xmodal_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
  assert not [f for f in files if re.search(r"sys\.path\b", f.read_text())]


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_documentation_names_files_that_exist(file):
  text = file.read_text()
  links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
  missing = [link for link in links if not (file.parent / link).exists()]
  text = re.sub(r"\S*NAME\S*", "", text)  # placeholders
  paths = re.findall(r"\b(?:xmodal_jax|configs|tests|tools|docs)/[\w/]+\.(?:py|md|txt|png)\b", text)
  missing += [path for path in paths if not (ROOT / path).exists()]
  assert not missing
