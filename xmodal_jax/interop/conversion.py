"""Converts PyTorch state dicts to our parameters and back, by the rules of a table.

No key is dropped silently: keys that are unknown, extra, missing or of another shape are listed
together in one ConversionError. Values keep their dtypes and bits; the caller widens them.

  flat, report = to_jax(state, table.RULES, abstract)
  state = to_torch(flat, table.RULES, kept=report.kept, order=report.keys)
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xmodal_jax.interop.rules import (
  Alias,
  Constant,
  ConversionError,
  Entry,
  Ignore,
  Rule,
  Tied,
  pattern,
)
from xmodal_jax.interop.torch_files import Lazy, TensorRef

# A jax key path of nested dicts -> "image/blocks/q/kernel".
path_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")

Shapes = Mapping[str, tuple[int, ...]]
Problems = dict[str, list[str]]  # kind, a keyword of ConversionError -> lines


@dataclasses.dataclass
class Report:
  """What `to_jax` did with a file."""

  keys: list[str]  # all of the file, in its order
  kept: dict[str, np.ndarray]  # values of ignored keys
  dropped: list[str]  # ignored keys whose values are not kept
  missing: list[str]  # absent keys that `allow_missing` accepted
  parameters: int  # number of values
  filled: list[str] = dataclasses.field(default_factory=list)  # absent keys with a default
  # Scalars that the file has with axes of length 1: key -> shape in the file.
  scalars: dict[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where one torch tensor belongs: the paths of its pieces, its layer in the stacked arrays."""

  rule: Rule
  paths: tuple[str, ...]
  layer: int | None  # None: the arrays are not stacked
  depth: int  # number of layers


def plan(rules: Iterable[Entry], shapes: Shapes) -> dict[str, Placement]:
  """The placement of every torch key of a model, whose paths and shapes are given."""
  placements: dict[str, Placement] = {}
  for rule in rules:
    if not isinstance(rule, Rule):
      continue
    first_path, stacked = pattern(rule.paths[0]), "{layer}" in rule.torch
    for path, shape in shapes.items():
      match = first_path.fullmatch(path)
      if match is None:
        continue
      numbers = match.groupdict()
      paths = tuple(p.format(**numbers) for p in rule.paths)
      depth = shape[0] if stacked else 1
      for layer in range(depth):
        name = rule.torch.format(**numbers, layer=layer + rule.first)
        if name in placements:
          raise ValueError(f"two rules for {name}: {placements[name].rule.torch} and {rule.torch}")
        placements[name] = Placement(rule, paths, layer if stacked else None, depth)
  return placements


def tensors(rules: Iterable[Entry], shapes: Shapes) -> list[tuple[tuple[str, ...], bool]]:
  """Groups (paths, stacked) of those of our arrays that are one torch tensor.

  Several paths are pieces of the same tensor (fused query, key, value). Where stacked, each array
  has a leading layer axis and there is one torch tensor per layer. shapes: of all parameters.
  Raises ConversionError for a parameter that no rule covers, ValueError for one in two groups.
  """
  placements = plan(rules, shapes)
  groups = {place.paths: place.layer is not None for place in placements.values()}
  _raise_if_any(_uncovered(placements, shapes))
  counts = collections.Counter(path for paths in groups for path in paths)
  if twice := sorted(path for path, count in counts.items() if count > 1):
    raise ValueError(f"rules put {', '.join(twice)} into more than one torch tensor")
  return list(groups.items())


def tensors_of(rules: Iterable[Entry], params: Any) -> list[tuple[tuple[str, ...], bool]]:
  """`tensors` for nested dicts of parameters; shapes suffice."""
  leaves = jax.tree.leaves_with_path(params)
  return tensors(rules, {path_of(key_path): x.shape for key_path, x in leaves})


def parameter_names(rules: Sequence[Entry], shapes: Shapes, keys: Iterable[str]) -> list[str]:
  """Those of a file's keys that are parameters of the original, in order, by the rules' names.

  shapes: of our parameters. The original may have parameters that the rules ignore.
  """
  placements = plan(rules, shapes)
  ignored = [pattern(r.torch) for r in rules if isinstance(r, Ignore) and r.parameter]
  names = _canonical(rules, keys).values()
  return [n for n in names if n in placements or any(p.fullmatch(n) for p in ignored)]


