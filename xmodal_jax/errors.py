"""The base of errors about what a person gave: a config, a file, a folder, a command."""


class UserError(ValueError):
  """Something given from outside is wrong.

  The message is complete: it names the file, line or key, what was expected and what to do.
  Programs print it alone and exit with code 1; --debug shows the traceback. Any other exception is
  a fault of this package.
  """


class ConfigError(UserError):
  """Values of a config that are wrong by themselves or do not fit each other."""
