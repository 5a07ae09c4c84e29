"""Continuing a PyTorch run: its optimizer file becomes an optax state."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer, restore
from xmodal_jax.errors import UserError
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion, optimizer_state
from xmodal_jax.interop.rules import Rule
from xmodal_jax.optim import factory, schedules
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.training import loop

torch = pytest.importorskip("torch")

RESNET = dict(kind="resnet", size=32, width=4, depths=(1, 2, 1, 1))
RECIPE = dict(lr=1e-2, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1)


def toy(image=None):
  config = tiny.config("")
  if image:
    with config.model.ignore_type():
      config.model.image = image
  return setup.build(config)


def shapes(state):
  return {k: x.shape for k, x in restore.flat(nnx.to_pure_dict(state)).items()}


def values(built, seed=0):
  """{torch name: array} of parameters and running statistics, in another order than the rules'."""
  rng = np.random.default_rng(seed)
  want = shapes(built.params) | shapes(built.stats)
  flat = {k: rng.normal(size=shape).astype(np.float32) for k, shape in want.items()}
  state = dict(conversion.arrays(conversion.to_torch(flat, clip_rules.RULES)))
  return {k: np.array(state[k]) for k in sorted(state, reverse=True)}


def to_jax(built, state):
  flat, _ = conversion.to_jax(state, clip_rules.RULES, restore.flat(nnx.to_pure_dict(built.params)))
  return restore.nested(flat)


class TorchRun:
  """AdamW on the distance to a target, over `groups` of parameters in turn."""

  def __init__(self, built, count=1):
    self.state, self.target = values(built), values(built, seed=1)
    self.names = conversion.parameter_names(clip_rules.RULES, shapes(built.params), self.state)
    self.params = {k: torch.nn.Parameter(torch.tensor(self.state[k])) for k in self.names}
    c = RECIPE
    options = dict(lr=c["lr"], betas=(c["b1"], c["b2"]), eps=c["eps"], foreach=False)
    groups = [[self.params[k] for k in self.names[i::count]] for i in range(count)]
    groups = [dict(params=group) for group in groups]
    self.adamw = torch.optim.AdamW(groups, weight_decay=c["weight_decay"], **options)

  def train(self, steps, idle=()):
    for _ in range(steps):
      for name, p in self.params.items():
        p.grad = None if name in idle else p.detach() - torch.tensor(self.target[name])
      self.adamw.step()

  def save(self, folder):
    new = {k: torch.tensor(v) for k, v in self.state.items()}
    new |= {k: p.detach() for k, p in self.params.items()}
    torch.save({"state_dict": {k: new[k] for k in self.state}}, folder / "model.pt")
    torch.save(self.adamw.state_dict(), folder / "optimizer.pt")


def chain(built, **changes):
  c = config_lib.base().optim.to_dict() | RECIPE | dict(decay=((".*", 1.0),)) | changes
  schedule = optax.constant_schedule(c["lr"])
  params = nnx.to_pure_dict(built.params)
  tensors = conversion.tensors_of(clip_rules.RULES, params)
  return factory.make_optimizer(c, schedule, params, tensors)


@pytest.mark.parametrize("image", [None, pytest.param(RESNET, marks=pytest.mark.full)])
def test_three_steps_in_torch_and_three_in_jax(image, tmp_path):
  built = toy(image)
  run = TorchRun(built)
  assert ("visual.layer1.0.bn1.running_mean" in run.state) == bool(image)
  run.train(3)
  run.save(tmp_path)
  source = str(tmp_path / "model.pt")
  params, _, _ = restore.load(source, "clip", built.params, built.stats)
  tx = chain(built)
  state, step = optimizer_state.for_init(
    source, str(tmp_path / "optimizer.pt"), "clip", nnx.to_pure_dict(built.params), tx
  )
  assert step == 3
  jax.tree.map(lambda a, b: None, state, tx.init(params))  # raises if the structures differ
  target = to_jax(built, {k: run.target[k] for k in run.names})
  update = jax.jit(tx.update)
  for _ in range(3):
    grads = jax.tree.map(jnp.subtract, params, target)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  run.train(3)
  want = to_jax(built, {k: p.detach().numpy() for k, p in run.params.items()})
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-6)
  jax.tree.map(compare, jax.device_get(params), want)
  counts = [s.count for s in state if "count" in getattr(s, "_fields", ())]
  assert counts == [6, 6]  # of Adam and of the schedule


