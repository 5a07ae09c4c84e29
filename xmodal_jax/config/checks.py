"""Everything that can be said about a config by itself, in one pass, with all faults at once."""

import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from xmodal_jax.config import values
from xmodal_jax.config.values import (
  BOOL,
  FRACTION,
  REGEX,
  TEXT,
  Rule,
  choice,
  duration,
  names,
  number,
  optional,
  rows,
  several,
  whole,
)
from xmodal_jax.data import augment, image, order, rand_augment, text, wordpiece
from xmodal_jax.distributed import sharding
from xmodal_jax.models import registry
from xmodal_jax.optim import schedules, transforms

MISSING = object()  # the value of a key that there is not
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _literals(function: Any, argument: str) -> Rule:
  """The choices that the type of an argument lists."""
  found = typing.get_args(typing.get_type_hints(function)[argument])
  return choice(*(name for name in found if name), none="" in found)


def _is_bound(value: Any) -> bool:
  row = (REGEX, number(-float("inf")), number(-float("inf")))
  return rows(row, (), "", none=True).holds(value) and all(low <= high for _, low, high in value)


# What the values of a key may be, beyond what its default says: True or False, or any text.
SPEC: dict[str, Rule] = {
  "seed": whole(0, 2**32 - 1),  # of larger ones JAX and NumPy would take different parts
  "init_missing": REGEX,
  "dtype": choice("auto", *DTYPES),
  "precision": choice("default", "high", "highest"),
  "mesh": Rule(sharding.MESH, sharding.is_mesh),
  "min_shard": whole(),
  "batch_size": whole(1),
  "accumulate": whole(1),
  "loss_chunk": whole(),
  "micro_shards": Rule(
    "a power of two", lambda v: values.is_whole(v) and v > 0 and v & (v - 1) == 0
  ),
  "total": duration(zero=False),
  "log_every": whole(),
  "profile.first_step": whole(),
  "profile.steps": whole(1),
  "data.mix": choice(*order.MIXES),
  "data.tfds_captions": whole(),
  "data.captions": choice("all", "one"),
  "data.image.size": whole(),
  "data.image.resize": _literals(image.Transform, "resize"),
  "data.image.interpolation": choice(*image.FILTERS),
  "data.regions": whole(),
  "data.crop": _literals(augment.build, "crop"),
  "data.crop_scale": several(number(0, 1, above=True), 2, (0.5, 1.0), rising=True),
  "data.crop_ratio": several(number(above=True), 2, (0.75, 1.33), rising=True),
  "data.jitter": several(number(), 4, (0.4, 0.4, 0.4, 0.1)),
  "data.jitter_p": FRACTION,
  "data.grayscale": FRACTION,
  "data.blur": FRACTION,
  "data.blur_radius": several(number(), 2, (0.1, 2.0), rising=True),
  "data.flip": FRACTION,
  "data.rand_augment": several(number(0), 2, (2, 7)),
  "data.rand_augment_mode": choice(*typing.get_args(rand_augment.Mode)),
  "data.auto_augment": _literals(augment.build, "auto_augment"),
  "data.erase": FRACTION,
  "data.erase_mode": choice(*typing.get_args(augment.EraseMode)),
  "data.erase_count": several(whole(1), 2, (1, 3), rising=True),
  "data.max_bad_fraction": FRACTION,
  "data.eval_max_bad_fraction": FRACTION,
  "data.max_pixels": whole(1),
  "data.threads": whole(),
  "text.tokenizer": choice(*text.TOKENIZERS),
  "text.max_merges": whole(),
  "text.clean": choice(*wordpiece.CLEAN_UPS),
  "text.max_words": whole(),
  "text.corrupt": FRACTION,
  "text.length": whole(2),
  "optim.name": choice("adamw", "lamb"),
  "optim.trust": choice("optax", "original"),
  "optim.lr": number(),
  "optim.b1": number(0, 1, below=True),
  "optim.b2": number(0, 1, below=True),
  "optim.eps": number(),
  "optim.weight_decay": number(),
  "optim.decay": rows((REGEX, number()), ((".*", 1.0),), "(regex, multiple) pairs"),
  "optim.lr_mult": rows((REGEX, number()), ((".*", 1.0),), "(regex, multiple) pairs"),
  "optim.freeze": rows(
    (REGEX, duration()), (("^image/", "1 epochs"),), "(regex, duration) pairs", none=True
  ),
  "optim.grad_clip": number(),
  "optim.schedule": choice(*schedules.SCHEDULES),
  "optim.warmup": duration(share=True),
  "optim.warmup_from": choice(*schedules.WARMUP_FROM),
  "optim.end": number(),
  "optim.cycles": number(above=True),
  "optim.step_every": duration(zero=False),
  "optim.step_factor": number(),
  "optim.milestones": Rule(
    "durations, such as ('10 epochs', '20 epochs'), or () for none",
    lambda v: isinstance(v, tuple | list) and all(map(duration().holds, v)),
  ),
  "optim.bounds": Rule(
    "(regex, low, high) rows, such as (('^logit_scale$', 0.0, 4.6),), or () for none", _is_bound
  ),
  "optim.ema": number(0, 1, below=True),
  "optim.ema_schedule": choice(*transforms.AVERAGES),
  "optim.round_to": choice(*DTYPES, none=True),
  "optim.round_paths": Rule(
    "regular expressions, such as ('kernel$',), or () for none",
    lambda v: isinstance(v, tuple | list) and all(map(REGEX.holds, v)),
  ),
  "eval.every": duration(),
  "eval.batch_size": whole(1),
  "eval.block": several(whole(1), 2, (1024, 5120)),
  "eval.select": choice("train", "val", "test"),
  "eval.top_k_text": optional(whole()),
  "eval.top_k_image": optional(whole()),
  "eval.stage_mix": optional(number()),
  "eval.stage_mixes": Rule(
    "numbers from 0, such as (0.5, 1.0), or () for none",
    lambda v: isinstance(v, tuple | list) and all(map(number().holds, v)),
  ),
  "eval.rerank_block": several(whole(1), 2, (8, 8)),
  "eval.token_dtype": choice("auto", *DTYPES),
  "eval.score_dtype": choice(*DTYPES),
  "eval.folds": whole(),
  "eval.ndcg": names("rougeL", "spice"),  # evaluation.ndcg.METHODS, which is above this package
  "eval.protocol": choice("right", "original"),
  "checkpoint.every": duration(),
  "checkpoint.keep": whole(-1),
  "probe.optim": choice("lars", "lbfgs"),
  "probe.batch_size": whole(1),
  "probe.total": duration(zero=False),
  "probe.every": duration(),
  "probe.lr": number(),
  "probe.warmup": duration(share=True),
  "probe.warmup_from": choice(*schedules.WARMUP_FROM),
  "probe.momentum": number(0, 1, below=True),
  "probe.dampening": FRACTION,
  "probe.weight_decay": number(),
  "probe.eta": number(above=True),
  "probe.l2": optional(number()),
  "probe.holdout": number(0, 1, above=True, below=True),
  "probe.max_steps": whole(1),
  "classify.block": whole(1),
}

