"""Adam moments from a PyTorch optimizer file, to continue a PyTorch run: config.init_optimizer."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from etils import epath

from xmodal_jax.errors import UserError
from xmodal_jax.interop import conversion, tables, torch_files
from xmodal_jax.interop.conversion import path_of
from xmodal_jax.interop.local import local_copy
from xmodal_jax.interop.rules import ConversionError, Entry, Rule

_WRAPPERS = ("optimizer", "optimizer_state_dict", "optimizer_states")
_ORDERED = ("zip", "legacy", "tar")  # formats that preserve the order of a state dict
Groups = list[dict[str, Any]]


def optim_state(
  file: str | os.PathLike,
  names: Sequence[str] | Callable[[list[int]], Sequence[str]],
  rules: Sequence[Entry],
  fresh: optax.OptState,
  *,
  allow_missing: bool = False,
) -> tuple[optax.OptState, int]:
  """(optax state, step) with the moments of a PyTorch Adam, AdamW or apex FusedLAMB.

  file: torch.save of an optimizer's state_dict, also inside of a training checkpoint.
  names: torch names of the optimizer's parameters in the order of its groups, or a function of the
  groups' sizes that returns them. Names that `rules` ignore are skipped.
  fresh: tx.init(params) or its shapes, with exactly one scale_by_adam in it. The result has the
  same structure: float32 host arrays for the moments, and the file's step for every count.
  allow_missing: parameters without moments in the file, which never had a gradient, get zeros.

  Raises ConversionError, which lists all missing, unknown and misshapen parameters, and ValueError
  for a state that optax cannot express.
  """
  state, groups = _find(torch_files.read(file), file)
  ids = [i for group in groups for i in group["params"]]
  if callable(names):
    names = names([len(group["params"]) for group in groups])
  if len(ids) != len(names):  # ids cannot be assigned to names
    raise UserError(
      f"{file}: an optimizer of {len(ids)} parameters, in groups of "
      f"{[len(group['params']) for group in groups]}, for a model of {len(names)}"
    )
  entries = {name: state[i] for name, i in zip(names, ids, strict=True) if i in state}
  entries |= {f"state {i}, in no group": state[i] for i in state.keys() - set(ids)}
  if any("max_exp_avg_sq" in entry for entry in entries.values()):
    raise UserError(f"{file}: an amsgrad optimizer, which is not supported")
  step = _step(entries, groups, file)

  adam = [x for x in jax.tree.leaves(fresh, is_leaf=_is_adam) if _is_adam(x)]
  if len(adam) != 1:
    raise ValueError(f"an optax state with {len(adam)} scale_by_adam in it; expected one")
  idle = [name for name in names if name not in entries] if allow_missing else []
  zeros = _zeros(idle, rules, adam[0].mu)
  mu, nu = (
    _moments(file, key, entries, zeros, rules, adam[0].mu) for key in ("exp_avg", "exp_avg_sq")
  )

  def fill(x):
    if not _is_counter(x):
      return x
    return x._replace(count=np.int32(step), **(dict(mu=mu, nu=nu) if _is_adam(x) else {}))

  return jax.tree.map(fill, fresh, is_leaf=_is_counter), step


def for_init(
  init: str,
  init_optimizer: str,
  system: str,
  params: Mapping[str, Any],
  tx: optax.GradientTransformation,
) -> tuple[optax.OptState, int]:
  """(optax state on the host, step) of the file config.init_optimizer.

  init: config.init, the PyTorch file of the parameters, which gives the order of the names. A
  system whose optimizer has another order defines `optimizer_names`, see `tables.RuleTable`.
  params: nested dict, shapes suffice. Raises UserError if config.init is not a file that
  torch.save wrote, and the errors of `optim_state`.
  """
  need = "config.init_optimizer continues the run that saved it"
  if not init:
    raise UserError(f"{need}: set config.init to the PyTorch file of its parameters")
  if epath.Path(init).expanduser().is_dir():
    raise UserError(
      f"{need}: config.init must be the PyTorch file of its parameters, but {init} is a directory. "
      "To resume a run of this package, pass its --workdir and leave both keys empty"
    )
  table = tables.rule_table(system)
  shapes = {path_of(k): x.shape for k, x in jax.tree_util.tree_flatten_with_path(params)[0]}
  paths = [epath.Path(source).expanduser() for source in (init, init_optimizer)]
  for path in paths:
    if not path.exists():
      raise UserError(f"{path} does not exist")
  with local_copy(paths[0]) as file, local_copy(paths[1]) as optimizer_file:
    state, info = torch_files.state_dict(file)
    if info["format"] not in _ORDERED:
      raise UserError(
        f"{need}: config.init is a {info['format']} file, which does not preserve the order of "
        "the optimizer's parameters; use the file that torch.save wrote"
      )
    names = conversion.parameter_names(table.RULES, shapes, state)  # without buffers
    reorder = getattr(table, "optimizer_names", lambda names, groups: names)
    opt_state, step = optim_state(
      optimizer_file,
      lambda groups: reorder(names, groups),
      table.RULES,
      jax.eval_shape(tx.init, params),
      allow_missing=True,
    )
  logging.info("optimizer state of step %d from %s", step, init_optimizer)
  return opt_state, step


def _find(tree: Any, file: str | os.PathLike) -> tuple[dict[Any, dict[str, Any]], Groups]:
  """(state by id, groups) of an optimizer's state_dict, also inside of a training checkpoint."""
  key = next((k for k in _WRAPPERS if isinstance(tree, Mapping) and k in tree), None)
  tree = tree if key is None else tree[key]
  if isinstance(tree, list) and len(tree) == 1:
    tree = tree[0]
  if not isinstance(tree, Mapping) or not {"state", "param_groups"} <= tree.keys():
    raise UserError(
      f"{file}: no optimizer state. Expected the state_dict of a PyTorch optimizer (state, "
      f"param_groups), or a checkpoint with it under one of {', '.join(_WRAPPERS)}"
    )
  state, groups = tree["state"], tree["param_groups"]
  known = isinstance(state, Mapping) and all(isinstance(e, Mapping) for e in state.values())
  if not known or not isinstance(groups, list) or not all(map(_is_group, groups)):
    raise UserError(
      f"{file}: its state or param_groups are not those of a PyTorch optimizer: expected a dict of "
      "dicts by parameter, and a list of dicts with 'params'. Save optimizer.state_dict()"
    )
  return state, groups


