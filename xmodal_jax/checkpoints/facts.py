"""What a config computes beyond the shapes of its parameters, against what config.init was made
with: heads, activation, pooling, pixel statistics, tokenizer, image transform.

Facts are a flat mapping of config keys, {"model.text.heads": 8, "text.length": 77}, with lists in
place of tuples as json has them.
"""

import os
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints.manifest import CheckpointError
from xmodal_jax.models import registry

Facts = Mapping[str, Any]

# Keys outside of `model` that a model is trained for.
_INPUTS = (
  "text.tokenizer", "text.vocab", "text.max_merges", "text.lowercase", "text.clean",
  "text.max_words", "text.length", "data.image.resize", "data.image.interpolation",
  "data.image.rgb_first", "data.image.exif",
)  # fmt: skip
_OF_TOKENIZER = {"clip_bpe": ("text.lowercase", "text.clean", "text.max_words")}
_OF_TOKENIZER["bert"] = ("text.max_merges",)

# Last names of keys of `model` that show in the shapes of parameters, or that may differ: position
# tables are resized for another image size.
_IN_SHAPES = {
  *("system", "kind", "embed", "width", "depth", "depths", "vocab", "context", "patch", "mlp"),
  *("mlp_ratio", "size", "window", "features", "classes", "project_text", "shared"),
  *("learn_temperature", "output_dim", "types"),
}
# Those of training alone, for every system; a system's module has its own in TRAINING.
_TRAINING = {
  *("remat", "unroll", "dropout", "attention_dropout", "drop_path", "loss", "mixup", "same_image"),
}


def of(config: Mapping[str, Any] | Any, *, complete: bool = True) -> dict[str, Any]:
  """The facts of a config: a ConfigDict, nested dicts, or the flat dict of a config.json.

  complete: keys that the config lacks have the defaults of its system.
  """
  flat = config_lib.flatten(config)
  flat = {k: v for k, v in flat.items() if not isinstance(v, Mapping | config_lib.ConfigDict)}
  training = set(getattr(_module(flat), "TRAINING", ()))
  unused = _OF_TOKENIZER.get(flat.get("text.tokenizer"), ())
  if not any(k.startswith("model.text.") for k in flat):
    unused = tuple(k for k in _INPUTS if k.startswith("text."))
  skip = _IN_SHAPES | _TRAINING | training
  return {
    k: v
    for k, v in sorted(((defaults(flat) if complete else {}) | flat).items())
    if (k in _INPUTS and k not in unused)
    or (k.startswith("model.") and not skip.intersection(k.split(".")[1:]))
  }


def defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
  """What a flat config means that lacks these keys: the DEFAULTS of its system."""
  found = config_lib.flatten({"model": getattr(_module(flat), "DEFAULTS", {})})
  if flat.get("model.image.kind") not in ("vit", "clip"):
    found = {k: v for k, v in found.items() if not k.startswith("model.image.")}
  return found


def _module(flat: Mapping[str, Any]) -> types.ModuleType | None:
  system = flat.get("model.system")
  return None if system is None else registry.system_module(system)


def of_converted(meta: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """The facts in the meta.json of a converted directory, and which of them were assumed when it was
  converted, in words. Earlier versions did not record what they assumed."""
  recorded = of({"model": meta["config"]}, complete="assumed" in meta) | meta.get("facts", {})
  values = ((key, recorded.get(f"model.{key}")) for key in meta.get("assumed", ()))
  return recorded, ", ".join(f"{key}={value}" for key, value in values)


def check(
  source: str, have: Facts, want: Facts, may_change: Sequence[str] = (), doubt: str = ""
) -> None:
  """Raises CheckpointError if the facts of a source and of this config differ, by name.

  have: of the source. want: of this config, nothing if it is not known. may_change: keys that are
  meant to differ. doubt: a sentence about the facts of the source. Keys of one side only are not
  compared, which is logged.
  """
  if not want:
    return
  both = have.keys() & want.keys()
  differ = [k for k in sorted(both) if _comparable(k, have[k]) != _comparable(k, want[k])]
  refused = [k for k in differ if not any(k == m or k.startswith(f"{m}.") for m in may_change)]
  if refused:
    lines = "\n  ".join(f"{k}: {have[k]!r} there, {want[k]!r} in this config" for k in refused)
    first = refused[0]
    raise CheckpointError(
      f"config.init: {source} was made with other values than this config has:\n  {lines}\n"
      f"{doubt}Parameters fit both, results do not. Use the values of the source, as in "
      f"--config.{first}={_as_flag(have[first])}, or say that they are meant to change: "
      f"--config.init_change={','.join(refused)}"
    )
  if differ:
    changes = ", ".join(f"{k} from {have[k]!r} to {want[k]!r}" for k in differ)
    logging.info("config.init_change: changed on purpose: %s", changes)
  if unknown := _by_section(want.keys() - have.keys(), have):
    logging.warning(
      "%s does not record, so not compared with this config: %s", source, ", ".join(unknown)
    )


def _by_section(unknown: Iterable[str], have: Facts) -> list[str]:
  """Keys, with one entry "text.*" for a section of which the source has nothing."""

  def name(key: str) -> str:
    section = key.rpartition(".")[0] + "."
    known = key.startswith("model.") or any(k.startswith(section) for k in have)
    return key if known else f"{section}*"

  return sorted({name(key) for key in unknown})


def _as_flag(value: Any) -> str:
  text = f"({','.join(map(repr, value))})" if isinstance(value, list) else str(value)
  return f"'{text}'" if set(text) & set("( ") else text


def _comparable(key: str, value: Any) -> Any:
  """A vocabulary may stand in another folder."""
  return os.path.basename(str(value)) if key == "text.vocab" else value
