"""Programs that are compiled once in a process, for all its runs of the same.

Toy runs are mostly compilation, and every run makes its jitted functions anew. JAX's own cache on
disk is no help: what is read from there has lost the order of its collectives on CPUs, and hangs.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from unittest import mock

from jax._src import compiler

KEPT = 64  # programs; they hold memory
WORTH = 0.3  # seconds: what compiles faster is not kept


@contextlib.contextmanager
def remembered() -> Iterator[None]:
  original, compiled = compiler.backend_compile_and_load, {}

  def compile_once(backend, module, devices, options, callbacks):
    text = hashlib.sha256(str(module).encode()).digest()
    key = text, options.SerializeAsString(), tuple(d.id for d in devices)
    if callbacks:
      return original(backend, module, devices, options, callbacks)
    if key in compiled:
      compiled[key] = compiled.pop(key)  # now the last to go
      return compiled[key]
    begin = time.perf_counter()
    program = original(backend, module, devices, options, callbacks)
    if time.perf_counter() - begin > WORTH:
      compiled[key] = program
      if len(compiled) > KEPT:
        del compiled[next(iter(compiled))]
    return program

  with mock.patch.object(compiler, "backend_compile_and_load", compile_once):
    yield
