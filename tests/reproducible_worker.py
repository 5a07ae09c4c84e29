"""Runs reproducible train steps of tiny systems, also as one of several processes.

`python reproducible_worker.py ADDRESS COUNT INDEX DEVICES STEPS NAME...`: process INDEX of COUNT,
with DEVICES devices each. Process 0 prints a JSON line {name: digest of the state and metrics}.
NAME is a system or "toy".
"""

import hashlib
import json
import os
import sys

if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import test_accumulate
from flax import nnx

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import contrastive
from xmodal_jax.models import base, layers
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import deterministic, setup
from xmodal_jax.runtime import step as step_lib

BATCH = 16


def digest(*trees) -> str:
  """SHA-256 of the paths and bytes of all arrays."""
  out = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(trees)):
    out.update(f"{path} {x.dtype} {x.shape}".encode())
    out.update(np.ascontiguousarray(x).tobytes())
  return out.hexdigest()


def config(name: str, **changes):
  """A tiny config of a system with dropout, for batches of random numbers."""
  make = test_accumulate.SYSTEMS[name]
  c = make("unused", batch_size=BATCH, reproducible=True, optim__grad_clip=1.0, **changes)
  c.mesh = (("data", -1),)
  return c


def run(config, steps: int, devices=None, plain: bool = False):
  """Trains on random batches -> (state, metrics of each step). plain: with the plain step."""
  with config.unlocked():
    config.reproducible = not plain
  built = setup.build(config, devices)
  schedule = schedules.make_schedule(
    config.optim, schedules.RunLength(48, config.batch_size, config.total)
  )
  tx = built.optimizer(config.optim, schedule)
  shardings = built.state_shardings(tx)
  state = jax.jit(lambda: step_lib.init_state(built.init_model, tx), out_shardings=shardings)()
  step = built.train_step(tx, jax.random.key(0), shardings, schedule)
  return _train(state, step, built.batch_sharding, test_accumulate.batch(config, 64), steps)


def _train(state, step, batch_sharding, data, steps: int):
  """Steps on batches drawn from the 64 rows of `data`."""
  own, metrics = sharding.local_rows(batch_sharding, BATCH), []
  for n in range(steps):
    chosen = np.random.default_rng(n).integers(0, 64, BATCH)
    host_batch = {k: v[chosen[own]] for k, v in data.items()}
    state, m = step(state, sharding.put_batch(host_batch, batch_sharding))
    metrics.append(jax.device_get(m))
  return state, metrics


class Toy(base.System):
  """A system that compiles in seconds and has everything that makes reproducibility hard.

  Weights shared by both sides, dropout, norms that are divided by twice, a boolean feature, and a
  loss over all pairs.
  """

  def __init__(self, rngs: nnx.Rngs):
    self.wi = layers.linear(24, 40, (None, "mlp"), rngs=rngs)
    self.wo = layers.linear(40, 16, ("mlp", None), rngs=rngs)

  def _encode(self, x, key):
    x = layers.dropout(jax.nn.gelu(self.wi(x)), 0.1, key)
    return {"embed": base.l2_normalize(self.wo(x), eps=1e-12), "mask": x[:, 0] > 0}

  def encode_image(self, batch, key=None):
    return self._encode(batch["image"], key)

  def encode_text(self, batch, key=None):
    return self._encode(batch["text"], key)

  def objective(self, images, texts, batch, key):
    loss, metrics = contrastive.infonce(
      images["embed"], texts["embed"], jnp.float32(10), batch["image_id"], "exclude"
    )
    return loss * (1 + images["mask"].mean()), metrics


def toy(steps: int, devices=None):
  """As `run`, with a Toy."""
  init_model = lambda: Toy(nnx.Rngs(0))
  graphdef = step_lib.split(nnx.eval_shape(init_model))[0]
  schedule = optax.cosine_decay_schedule(1e-2, 20)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
  mesh = sharding.make_mesh((("data", -1),), devices)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  init = lambda: step_lib.init_state(init_model, tx)
  shardings = jax.tree.map(lambda _: replicated, jax.eval_shape(init))
  state = jax.jit(init, out_shardings=shardings)()
  batch_sharding, key = sharding.batch_sharding(mesh), jax.random.key(0)
  step = deterministic.make_train_step(graphdef, tx, key, shardings, schedule, batch_sharding, 8)
  rng = np.random.default_rng(0)
  data = {k: rng.standard_normal((64, 24), np.float32) for k in ("image", "text")}
  data["image_id"] = np.arange(64, dtype=np.int32) // 2
  return _train(state, step, batch_sharding, data, steps)


def main(address: str, count: str, index: str, devices: str, steps: str, *names: str) -> None:
  jax.config.update("jax_num_cpu_devices", int(devices))
  if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(index))
  train = lambda name: toy(int(steps)) if name == "toy" else run(config(name), int(steps))
  digests = {name: digest(*train(name)) for name in names}
  if index == "0":
    print(json.dumps(digests), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