def _canonical(rules: Sequence[Entry], names: Iterable[str]) -> dict[str, str]:
  """Name in a file -> name in the rules."""
  names = list(names)
  usual = lambda alias: alias.unless and any(re.fullmatch(alias.unless, name) for name in names)
  aliases = [r for r in rules if isinstance(r, Alias) and not usual(r)]

  def rename(name: str) -> str:
    for alias in aliases:
      name = re.sub(alias.torch, alias.means, name)
    return name

  return {name: rename(name) for name in names}


def to_jax(
  state: Mapping[str, Any],
  rules: Sequence[Entry],
  abstract: Mapping[str, Any],
  *,
  allow_missing: str | None = None,
  check_shapes: bool = True,
) -> tuple[dict[str, np.ndarray], Report]:
  """Torch state dict -> {path: array} in the dtypes of the file, and a report.

  state: arrays or TensorRefs, which are read one at a time into the stacked arrays.
  abstract: path -> anything with a shape, for every parameter.
  allow_missing: regular expression for whole torch keys that may be absent, as are then their
  paths in the result.
  check_shapes: False accepts tensors of other shapes (position tables that the caller resizes);
  numbers of layers must fit in any case. A scalar may have axes of length 1 in the file.

  Raises ConversionError, which lists all keys that do not fit.
  """
  shapes = {path: tuple(x.shape) for path, x in abstract.items()}
  placements = plan(rules, shapes)
  report = Report(list(state), {}, [], [], 0)
  state = _by_canonical_name(state, rules)
  problems = _classify_keys(state, rules, placements, report)
  problems |= _absent_keys(state, placements, allow_missing, report)
  problems |= _uncovered(placements, shapes)
  if check_shapes and not problems["rules_without_a_parameter"]:
    problems["misshapen"] = _shape_problems(state, placements, shapes)
  _raise_if_any(problems)
  flat = _fill(state, placements, shapes, report)
  for name in report.filled:
    for path in placements[name].paths:
      flat[path] = np.full(shapes[path], placements[name].rule.default, np.float32)
  return {path: flat[path] for path in shapes if path in flat}, report


def _raise_if_any(problems: Problems) -> None:
  if any(problems.values()):
    raise ConversionError(**problems)


def _by_canonical_name(state: Mapping[str, Any], rules: Sequence[Entry]) -> dict[str, Any]:
  """The state dict under the names that the rules use."""
  names = _canonical(rules, state)
  counts = collections.Counter(names.values())
  twice = [f"{name} is {known}" for name, known in names.items() if counts[known] > 1]
  _raise_if_any(dict(keys_under_two_names=twice))
  return {known: state[name] for name, known in names.items()}


def _classify_keys(
  state: Mapping[str, Any],
  rules: Sequence[Entry],
  placements: Mapping[str, Placement],
  report: Report,
) -> Problems:
  """Checks the keys that are no parameters, and adds the ignored ones to the report."""
  ignores = [(pattern(r.torch), r) for r in rules if isinstance(r, Ignore)]
  known = [pattern(r.torch) for r in rules if isinstance(r, Rule | Tied | Constant)]
  tied = {r.torch: r.same_as for r in rules if isinstance(r, Tied)}
  unknown, extra, different, wrong = [], [], [], []
  for name, value in state.items():
    if name in placements:
      continue
    if tied.get(name) in state:
      if not _same_bits(value, state[tied[name]]):
        different.append(f"{name} is not {tied[name]}")
    elif (expected := _expected_constant(rules, name, state)) is not None:
      wrong += _check_constant(name, _fetch(value), expected, report)
    elif ignore := next((r for p, r in ignores if p.fullmatch(name)), None):
      if ignore.keep:
        report.kept[name] = _fetch(value)
      else:
        report.dropped.append(name)
    else:
      kind = extra if any(p.fullmatch(name) for p in known) else unknown
      kind.append(f"{name} {list(value.shape)}")
  return dict(
    unknown=unknown, extra=extra, tied_and_different=different, not_what_the_model_computes=wrong
  )


