"""Reads the pickles inside PyTorch files by interpreting their opcodes; no code is imported or run.

Python's unpickler imports names, calls them, sets attributes and allocates a memo of any size, all
as the stream says. This one cannot: see `names` for what a name can become.
"""

import codecs
import struct
from collections.abc import Callable
from typing import Any

from xmodal_jax.interop.torch_files import names
from xmodal_jax.interop.torch_files.keys import Keys
from xmodal_jax.interop.torch_files.names import Name, Placeholder
from xmodal_jax.interop.torch_files.tensor import FileFormatError

_MAX_OPS = 10_000_000  # an optimizer state of 1,500 parameters takes 0.2 million
_MAX_INDEX = 1 << 32  # of the memo
_MAX_INT = 1024  # bytes; larger integers are slow to hash and print, and no checkpoint has them
_ERRORS = (
  IndexError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
  MemoryError, struct.error,
)  # fmt: skip


class Unpickler:
  """Reads one pickle of `data` (bytes or a map) from `pos` on; `load()` moves `pos` to its end.

  persistent(id) returns the object of a persistent id. Time and memory are bounded by the length of
  the stream, whatever it contains; any damage is a FileFormatError.
  """

  def __init__(self, data, pos: int = 0, persistent: Callable[[Any], Any] | None = None):
    self.data, self.pos, self.end = data, pos, len(data)
    self.persistent = persistent
    self.stack: list = []
    self.marks: list[int] = []
    self.memo: dict[int, Any] = {}
    self.names: dict[tuple[str, str], Name] = {}
    self.budget = min(4 * (self.end - pos), 1 << 28) + (1 << 18)
    self.key = Keys(self.charge).check

  def load(self) -> Any:
    data, ops = self.data, _OPS
    try:
      for _ in range(_MAX_OPS):
        code = data[self.pos]
        self.pos += 1
        if code == 0x2E:  # STOP
          return self.stack.pop()
        op = ops.get(code)
        if op is None:
          raise FileFormatError(f"opcode {code:#x} at byte {self.pos - 1} of the pickle")
        op(self)
    except FileFormatError:
      raise
    except _ERRORS as e:
      raise FileFormatError(
        f"damaged pickle near byte {self.pos}: {type(e).__name__} {str(e)[:100]}"
      ) from e
    raise FileFormatError(f"a pickle of more than {_MAX_OPS} operations")

  def charge(self, n: int) -> None:
    """Counts n units of work: an element copied or compared, a call. The budget follows from the
    length of the stream, because short streams can refer to long values many times."""
    self.budget -= n
    if self.budget < 0:
      raise FileFormatError("the pickle unfolds to much more than its own size")

  def take(self, n: int) -> bytes:
    start = self.pos
    if n < 0 or start + n > self.end:
      raise FileFormatError("the pickle ends early")
    self.pos = start + n
    return self.data[start : self.pos]

  def line(self) -> bytes:
    end = self.data.find(b"\n", self.pos, self.pos + 100_000)
    if end < 0:
      raise FileFormatError("the pickle ends inside a line")
    text = self.take(end - self.pos)
    self.pos += 1
    return text

  def counted(self, form: str) -> bytes:
    (n,) = struct.unpack(form, self.take(struct.calcsize(form)))
    return self.take(n)

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def marked(self) -> list:
    start = self.marks.pop()
    values = self.stack[start:]
    del self.stack[start:]
    return values

  def find(self, module: str, name: str) -> Name:
    known = self.names.get((module, name))
    if known is None:
      known = self.names[module, name] = names.find(module, name)
    return known

  def call(self, function: Any, args: Any, new: bool = False) -> Any:
    return names.call(self, function, args, new)

  def extend(self, target: Any, values: list) -> None:
    if isinstance(target, set):
      target.update(map(self.key, values))
    else:
      _contents(target, list, "elements").extend(values)

  def update(self, target: Any, values: list) -> None:
    contents = _contents(target, dict, "items")
    for i in range(0, len(values), 2):
      contents[self.key(values[i])] = values[i + 1]


def _contents(target: Any, kind: type, attribute: str):
  if isinstance(target, Placeholder):
    return getattr(target, attribute)
  if type(target) is not kind:
    raise FileFormatError(f"contents for an object of type {type(target).__name__}")
  return target


def _text(data: bytes) -> str | bytes:
  """A `str` of Python 2."""
  try:
    return data.decode()
  except UnicodeDecodeError:
    return data


def _long(data: bytes) -> int:
  if len(data) > _MAX_INT:
    raise FileFormatError(f"an integer of {len(data)} bytes")
  return int.from_bytes(data, "little", signed=True)


def _number(line: bytes) -> int | bool:
  line = line.removesuffix(b"L")
  if len(line) > _MAX_INT:
    raise FileFormatError(f"an integer of {len(line)} digits")
  return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def _new(vm: Unpickler, keywords: bool) -> None:
  kw = vm.stack.pop() if keywords else {}
  args, cls = vm.stack.pop(), vm.stack.pop()
  if kw:
    vm.charge(len(args))
    args = (*args, kw)
  vm.push(vm.call(cls, args, new=True))


def _obj(vm: Unpickler) -> None:
  cls, *args = vm.marked()
  vm.push(vm.call(cls, tuple(args)))


def _persistent(vm: Unpickler, pid: Any) -> None:
  if vm.persistent is None:
    raise FileFormatError("a tensor where none is expected")
  vm.push(vm.persistent(pid))


def _dict(vm: Unpickler) -> None:
  values, target = vm.marked(), {}
  vm.update(target, values)
  vm.push(target)


def _swap_pop(vm: Unpickler, method: Callable, n: int) -> None:
  """Applies `method` with the last n values to the object below them."""
  values = vm.stack[-n:]
  del vm.stack[-n:]
  method(vm, vm.stack[-1], values)