def load(built, path, names, **kw):
  fresh = jax.eval_shape(chain(built).init, nnx.to_pure_dict(built.params))
  return optimizer_state.optim_state(path, names, clip_rules.RULES, fresh, **kw)


def moments(state):
  return next(s for s in state if isinstance(s, optax.ScaleByAdamState))


def test_two_groups_and_the_step_of_apex(tmp_path):
  """A function gives the order of the groups; ids may be any numbers; apex stores one step."""
  built = toy()
  run = TorchRun(built, count=2)
  run.train(2)
  saved = run.adamw.state_dict()
  number = lambda i: 7_000_000 - 3 * i
  groups = [
    g | dict(params=[number(i) for i in g["params"]], step=2) for g in saved["param_groups"]
  ]
  state = {number(i): {k: s[k] for k in s if k != "step"} for i, s in saved["state"].items()}
  torch.save({"optimizer": dict(state=state, param_groups=groups)}, tmp_path / "apex.pt")
  sizes = []

  def names(groups):
    sizes.append(groups)
    return run.names[::2] + run.names[1::2]

  state, step = load(built, tmp_path / "apex.pt", names)
  half = len(run.names) // 2
  assert step == 2 and sizes == [[len(run.names) - half, half]]
  for got, key in ((moments(state).mu, "exp_avg"), (moments(state).nu, "exp_avg_sq")):
    want = to_jax(built, {k: run.adamw.state[p][key].numpy() for k, p in run.params.items()})
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parameters_without_a_gradient(tmp_path):
  built = toy()
  run = TorchRun(built)
  idle = ("text_projection", "visual.transformer.resblocks.1.attn.in_proj_weight")
  run.train(2, idle)
  run.save(tmp_path)
  with pytest.raises(conversion.ConversionError, match=r"exp_avg by parameter names") as e:
    load(built, tmp_path / "optimizer.pt", run.names)
  assert sorted(line.split()[0] for line in e.value.missing) == sorted(idle)
  state, step = load(built, tmp_path / "optimizer.pt", run.names, allow_missing=True)
  mu = moments(state).mu
  assert step == 2 and not mu["text"]["proj"]["kernel"].any()
  for x in "qkv":
    first, second = mu["image"]["blocks"][x]["kernel"]
    assert first.any() and not second.any()


def test_what_does_not_fit_is_listed(tmp_path):
  built = toy()
  run = TorchRun(built)
  run.train(1)
  good, path = run.adamw.state_dict(), tmp_path / "optimizer.pt"

  def save(tree):
    torch.save(tree, path)

  def state(changes):
    return {i: s | changes.get(i, {}) for i, s in good["state"].items() if changes.get(i, 1)}

  # One parameter without moments, one of another shape, one in no group.
  save(good | {"state": state({0: None, 1: {"exp_avg": torch.zeros(7)}}) | {99: good["state"][2]}})
  with pytest.raises(conversion.ConversionError) as e:
    load(built, path, run.names)
  assert [x.split()[0] for x in e.value.missing] == [run.names[0]]
  assert [x.split()[0] for x in e.value.misshapen] == [run.names[1]]
  assert e.value.unknown[0].startswith("state 99, in no group")
  save(good)
  with pytest.raises(ValueError, match=rf"of {len(run.names)} parameters, .* a model of 1$"):
    load(built, path, run.names[:1], allow_missing=True)
  with pytest.raises(conversion.ConversionError, match="unknown"):
    load(built, path, ["other", *run.names[1:]], allow_missing=True)
  save(good | {"state": state({2: {"step": torch.tensor(5.0)}})})
  with pytest.raises(ValueError, match=r"steps \[1, 5\]; all parameters must be at"):
    load(built, path, run.names)
  save(good | {"state": state({2: {"max_exp_avg_sq": torch.zeros(1)}})})
  with pytest.raises(ValueError, match="amsgrad"):
    load(built, path, run.names)
  save(run.state)
  with pytest.raises(ValueError, match="no optimizer state"):
    load(built, path, run.names)