def _is_group(group: Any) -> bool:
  params = group.get("params") if isinstance(group, Mapping) else None
  return isinstance(params, list) and all(type(i) in (int, str) for i in params)


def _step(entries: Mapping[str, Mapping[str, Any]], groups: Groups, file: Any) -> int:
  """The number of steps taken, which apex stores per group and PyTorch per parameter."""
  found = [g["step"] for g in groups if "step" in g]
  found += [entry["step"] for entry in entries.values() if "step" in entry]
  try:
    values = {int(x.read() if isinstance(x, torch_files.TensorRef) else x) for x in found}
  except (TypeError, ValueError, OverflowError) as e:
    raise UserError(f"{file}: a step that is no number ({e})") from e
  if len(values) != 1:
    what = f"steps {sorted(values)[:10]}" if values else "no step"
    raise UserError(f"{file}: {what}; all parameters must be at the same step")
  return values.pop()


def _moments(
  file: str | os.PathLike,
  key: str,
  entries: Mapping[str, Mapping[str, Any]],
  zeros: Mapping[str, np.ndarray],
  rules: Sequence[Entry],
  like: Any,
) -> Any:
  """The moments `key` of all parameters, as a tree of float32 arrays like `like`.

  entries: state by torch name. zeros: moments by torch name of parameters without a state.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(like)
  shapes = {path_of(k): x for k, x in leaves}
  # Defaults are values of parameters, not of their moments.
  rules = [dataclasses.replace(r, default=None) if isinstance(r, Rule) else r for r in rules]
  # Moments have the layout of their parameter, so its rule converts them.
  state = {name: entry[key] for name, entry in entries.items() if key in entry}
  odd = [name for name, x in state.items() if not isinstance(x, torch_files.TensorRef)]
  if odd:
    raise UserError(f"{os.fspath(file)}: {key} of {odd[0]} is no tensor")
  state |= zeros
  try:
    flat, _ = conversion.to_jax(state, rules, shapes)
  except ConversionError as e:
    e.args = (f"{os.fspath(file)}, {key} by parameter names: {e}",)
    raise
  return jax.tree.unflatten(tree, [np.asarray(flat[p], np.float32) for p in shapes])


def _zeros(names: Sequence[str], rules: Sequence[Entry], like: Any) -> dict[str, np.ndarray]:
  """Zeros for those of the torch tensors `names` that the model has, with a warning.

  like: tree of the model's parameters.
  """
  if not names:
    return {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(like)
  blank = {path_of(k): np.broadcast_to(np.float32(0), x.shape) for k, x in leaves}
  state = conversion.to_torch(blank, rules)
  out = {name: state[name].make() for name in names if name in state}
  if out:
    logging.warning(
      "no optimizer state for %d tensors, which start from zeros: %s", len(out), ", ".join(out)
    )
  return out


def _is_adam(x: Any) -> bool:
  return isinstance(x, optax.ScaleByAdamState)


def _is_counter(x: Any) -> bool:
  return isinstance(x, optax.ScaleByAdamState | optax.ScaleByScheduleState)
