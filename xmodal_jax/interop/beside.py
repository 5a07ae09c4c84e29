"""What a model computes beyond the keys and shapes of its file, from a json beside the file.

Two files of equal keys and shapes may be of models with other activations, numbers of heads,
pooling or attention masks. Hubs publish open_clip_config.json (open_clip) or config.json (Hugging
Face) beside the weights, which say it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from xmodal_jax.errors import UserError
from xmodal_jax.models import clip

NAMES = ("open_clip_config.json", "config.json")
_HF_ACTS = {
  "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


class UnsupportedModelError(UserError):
  """A json beside a file says that the file is of a model that this package does not compute."""


@dataclasses.dataclass(frozen=True)
class Description:
  """What a json says. facts: by keys of a config, "model.act", "data.image.resize"; empty if there
  is no json, or if it is of another model, which `problem` then says."""

  name: str = ""
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  problem: str = ""


# (content of a json, its path) -> facts that a file does not show, and sizes that it does; None for
# a json of another kind.
Parser = Callable[[Mapping[str, Any], epath.Path], tuple[dict[str, Any], dict[str, Any]] | None]


def describe(
  source: epath.PathLike, parser: Parser | None, sizes: Mapping[str, Any]
) -> Description:
  """What a json beside a file (or in a folder of weights) says of the file's model.

  sizes: by keys of a config, those that the file shows. Raises UnsupportedModelError.
  """
  if parser is None:
    return Description()
  source = epath.Path(source)
  folder = source if source.is_dir() else source.parent
  for name in NAMES:
    path = folder / name
    try:
      content = json.loads(path.read_text())
    except (OSError, ValueError):
      continue
    try:
      found = parser(content, path) if isinstance(content, Mapping) else None
    except (TypeError, AttributeError, KeyError, ZeroDivisionError) as e:  # values of other types
      return Description(name, {}, f"{name} beside it cannot be read ({type(e).__name__}: {e}); ")
    if found is None:
      continue
    facts, theirs = found
    for key, value in theirs.items():
      if key in sizes and sizes[key] != value:
        differs = f"{key} is {value} there, {sizes[key]} in the file"
        return Description(name, {}, f"{name} beside it is of another model ({differs}); ")
    return Description(name, facts)
  return Description()


def assumption(
  name: str,
  assumed: Mapping[str, Any],
  found: Description,
  hints: Mapping[str, str],
  flag: str,
) -> str:
  """The line about values that a file and the json beside it do not say.

  hints: by keys of `assumed`, who needs other values. flag: what stands before a key where it is
  set, for {flag} in hints.
  """
  values = ", ".join(f"{k}={v}" for k, v in assumed.items())
  text = f"{name}: {found.problem}assumed {values}, which the file does not say"
  return ". ".join([text, *(hint.format(flag=flag) for k, hint in hints.items() if k in assumed)])


def _supported(path: epath.Path, section: Mapping[str, Any], **allowed: tuple) -> None:
  """Raises UnsupportedModelError for a key with a value that is not among the allowed ones."""
  for key, values in allowed.items():
    if key in section and section[key] not in values:
      raise UnsupportedModelError(
        f"{path} says {key}={section[key]!r}, which this package does not compute (it does for "
        f"{', '.join(map(repr, values))}). If it is not the json of this file, move it away"
      )


def parse_clip(
  content: Mapping[str, Any], path: epath.Path
) -> tuple[dict[str, Any], dict[str, Any]] | None:
  """The json of a whole CLIP: open_clip's or Hugging Face's."""
  model = content.get("model_cfg", content)
  if isinstance(model, Mapping) and "vision_cfg" in model and "text_cfg" in model:
    return _open_clip(model, content.get("preprocess_cfg") or {}, path)
  if content.get("model_type") == "clip":
    return _hugging_face_clip(content, path)
  return None


def parse_clip_image(
  content: Mapping[str, Any], path: epath.Path
) -> tuple[dict[str, Any], dict[str, Any]] | None:
  """`parse_clip` for a system that takes the image tower alone."""
  if (found := parse_clip(content, path)) is None:
    return None
  image = lambda values: {k: v for k, v in values.items() if k.startswith("model.image.")}
  facts, sizes = found
  return image(facts) | {"model.image.act": facts["model.act"]}, image(sizes)


def _open_clip(model, preprocess, path):
  vision, text = model["vision_cfg"], model["text_cfg"]
  off = (None, False, 0, "", {})
  for section in (vision, text):
    _supported(path, section.get("norm_kwargs") or {}, eps=(1e-5,))
    _supported(path, section.get("act_kwargs") or {}, approximate=("none", "tanh"))
    _supported(path, section, qk_norm=off, scaled_cosine_attn=off, scale_heads=off)
  _supported(path, vision, timm_model_name=off, attentional_pool=off, pool_type=("tok", "avg"))
  _supported(path, text, hf_model_name=off, embed_cls=off, pool_type=("argmax",))
  mean_pool = vision.get("pool_type") == "avg" or vision.get("global_average_pool", False)
  if mean_pool:
    _supported(path, vision, final_ln_after_pool=off)
  tanh = {(s.get("act_kwargs") or {}).get("approximate") == "tanh" for s in (vision, text)}
  quick = model.get("quick_gelu", False)
  if len(tanh) > 1 and not quick:
    raise UnsupportedModelError(f"{path}: act_kwargs of image and text differ: not supported")
  resnet = isinstance(vision.get("layers", 12), list)
  width = vision.get("width", 64 if resnet else 768)
  facts = {
    "model.act": "quick_gelu" if quick else "gelu_tanh" if tanh == {True} else "gelu",
    "model.mean": list(preprocess.get("mean") or clip.MEAN),
    "model.std": list(preprocess.get("std") or clip.STD),
    "model.image.heads": width * (32 if resnet else 1) // vision.get("head_width", 64),
    "model.text.heads": text.get("heads", 8),
    "model.text.causal": not text.get("no_causal_mask", False),
  }
  if not resnet:
    facts["model.image.pool"] = "mean" if mean_pool else "cls"
  if "resize_mode" in preprocess:
    modes = {"shortest": "shorter", "squash": "exact"}
    _supported(path, preprocess, resize_mode=tuple(modes))
    facts["data.image.resize"] = modes[preprocess["resize_mode"]]
  if "interpolation" in preprocess:
    facts["data.image.interpolation"] = preprocess["interpolation"]
  sizes = {
    "model.embed": model.get("embed_dim"), "model.image.width": width,
    "model.image.depth": vision.get("layers", 12), "model.text.width": text.get("width", 512),
    "model.text.depth": text.get("layers", 12),
  }  # fmt: skip
  return facts, {k: v for k, v in sizes.items() if isinstance(v, int)}


def _hugging_face_clip(content, path):
  vision, text = content.get("vision_config") or {}, content.get("text_config") or {}
  for section in (vision, text):
    _supported(path, section, hidden_act=tuple(_HF_ACTS), layer_norm_eps=(1e-5,))
  acts = {_HF_ACTS[section.get("hidden_act", "quick_gelu")] for section in (vision, text)}
  if len(acts) > 1:
    raise UnsupportedModelError(f"{path}: hidden_act of image and text differ: not supported")
  facts = {
    "model.act": acts.pop(),
    "model.image.heads": vision.get("num_attention_heads", 12),
    "model.image.pool": "cls",
    "model.text.heads": text.get("num_attention_heads", 8),
    "model.text.causal": True,
  }
  sizes = {
    "model.embed": content.get("projection_dim", 512),
    "model.image.width": vision.get("hidden_size", 768),
    "model.image.depth": vision.get("num_hidden_layers", 12),
    "model.text.width": text.get("hidden_size", 512),
    "model.text.depth": text.get("num_hidden_layers", 12),
  }
  return facts, sizes


def parse_bert(
  content: Mapping[str, Any], path: epath.Path
) -> tuple[dict[str, Any], dict[str, Any]] | None:
  """The config.json of Hugging Face's BERT."""
  architectures = content.get("architectures") or []
  if content.get("model_type", "bert" if "BertModel" in architectures else "") != "bert":
    return None
  _supported(path, content, hidden_act=("gelu",), layer_norm_eps=(1e-12,))
  _supported(path, content, position_embedding_type=("absolute",))
  sizes = {
    "model.text.width": content.get("hidden_size", 768),
    "model.text.mlp": content.get("intermediate_size", 3072),
  }
  return {"model.text.heads": content.get("num_attention_heads", 12)}, sizes
