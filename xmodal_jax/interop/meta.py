"""meta.json of a converted directory: where parameters are from, and what the way back needs."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xmodal_jax.interop.conversion import ConversionError, Report

VERSION = 1  # of the layout
BESIDE = "ignored.pth"  # what is ignored and too large for meta.json, as a PyTorch file
_PACKED = 2**16  # bytes


def pack(array: np.ndarray) -> dict[str, Any]:
  """An array as JSON: numbers where they are few, else their compressed bytes."""
  out = {"dtype": array.dtype.name, "shape": list(array.shape)}
  if array.dtype.kind in "iub" and array.size <= 16:
    return out | {"values": array.ravel().tolist()}
  return out | {"zlib": base64.b64encode(zlib.compress(array.tobytes())).decode()}


def unpack(value: Mapping[str, Any]) -> np.ndarray:
  """The inverse of `pack`."""
  dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
  if "values" in value:
    return np.array(value["values"], dtype).reshape(shape)
  return np.frombuffer(zlib.decompress(base64.b64decode(value["zlib"])), dtype).reshape(shape)


def meta(
  *,
  system: str,
  variant: str,
  config: Mapping[str, Any],
  source: str,
  sha256: str,
  info: Mapping[str, Any],
  report: Report,
) -> dict[str, Any]:
  """What stands beside the parameters: where they are from and what the way back needs.

  Ignored arrays that are named in `beside` have to be written to the file BESIDE.
  """
  return dict(
    system=system,
    variant=variant,
    config=dict(config),
    source=source,
    sha256=sha256,
    converter=VERSION,
    format=info["format"],
    wrapper=list(info["wrapper"]),
    scalars=dict(info["scalars"]),
    missing=report.missing,
    dropped=report.dropped,
    ignored={name: pack(x) for name, x in report.kept.items() if x.nbytes <= _PACKED},
    beside=[name for name, x in report.kept.items() if x.nbytes > _PACKED],
    keys=report.keys,
  )


def read_meta(path: epath.PathLike) -> dict[str, Any]:
  """meta.json of a converted directory, checked to be of this version."""
  file = epath.Path(path) / "meta.json"
  if not file.exists():
    raise ConversionError(missing=[f"{file}: not a converted directory"])
  out = json.loads(file.read_text())
  if out.get("converter") != VERSION:
    raise ConversionError(unknown=[f"{file}: converter version {out.get('converter')!r}"])
  return out


def wrap(state: Mapping[str, Any], wrapper: Sequence[str]) -> dict[str, Any]:
  """Puts a state dict back into what it was wrapped in: keys, and a prefix "module."."""
  out = dict(state)
  for key in reversed(wrapper):
    out = {key + k: v for k, v in out.items()} if key == "module." else {key: out}
  return out