def _pop_into(vm: Unpickler, method: Callable) -> None:
  values = vm.marked()
  method(vm, vm.stack[-1], values)


def _build(vm: Unpickler) -> None:
  state = vm.stack.pop()
  names.build(vm, vm.stack[-1], state)


def _put(vm: Unpickler, index: int) -> None:
  if not 0 <= index < _MAX_INDEX:
    raise FileFormatError(f"memo entry {index:#x}"[:100])
  vm.memo[index] = vm.stack[-1]


def _stack_global(vm: Unpickler) -> None:
  name, module = vm.stack.pop(), vm.stack.pop()
  if type(name) is not str or type(module) is not str:
    raise FileFormatError("a global whose name is not text")
  vm.push(vm.find(module, name))


def _last(n: int) -> Callable:
  def op(vm):
    values = tuple(vm.stack[-n:])
    if len(values) < n:
      raise FileFormatError("the pickle's stack is empty")
    vm.stack[-n:] = [values]

  return op


_u1, _u2, _u4, _u8 = "<B", "<H", "<I", "<Q"
_int = lambda vm, form: struct.unpack(form, vm.take(struct.calcsize(form)))[0]
_find = lambda vm: vm.find(vm.line().decode(), vm.line().decode())
_TABLE: dict[bytes, Callable[[Unpickler], Any]] = {
  b"\x80": lambda vm: vm.take(1),  # protocol
  b"\x95": lambda vm: vm.take(8),  # frame
  b"(": lambda vm: vm.marks.append(len(vm.stack)),
  b"0": lambda vm: vm.stack.pop(),
  b"1": lambda vm: vm.marked(),
  b"2": lambda vm: vm.push(vm.stack[-1]),
  b"N": lambda vm: vm.push(None),
  b"\x88": lambda vm: vm.push(True),
  b"\x89": lambda vm: vm.push(False),
  b"I": lambda vm: vm.push(_number(vm.line())),
  b"L": lambda vm: vm.push(_number(vm.line())),
  b"F": lambda vm: vm.push(float(vm.line())),
  b"J": lambda vm: vm.push(_int(vm, "<i")),
  b"K": lambda vm: vm.push(_int(vm, _u1)),
  b"M": lambda vm: vm.push(_int(vm, _u2)),
  b"\x8a": lambda vm: vm.push(_long(vm.counted(_u1))),
  b"\x8b": lambda vm: vm.push(_long(vm.counted("<i"))),
  b"G": lambda vm: vm.push(_int(vm, ">d")),
  b"S": lambda vm: vm.push(_text(codecs.escape_decode(vm.line()[1:-1])[0])),
  b"V": lambda vm: vm.push(vm.line().decode("raw-unicode-escape")),
  b"T": lambda vm: vm.push(_text(vm.counted("<i"))),
  b"U": lambda vm: vm.push(_text(vm.counted(_u1))),
  b"X": lambda vm: vm.push(vm.counted(_u4).decode("utf-8", "surrogatepass")),
  b"\x8c": lambda vm: vm.push(vm.counted(_u1).decode("utf-8", "surrogatepass")),
  b"\x8d": lambda vm: vm.push(vm.counted(_u8).decode("utf-8", "surrogatepass")),
  b"B": lambda vm: vm.push(vm.counted(_u4)),
  b"C": lambda vm: vm.push(vm.counted(_u1)),
  b"\x8e": lambda vm: vm.push(vm.counted(_u8)),
  b"\x96": lambda vm: vm.push(vm.counted(_u8)),
  b"]": lambda vm: vm.push([]),
  b"}": lambda vm: vm.push({}),
  b")": lambda vm: vm.push(()),
  b"\x8f": lambda vm: vm.push(set()),
  b"l": lambda vm: vm.push(vm.marked()),
  b"t": lambda vm: vm.push(tuple(vm.marked())),
  b"\x85": _last(1),
  b"\x86": _last(2),
  b"\x87": _last(3),
  b"d": _dict,
  b"\x91": lambda vm: vm.push(frozenset(map(vm.key, vm.marked()))),
  b"a": lambda vm: _swap_pop(vm, Unpickler.extend, 1),
  b"e": lambda vm: _pop_into(vm, Unpickler.extend),
  b"\x90": lambda vm: _pop_into(vm, Unpickler.extend),
  b"s": lambda vm: _swap_pop(vm, Unpickler.update, 2),
  b"u": lambda vm: _pop_into(vm, Unpickler.update),
  b"p": lambda vm: _put(vm, _number(vm.line())),
  b"q": lambda vm: _put(vm, _int(vm, _u1)),
  b"r": lambda vm: _put(vm, _int(vm, _u4)),
  b"\x94": lambda vm: _put(vm, len(vm.memo)),
  b"g": lambda vm: vm.push(vm.memo[_number(vm.line())]),
  b"h": lambda vm: vm.push(vm.memo[_int(vm, _u1)]),
  b"j": lambda vm: vm.push(vm.memo[_int(vm, _u4)]),
  b"P": lambda vm: _persistent(vm, vm.line().decode()),
  b"Q": lambda vm: _persistent(vm, vm.stack.pop()),
  b"c": lambda vm: vm.push(_find(vm)),
  b"\x93": _stack_global,
  b"R": lambda vm: vm.push(vm.call(args=vm.stack.pop(), function=vm.stack.pop())),
  b"\x81": lambda vm: _new(vm, False),
  b"\x92": lambda vm: _new(vm, True),
  b"i": lambda vm: vm.push(vm.call(_find(vm), tuple(vm.marked()))),
  b"o": _obj,
  b"b": _build,
}
_OPS = {code[0]: op for code, op in _TABLE.items()}
