"""Local copies of files in object stores."""

import contextlib
import tempfile
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[epath.Path]:
  """A local path of the file, which can be mapped into memory; a download is deleted afterwards.

  with local_copy(epath.Path("gs://bucket/ViT-B-32.pt")) as file:
    state, info = torch_files.state_dict(file)
  """
  if "://" not in str(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    local = epath.Path(folder) / path.name
    path.copy(local)
    yield local