@pytest.mark.parametrize(
  "tree",
  [
    {"state": 3, "param_groups": []},
    {"state": {0: [1]}, "param_groups": []},
    {"state": {}, "param_groups": {"params": [0]}},
    {"state": {}, "param_groups": [{"lr": 1.0}]},
    {"state": {}, "param_groups": [{"params": [[0]]}]},
    {"state": {0: {"step": "many"}}, "param_groups": [{"params": [0]}]},
    {"state": {0: {"step": 1, "exp_avg": 2.0}}, "param_groups": [{"params": [0]}]},
  ],
)
def test_odd_files_are_named(tree, monkeypatch):
  monkeypatch.setattr(optimizer_state.torch_files, "read", lambda file: tree)
  fresh = optax.scale_by_adam().init({"w": np.zeros(2, np.float32)})
  with pytest.raises(UserError, match=r"^o\.pt"):
    optimizer_state.optim_state("o.pt", ["w"], [Rule("w", "w")], fresh)


def test_wrong_combinations_are_errors(tiny_data, tmp_path):
  config = tiny.config(tiny_data, init_optimizer=str(tmp_path / "optimizer.pt"))
  with pytest.raises(ValueError, match=r"set config\.init to the PyTorch file"):
    loop.train(config, tmp_path / "a")
  config.init = str(tmp_path)
  with pytest.raises(ValueError, match=r"is a directory\. To resume a run of this package"):
    loop.train(config, tmp_path / "b")
  config.init = str(tmp_path / "none.pt")
  with pytest.raises(ValueError, match=r"none\.pt does not exist"):
    loop.train(config, tmp_path / "c")
  from safetensors.numpy import save_file

  run = TorchRun(toy())
  run.train(1)
  run.save(tmp_path)
  save_file(run.state, tmp_path / "model.safetensors")
  config.init = str(tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="does not preserve the order"):
    loop.train(config, tmp_path / "d")


def losses(folder):
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


@pytest.mark.full
def test_training_continues_from_the_step_of_the_file(tiny_data, tmp_path):
  """Three steps, a conversion to PyTorch files and back, and three more steps equal six steps."""
  changes = dict(total="6 steps", eval__test=False, eval__every="0 steps")
  config = tiny.config(tiny_data, **changes)
  loop.train(config, tmp_path / "straight")
  built = setup.build(config)
  run = schedules.RunLength(tiny.SIZES["train"], config.batch_size, config.total)
  tx = built.optimizer(config.optim, schedules.make_schedule(config.optim, run))
  new = functools.partial(step_lib.init_state, built.init_model, tx)
  want = checkpointer.abstract_state(jax.eval_shape(new), built.state_shardings(tx))
  saved = checkpointer.Checkpoints(tmp_path / "straight", keep=2, metric="", read_only=True)
  state = jax.device_get(saved.restore(3, want))

  tensors = lambda tree: {
    k: torch.tensor(np.array(v))
    for k, v in conversion.arrays(conversion.to_torch(restore.flat(tree), clip_rules.RULES))
  }
  params, adam = tensors(state.params), moments(state.opt_state)
  mu, nu = tensors(adam.mu), tensors(adam.nu)
  torch.save(params, tmp_path / "model.pt")
  entries = {i: dict(step=3, exp_avg=mu[k], exp_avg_sq=nu[k]) for i, k in enumerate(params)}
  groups = [dict(lr=0.1, params=list(range(len(params))))]
  torch.save(dict(state=entries, param_groups=groups), tmp_path / "optimizer.pt")

  files = dict(init=str(tmp_path / "model.pt"), init_optimizer=str(tmp_path / "optimizer.pt"))
  loop.train(tiny.config(tiny_data, **changes, **files), tmp_path / "continued")
  ours, straight = losses(tmp_path / "continued"), losses(tmp_path / "straight")
  assert list(ours) == [4, 5, 6]
  np.testing.assert_allclose([ours[i] for i in (4, 5, 6)], [straight[i] for i in (4, 5, 6)])
  short = tiny.config(tiny_data, **(changes | {"total": "3 steps"}), **files)
  with pytest.raises(ValueError, match=r"is of step 3, and .* nothing is left to train"):
    loop.train(short, tmp_path / "short")
