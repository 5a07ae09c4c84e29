"""Reads the text of a compiled program: operations, matmul FLOPs, bytes, loops, collectives.

`compiled.cost_analysis()` counts the body of a loop once, and has no word on collectives. Here are
the numbers of single operations; `cost` adds them up, bodies once per iteration.
"""

import dataclasses
import functools
import math
import re

import numpy as np

BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Names, places and unpacking: nothing happens when they run.
FREE = frozenset(
  [
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
  ]
)
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_LIBRARY_DOT = r'"lhs_contracting_dimensions":\[([^\]]*)\]'  # of a call of cuBLAS
_LIBRARY_ATTENTION = r'custom_call_target="__cudnn\$fmha(\w+)"'
_SCORES = r'"intermediate_tensor_shape":\{.*?"dimensions":\[([^\]]*)\]'  # [B, H, Q, K] of it
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
  """dtype as XLA names it; dims; memory: XLA's number of the space that it lies in, 0 for HBM."""

  dtype: str
  dims: tuple[int, ...]
  memory: int = 0

  @property
  def bytes(self) -> int:
    width = BYTES.get(self.dtype)
    if width is None:  # of bf16, f8e4m3fn, s4 the number of bits
      width = int(re.search(r"\d+", self.dtype)[0]) / 8
    return math.ceil(math.prod(self.dims) * width)

  @property
  def hbm(self) -> int:
    """Bytes in the device's main memory."""
    return self.bytes if self.memory == 0 else 0


