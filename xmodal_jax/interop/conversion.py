"""The two-way rule engine between PyTorch state dicts and our parameter paths.

A rule names both sides with templates. `{layer}` numbers the layers that our array stacks on its
first axis (`first` is torch's number of our layer 0); any other placeholder is a number that occurs
in both templates. Nothing is dropped in silence: unknown, extra, missing and misshapen keys are
listed together and raise. Values keep their dtypes and bits; widening them is for who loads them.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xmodal_jax.interop.torch_files import Lazy, TensorRef

# A jax key path of nested dicts -> "image/blocks/q/kernel".
path_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")

Pieces = tuple[np.ndarray, ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one torch tensor becomes one or more arrays of ours, and back."""

  forward: Callable[[np.ndarray], Pieces]
  backward: Callable[[Pieces], np.ndarray]


def _axes(to: Sequence[int], back: Sequence[int]) -> Transform:
  return Transform(lambda x: (x.transpose(to),), lambda parts: parts[0].transpose(back))


same = Transform(lambda x: (x,), lambda parts: parts[0])
linear = _axes((1, 0), (1, 0))  # [out, in] <-> [in, out]
conv = _axes((2, 3, 1, 0), (3, 2, 0, 1))  # OIHW <-> HWIO


def split(n: int, inner: Transform = same) -> Transform:
  """[n * D, ...] <-> n arrays [D, ...], each through `inner`: fused query, key, value."""
  return Transform(
    lambda x: tuple(inner.forward(part)[0] for part in np.split(x, n)),
    lambda parts: np.concatenate([inner.backward((part,)) for part in parts]),
  )


def squeeze(*axes: int) -> Transform:
  """Drops axes of size 1: [1, 1, D] <-> [D] with axes 0, 1."""
  return Transform(lambda x: (np.squeeze(x, axes),), lambda parts: np.expand_dims(parts[0], axes))


@dataclasses.dataclass(frozen=True)
class Rule:
  """default: the value that a parameter gets where the file, by design, has no such key: it is one
  of those with a key that `default_beside`, a regular expression, matches as a whole."""

  torch: str
  ours: tuple[str, ...] | str
  fn: Transform = same
  first: int = 0
  default: float | None = None
  default_beside: str = ".*"

  @property
  def paths(self) -> tuple[str, ...]:
    return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Ignore:
  """Keys without a parameter of ours. keep: their values travel along, for the way back.
  parameter: the original's optimizer has them too."""

  torch: str
  keep: bool = True
  parameter: bool = False


@dataclasses.dataclass(frozen=True)
class Alias:
  """Names that some files write in place of those that the rules know: re.sub(torch, means)."""

  torch: str
  means: str


@dataclasses.dataclass(frozen=True)
class Tied:
  """A key that holds the tensor of another key once more: checked, and written again."""

  torch: str
  same_as: str


@dataclasses.dataclass(frozen=True)
class Constant:
  """A key without a parameter, whose value the shape of another key, `of`, determines. It may be
  absent; where it is not it is compared, and it is written again.

  value: (shape of `of`, **numbers in its name) -> array, None where a model has no such key.
  """

  torch: str
  of: str
  value: Callable[..., np.ndarray | None]


Entry = Rule | Ignore | Alias | Tied | Constant


@dataclasses.dataclass
class Report:
  """keys: all of the file, in its order. missing: those that allow_missing let pass. filled: names
  that got their rule's default."""

  keys: list[str]
  kept: dict[str, np.ndarray]
  dropped: list[str]
  missing: list[str]
  parameters: int
  filled: list[str] = dataclasses.field(default_factory=list)


class ConversionError(ValueError):
  """Lists of keys that do not fit, by kind: unknown, extra, missing, misshapen."""

  def __init__(self, **lists: list[str]):
    self.__dict__.update(lists)
    text = [
      f"{len(keys)} {kind.replace('_', ' ')}:\n    " + "\n    ".join(keys)
      for kind, keys in lists.items()
      if keys
    ]
    super().__init__("the state dict does not fit the model\n  " + "\n  ".join(text))


@dataclasses.dataclass(frozen=True)
class _Step:
  rule: Rule
  paths: tuple[str, ...]
  layer: int | None
  depth: int


