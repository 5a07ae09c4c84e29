"""Features kept in a workdir: .npz files whose names are hashes of what they depend on."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from xmodal_jax import config as config_lib
from xmodal_jax.evaluation.scored import LeftOut
from xmodal_jax.interop.local import local_copy

# Features of one side, nested dicts of arrays [N, ...], and the image_id int [N] of their rows.
Side = tuple[Any, np.ndarray]


def config_keys(config: Any, sections: Sequence[str], platform: str) -> dict[str, Any]:
  """The part of a flat config that cached features depend on, and the platform they come from.

  sections: dotted keys; each selects itself and all keys below it. platform: of the devices, which
  decides what dtype "auto" and precision "default" mean.

  >>> config_keys(config, ("dtype", "data.image"), "cpu")
  {"platform": "cpu", "dtype": "auto", "data.image.size": 0, "data.image.resize": "shorter", ...}
  """
  return {"platform": platform} | {
    key: value
    for key, value in config_lib.flatten(config).items()
    if any(key == section or key.startswith(f"{section}.") for section in sections)
  }


def cache_file(
  folder: epath.PathLike, name: str, keys: Mapping[str, Any], fingerprint: str, source: Any
) -> epath.Path:
  """FOLDER/NAME-HASH.npz, the hash being of everything that the cached features depend on.

  Args:
    keys: from `config_keys`. fingerprint: of the split. source: where the parameters came from.
  """
  key = json.dumps([dict(keys), fingerprint, source], sort_keys=True, default=str)
  return epath.Path(folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def save_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes an .npz atomically: readers see no file or a complete one."""
  temporary = path.parent / (path.name + ".tmp")
  if "://" in str(path):  # writing a zip archive seeks, which object stores do not support
    np.savez(buffer := io.BytesIO(), **arrays)
    temporary.write_bytes(buffer.getbuffer())
  else:
    with temporary.open("wb") as f:
      np.savez(f, **arrays)
  temporary.replace(path)


def load_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads a file of `save_arrays`."""
  with local_copy(path) as local, np.load(local, allow_pickle=False) as f:
    return {k: f[k] for k in f.files}


def save_features(path: epath.Path, images: Side, texts: Side, left_out: LeftOut) -> None:
  """Writes the features of both sides, and which records have none, into one .npz."""
  arrays = {"left_out": np.array(json.dumps(left_out))}
  for side, (features, ids) in (("image", images), ("text", texts)):
    flat = traverse_util.flatten_dict(features, sep="/")
    arrays |= {f"{side}/features/{k}": v for k, v in flat.items()}
    arrays[f"{side}/ids"] = ids
  save_arrays(path, arrays)


def load_features(path: epath.Path) -> tuple[Side, Side, LeftOut]:
  """Reads (images, texts, left_out) from a file of `save_features`."""
  arrays = traverse_util.unflatten_dict(load_arrays(path), sep="/")
  images, texts = ((arrays[s]["features"], arrays[s]["ids"]) for s in ("image", "text"))
  return images, texts, json.loads(str(arrays["left_out"]))
