"""Files of object stores on this machine."""

import contextlib
import tempfile
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[epath.Path]:
  """The file on this machine, where it is mapped into memory."""
  if "://" not in str(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    local = epath.Path(folder) / path.name
    path.copy(local)
    yield local
