"""Combinations of systems and image towers that no paper has published."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from test_configs import get_config

from xmodal_jax import config as config_lib
from xmodal_jax.data import inputs
from xmodal_jax.distributed import sharding
from xmodal_jax.models import registry
from xmodal_jax.models.towers import registry as towers
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
MIXED = ["hat_clip_vit", "team_swin"]
VIT = dict(size=16, patch=8, width=24, depth=2, heads=2)
IMAGE = {kind: VIT for kind in ("clip", "timm", "deit")} | {
  "swin": dict(size=32, window=4, embed=8, depths=(1, 2), heads=(1, 2)),
  "resnet": dict(size=32, width=8, depths=(1, 1, 1, 1)),
}


def read(name, tiny_data):
  config = config_lib.resolve(get_config(name, "shapes"))
  config.data.dir = tiny_data
  return config


@pytest.mark.full
@pytest.mark.parametrize("kind", towers.KINDS)
@pytest.mark.parametrize("system", ["clip", "zerovl", "team", "hat"])
def test_every_image_tower_in_every_system(system, kind):
  """Combined by config alone; traced, not compiled."""
  make = {"clip": tiny.config, "zerovl": tiny.zerovl, "team": tiny.team, "hat": tiny.hat}[system]
  config = make("unused").model.to_dict() | {"image": dict(kind=kind, **IMAGE[kind])}
  if system == "hat":
    config["levels"] = ((1, 1), (0, 0))
  size, arrays = IMAGE[kind]["size"], jax.ShapeDtypeStruct
  batch = dict(
    image=arrays((4, size, size, 3), np.uint8),
    image_id=arrays((4,), np.int32),
    text_ids=arrays((4, 12), np.int32),
    text_mask=arrays((4, 12), np.bool_),
  )

  def run(batch):
    model = registry.system_module(system).build(config, rngs=nnx.Rngs(0))
    scores = model.score(model.encode_image(batch), model.encode_text(batch))
    return scores, model.probe_features(batch), model.loss(batch, jax.random.key(0))[0]

  scores, features, loss = jax.eval_shape(run, batch)
  assert scores.shape == (4, 4) and len(features.shape) == 2 and loss.shape == ()


@pytest.mark.full
@pytest.mark.parametrize("name", [MIXED[0], pytest.param(MIXED[1], marks=pytest.mark.slow)])
def test_a_few_steps_lower_the_loss(name, tiny_data):
  config = read(name, tiny_data)
  config.batch_size, config.optim.warmup = 16, "1 steps"
  built = setup.build(config, jax.devices()[:1])
  run = schedules.RunLength(1600, 16, "1 epochs")
  schedule = schedules.make_schedule(config.optim, run)
  tx = built.optimizer(config.optim, schedule, run.steps_per_epoch)
  shardings = built.state_shardings(tx)
  state = jax.jit(lambda: step_lib.init_state(built.init_model, tx), out_shardings=shardings)()
  step = step_lib.make_train_step(built.graphdef, tx, jax.random.key(0), shardings, schedule)
  stream = inputs.from_config(config).train(0)
  batch = sharding.put_batch(next(stream), sharding.batch_sharding(built.mesh))
  stream.close()
  losses = []
  for _ in range(25):  # on one batch
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all() and min(losses[-5:]) < 0.9 * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("hat_clip_vit", 150), ("team_swin", 110)])
def test_a_minute_on_shapes_learns(name, steps, tmp_path):
  """By the command line, with the optimisations that conftest.py turns off. Chance is R@10 of 2."""
  command = [sys.executable, "-m", "xmodal_jax.main", f"--workdir={tmp_path}"]
  command += [f"--config={ROOT / 'configs' / name}.py:shapes", f"--config.total={steps} steps"]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  subprocess.run([*command, "--config.eval.every=0 steps"], check=True, cwd=ROOT, env=env)
  result = json.loads((tmp_path / "results.json").read_text())["test"]
  assert min(result["i2t_r10"], result["t2i_r10"]) > 10
