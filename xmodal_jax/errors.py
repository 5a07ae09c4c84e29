"""The base of errors about what a person gave: a config, a file, a folder, a command."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence


class UserError(ValueError):
  """Something given from outside is wrong.

  The message is complete: it names the file, line or key, what was expected and what to do.
  Programs print it alone and exit with code 1; --debug shows the traceback. Any other exception is
  a fault of this package.
  """

  named = False  # whether `naming` has put a path before the message


class ConfigError(UserError):
  """Values of a config that are wrong by themselves or do not fit each other."""


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
  """Raises ConfigError, which lists the choices, unless the value of a key is one of them."""
  if value not in (choices := list(choices)):
    raise ConfigError(f"{key} is {value!r}; there are {', '.join(choices)}")


def listed(lines: Sequence[str], most: int = 5) -> str:
  """The first of several lines for a message, each on its own line, and how many more there are.

  >>> listed(["a", "b", "c"], most=2)
  '\\n  a\\n  b\\n  and 1 more'
  """
  more = [f"and {len(lines) - most} more"] if len(lines) > most else []
  return "".join(f"\n  {line}" for line in [*lines[:most], *more])


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Puts a path before the messages of UserErrors that do not name it yet.

  with naming("ViT-B-32.pt"):
    table.infer_config(shapes)  # ViT-B-32.pt: the state dict does not fit the model ...
  """
  try:
    yield
  except UserError as e:
    path = os.fspath(path)
    if not e.named and path not in str(e):
      e.args, e.named = (f"{path}: {e}",), True
    raise
