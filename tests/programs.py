"""Programs that are compiled once in a process, for all its runs of the same.

Toy runs are mostly compilation, and every run makes its jitted functions anew. JAX's own cache on
disk is no help: what is read from there has lost the order of its collectives on CPUs, and hangs.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from jax._src import compiler

_compiled = {}


@contextlib.contextmanager
def remembered() -> Iterator[None]:
  original = compiler.backend_compile_and_load

  def compile_once(backend, module, devices, options, callbacks):
    key = str(module), tuple(d.id for d in devices)
    if callbacks or key not in _compiled:
      _compiled[key] = original(backend, module, devices, options, callbacks)
    return _compiled[key]

  with mock.patch.object(compiler, "backend_compile_and_load", compile_once):
    yield