def _pattern(template: str) -> re.Pattern:
  """A template as a regular expression; numbers are written without leading zeros. `*` is any."""
  out, seen = "", set()
  for literal, name in re.findall(r"([^{]+)|\{(\w+)\}", template):
    if literal:
      out += re.escape(literal).replace(r"\*", ".*")
    else:
      out += f"(?P={name})" if name in seen else f"(?P<{name}>0|[1-9][0-9]*)"
      seen.add(name)
  return re.compile(out)


def plan(rules: Iterable[Entry], shapes: Shapes) -> dict[str, _Step]:
  """Every torch key of a model whose paths and shapes are given -> how it maps."""
  steps: dict[str, _Step] = {}
  for rule in rules:
    if not isinstance(rule, Rule):
      continue
    pattern, stacked = _pattern(rule.paths[0]), "{layer}" in rule.torch
    for path, shape in shapes.items():
      match = pattern.fullmatch(path)
      if match is None:
        continue
      env = match.groupdict()
      paths = tuple(p.format(**env) for p in rule.paths)
      depth = shape[0] if stacked else 1
      for layer in range(depth):
        name = rule.torch.format(**env, layer=layer + rule.first)
        if name in steps:
          raise ValueError(f"two rules for {name}: {steps[name].rule.torch} and {rule.torch}")
        steps[name] = _Step(rule, paths, layer if stacked else None, depth)
  return steps


def tensors(rules: Iterable[Entry], shapes: Shapes) -> list[tuple[tuple[str, ...], bool]]:
  """Which of our arrays are one torch tensor: (paths, stacked) for each group of them.

  Several paths are pieces of the same tensor (fused query, key, value). Where stacked, each of
  them leads with a layer axis and there is one torch tensor per layer. shapes: of all parameters.
  Raises ConversionError for a parameter that no rule covers, ValueError for one in two groups.
  """
  groups = {step.paths: step.layer is not None for step in plan(rules, shapes).values()}
  covered = [path for paths in groups for path in paths]
  if set(covered) != set(shapes):
    raise ConversionError(
      parameters_without_a_rule=sorted(set(shapes) - set(covered)),
      rules_without_a_parameter=sorted(set(covered) - set(shapes)),
    )
  if twice := sorted({path for path in covered if covered.count(path) > 1}):
    raise ValueError(f"rules put {', '.join(twice)} into more than one torch tensor")
  return list(groups.items())


def tensors_of(rules: Iterable[Entry], params: Any) -> list[tuple[tuple[str, ...], bool]]:
  """`tensors` for nested dicts of parameters, shapes suffice."""
  leaves = jax.tree.leaves_with_path(params)
  return tensors(rules, {path_of(key_path): x.shape for key_path, x in leaves})


def parameter_names(rules: Sequence[Entry], shapes: Shapes, keys: Iterable[str]) -> list[str]:
  """Those of a file's keys that are parameters, in order, by the rules' names: of these shapes, or
  of what is ignored."""
  steps = plan(rules, shapes)
  idle = [_pattern(r.torch) for r in rules if isinstance(r, Ignore) and r.parameter]
  names = _canonical(rules, keys).values()
  return [n for n in names if n in steps or any(p.fullmatch(n) for p in idle)]


def _canonical(rules: Sequence[Entry], names: Iterable[str]) -> dict[str, str]:
  """Name in a file -> name that the rules know."""
  aliases = [r for r in rules if isinstance(r, Alias)]

  def one(name: str) -> str:
    for a in aliases:
      name = re.sub(a.torch, a.means, name)
    return name

  return {name: one(name) for name in names}


def _has_default(rule: Rule, keys: Sequence[str]) -> bool:
  """Whether a file with these keys gets the default of a rule whose own key it lacks."""
  beside = re.compile(rule.default_beside).fullmatch
  return rule.default is not None and any(beside(key) for key in keys)


