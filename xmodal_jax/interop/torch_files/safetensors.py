"""The safetensors format: a JSON header, then the arrays."""

import itertools
import json
import struct
from typing import Any

from xmodal_jax.interop.torch_files import names
from xmodal_jax.interop.torch_files.tensor import (
  FileFormatError,
  Source,
  Storage,
  TensorRef,
  check_shape,
  contiguous,
)

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_DTYPES = {
  "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
  "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
  "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object, for json's object_pairs_hook; raises ValueError if a name occurs twice."""
  out: dict[str, Any] = {}
  for key, value in pairs:
    if key in out:
      raise ValueError(f"key {key!r:.80} twice in one object")
    out[key] = value
  return out


def read(source: Source) -> dict[str, TensorRef]:
  """{name: array} of a file. Raises FileFormatError unless its arrays fill it without overlap."""
  (size,) = struct.unpack("<Q", source.read(0, 8))
  base = 8 + size
  out, ends = {}, [(0, 0)]
  try:
    header = json.loads(source.read(8, size).decode(), object_pairs_hook=unique)
    for name, entry in header.items():
      if name != "__metadata__":
        begin, end = entry["data_offsets"]
        out[name] = _array(source, name, entry, base, begin, end)
        ends.append((begin, end))
  except FileFormatError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    text = f"damaged header of a safetensors file: {type(e).__name__} {str(e)[:100]}"
    raise FileFormatError(text) from e
  ends.sort()
  if any(a[1] != b[0] for a, b in itertools.pairwise(ends)) or base + ends[-1][1] != source.size:
    raise FileFormatError(
      f"arrays of a safetensors file overlap or leave gaps, or it is truncated: it has "
      f"{source.size} bytes, its header says {base + ends[-1][1]}"
    )
  return out


def _array(source: Source, name: str, entry: dict, base: int, begin: int, end: int) -> TensorRef:
  dtype, shape = entry["dtype"], entry["shape"]
  if type(dtype) is str and dtype not in _DTYPES:
    raise FileFormatError(
      f"{name[:80]!r} has the dtype {dtype[:20]}, which is not read (read are "
      f"{', '.join(_DTYPES)}): save it in one of these"
    )
  if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
    raise FileFormatError(f"offsets of {name[:80]!r}")
  check_shape(shape)
  storage = Storage(source, 0, end - begin)
  storage.place(source, base + begin)
  out = TensorRef(storage, 0, shape, contiguous(shape), names.DTYPES[_DTYPES[dtype]])
  if out.nbytes != end - begin:
    raise FileFormatError(f"{name[:80]!r} has {end - begin} bytes, its shape says otherwise")
  return out
