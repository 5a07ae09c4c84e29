"""The optax chain from the `optim` section of a config.

Masks and multipliers are ordered (regex, value) lists over paths such as `image/blocks/q/kernel`:
the first match wins and a path without a match is an error.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from xmodal_jax.errors import ConfigError, check_choice, listed
from xmodal_jax.optim import schedules, transforms
from xmodal_jax.optim.schedules import Schedule


def first_match(what: str, rules: Sequence[tuple[str, float]], path: str) -> float:
  """Value of the first rule whose regex is found in `path`. Raises ConfigError if there is none.

  what: the config key of the rules, for the message.

  >>> first_match("optim.decay", [("bias$", 0.0), (".*", 0.1)], "image/blocks/q/bias")
  0.0
  """
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  raise ConfigError(
    f"{what}: no rule matches parameter {path}; end the list with ('.*', value) for all other "
    "parameters"
  )


def per_param(what: str, rules: Sequence[tuple[str, float]], params: Any) -> Any:
  """Nested dict like `params` with the value of the first rule that matches each path."""
  return jax.tree_util.tree_map_with_path(
    lambda p, _: float(first_match(what, rules, transforms.path_of(p))), params
  )


def first_steps(config: Mapping[str, Any], params: Any, steps_per_epoch: int) -> Any:
  """Nested dict like `params` with the first step that trains each one, by config.optim.freeze.

  config: the `optim` section. None if nothing is frozen.
  """
  if not config["freeze"]:
    return None
  to_steps = schedules.duration_to_steps
  rules = [(pattern, to_steps(d, steps_per_epoch)) for pattern, d in config["freeze"]]
  return jax.tree.map(int, per_param("optim.freeze", [*rules, (".*", 0)], params))


_LISTED = 60  # parameters that an error lists


def check_rules(config: Mapping[str, Any], params: Any) -> None:
  """Raises ConfigError if a regex of the `optim` section has no effect on parameters like `params`.

  It finds no parameter, or only those that rules before it have taken. A rule that finds all
  parameters, such as ".*" at the end of a list, may be left with none.
  """
  paths = [transforms.path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)]
  patterns = {k: [row[0] for row in config[k]] for k in ("decay", "lr_mult", "freeze", "bounds")}
  if config["round_to"]:
    patterns["round_paths"] = config["round_paths"]
  faults, unmatched = [], False
  for key, regexes in patterns.items():
    taken: set[str] = set()
    for regex in regexes:
      found = {path for path in paths if re.search(regex, path)}
      if not found:
        faults.append(f"config.optim.{key}: {regex!r} matches no parameter")
        unmatched = True
      elif key != "round_paths" and found <= taken and len(found) < len(paths):
        faults.append(
          f"config.optim.{key}: {regex!r} has no effect, because rules before it match the same "
          f"{len(found)} parameters, and the first match wins: put it before them"
        )
      taken |= found
  if unmatched:
    faults.append(f"The parameters are:{listed(paths, _LISTED)}")
  if faults:
    raise ConfigError("\n".join(faults))


Tensors = Sequence[tuple[Sequence[str], bool]]


def trust_groups(trust: str, decay: Any, params: Any, tensors: Tensors) -> Tensors:
  """Groups for `transforms.scale_by_trust_ratio`, for parameters like `params`.

  trust: config.optim.trust. "optax" takes the norms of each array; "original" those of each tensor
  of the published optimizer, and only of tensors with weight decay (apex with use_nvlamb=False).
  decay: nested dict of weight decays. tensors: which arrays are one tensor of the published
  optimizer, see `interop.conversion.tensors`. Raises ConfigError if the decay differs inside one
  tensor.
  """
  paths_of = lambda tree: [transforms.path_of(k) for k, _ in jax.tree.leaves_with_path(tree)]
  if covered := set(paths_of(params)) ^ {path for paths, _ in tensors for path in paths}:
    raise ConfigError(f"optim.name='lamb': no tensor of the published optimizer has {covered}")
  if trust == "optax":
    return [((path,), stacked) for paths, stacked in tensors for path in paths]
  check_choice("optim.trust", trust, ("optax", "original"))
  decay = dict(zip(paths_of(decay), jax.tree.leaves(decay), strict=True))
  for paths, _ in tensors:
    if len({decay[path] for path in paths}) > 1:
      raise ConfigError(
        f"optim.decay differs between {', '.join(paths)}, which are one tensor with "
        "optim.trust='original': set the same value for them"
      )
  return [(paths, stacked) for paths, stacked in tensors if decay[paths[0]]]


def make_optimizer(
  config: Mapping[str, Any],
  schedule: Schedule,
  params: Any,
  tensors: Tensors = (),
  steps_per_epoch: int = 0,
  stats: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """The optax chain of the `optim` section, for parameters like `params` (shapes suffice).

  tensors: for LAMB, see `trust_groups`. steps_per_epoch: for durations in epochs in `freeze`.
  stats: running statistics of the model, for `ema`, see `transforms.average`.

    tx = make_optimizer(config.optim, make_schedule(config.optim, run), params)
    opt_state = tx.init(params)
  """
  check_choice("optim.name", config["name"], ("adamw", "lamb"))
  decay = per_param("optim.decay", config["decay"], params)
  decay = jax.tree.map(lambda m: m * config["weight_decay"], decay)
  adam, chain, frozen = (config["b1"], config["b2"], config["eps"]), [], []
  starts = first_steps(config, params, steps_per_epoch)
  if starts is not None:
    chain.append(transforms.hold(starts))  # excluded from the global norm
    frozen = [transforms.hold(starts)]  # and from the weight decay
  if config["grad_clip"]:
    chain.append(optax.clip_by_global_norm(config["grad_clip"]))
  scale = transforms.scale_by_adam_from(starts, *adam) if frozen else optax.scale_by_adam(*adam)
  chain += [scale, transforms.add_decay(decay)]
  if config["name"] == "lamb":
    # The ratio includes the weight decay, but not the learning rate and its multiples.
    chain.append(
      transforms.scale_by_trust_ratio(trust_groups(config["trust"], decay, params, tensors))
    )
  chain += [
    *frozen,
    transforms.scale_per_param(per_param("optim.lr_mult", config["lr_mult"], params)),
    optax.scale_by_learning_rate(schedule),
  ]
  if config["bounds"]:
    chain.append(transforms.bound(config["bounds"], starts))
  if config["round_to"]:
    chain.append(transforms.round_trip(config["round_to"], config["round_paths"], starts))
  if config["ema"]:
    chain.append(transforms.average(config["ema"], config["ema_schedule"], stats))
  return optax.chain(*chain)


def table(config: Mapping[str, Any], abstract: Any, shardings: Any) -> str:
  """One line per parameter: path, shape, logical axes, sharding, decay, lr multiple.

  abstract: nnx.State of variables with `axes` metadata; shardings: nested dict like it.
  """
  rows = [("parameter", "shape", "axes", "sharding", "decay", "lr")]
  is_variable = lambda v: hasattr(v, "get_metadata")
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_variable)
  shardings = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
  shardings = {transforms.path_of(k): v for k, v in shardings.items()}
  total = 0
  for key_path, v in leaves:
    path = transforms.path_of(key_path)
    total += int(np.prod(v.shape, dtype=np.int64))
    decay = config["weight_decay"] * first_match("optim.decay", config["decay"], path)
    rows.append(
      (
        path,
        "x".join(map(str, v.shape)) or "scalar",
        ",".join(a or "-" for a in v.get_metadata().get("axes", ())),
        ",".join(a or "-" for a in shardings[path].spec) or "replicated",
        f"{decay:g}",
        f"{first_match('optim.lr_mult', config['lr_mult'], path):g}",
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
  return "\n".join([*lines, f"{total:,} parameters"])