def to_jax(
  state: Mapping[str, Any],
  rules: Sequence[Entry],
  abstract: Mapping[str, Any],
  *,
  allow_missing: str | None = None,
  check_shapes: bool = True,
) -> tuple[dict[str, np.ndarray], Report]:
  """Torch state dict -> {path: array}, in the dtypes of the file.

  state: arrays or TensorRefs, read one at a time into the stacked arrays. abstract: path ->
  anything with a shape; all of it must be filled. allow_missing: a regular expression for whole
  torch keys that may be absent; their paths are then absent too. check_shapes=False keeps the
  file's shapes (position tables that are resized afterwards); the numbers of layers must fit.
  """
  shapes = {path: tuple(x.shape) for path, x in abstract.items()}
  steps = plan(rules, shapes)
  ignores = [(_pattern(r.torch), r) for r in rules if isinstance(r, Ignore)]
  known = [_pattern(r.torch) for r in rules if isinstance(r, Rule | Tied | Constant)]
  report = Report(list(state), {}, [], [], 0)
  names = _canonical(rules, state)
  state = {known: state[name] for name, known in names.items()}
  if len(state) < len(report.keys):
    count = collections.Counter(names.values())
    twice = [f"{name} is {known}" for name, known in names.items() if count[known] > 1]
    raise ConversionError(keys_under_two_names=twice)
  unknown, extra, misshapen, untied, wrong = [], [], [], [], []
  tied = {r.torch: r.same_as for r in rules if isinstance(r, Tied)}
  for name in state:
    if name in steps:
      continue
    if name in tied and tied[name] in state:
      if not _same_bits(state[name], state[tied[name]]):
        untied.append(f"{name} is not {tied[name]}")
      continue
    if (want := _constant(rules, name, state)) is not None:
      have = _fetch(state[name])
      if have.shape != want.shape:
        wrong.append(f"{name} {list(have.shape)}, expected {list(want.shape)}")
      elif differ := np.count_nonzero(have != want):
        wrong.append(f"{name}: {differ} of {want.size} values differ")
      elif have.dtype != want.dtype:  # a file of half precision gets its own back
        report.kept[name] = have
      continue
    ignore = next((r for p, r in ignores if p.fullmatch(name)), None)
    if ignore is None:
      listed = extra if any(p.fullmatch(name) for p in known) else unknown
      listed.append(f"{name} {list(state[name].shape)}")
    elif ignore.keep:
      report.kept[name] = _fetch(state[name])
    else:
      report.dropped.append(name)

  absent = [name for name in steps if name not in state]
  report.filled = [name for name in absent if _has_default(steps[name].rule, report.keys)]
  absent = [name for name in absent if name not in set(report.filled)]
  allowed = re.compile(allow_missing).fullmatch if allow_missing else lambda _: None
  report.missing = [name for name in absent if allowed(name)]
  missing = [f"{name} -> {', '.join(steps[name].paths)}" for name in absent if not allowed(name)]
  # A stacked array needs all of its layers: leave it out whole, or complain.
  left_out = {path for name in report.missing for path in steps[name].paths}
  partial = {p for name in steps if name in state for p in steps[name].paths} & left_out
  missing += [f"{path}: only some of its layers are in the file" for path in sorted(partial)]
  covered = {path for step in steps.values() for path in step.paths}
  no_rule = [f"{path} {list(shapes[path])}" for path in shapes if path not in covered]
  no_model = sorted(covered - set(shapes))
  if (
    unknown or extra or missing or no_rule or no_model or untied or wrong
  ):  # shapes are compared without reading
    misshapen = _compare(state, steps, shapes) if check_shapes and not no_model else []
    raise ConversionError(
      unknown=unknown, extra=extra, missing=missing, misshapen=misshapen,
      tied_and_different=untied, not_what_the_model_computes=wrong,
      parameters_without_a_rule=no_rule, rules_without_a_parameter=no_model,
    )  # fmt: skip
  if check_shapes and (misshapen := _compare(state, steps, shapes)):
    raise ConversionError(misshapen=misshapen)

  flat: dict[str, np.ndarray] = {}
  for name, step in steps.items():
    if name not in state:
      continue
    pieces = step.rule.fn.forward(_fetch(state[name]))
    for path, piece in zip(step.paths, pieces, strict=True):
      problem = _store(flat, path, piece, step)
      if problem:
        misshapen.append(f"{name} -> {path}: {problem}")
    report.parameters += sum(p.size for p in pieces)
  if misshapen:
    raise ConversionError(misshapen=misshapen)
  for name in report.filled:
    for path in steps[name].paths:
      flat[path] = np.full(shapes[path], steps[name].rule.default, np.float32)
  return {path: flat[path] for path in shapes if path in flat}, report


def _store(flat: dict, path: str, piece: np.ndarray, step: _Step) -> str | None:
  if step.layer is None:
    flat[path] = np.ascontiguousarray(piece).reshape(piece.shape)  # of a 0-d array it makes 1-d
    return None
  if path not in flat:
    flat[path] = np.empty((step.depth, *piece.shape), piece.dtype)
  stack = flat[path]
  if stack.shape[1:] != piece.shape or stack.dtype != piece.dtype:
    return f"{piece.dtype}{list(piece.shape)} beside {stack.dtype}{list(stack.shape[1:])}"
  stack[step.layer] = piece
  return None