@dataclasses.dataclass(frozen=True)
class Op:
  """One line: its result's shapes (several of a tuple), opcode, names of operands, the rest."""

  name: str
  kind: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  inside: str  # what the parentheses hold: an operation's literal or number
  root: bool

  def attribute(self, pattern: str) -> str | None:
    """First group of the pattern in the attributes."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else None

  @property
  def bytes(self) -> int:
    return sum(s.bytes for s in self.shapes)


class Computation:
  """Operations in the order that they run in."""

  def __init__(self, name: str, ops: list[Op]):
    self.name, self.ops = name, ops
    self.by_name = {op.name: op for op in ops}

  @property
  def root(self) -> Op:
    return next((op for op in self.ops if op.root), self.ops[-1])

  @functools.cached_property
  def users(self) -> dict[str, list[Op]]:
    out: dict[str, list[Op]] = {}
    for op in self.ops:
      for name in dict.fromkeys(op.operands):
        out.setdefault(name, []).append(op)
    return out

  def operand(self, op: Op, index: int) -> Op:
    return self.by_name[op.operands[index]]


class Module:
  """computations by name; entry: the one that the program is."""

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry = ""
    name, ops = "", []
    for line in text.splitlines():
      if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
        name, ops = _NAME.search(line)[1], []
        if line.startswith("ENTRY"):
          self.entry = name
      elif line.startswith("}"):
        self.computations[name] = Computation(name, ops)
      elif line.startswith("  ") and " = " in line and (op := parse_line(line)):
        ops.append(op)
    if not self.entry:
      raise ValueError("no ENTRY computation: this is not the text of an HLO module")

  def called(self, op: Op, key: str = "calls") -> Computation | None:
    name = op.attribute(rf"\b{key}=%?([\w.\-]+)")
    return self.computations.get(name) if name else None

  def branches(self, op: Op) -> list[Computation]:
    """Of a conditional."""
    many = op.attribute(r"branch_computations=\{([^}]*)\}")
    names = _NAME.findall(many) if many else []
    names += [n for k in ("true", "false") if (n := op.attribute(rf"{k}_computation=%([\w.\-]+)"))]
    return [self.computations[n] for n in names]

  # --- loops ------------------------------------------------------------------------------------

  def trips(self, loop: Op, caller: Computation) -> int | None:
    """Iterations of a `while` that counts from 0 to a constant; None where it does not."""
    if known := loop.attribute(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)'):
      return int(known)
    condition = self.called(loop, "condition")
    ends = self._ends(condition, condition.root, caller, loop)
    return ends

  def _ends(self, comp: Computation, op: Op, caller: Computation, loop: Op) -> int | None:
    """The constant that a condition compares its counter with."""
    if op.kind == "fusion" and (inner := self.called(op)):
      consts = [comp.by_name[n] for n in op.operands if comp.by_name[n].kind == "constant"]
      if inner.root.kind == "compare" and "direction=LT" in inner.root.attributes and consts:
        return int(consts[-1].inside)
      return None
    if op.kind != "compare" or "direction=LT" not in op.attributes:
      return None
    bound = comp.operand(op, 1)
    while bound.kind in ("copy", "bitcast", "convert"):
      bound = comp.operand(bound, 0)
    if bound.kind == "constant":
      return int(bound.inside)
    if bound.kind != "get-tuple-element" or not loop.operands:
      return None
    start = caller.operand(loop, 0)
    place = int(bound.attribute(r"index=(\d+)"))
    if start.kind != "tuple":
      return None
    value = caller.operand(start, place)
    while value.kind in ("copy", "bitcast"):
      value = caller.operand(value, 0)
    return int(value.inside) if value.kind == "constant" else None

  # --- work -------------------------------------------------------------------------------------

  def flops(self, op: Op, comp: Computation) -> int:
    """Of matmuls and convolutions, in the operation or in what it fuses."""
    if op.kind == "dot":
      lhs = comp.operand(op, 0).shapes[0]
      contract = _numbers(op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
      return 2 * math.prod(op.shapes[0].dims) * math.prod(lhs.dims[i] for i in contract)
    if op.kind == "custom-call" and (name := op.attribute(_LIBRARY_ATTENTION)):
      scores = [int(d) for d in re.findall(r"\d+", op.attribute(_SCORES))]
      # Backward the scores are made again, for the gradients of values, weights, queries and keys.
      products = 5 if "Backward" in name else 2
      return products * 2 * math.prod(scores) * comp.operand(op, 0).shapes[0].dims[-1]
    if op.kind == "custom-call" and (dims := op.attribute(_LIBRARY_DOT)):
      lhs = comp.operand(op, 0).shapes[0]
      contract = [int(d) for d in re.findall(r"\d+", dims)]
      return 2 * math.prod(op.shapes[0].dims) * math.prod(lhs.dims[i] for i in contract)
    if op.kind == "convolution" or (op.kind == "custom-call" and "dim_labels=" in op.attributes):
      return _convolution_flops(op, comp.operand(op, 0).shapes[0], comp.operand(op, 1).shapes[0])
    if op.kind in ("fusion", "call") and (inner := self.called(op) or self.called(op, "to_apply")):
      return sum(self.flops(o, inner) for o in inner.ops)
    return 0

  def traffic(self, op: Op, comp: Computation) -> int:
    """Bytes that it reads from and writes to HBM; of what is sliced or updated, that part alone."""
    sources = [comp.by_name[n] for n in op.operands if n in comp.by_name]
    if op.kind in ("fusion", "fusion-start") and (inner := self.called(op)):
      return self._fusion_traffic(op, sources, inner)
    out = sum(s.hbm for s in op.shapes)
    if op.kind in ("dynamic-slice", "slice", "gather"):
      read = out if sources and sources[0].shapes[0].memory == 0 else 0
      return out + read
    if op.kind in ("dynamic-update-slice", "scatter"):
      update = sources[1 if op.kind == "dynamic-update-slice" else -1]
      return 2 * update.bytes if op.shapes[0].memory == 0 else sum(s.hbm for s in update.shapes)
    return out + sum(s.hbm for x in sources for s in x.shapes)

  def _fusion_traffic(self, op: Op, sources: list[Op], inner: Computation) -> int:
    total = 0
    parameters = {int(o.inside): o for o in inner.ops if o.kind == "parameter"}
    for i, source in enumerate(sources):
      if len(source.shapes) == 1 and source.shapes[0].memory:
        continue
      whole = sum(s.hbm for s in source.shapes)
      total += min(whole, self._read(parameters[i], inner)) if i in parameters else whole
    root = inner.root
    results = [inner.by_name[n] for n in root.operands] if root.kind == "tuple" else [root]
    shapes = op.shapes
    if op.kind == "fusion-start":  # its own are those of operands and results
      shapes = tuple(s for r in results for s in r.shapes)
    if len(results) != len(shapes):
      return total + sum(s.hbm for s in shapes)
    for shape, result in zip(shapes, results, strict=True):
      result = _through_bitcasts(result, inner)
      if result.kind == "dynamic-update-slice":
        total += inner.operand(result, 1).bytes if shape.memory == 0 else 0
      else:
        total += shape.hbm
    return total

  def _read(self, value: Op, inner: Computation) -> int:
    """Bytes of a fusion's parameter that are read."""
    total = 0
    for user in inner.users.get(value.name, []):
      if user.kind in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
        total += user.bytes
      elif user.kind == "dynamic-update-slice" and user.operands[0] == value.name:
        continue  # in place
      elif user.kind == "bitcast":
        total += self._read(user, inner)
      elif user.kind == "fusion" and (deeper := self.called(user)):
        at = user.operands.index(value.name)
        same = [o for o in deeper.ops if o.kind == "parameter" and int(o.inside) == at]
        total += self._read(same[0], deeper)
      else:
        return value.bytes
    return total