# Rules of keys of the model section by their last name, which towers and systems share. A tuple has
# a value for each stage. What only a system knows, it says when it is built.
_COUNTS = (
  "depth", "depths", "width", "heads", "size", "patch", "window", "embed", "mlp", "mlp_ratio",
  "vocab", "context", "features", "unroll", "groups", "negatives",
)  # fmt: skip
_MODEL = dict.fromkeys(_COUNTS, values.each(whole(1)))
_MODEL |= dict.fromkeys(
  ("dropout", "attention_dropout", "drop_path", "smoothing"), number(0, 1, below=True)
)
_MODEL |= dict.fromkeys(("temperature", "sharpness", "scale"), number(above=True))
_MODEL |= dict.fromkeys(
  ("mean", "std"), several(number(-math.inf), 3, (0.5, 0.5, 0.5))._replace(expected="three numbers")
)
_MODEL["remat"] = Rule(
  "'' or a policy of jax.checkpoint_policies, such as 'nothing_saveable'",
  lambda v: not v or hasattr(jax.checkpoint_policies, str(v)),
)
_FINITE = Rule("a finite number", lambda v: not isinstance(v, float) or math.isfinite(v))

# Sections of free keys, which are checked by themselves.
_FREE = ("model", "recipes", "rules")


def rule_of(key: str, default: Any) -> Rule:
  """The rule of a key of the default config."""
  if key in SPEC:
    return SPEC[key]
  if isinstance(default, bool):
    return BOOL
  if isinstance(default, str):
    return TEXT
  if isinstance(default, tuple):
    return Rule("a tuple", lambda v: isinstance(v, tuple | list))
  return number() if default is not None else optional(number())


def faults(config: Any, default: Any, overrides: Mapping[str, Any]) -> list[str]:
  """One line for each fault of a config, "config.KEY is VALUE: expected ...".

  default: the config that has all keys, with their default values. overrides: the dotted keys that
  the command line has set, and their values.
  """
  return [
    *_section(config, default, ""),
    *_model(config.get("model"), overrides),
    *_recipes(config, default),
    *_sharding_rules(config.get("rules")),
    *_together(config),
  ]


def _section(config: Any, default: Any, prefix: str) -> Iterator[str]:
  for name in sorted(set(config) - set(default) - set(_FREE)):
    close = difflib.get_close_matches(str(name), list(default.keys()), 1)
    yield f"config.{prefix}{name} does not exist" + (f"; did you mean {close[0]}?" if close else "")
  for name, standard in default.items():
    key = f"{prefix}{name}"
    if not prefix and name in _FREE:
      continue
    if name not in config:
      yield f"config.{key} is missing: set it, e.g. to its default {standard!r}"
    elif not isinstance(standard, ml_collections.ConfigDict):
      if wrong := rule_of(key, standard).fault(config[name]):
        yield f"config.{key} is {config[name]!r}: {wrong}"
    elif isinstance(config[name], ml_collections.ConfigDict):
      yield from _section(config[name], standard, f"{key}.")
    else:
      yield f"config.{key} is {config[name]!r}: expected a section of keys, {', '.join(standard)}"


