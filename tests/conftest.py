"""Eight host devices for every test, fixed before any device is touched."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Programs of several CPU devices that JAX reads from its cache hang, see xmodal_jax/main.py.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import programs
import pytest
from jaxtyping import install_import_hook

# Checks the shapes and types in the signatures of these packages at run time, in tests only. The
# hook has to precede their import.
install_import_hook(["xmodal_jax.losses", "xmodal_jax.models"], "typechecker.check")

# Of a flag that is given twice the last value counts, so a developer's own flags win.
os.environ["XLA_FLAGS"] = f"{programs.XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_num_cpu_devices", 8)
programs.install()

# Files that share compiled programs or cached results run in one worker, one after another.
SHARED = {
  "gradients": ("test_accumulate", "test_sharding", "test_ring_systems", "test_reproducible"),
  "runs": ("test_train", "test_ema", "test_preemption", "test_corrupt", "test_checkpoint_damage"),
}
GROUPS = {name: group for group, names in SHARED.items() for name in names}
# The dearest groups start first, so that the workers end together; the others follow by name.
DEAREST = ("gradients", "runs", "test_golden_team_model", "test_golden_tgdt_model")
DEAREST += ("test_hosts", "test_golden_zerovl_model", "test_towers", "test_token_matching")


def pytest_configure(config):
  if hasattr(config.option, "loadscopereorder"):  # xdist would start with the most tests
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Sets the group of every test (pytest-xdist's --dist loadgroup) and the order of the groups."""
  group = {item: GROUPS.get(item.path.stem, item.path.stem) for item in items}
  for item, name in group.items():
    item.add_marker(pytest.mark.xdist_group(name))
    if item.get_closest_marker("slow"):  # -m full leaves it out
      item.own_markers[:] = [m for m in item.own_markers if m.name != "full"]
  place = {name: i for i, name in enumerate(DEAREST)}
  items.sort(key=lambda item: place.get(group[item], len(place)))


@pytest.fixture(autouse=True)
def few_programs():
  yield
  programs.trim()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Photographs and split ids that do not travel with the project; skips where they are absent."""
  root = os.environ.get("XMODAL_SHARED")
  root = pathlib.Path(root) if root else pathlib.Path(__file__).parents[2] / "shared"
  if not (root / "data").is_dir():
    pytest.skip(f"needs the shared photographs: no folder {root / 'data'} (set XMODAL_SHARED)")
  return root / "data"


@pytest.fixture(scope="session")
def labelled_data(tmp_path_factory) -> str:
  """The folder of a small data set of labelled pictures."""
  import labelled

  return labelled.write(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
  """The folder of a small embedded data set."""
  import tiny

  return tiny.data(tmp_path_factory.mktemp("data"))
