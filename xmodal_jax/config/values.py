"""What a value of a config may be: the vocabulary that config/checks.py is written in.

SPEC = {"batch_size": whole(1), "data.crop": choice("center", "random")}
SPEC["batch_size"].fault(0.5)  # "expected a whole number from 1"
"""

import ast
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xmodal_jax.optim import schedules


@dataclasses.dataclass(frozen=True)
class Misfit:
  """Text of the command line that cannot be read as a value of its key's type."""

  text: str
  of: type

  @property
  def expected(self) -> str:
    return {bool: "True or False", int: "a whole number", float: "a number"}.get(
      self.of, f"a {self.of.__name__}"
    )

  def __repr__(self) -> str:
    return repr(self.text)


class Rule(NamedTuple):
  """expected: completes "expected ..."; holds: whether a value is as expected."""

  expected: str
  holds: Callable[[Any], bool]

  def fault(self, value: Any) -> str:
    """What is wrong with a value; "" if nothing is."""
    return "" if self.holds(value) else f"expected {self.expected}"


def is_number(value: Any) -> bool:
  """Whether it is a finite int or float; True and False are not."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
  return is_number(value) and isinstance(value, int)


def _range(low: float, high: float, above: bool = False, below: bool = False) -> str:
  limits = [f"{'above' if above else 'from'} {low}"] if low > -math.inf else []
  limits += [f"{'below' if below else 'up to'} {high}"] if high < math.inf else []
  return " ".join(["", *limits])


def whole(low: int = 0, high: float = math.inf) -> Rule:
  """An integer from low up to high."""
  holds = lambda v: is_whole(v) and low <= v <= high
  return Rule(f"a whole number{_range(low, high)}", holds)


def number(
  low: float = 0, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Rule:
  """A finite number from low (or above it) up to high (or below it)."""

  def holds(v):
    return is_number(v) and (low < v if above else low <= v) and (v < high if below else v <= high)

  return Rule(f"a number{_range(low, high, above, below)}", holds)


FRACTION = number(0, 1)
BOOL = Rule("True or False", lambda v: isinstance(v, bool))
TEXT = Rule("text, and '' for none", lambda v: isinstance(v, str | os.PathLike))


def choice(*names: str, none: bool = False) -> Rule:
  """One of the names; none: or "", which stands for none of them."""
  listed = ", ".join(map(repr, names)) + (", or '' for none" if none else "")
  known = {*names, ""} if none else set(names)
  return Rule(f"one of {listed}" if len(names) > 1 else listed, lambda v: _in(v, known))


def _in(value: Any, names: set[str]) -> bool:
  return isinstance(value, str) and value in names


def names(*known: str) -> Rule:
  """Different names with commas between them; "": none."""

  def holds(v):
    found = [name.strip() for name in v.split(",")] if isinstance(v, str) and v else []
    return isinstance(v, str) and set(found) <= set(known) and len(set(found)) == len(found)

  return Rule(f"names out of {', '.join(known)} with commas between them, or '' for none", holds)


def duration(share: bool = False, zero: bool = True) -> Rule:
  """ "5 epochs", "500 steps"; share: also "2.5 %" of the run; zero: may be none."""
  forms = "'500 steps' or '5 epochs'" + (", or '2.5 %' of the run" if share else "")

  def holds(v):
    return schedules.is_duration(v, share) and (zero or re.search("[1-9]", v.split("e")[0]))

  return Rule(f"a duration{'' if zero else ' above 0'} such as {forms}", lambda v: bool(holds(v)))


def _is_regex(value: Any) -> bool:
  try:
    return isinstance(value, str) and re.compile(value) is not None
  except re.error:
    return False


REGEX = Rule("a regular expression", _is_regex)


def optional(rule: Rule) -> Rule:
  return Rule(f"{rule.expected}, or None", lambda v: v is None or rule.holds(v))


def _is_sequence(value: Any) -> bool:
  return isinstance(value, tuple | list)


def several(rule: Rule, count: int, example: Any, *, rising: bool = False) -> Rule:
  """`count` values of one rule; rising: the first is at most the last."""

  def holds(v):
    fits = _is_sequence(v) and len(v) == count and all(map(rule.holds, v))
    return fits and (not rising or v[0] <= v[-1])

  order = ", the smaller first" if rising else ""
  return Rule(f"{count} values, each {rule.expected}{order}, such as {example}", holds)


def each(rule: Rule) -> Rule:
  """A value of the rule, or a tuple of such values."""
  return Rule(rule.expected, lambda v: all(map(rule.holds, v if _is_sequence(v) else (v,))))


def rows(rules: Sequence[Rule], example: Any, what: str, none: bool = False) -> Rule:
  """Tuples with a value for each rule, at least one unless there may be none."""

  def row(v):
    return (
      _is_sequence(v)
      and len(v) == len(rules)
      and all(r.holds(x) for r, x in zip(rules, v, strict=True))
    )

  holds = lambda v: _is_sequence(v) and (none or len(v) > 0) and all(map(row, v))
  return Rule(f"{what}, such as {example!r}{', or () for none' if none else ''}", holds)


def read(text: str, of: type) -> Any:
  """A value of the command line as a value of this type, None, or a Misfit; never raises.

  The text None is None for every type; whether the key may be None is for the checks to say.

  >>> read("3", float), read("none", int), read("3.5", int)
  (3.0, None, '3.5')
  """
  if text == "None" or (text.strip().lower() == "none" and of is not str):
    return None
  if of is str:
    return text
  literal = {"true": "True", "false": "False"}.get(text.strip().lower(), text.strip())
  try:
    value = float(literal) if of is float else ast.literal_eval(literal)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return Misfit(text, of)
  if of is tuple and isinstance(value, list):
    value = tuple(value)
  if of is bool and value in (0, 1):
    return bool(value)
  return value if type(value) is of else Misfit(text, of)