def _model(model: Any, overrides: Mapping[str, Any]) -> Iterator[str]:
  if not isinstance(model, ml_collections.ConfigDict) or not len(model):
    yield f"config.model is {model!r}: expected the section of a system, as a config file sets it"
    return
  unread = set()
  for key, value in overrides.items():
    if key.startswith("model.") and (value is None or isinstance(value, values.Misfit)):
      unread.add(key)
      expected = "a value, or leave it out for that of the config file"
      yield f"config.{key} is {value!r}: expected {getattr(value, 'expected', expected)}"
  if model.get("system") not in registry.SYSTEMS:
    known = ", ".join(registry.SYSTEMS)
    yield f"config.model.system is {model.get('system')!r}: expected one of {known}"
  for key, line in _section_of_model(model, "model."):
    if key not in unread:
      yield line


def _section_of_model(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
  """(key, its fault) of a section of the model."""
  width, heads = section.get("width"), section.get("heads")
  if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
    key, expected = f"{prefix}heads", f"a number that divides {prefix}width={width}"
    yield key, f"config.{key} is {heads}: expected {expected}"
  for name, value in section.items():
    key = f"{prefix}{name}"
    if isinstance(value, ml_collections.ConfigDict):
      yield from _section_of_model(value, f"{key}.")
    elif wrong := _MODEL.get(name, _FINITE).fault(value):
      yield key, f"config.{key} is {value!r}: {wrong}"


def _recipes(config: Any, default: Any) -> Iterator[str]:
  recipes, known = config.get("recipes"), config.get("recipe")
  if not isinstance(recipes, ml_collections.ConfigDict):
    yield f"config.recipes is {recipes!r}: expected a section of recipes by name"
    return
  if not isinstance(known, str) or known not in recipes:
    listed = ", ".join(sorted(recipes))
    yield f"config.recipe is {known!r}: expected one of config.recipes, {listed}"
  for name, recipe in recipes.items():
    if not isinstance(recipe, ml_collections.ConfigDict):
      yield f"config.recipes.{name} is {recipe!r}: expected a section of keys and their values"
      continue
    for key, value in recipe.items():
      node = f"config.recipes.{name}.{key}"
      dotted = key.replace("/", ".")
      if (own := find(config, dotted)) is MISSING:
        yield f"{node} is no key of the config: expected those of its sections, such as 'optim/lr'"
      elif (standard := find(default, dotted)) is not MISSING:
        if wrong := rule_of(dotted, standard).fault(value):
          yield f"{node} is {value!r}: {wrong}"
      elif value is None or isinstance(value, values.Misfit):
        yield f"{node} is {value!r}: expected a value such as {own!r}"


def _sharding_rules(rules: Any) -> Iterator[str]:
  if not isinstance(rules, ml_collections.ConfigDict):
    yield f"config.rules is {rules!r}: expected a section of logical axes and their mesh axes"
    return
  for axis, mesh_axis in rules.items():
    if mesh_axis not in sharding.AXES:
      expected = ", ".join(sharding.AXES)
      yield f"config.rules.{axis} is {mesh_axis!r}: expected a mesh axis, one of {expected}"


def _together(config: Any) -> Iterator[str]:
  """Faults of values that are right by themselves but do not fit each other."""
  has = lambda key, of: _get(config, key, of)
  batch, parts = has("batch_size", int), has("accumulate", int)
  if batch and parts and parts > 0 and batch % parts:
    yield (
      f"config.accumulate is {parts}: expected a number that divides config.batch_size={batch}"
    )
  magnitude = (has("data.rand_augment", tuple) or (0, 0))[-1]
  if values.is_number(magnitude) and magnitude > rand_augment.MAX_MAGNITUDE:
    yield (
      f"config.data.rand_augment has magnitude {magnitude}: expected 0 to "
      f"{rand_augment.MAX_MAGNITUDE}"
    )
  hue = (has("data.jitter", tuple) or (0,))[-1]
  if values.is_number(hue) and hue > 0.5:
    yield f"config.data.jitter has a hue of {hue}: expected 0 to 0.5"
  if has("optim.schedule", str) == "milestones" and has("optim.milestones", tuple) == ():
    yield (
      "config.optim.milestones is (): expected durations, such as ('10 epochs',), for the schedule "
      "'milestones'"
    )
  if has("optim.round_to", str) and has("optim.round_paths", tuple) == ():
    yield "config.optim.round_paths is (): expected the parameters that optim.round_to rounds"
  if has("probe.optim", str) == "lbfgs" and has("probe.augment", bool):
    yield "config.probe.augment is True: expected False with probe.optim='lbfgs'"


def find(config: Any, key: str) -> Any:
  """The value of a dotted key, or MISSING, also where a section is no section."""
  for name in key.split("."):
    is_section = isinstance(config, ml_collections.ConfigDict)
    config = config.get(name, MISSING) if is_section else MISSING
  return config


def _get(config: Any, key: str, of: type) -> Any:
  """The value of a key; None unless it has this type."""
  value = find(config, key)
  return value if type(value) is of else None
