"""Eight host devices for every test, fixed before any device is touched."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the suite's time is compilation of programs that run for milliseconds. XLA's own passes
# stay as they are; LLVM's are left out, which halves it. The last of two values of a flag counts.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
# Of several CPU devices JAX's cache would make programs that hang, see xmodal_jax/main.py.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
  """Programs of earlier modules go before they use up the memory maps that Linux allows, 65,530:
  XLA does not survive that."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
    jax.clear_caches()


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