def parse_line(line: str) -> Op | None:
  """`  [ROOT ]%name = shapes kind(operands), attributes`."""
  line = _COMMENT.sub("", line)
  name, _, rest = line.strip().partition(" = ")
  root = name.startswith("ROOT ")
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  shapes, rest = rest[:end], rest[end:].lstrip()
  opens = rest.find("(")
  if opens < 0:
    return None
  closes = _closing(rest, opens)
  inside = rest[opens + 1 : closes]
  return Op(
    name.removeprefix("ROOT ").lstrip("%"),
    rest[:opens],
    tuple(_shape(*found) for found in _SHAPE.findall(shapes)),
    tuple(_NAME.findall(inside)),
    rest[closes + 1 :],
    inside,
    root,
  )


def _closing(text: str, at: int) -> int:
  """Where the parenthesis that opens at `at` is closed."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, at):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  raise ValueError(f"a parenthesis is not closed in {text[:200]!r}")


@functools.lru_cache(maxsize=4096)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
  memory = re.search(r"S\((\d+)\)", layout)
  return Shape(dtype, _numbers(dims), int(memory[1]) if memory else 0)


def _numbers(text: str | None) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n) if text else ()


def _through_bitcasts(op: Op, comp: Computation) -> Op:
  while op.kind == "bitcast":
    op = comp.operand(op, 0)
  return op


def _convolution_flops(op: Op, lhs: Shape, rhs: Shape) -> int:
  """Multiplications with what is there: places that only padding or dilation made do not count.

  The compiler writes matmuls, batched ones too, as convolutions with windows.
  """
  sides = op.attribute(r"dim_labels=(\S+?)(?:,|$)")
  inputs, kernel, output = re.fullmatch(r"(\w+)_(\w+)->(\w+)", sides).groups()
  window = {
    k: v.split("x")
    for k, v in re.findall(r"(\w+)=(\S+)", op.attribute(r"window=\{([^}]*)\}") or "")
  }
  out = op.shapes[0]
  pairs = 1
  for digit in (c for c in inputs if c.isdigit()):
    d = int(digit)
    get = lambda key, default: window[key][d] if key in window else default
    low = int(get("pad", "0_0").split("_")[0])
    pairs *= _window_pairs(
      lhs.dims[inputs.index(digit)],
      out.dims[output.index(digit)],
      int(get("size", "1")),
      int(get("stride", "1")),
      low,
      int(get("lhs_dilate", "1")),
      int(get("rhs_dilate", "1")),
    )
  features = out.dims[output.index("b")] * out.dims[output.index("f")]
  return 2 * features * rhs.dims[kernel.index("i")] * pairs


@functools.lru_cache(maxsize=4096)
def _window_pairs(size, out, window, stride, low, lhs_dilate, rhs_dilate) -> int:
  """(place of the output, place of the window) pairs that meet a number of the input."""
  if window == 1 and stride == 1 and low == 0 and lhs_dilate == 1:
    return min(out, size)
  at = np.arange(out, dtype=np.int64) * stride - low
  total = 0
  for k in range(window):
    place = at + k * rhs_dilate
    meets = (place >= 0) & (place <= (size - 1) * lhs_dilate) & (place % lhs_dilate == 0)
    total += int(meets.sum())
  return total