def _check_constant(
  name: str, value: np.ndarray, expected: np.ndarray, report: Report
) -> list[str]:
  """Problems of a constant buffer. One of another dtype (half precision) is kept as it is."""
  if value.shape != expected.shape:
    return [f"{name} {list(value.shape)}, expected {list(expected.shape)}"]
  if different := np.count_nonzero(value != expected):
    return [f"{name}: {different} of {expected.size} values differ"]
  if value.dtype != expected.dtype:
    report.kept[name] = value
  return []


def _absent_keys(
  state: Mapping[str, Any],
  placements: Mapping[str, Placement],
  allow_missing: str | None,
  report: Report,
) -> Problems:
  """Sorts absent parameters into those with a default, those that may be missing, and problems."""
  allowed = re.compile(allow_missing).fullmatch if allow_missing else lambda _: None
  missing = []
  for name, place in placements.items():
    if name in state:
      continue
    if _has_default(place.rule, report.keys):
      report.filled.append(name)
    elif allowed(name):
      report.missing.append(name)
    else:
      missing.append(f"{name} -> {', '.join(place.paths)}")
  # A stacked array needs all of its layers or none.
  left_out = {path for name in report.missing for path in placements[name].paths}
  present = {path for name, p in placements.items() if name in state for path in p.paths}
  missing += [f"{p}: only some of its layers are in the file" for p in sorted(left_out & present)]
  return dict(missing=missing)


def _has_default(rule: Rule, keys: Sequence[str]) -> bool:
  """Whether a file with these keys gets the default of a rule whose own key it lacks."""
  beside = re.compile(rule.default_beside).fullmatch
  return rule.default is not None and any(beside(key) for key in keys)


def _uncovered(placements: Mapping[str, Placement], shapes: Shapes) -> Problems:
  """Parameters without a rule, and rules that need a parameter which the model does not have."""
  covered = {path for place in placements.values() for path in place.paths}
  return dict(
    parameters_without_a_rule=[f"{p} {list(shapes[p])}" for p in sorted(shapes.keys() - covered)],
    rules_without_a_parameter=sorted(covered - shapes.keys()),
  )


def _shape_problems(
  state: Mapping[str, Any], placements: Mapping[str, Placement], shapes: Shapes
) -> list[str]:
  """Keys whose shape is not the model's. Transforms run on zero-stride arrays: nothing is read."""
  out = []
  for name, place in placements.items():
    if name not in state:
      continue
    expected = [shapes[p] if place.layer is None else shapes[p][1:] for p in place.paths]
    shape = tuple(state[name].shape)
    if expected == [()] and math.prod(shape) == 1:
      continue
    try:
      found = [x.shape for x in place.rule.fn.forward(np.broadcast_to(np.int8(0), shape))]
    except ValueError:  # np.split or transpose of another rank
      found = None
    if found != expected:
      targets = f"{', '.join(place.paths)} {[list(s) for s in expected]}"
      out.append(f"{name} {list(shape)} -> {targets}")
  return out


def _fill(
  state: Mapping[str, Any],
  placements: Mapping[str, Placement],
  shapes: Shapes,
  report: Report,
) -> dict[str, np.ndarray]:
  """Reads the tensors one at a time into {path: array}, stacked ones into their layer."""
  flat: dict[str, np.ndarray] = {}
  misshapen = []
  for name, place in placements.items():
    if name not in state:
      continue
    value = _fetch(state[name])
    if value.ndim and value.size == 1 and [shapes[p] for p in place.paths] == [()]:
      report.scalars[name], value = list(value.shape), value.reshape(())
    pieces = place.rule.fn.forward(value)
    for path, piece in zip(place.paths, pieces, strict=True):
      if problem := _store(flat, path, piece, place):
        misshapen.append(f"{name} -> {path}: {problem}")
    report.parameters += sum(p.size for p in pieces)
  _raise_if_any(dict(misshapen=misshapen))
  return flat


def _store(flat: dict, path: str, piece: np.ndarray, place: Placement) -> str | None:
  if place.layer is None:
    flat[path] = np.ascontiguousarray(piece).reshape(piece.shape)  # it makes 0-d arrays 1-d
    return None
  if path not in flat:
    flat[path] = np.empty((place.depth, *piece.shape), piece.dtype)
  stack = flat[path]
  if stack.shape[1:] != piece.shape or stack.dtype != piece.dtype:
    return f"{piece.dtype}{list(piece.shape)} beside {stack.dtype}{list(stack.shape[1:])}"
  stack[place.layer] = piece
  return None