def _compare(state: Mapping[str, Any], steps: Mapping[str, _Step], shapes: Shapes) -> list[str]:
  """Keys whose shape is not the model's, found from zero-stride stand-ins of no memory."""
  wrong = []
  for name, step in steps.items():
    if name not in state:
      continue
    want = [shapes[p] if step.layer is None else shapes[p][1:] for p in step.paths]
    have = tuple(state[name].shape)
    try:
      got = [x.shape for x in step.rule.fn.forward(np.broadcast_to(np.int8(0), have))]
    except ValueError:  # np.split or transpose of another rank
      got = None
    if got != want:
      wrong.append(f"{name} {list(have)} -> {', '.join(step.paths)} {[list(w) for w in want]}")
  return wrong


def _same_bits(a: Any, b: Any) -> bool:
  a, b = _fetch(a), _fetch(b)
  return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _constant(rules: Sequence[Entry], name: str, state: Mapping[str, Any]) -> np.ndarray | None:
  """What the Constant of this name has to be beside the rest of a file; None if it is none."""
  for rule in rules:
    if isinstance(rule, Constant) and (match := _pattern(rule.torch).fullmatch(name)):
      numbers = match.groupdict()
      of = state.get(rule.of.format(**numbers))
      return None if of is None else _value(rule, of.shape, numbers)
  return None


def _value(rule: Constant, shape: Sequence[int], numbers: Mapping[str, str]) -> np.ndarray | None:
  return rule.value(tuple(shape), **{k: int(v) for k, v in numbers.items()})


def _fetch(value: Any) -> np.ndarray:
  return value.read() if isinstance(value, TensorRef) else np.asarray(value)


def to_torch(
  flat: Mapping[str, Any],
  rules: Sequence[Entry],
  *,
  kept: Mapping[str, np.ndarray] | None = None,
  order: Sequence[str] = (),
) -> dict[str, Lazy]:
  """{path: array} -> torch state dict of arrays that are made when they are asked for.

  kept: values of ignored keys, from the report of the way there. order: the keys of the file on
  the way there; they come first and keep their aliases, and what was filled stays out again.
  """
  steps = plan(rules, {path: tuple(x.shape) for path, x in flat.items()})
  covered = {path for step in steps.values() for path in step.paths}
  if covered != set(flat):
    raise ConversionError(
      parameters_without_a_rule=sorted(set(flat) - covered),
      rules_without_a_parameter=sorted(covered - set(flat)),
    )
  kept = dict(kept or {})
  alias = {known: name for name, known in _canonical(rules, order).items()}
  filled = lambda name, step: order and step.rule.default is not None and name not in alias
  out = {
    alias.get(name, name): _lazy(flat, step)
    for name, step in steps.items()
    if not filled(name, step)
  }
  for tied in (r for r in rules if isinstance(r, Tied)):
    first = out.get(alias.get(tied.same_as, tied.same_as))
    if first is not None and (not order or tied.torch in order):
      out[tied.torch] = first
  for rule in (r for r in rules if isinstance(r, Constant)):
    pattern = _pattern(rule.of)
    for known in steps:
      name, match = alias.get(known, known), pattern.fullmatch(known)
      if match is None or name not in out:
        continue
      key = rule.torch.format(**match.groupdict())
      value = _value(rule, out[name].shape, match.groupdict())
      if value is not None and (not order or alias.get(key, key) in order):
        out[alias.get(key, key)] = Lazy(value.shape, value.dtype, lambda v=value: v)
  out |= {name: Lazy(v.shape, v.dtype, lambda v=v: v) for name, v in kept.items()}
  names = dict.fromkeys([n for n in order if n in out]) | dict.fromkeys(out)
  return {name: out[name] for name in names}


def _lazy(flat: Mapping[str, Any], step: _Step) -> Lazy:
  def make():
    parts = (np.asarray(flat[p]) for p in step.paths)
    return step.rule.fn.backward(tuple(x if step.layer is None else x[step.layer] for x in parts))

  sample = make()  # a view, but for fused weights, which are copies for this moment only
  return Lazy(sample.shape, sample.dtype, make)


def arrays(state: Mapping[str, Lazy]) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of what `to_torch` gave, one alive at a time."""
  for name, lazy in state.items():
    yield name, lazy.make()
