"""The entries of a rule table: how a PyTorch state dict maps to our parameters.

`Rule` maps a tensor to one or more of our arrays. `Ignore`, `Alias`, `Tied` and `Constant` describe
keys that have no parameter of their own.

Names are templates. `{layer}` is the index of the layers that our array stacks on its first axis,
any other placeholder is a number that occurs in both names, and `*` in an `Ignore` matches any
text. For example

  Rule("transformer.resblocks.{layer}.mlp.c_fc.weight", "text/blocks/wi/kernel", linear)

maps the matrices [4D, D] of all blocks to one array [depth, D, 4D].
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from xmodal_jax.errors import UserError

Pieces = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one torch tensor becomes one or more of our arrays (`forward`), and the inverse."""

  forward: Callable[[np.ndarray], Pieces]
  backward: Callable[[Pieces], np.ndarray]


def _transpose(axes: Sequence[int], inverse: Sequence[int]) -> Transform:
  return Transform(lambda x: (x.transpose(axes),), lambda pieces: pieces[0].transpose(inverse))


same = Transform(lambda x: (x,), lambda pieces: pieces[0])
linear = _transpose((1, 0), (1, 0))  # [out, in] <-> [in, out]
conv = _transpose((2, 3, 1, 0), (3, 2, 0, 1))  # OIHW <-> HWIO


def split(n: int, inner: Transform = same) -> Transform:
  """[n * D, ...] <-> n arrays [D, ...], each through `inner`: fused query, key and value."""

  def forward(x: np.ndarray) -> Pieces:
    return tuple(inner.forward(piece)[0] for piece in np.split(x, n))

  def backward(pieces: Pieces) -> np.ndarray:
    return np.concatenate([inner.backward((piece,)) for piece in pieces])

  return Transform(forward, backward)


def squeeze(*axes: int) -> Transform:
  """Drops axes of size 1: [1, 1, D] <-> [D] with axes 0, 1."""
  return Transform(lambda x: (np.squeeze(x, axes),), lambda pieces: np.expand_dims(pieces[0], axes))


@dataclasses.dataclass(frozen=True)
class Rule:
  """Maps a torch key to one of our paths, or to several where `fn` gives several arrays.

  first: torch's number of our layer 0.
  default: value of the parameter where the file lacks the key by design, which is the case if one
  of the file's keys matches the regular expression `default_beside` in full. None: the key is
  required.
  """

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
  """Keys without a parameter of ours.

  keep: the converted directory stores their values, and the inverse conversion writes them.
  parameter: they are parameters of the original, so its optimizer has them too.
  """

  torch: str
  keep: bool = True
  parameter: bool = False


@dataclasses.dataclass(frozen=True)
class Alias:
  """Another spelling of keys: re.sub(torch, means, key) is the name that the rules use.

  unless: regular expression; a file with a key that it matches in full has the usual spelling.
  """

  torch: str
  means: str | Callable[[re.Match], str]
  unless: str = ""


@dataclasses.dataclass(frozen=True)
class Tied:
  """A key whose tensor must equal that of the key `same_as`; the inverse conversion writes both."""

  torch: str
  same_as: str


@dataclasses.dataclass(frozen=True)
class Constant:
  """A buffer whose value follows from the shape of the tensor `of`. It may be absent; where it is
  present it must have that value. The inverse conversion writes it.

  value: (shape of `of`, **numbers in its name) -> array, or None where the model has no such key.
  """

  torch: str
  of: str
  value: Callable[..., np.ndarray | None]


Entry = Rule | Ignore | Alias | Tied | Constant


class ConversionError(UserError):
  """Keys that do not fit. Lists by kind are attributes: unknown, extra, missing, misshapen, ..."""

  def __init__(self, **lists: list[str]):
    self.__dict__.update(lists)
    text = [
      f"{len(keys)} {kind.replace('_', ' ')}:\n    " + "\n    ".join(keys)
      for kind, keys in lists.items()
      if keys
    ]
    super().__init__("the state dict does not fit the model\n  " + "\n  ".join(text))


def pattern(template: str) -> re.Pattern:
  """A template as a regular expression; numbers have no leading zeros, `*` matches any text.

  >>> pattern("layer{s}.{layer}.conv").fullmatch("layer2.10.conv").groupdict()
  {'s': '2', 'layer': '10'}
  """
  out, seen = "", set()
  for literal, name in re.findall(r"([^{]+)|\{(\w+)\}", template):
    if literal:
      out += re.escape(literal).replace(r"\*", ".*")
    else:
      out += f"(?P={name})" if name in seen else f"(?P<{name}>0|[1-9][0-9]*)"
      seen.add(name)
  return re.compile(out)
