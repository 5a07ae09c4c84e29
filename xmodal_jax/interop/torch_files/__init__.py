"""Reads PyTorch and safetensors files without torch, and without executing code from them.

`read` returns the object tree with TensorRefs for arrays, `state_dict` the named arrays in it. The
format is detected from the content: torch.save zips, TorchScript archives, the two formats of torch
before 1.6, safetensors. `state_dict` also takes folders and indices of shards. `write` makes files
that torch.load reads.

  state, info = state_dict("ViT-B-32.pt")
  state["visual.proj"].shape, state["visual.proj"].read()
"""

import hashlib
import os
import struct
from typing import Any, TypedDict

from xmodal_jax.errors import naming
from xmodal_jax.interop.torch_files import folders, foreign, legacy, safetensors, zips
from xmodal_jax.interop.torch_files import state as state_lib
from xmodal_jax.interop.torch_files import write as write_lib
from xmodal_jax.interop.torch_files.names import Name, Placeholder
from xmodal_jax.interop.torch_files.tensor import (
  FileFormatError,
  Source,
  TensorRef,
  UnsafeFileError,
)

__all__ = [
  "FileFormatError", "FileInfo", "Lazy", "Name", "Placeholder", "TensorRef", "UnsafeFileError",
  "read", "read_with_format", "sha256", "state_dict", "write",
]  # fmt: skip

Lazy, write = write_lib.Lazy, write_lib.write

# Arrays of a state dict may repeat elements of the file up to this many bytes in all, and as many
# times the file's size.
_FREE_BYTES, _RATIO = 1 << 26, 8


class FileInfo(TypedDict):
  """What a file contains besides the arrays."""

  format: str  # zip, torchscript, legacy, tar, safetensors
  wrapper: tuple[str, ...]  # keys that lead to the arrays, then prefixes (with a dot) of all names
  scalars: dict[str, int]  # input_resolution, context_length, vocab_size of a TorchScript CLIP
  extras: dict[Any, Any]  # other entries of the wrapping dicts: epoch, config, optimizer
  notes: tuple[str, ...]  # lines on what was taken and what was passed over, to be printed


def read(path: str | os.PathLike, *, verify: bool = False) -> Any:
  """The object tree of a file: dicts, lists, numbers, text, TensorRefs; Placeholders for the rest.

  verify: also checks the CRC of every array in a zip, which reads the whole file. Raises
  FileFormatError, or UnsafeFileError if the file refers to code.
  """
  return read_with_format(path, verify=verify)[0]


def read_with_format(path: str | os.PathLike, *, verify: bool = False) -> tuple[Any, str]:
  """As `read`, and the name of the format: zip, torchscript, legacy, tar or safetensors."""
  with naming(path):
    return _read(Source(path), verify)


def _read(source: Source, verify: bool) -> tuple[Any, str]:
  head = source.read(0, min(source.size, 512))
  if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):  # the second: an empty archive
    return zips.read(source, verify)
  if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= safetensors.MAX_HEADER:
    return safetensors.read(source), "safetensors"
  if head[257:262] == b"ustar" or (len(head) == 512 and head[:9] == b"storages\0"):
    return legacy.read_tar(source), "tar"
  if what := foreign.other_file(head):
    raise FileFormatError(what)
  return legacy.read_magic(source), "legacy"


def state_dict(
  path: str | os.PathLike,
  *,
  verify: bool = False,
  key: str | None = None,
  prefix: str | None = None,
) -> tuple[dict[str, TensorRef], FileInfo]:
  """({name: TensorRef}, info) of the weights in a file, a folder, or the shards of an index.

  Enters the entries of `state.WRAPPERS` ("state_dict", "model", ...), walks the modules of a
  TorchScript archive, and strips prefixes that all names share ("module.", "_orig_mod.", ...).
  key, prefix: the entry and the prefix to take instead, see `state.find`. Of a folder, the file or
  the index with one of the usual names is read (model.safetensors, pytorch_model.bin), or the only
  file of weights.

  info["notes"] says what was taken and passed over. Raises FileFormatError if there is no state
  dict.
  """
  with naming(path):
    parts = folders.Parts(path)
    notes = list(parts.notes)
    tree, kind, scalars, size = {}, "", {}, 0
    for file in parts.files:
      part, kind = read_with_format(file, verify=verify)
      size += file.stat().st_size
      if len(parts.files) == 1 and not parts.names:
        tree = part
      else:
        _add_shard(tree, part, file.name)
    if isinstance(tree, Placeholder) and kind == "torchscript":
      tree, scalars = state_lib.walk_modules(tree)
    found = state_lib.find(tree, key, prefix)
    if parts.names and (missing := parts.names.keys() - tree.keys()):
      raise FileFormatError(f"{len(missing)} arrays of the index are in no shard: {min(missing)!r}")
    total = sum(x.nbytes for x in found.arrays.values())
    if total > _FREE_BYTES + _RATIO * size:
      raise FileFormatError(f"arrays of {total} bytes in a file of {size}: they repeat elements")
  return found.arrays, FileInfo(
    format=kind,
    wrapper=tuple(found.wrapper),
    scalars=scalars,
    extras=found.extras,
    notes=tuple(notes + found.notes),
  )


def _add_shard(tree: dict, part: Any, name: str) -> None:
  """Adds the entries of one shard to `tree`."""
  inside = state_lib.entries(part)
  if inside is None:
    raise FileFormatError(
      f"{name}: contains a {state_lib.kind_of(part)}, expected a dict of arrays"
    )
  if twice := [k for k in inside if k in tree]:
    raise FileFormatError(f"{name}: {str(twice[0])[:80]!r} is in another shard, too")
  tree |= inside


def sha256(path: str | os.PathLike) -> str:
  """Hex digest of the file's bytes, read in chunks; of several files, the digest of theirs."""
  digests = []
  for file in folders.Parts(path).files:
    with open(file, "rb", buffering=0) as f:
      digests.append(hashlib.file_digest(f, "sha256").hexdigest())
  return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
