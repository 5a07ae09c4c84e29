"""Steps of tiny reproducible runs: what they leave behind, on a mesh, in a process of a group.

`python reproducible_worker.py ADDRESS COUNT INDEX DEVICES STEPS SYSTEM...` prints, in process 0, a
JSON line {system: digest}.
"""

import hashlib
import json
import os
import sys

import jax
import numpy as np

BATCH = 16


def digest(*trees) -> str:
  """SHA-256 of all arrays and their paths."""
  out = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(trees)):
    out.update(f"{path} {x.dtype} {x.shape}".encode())
    out.update(np.ascontiguousarray(x).tobytes())
  return out.hexdigest()


def config(name: str, **changes):
  """A tiny config of a system, for batches of noise; with dropout."""
  import test_accumulate

  make = test_accumulate.SYSTEMS[name]
  c = make("unused", batch_size=BATCH, reproducible=True, optim__grad_clip=1.0, **changes)
  c.mesh = (("data", -1),)
  return c


def run(config, steps: int, devices=None, plain: bool = False):
  """(state, metrics of each step) after so many steps of different batches, of all devices or some.

  plain: the step that is not reproducible.
  """
  import test_accumulate

  from xmodal_jax import build, optim, sharding
  from xmodal_jax import step as step_lib

  with config.unlocked():
    config.reproducible = not plain
  built = build.Built(config, devices)
  schedule = optim.make_schedule(config.optim, optim.Run(48, config.batch_size, config.total))
  tx = built.optimizer(schedule)
  shardings = built.state_shardings(tx)
  state = jax.jit(lambda: step_lib.init_state(built.model, tx), out_shardings=shardings)()
  step = built.train_step(tx, jax.random.key(0), shardings, schedule)
  noise, metrics = test_accumulate.batch(config, 64), []
  own = sharding.local_rows(built.rows, config.batch_size)
  for n in range(steps):
    chosen = np.random.default_rng(n).integers(0, 64, config.batch_size)
    batch = {k: v[chosen[own]] for k, v in noise.items()}
    state, m = step(state, sharding.put_batch(batch, built.rows))
    metrics.append(jax.device_get(m))
  return state, metrics


def main(address: str, count: str, index: str, devices: str, steps: str, *systems: str) -> None:
  jax.config.update("jax_num_cpu_devices", int(devices))
  if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(index))
  found = {name: digest(*run(config(name), int(steps))) for name in systems}
  if index == "0":
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"
  main(*sys.argv[1:])
