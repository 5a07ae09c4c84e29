"""Compiled programs that a process shares between all its tests.

Most of the suite's time is compilation, and every run, model and test builds its jitted functions
anew, so that JAX compiles the same program many times. `install` makes XLA compile a program once
per process; `trim` drops the oldest when there are too many.

JAX's own cache on disk does not help: a program of several CPU devices that is read from it has
lost the order of its collectives, and hangs.
"""

import contextlib
import gc
import hashlib
import pathlib
from collections.abc import Iterator

import jax
from jax._src import compiler

# LLVM's optimization passes and XLA's fusion emitters (MLIR) take three quarters of the compilation
# of programs that run for milliseconds. XLA's own passes stay as they are.
NO_LLVM_PASSES = "--xla_backend_optimization_level=0"
XLA_FLAGS = f"{NO_LLVM_PASSES} --xla_cpu_use_fusion_emitters=false"

MAPS = 40_000  # of the 65,530 memory maps that Linux allows a process: XLA aborts beyond
EVERY = 50  # compilations between two looks at them

_compile = compiler.backend_compile_and_load
_compiled = {}  # by key, the least recently used first
_since_trim = 0
_overrides = []  # of XLA's flags, (name, value)


def _key(module, devices, options) -> bytes:
  text = hashlib.sha256(str(module).encode())
  text.update(options.SerializeAsString())
  text.update(repr([d.id for d in devices]).encode())
  return text.digest()


def _compile_once(backend, module, devices, options, callbacks):
  global _since_trim
  if _overrides:
    options.env_option_overrides = [*options.env_option_overrides, *_overrides]
  if callbacks or backend.platform != "cpu":  # a callback belongs to one function of one test
    return _compile(backend, module, devices, options, callbacks)
  key = _key(module, devices, options)
  if key in _compiled:
    _compiled[key] = _compiled.pop(key)
  else:
    _compiled[key] = _compile(backend, module, devices, options, callbacks)
    _since_trim += 1
  return _compiled[key]


@contextlib.contextmanager
def fusion_emitters() -> Iterator[None]:
  """Compiles with XLA's default code generation, whose bits do not depend on the batch's size."""
  _overrides.append(("xla_cpu_use_fusion_emitters", True))
  try:
    yield
  finally:
    _overrides.clear()


def install() -> None:
  compiler.backend_compile_and_load = _compile_once


def trim() -> None:
  """Drops the less recently used half of the programs once they take up too many memory maps."""
  global _since_trim
  if _since_trim < EVERY:
    return
  _since_trim = 0
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") < MAPS:
    return
  for key in list(_compiled)[: len(_compiled) // 2]:
    del _compiled[key]
  jax.clear_caches()
  gc.collect()
