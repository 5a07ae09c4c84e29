"""LAMB and the learning rates against the original TEAM's optimizer and scheduler."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import team_golden
import tiny

from xmodal_jax import config as config_lib
from xmodal_jax.interop import conversion, optimizer_state, torch_files
from xmodal_jax.interop import team as team_rules
from xmodal_jax.interop.rules import Rule
from xmodal_jax.optim import factory, schedules

UNIT = golden_files.arrays("team", "lamb", "lamb_unit.npz")
NAMES = [k.removeprefix("init/") for k in UNIT if k.startswith("init/")]
RULES = [Rule(name, name) for name in NAMES]
# Learning rates [step, group]: of all but low_lr_weight, then of that.
RATES = np.stack([UNIT[f"lr/{k}"] for k in range(sum(name.startswith("lr/") for name in UNIT))])

# The manifest's bound for trained parameters is 1e-4 of the largest entry; these are a few float32
# steps on a few hundred numbers, so only rounding may differ.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def of(prefix):
  return {name: jnp.asarray(UNIT[f"{prefix}/{name}"]) for name in NAMES}


def optimizer(schedule, params, **changes):
  c = config_lib.base().optim.to_dict()
  c |= dict(name="lamb", trust="original", b1=0.9, b2=0.999, eps=1e-6, grad_clip=1.0)
  c |= dict(weight_decay=0.01, decay=((".*", 1.0),)) | changes
  return factory.make_optimizer(c, schedule, params, conversion.tensors_of(RULES, params))


def test_steps_of_two_groups():
  """Also of a scalar, a tensor that starts at zero and one without a gradient."""
  params = of("init")
  every, factor = team_golden.step_decay(RATES[:, 0])
  run = schedules.RunLength(samples=every, batch_size=1, total=f"{len(RATES)} epochs")
  recipe = dict(schedule="step", lr=RATES[0, 0], step_every="1 epochs", step_factor=factor)
  schedule = schedules.make_schedule(tiny.optim(warmup="0 steps", end=0.0, **recipe), run)
  multiple = float(RATES[0, 1] / RATES[0, 0])
  tx = optimizer(schedule, params, lr_mult=((r"^low_lr", multiple), (".*", 1.0)))
  state, update = tx.init(params), jax.jit(tx.update)
  for step, lr in enumerate(RATES):
    np.testing.assert_allclose(schedule(step, np) * np.array([1, multiple]), lr, rtol=1e-12)
    grads = of(f"grad/{step}")
    close(optax.tree_utils.tree_norm(grads), UNIT[f"grad_norm/{step}"])
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for name, want in of(f"param/{step}").items():
      close(params[name], want, err_msg=f"step {step}: {name}")
  adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
  for name in NAMES:
    close(adam.mu[name], UNIT[f"final_exp_avg/{name}"], err_msg=name)
    close(adam.nu[name], UNIT[f"final_exp_avg_sq/{name}"], atol=1e-9, err_msg=name)


def test_without_weight_decay_there_is_no_ratio():
  params, prefix = of("init"), "no_weight_decay/param/"
  (last,) = {int(k.split("/")[2]) for k in UNIT if k.startswith(prefix)}
  tx = optimizer(optax.constant_schedule(RATES[0, 0]), params, weight_decay=0.0)
  state = tx.init(params)
  for step in range(last + 1):
    updates, state = tx.update(of(f"grad/{step}"), state, params)
    params = optax.apply_updates(params, updates)
  for name, want in of(f"{prefix}{last}").items():
    close(params[name], want, err_msg=name)


@pytest.mark.parametrize("variant", team_golden.WITH_OPTIMIZER or [None])
def test_optimizer_file_of_the_original(variant):
  """Ids follow the state dict, group by group. One rule a name: no table is needed."""
  path = team_golden.optimizer_file(variant) if variant else team_golden.some_optimizer_file()
  file = golden_files.path("team", variant, team_golden.FILES[variant])
  state, _ = torch_files.state_dict(file)
  names = [name for name in state if not name.endswith("position_ids")]
  params = {name: jax.ShapeDtypeStruct(state[name].shape, jnp.float32) for name in names}
  tx, saved = optax.scale_by_adam(), torch_files.read(path)
  in_order = team_rules.optimizer_names(names, [len(g["params"]) for g in saved["param_groups"]])
  rules = [Rule(name, name) for name in names]
  abstract = jax.eval_shape(tx.init, params)
  got, step = optimizer_state.optim_state(path, in_order, rules, abstract)
  assert step == got.count == saved["param_groups"][0]["step"]
  assert len(saved["state"]) == len(names)
  for i, name in enumerate(in_order):
    np.testing.assert_array_equal(got.mu[name], saved["state"][i]["exp_avg"].read())
    np.testing.assert_array_equal(got.nu[name], saved["state"][i]["exp_avg_sq"].read())


@pytest.mark.parametrize("variant", team_golden.VARIANTS)
def test_learning_rates_of_a_run(variant):
  """Step decay of all groups; the image tower's group, where there is one, at a multiple."""
  want = golden_files.arrays("team", variant, "outputs.npz")["schedule/lr_per_epoch_per_group"]
  every, factor = team_golden.step_decay(want[:, 0])
  run = schedules.RunLength(samples=5_000_003, batch_size=1920, total=f"{len(want)} epochs")
  recipe = dict(schedule="step", lr=want[0, 0], step_every=f"{every} epochs", step_factor=factor)
  schedule = schedules.make_schedule(tiny.optim(warmup="0 steps", end=0.0, **recipe), run)
  first = np.arange(len(want)) * run.steps_per_epoch
  multiples = want[0] / want[0, 0]
  for steps in (first, first + run.steps_per_epoch - 1):
    np.testing.assert_allclose(schedule(steps, np)[:, None] * multiples, want, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(schedule)(steps)[:, None] * multiples, want, rtol=1e-6)
