"""How programs end on an error: one that is expected as one message, a fault with its traceback.

Expected are `errors.UserError` and the OSError of a file (exit code 1), and a wrong command line
(2). With --debug, all errors keep their traceback.

```
@cli.program
def main(argv: list[str] | None = None) -> None:
  args = cli.ArgumentParser(description=__doc__).parse_args(argv)
```

Programs with absl flags end with `cli.run_with_flags(main)` instead of `app.run(main)`.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from xmodal_jax.errors import UserError

_DEBUG = "Show the traceback of every error."


class UsageError(UserError):
  """A command line that is wrong: exit code 2."""


class ArgumentParser(argparse.ArgumentParser):
  """argparse's, with --debug, also behind a subcommand."""

  def __init__(self, *args: Any, **kw: Any):
    super().__init__(*args, **kw)
    # Without a default: that of a subcommand would replace what stands before it.
    self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG)


def message(error: BaseException) -> str | None:
  """The text that stands for an expected error; None for a fault of this package, or with --debug.

  >>> message(FileNotFoundError(2, "No such file or directory", "a.pt"))
  'a.pt: No such file or directory'
  """
  if "--debug" in sys.argv[1:]:
    return None
  if isinstance(error, UserError | flags.Error | app.UsageError):
    return str(error)
  if isinstance(error, OSError):
    if error.filename is not None and error.strerror:
      return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)
  return None


def program(main: Callable[..., Any]) -> Callable[..., Any]:
  """Decorates `main(argv=None)`: an expected error becomes a SystemExit with its message.

  main is called with the arguments behind the program's name, by default those of the process.
  """

  @functools.wraps(main)
  def wrapped(argv: Sequence[str] | None = None) -> Any:
    argv = [_expanded(part) for part in (sys.argv[1:] if argv is None else argv)]
    with _expected(os.path.basename(main.__code__.co_filename)):
      return main(argv)

  return wrapped


def _expanded(argument: str) -> str:
  """`--out=~/a` with the home folder, as shells do it for `~/a` alone."""
  name, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
  return name + equals + os.path.expanduser(value)


def run_with_flags(main: Callable[[list[str]], Any]) -> None:
  """absl's `app.run`, with errors of the flags and of main(argv) as in `program`."""
  flags.DEFINE_bool("debug", False, _DEBUG)
  name = os.path.basename(main.__code__.co_filename)
  with _expected(name):
    app.run(main, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    raise UsageError(_of_flags(e)) from e
  if len(rest) > 1:
    raise UsageError(f"unexpected arguments {rest[1:]}; overrides are --config.key=value")
  return rest


def _of_flags(error: BaseException) -> str:
  """The message about flags that could not be parsed."""
  inner: BaseException | None = error
  while inner is not None:  # absl wraps an error about a value in its own
    if isinstance(inner, UserError):
      return str(inner)
    inner = inner.__cause__ or inner.__context__
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  text = str(error.args[0]) if error.args else str(error)
  if isinstance(error, KeyError) and text.startswith("'"):  # 'lrr'\nDid you mean ...
    name, _, hint = text.partition("\n")
    return f"the config has no key {name}. {hint}".strip()
  return text


@contextlib.contextmanager
def _expected(name: str) -> Iterator[None]:
  try:
    yield
  except KeyboardInterrupt:
    _exit(f"{name}: interrupted", 130)
  except Exception as e:
    text = message(e)
    if text is None:
      raise
    if isinstance(e, UsageError | app.UsageError):
      _exit(f"{name}: {text}", 2)
    raise SystemExit(f"{name}: {text}") from e


def _exit(text: str, code: int) -> None:
  print(text, file=sys.stderr, flush=True)
  raise SystemExit(code)
