"""The key-value store of jax.distributed's coordinator, which runs in process 0."""

from typing import Any

from jax._src import distributed  # the key-value store has no public API

ROOT = "xmodal_jax"  # prefix of all keys


def client() -> Any:
  """jaxlib's client of the store; None with one process."""
  return distributed.global_state.client


def format_indices(indices: list[int]) -> str:
  """[1, 3] -> "processes 1, 3"."""
  return ("process " if len(indices) == 1 else "processes ") + ", ".join(map(str, indices))


def read_dir(path: str) -> dict[str, str]:
  """{last part of the key: value} of all keys under `path` in the store."""
  return {k.rsplit("/", 1)[1]: v for k, v in client().key_value_dir_get(f"{path}/")}
