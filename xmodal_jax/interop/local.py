"""Local copies of files in object stores."""

import contextlib
import tempfile
from collections.abc import Iterator

from etils import epath

from xmodal_jax.errors import naming
from xmodal_jax.interop.torch_files import folders


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[epath.Path]:
  """A local path of the file, which can be mapped into memory; a download is deleted afterwards.

  path: also of a folder or an index of shards, of which the files with the weights are downloaded.

  with local_copy(epath.Path("gs://bucket/ViT-B-32.pt")) as file:
    state, info = torch_files.state_dict(file)
  """
  if "://" not in str(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    with naming(path):
      for file in _files(path):
        file.copy(epath.Path(folder) / file.name)
    yield epath.Path(folder) if path.is_dir() else epath.Path(folder) / path.name


def _files(path: epath.Path) -> list[epath.Path]:
  """The files that the weights of a path are in, and their index."""
  if path.is_dir():
    path = path / folders.choose([p.name for p in path.iterdir()])[0]
  text = path.read_text() if path.name.endswith(".json") else None
  names = dict.fromkeys([path.name, *folders.shards_of(path.name, text)])
  return [path.parent / name for name in names]
