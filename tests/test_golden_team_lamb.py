"""LAMB and the learning rates against the original TEAM's optimizer and scheduler."""

import functools

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from xmodal_jax import config as config_lib
from xmodal_jax.interop import conversion, optimizer_state, torch_files
from xmodal_jax.interop.conversion import Rule
from xmodal_jax.optim import factory, schedules

NAMES = ("weight", "vector", "scalar", "zero_bias", "zero_grad", "low_lr_weight")
RULES = [Rule(name, name) for name in NAMES]
STEPS = 6

# The manifest's bound for trained parameters is 1e-4 of the largest entry; these are six steps of
# float32 on a few hundred numbers, so rounding is all that may differ.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def golden():
  return golden_files.arrays("team", "lamb", "lamb_unit.npz")


def of(golden, prefix):
  return {name: jnp.asarray(golden[f"{prefix}/{name}"]) for name in NAMES}


def optimizer(schedule, params, **changes):
  c = config_lib.base().optim.to_dict()
  c |= dict(name="lamb", trust="original", b1=0.9, b2=0.999, eps=1e-6, grad_clip=1.0)
  c |= dict(weight_decay=0.01, decay=((".*", 1.0),)) | changes
  return factory.make_optimizer(c, schedule, params, conversion.tensors_of(RULES, params))


def test_six_steps_of_two_groups(golden):
  """The scalar, the tensor that starts at zero and the one without a gradient are among them."""
  params = of(golden, "init")
  run = schedules.RunLength(samples=4, batch_size=1, total="2 epochs")
  recipe = dict(schedule="step", lr=0.01, step_every="1 epochs", step_factor=0.1)
  schedule = schedules.make_schedule(tiny.optim(warmup="0 steps", end=0.0, **recipe), run)
  tx = optimizer(schedule, params, lr_mult=((r"^low_lr", 0.1), (".*", 1.0)))
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(STEPS):
    lr = golden[f"lr/{step}"]
    np.testing.assert_allclose(schedule(step, np) * np.array([1, 0.1]), lr, rtol=1e-12)
    grads = of(golden, f"grad/{step}")
    close(optax.tree_utils.tree_norm(grads), golden[f"grad_norm/{step}"])
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for name, want in of(golden, f"param/{step}").items():
      close(params[name], want, err_msg=f"step {step}: {name}")
  adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
  for name in NAMES:
    close(adam.mu[name], golden[f"final_exp_avg/{name}"], err_msg=name)
    close(adam.nu[name], golden[f"final_exp_avg_sq/{name}"], atol=1e-9, err_msg=name)


def test_without_weight_decay_there_is_no_ratio(golden):
  params = of(golden, "init")
  tx = optimizer(optax.constant_schedule(1e-2), params, weight_decay=0.0)
  state = tx.init(params)
  for step in range(2):
    updates, state = tx.update(of(golden, f"grad/{step}"), state, params)
    params = optax.apply_updates(params, updates)
  for name, want in of(golden, "no_weight_decay/param/1").items():
    close(params[name], want, err_msg=name)


def test_optimizer_file_of_the_original():
  """Ids follow the state dict without its buffer. One rule a name: no table is needed."""
  state, _ = torch_files.state_dict(golden_files.path("team", "vitb16", "epoch0_params.pth"))
  path = golden_files.path("team", "vitb16", "epoch0_opt.pth")
  names = [name for name in state if not name.endswith("position_ids")]
  params = {name: jax.ShapeDtypeStruct(state[name].shape, jnp.float32) for name in names}
  tx = optax.scale_by_adam()
  rules = [Rule(name, name) for name in names]
  got, step = optimizer_state.optim_state(path, names, rules, jax.eval_shape(tx.init, params))
  entries = torch_files.read(path)["state"]
  assert step == got.count == 3 and len(entries) == len(names)
  for i, name in enumerate(names):
    np.testing.assert_array_equal(got.mu[name], entries[i]["exp_avg"].read())
    np.testing.assert_array_equal(got.nu[name], entries[i]["exp_avg_sq"].read())


@pytest.mark.parametrize("variant", ["vitb16", "clipl14"])
def test_learning_rates_of_thirty_epochs(variant):
  """One factor 0.1 every ten epochs; the second group, where there is one, at a tenth."""
  want = golden_files.arrays("team", variant, "outputs.npz")["schedule/lr_per_epoch_per_group"]
  run = schedules.RunLength(samples=5_000_003, batch_size=1920, total="30 epochs")
  recipe = dict(schedule="step", lr=1e-3, step_every="10 epochs", step_factor=0.1)
  schedule = schedules.make_schedule(tiny.optim(warmup="0 steps", end=0.0, **recipe), run)
  first = np.arange(30) * run.steps_per_epoch
  multiples = np.array([1.0, 0.1])[: want.shape[1]]
  for steps in (first, first + run.steps_per_epoch - 1):
    np.testing.assert_allclose(schedule(steps, np)[:, None] * multiples, want, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(schedule)(steps)[:, None] * multiples, want, rtol=1e-6)