def _same_bits(a: Any, b: Any) -> bool:
  a, b = _fetch(a), _fetch(b)
  return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _expected_constant(
  rules: Sequence[Entry], name: str, state: Mapping[str, Any]
) -> np.ndarray | None:
  """The value that a Constant of this name must have in this file; None if it is none."""
  for rule in rules:
    if isinstance(rule, Constant) and (match := pattern(rule.torch).fullmatch(name)):
      numbers = match.groupdict()
      of = state.get(rule.of.format(**numbers))
      return None if of is None else _constant_value(rule, of.shape, numbers)
  return None


def _constant_value(
  rule: Constant, shape: Sequence[int], numbers: Mapping[str, str]
) -> np.ndarray | None:
  return rule.value(tuple(shape), **{k: int(v) for k, v in numbers.items()})


def _fetch(value: Any) -> np.ndarray:
  return value.read() if isinstance(value, TensorRef) else np.asarray(value)


def to_torch(
  flat: Mapping[str, Any],
  rules: Sequence[Entry],
  *,
  kept: Mapping[str, np.ndarray] | None = None,
  order: Sequence[str] = (),
  scalars: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Lazy]:
  """{path: array} -> torch state dict of lazy arrays, each made when it is written.

  kept: values of ignored keys, from the report of `to_jax`. order: the keys of the original file,
  from the same report. They come first, under the names they have there, and what the file lacks
  (defaults, tied keys, constants) is not written. scalars: shapes of scalars in the original file,
  from the same report.
  """
  shapes = {path: tuple(x.shape) for path, x in flat.items()}
  placements = plan(rules, shapes)
  _raise_if_any(_uncovered(placements, shapes))
  alias = {known: name for name, known in _canonical(rules, order).items()}
  name_in_file = lambda known: alias.get(known, known)
  in_file = lambda known: not order or known in alias
  scalars = scalars or {}
  out = {
    name_in_file(known): _lazy(flat, place, scalars.get(known))
    for known, place in placements.items()
    if place.rule.default is None or in_file(known)
  }
  for rule in rules:
    if isinstance(rule, Tied):
      tensor = out.get(name_in_file(rule.same_as))
      if tensor is not None and in_file(rule.torch):
        out[name_in_file(rule.torch)] = tensor
    elif isinstance(rule, Constant):
      for known, value in _constants(rule, placements, out, name_in_file):
        if in_file(known):
          out[name_in_file(known)] = _ready(value)
  out |= {name: _ready(value) for name, value in (kept or {}).items()}
  names = dict.fromkeys([n for n in order if n in out]) | dict.fromkeys(out)
  return {name: out[name] for name in names}


def _constants(
  rule: Constant, placements: Mapping[str, Placement], out: Mapping[str, Lazy], name_in_file
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, value) for every tensor of the state dict `out` that the constant belongs to."""
  of = pattern(rule.of)
  for known in placements:
    match = of.fullmatch(known)
    if match is None or name_in_file(known) not in out:
      continue
    numbers = match.groupdict()
    value = _constant_value(rule, out[name_in_file(known)].shape, numbers)
    if value is not None:
      yield rule.torch.format(**numbers), value


def _ready(value: np.ndarray) -> Lazy:
  return Lazy(value.shape, value.dtype, lambda: value)


def _lazy(flat: Mapping[str, Any], place: Placement, shape: Sequence[int] | None = None) -> Lazy:
  """shape: of the tensor in the file, where it is not the array's own."""

  def make():
    arrays = (np.asarray(flat[p]) for p in place.paths)
    out = place.rule.fn.backward(
      tuple(x if place.layer is None else x[place.layer] for x in arrays)
    )
    return out if shape is None else out.reshape(shape)

  sample = make()  # a view; of fused weights a copy, which is freed at once
  return Lazy(sample.shape, sample.dtype, make)


def arrays(state: Mapping[str, Lazy]) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of a state dict of `to_torch`; one array is in memory at a time."""
  for name, lazy in state.items():
    yield name, lazy.make()
