"""meta.json of a converted directory: the source of the parameters, and what `to_torch` needs."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xmodal_jax.interop.conversion import Report
from xmodal_jax.interop.rules import ConversionError

VERSION = 1  # of the layout
BESIDE = "ignored.pth"  # PyTorch file of the ignored arrays that are too large for meta.json
_PACKED = 2**16  # bytes, the largest array in meta.json


def pack(array: np.ndarray) -> dict[str, Any]:
  """An array as JSON: numbers if they are few, otherwise compressed bytes.

  >>> pack(np.array([3, 4]))
  {'dtype': 'int64', 'shape': [2], 'values': [3, 4]}
  """
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
  assumed: Sequence[str] = (),
  facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The content of meta.json.

  source, sha256: the PyTorch file; info: from `torch_files.state_dict`; report: from
  `conversion.to_jax`. assumed: keys of config that nothing said. facts: what is known beyond the
  model, by keys of a config ("data.image.resize"). The caller writes the ignored arrays named in
  `beside` to the file BESIDE.
  """
  return dict(
    system=system,
    variant=variant,
    config=dict(config),
    source=source,
    sha256=sha256,
    assumed=list(assumed),
    facts=dict(facts or {}),
    converter=VERSION,
    format=info["format"],
    wrapper=list(info["wrapper"]),
    scalars=dict(info["scalars"]),
    missing=report.missing,
    dropped=report.dropped,
    reshaped=report.scalars,
    ignored={name: pack(x) for name, x in report.kept.items() if x.nbytes <= _PACKED},
    beside=[name for name, x in report.kept.items() if x.nbytes > _PACKED],
    keys=report.keys,
  )


def read_meta(path: epath.PathLike) -> dict[str, Any]:
  """meta.json of a converted directory. Raises ConversionError if it is of another version."""
  file = epath.Path(path) / "meta.json"
  if not file.exists():
    raise ConversionError(missing=[f"{file}: not a converted directory"])
  out = json.loads(file.read_text())
  if out.get("converter") != VERSION:
    version = out.get("converter")
    raise ConversionError(unknown=[f"{file}: converter version {version!r}, expected {VERSION}"])
  return out


def wrap(state: Mapping[str, Any], wrapper: Sequence[str]) -> dict[str, Any]:
  """Nests a state dict as in the original file. wrapper: keys, and prefixes, which end with a dot.

  >>> wrap({"a": 1}, ["model", "module."])
  {'model': {'module.a': 1}}
  """
  out = dict(state)
  for key in reversed(wrapper):
    out = {key + k: v for k, v in out.items()} if key.endswith(".") else {key: out}
  return out
