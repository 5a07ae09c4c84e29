"""Folders and shards: which files the weights of a path are in."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from xmodal_jax.interop.torch_files import foreign, safetensors
from xmodal_jax.interop.torch_files.tensor import FileFormatError

_INDEX = ".index.json"
_KNOWN = (
  "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
  "pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NOT_WEIGHTS = re.compile(
  r"(optimizer|scheduler|training_args|rng_state.*|scaler|adapter_model)\.\w+"
)
_SHARD = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.\w+)")
_MAX_INDEX = 100_000_000  # bytes


def choose(names: Sequence[str]) -> tuple[str, list[str]]:
  """(the file or index among the names of a folder that has its weights, others that could be).

  Raises FileFormatError if none is found, or several where none has a usual name.
  """
  known = [n for n in _KNOWN if n in names]
  if known:
    return known[0], known[1:]
  files = sorted(n for n in names if n.endswith(_SUFFIXES) and not _NOT_WEIGHTS.fullmatch(n))
  if not files:
    raise FileFormatError(foreign.other_folder(names))
  shards = [_SHARD.fullmatch(n) for n in files]
  if all(shards) and len({(m[1], m[4], m[5]) for m in shards}) == 1:
    return files[0], []
  if len(files) > 1:
    raise FileFormatError(f"holds several files of weights: name one of {', '.join(files[:10])}")
  return files[0], []


def shards_of(name: str, text: str | None = None) -> list[str]:
  """Names of all files that the weights of a file or index are in, in order.

  text: the content of an index (*.index.json). For one shard of several, all of them.
  """
  if name.endswith(_INDEX):
    return sorted(set(weight_map(text or "").values()))
  if (match := _SHARD.fullmatch(name)) and int(match[4]) <= 10_000:
    count = int(match[4])
    return [f"{match[1]}{i:05}{match[3]}{match[4]}{match[5]}" for i in range(1, count + 1)]
  return [name]


def weight_map(text: str) -> Mapping[str, str]:
  """{name of an array: file in the index's folder} of an index. Raises FileFormatError."""
  try:
    out = json.loads(text, object_pairs_hook=safetensors.unique)["weight_map"]
    if not out or not all(type(v) is str for v in out.values()):
      raise ValueError("no names of files")
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise FileFormatError(f"not an index of shards ({type(e).__name__} {str(e)[:100]})") from e
  if odd := [v for v in out.values() if pathlib.PurePath(v).name != v or v in ("", "..")]:
    raise FileFormatError(f"an index that refers to {odd[0][:80]!r}, outside of its folder")
  return out


class Parts:
  """The files of a path: of the file itself, of a folder, of an index, or all shards of one."""

  def __init__(self, path: str | os.PathLike):
    path = pathlib.Path(path)
    self.names: Mapping[str, str] = {}  # of an index
    self.notes: list[str] = []
    if path.is_dir():
      file, beside = choose(os.listdir(path))
      path = path / file
      also = f"; beside it: {', '.join(beside)}" if beside else ""
      self.notes.append(f"took {file} of the folder{also}")
    text = None
    if path.name.endswith(_INDEX):
      if path.stat().st_size > _MAX_INDEX:
        raise FileFormatError(f"{path.name} is too large for an index of shards")
      text = path.read_text("utf-8", "replace")
      self.names = weight_map(text)
    self.files = [path.with_name(name) for name in shards_of(path.name, text)]
    if gone := [f.name for f in self.files if len(self.files) > 1 and not f.exists()]:
      raise FileFormatError(
        f"{len(gone)} of {len(self.files)} shards are not there: {', '.join(gone[:5])}; put them "
        "beside the others"
      )
    if len(self.files) > 1:
      self.notes.append(f"read {len(self.files)} shards")
