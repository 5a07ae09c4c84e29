"""Compiles a config's training step without its data, and says what memory and time that takes.

  python tools/compile_check.py --config configs/zerovl_pretrain.py:dga --devices 8 \
    --sizes 1024x1,4096x4,16384x16

sizes: batch size x accumulate, one line each; the config's own by default. devices: host devices
that stand for accelerators. Nothing of the model's size is allocated.
"""

import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from xmodal_jax import build, optim, sharding
from xmodal_jax import config as config_lib
from xmodal_jax import step as step_lib

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_DEVICES = flags.DEFINE_integer("devices", 8, "Host devices.")
_SIZES = flags.DEFINE_list("sizes", [], "Batch size x accumulate, e.g. 1024x1,4096x4.")


def batch(config, size: int, rows) -> dict[str, jax.ShapeDtypeStruct]:
  """A training batch of the config in shapes alone."""
  length = config.text.length
  fields = {
    "text_ids": ((length,), jnp.int32),
    "text_mask": ((length,), bool),
    "image_id": ((), jnp.int32),
    "caption_id": ((), jnp.int32),
  }
  if n := config.data.regions:
    fields["regions"] = ((n, config.model.image.features), jnp.float32)
    fields |= {"boxes": ((n, 4), jnp.float32), "region_mask": ((n,), bool)}
  else:
    side = config.model.image.size
    fields["image"] = ((side, side, 3), jnp.uint8)
  make = lambda shape, dtype: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)
  return {name: make(*field) for name, field in fields.items()}


def check(config) -> dict[str, float]:
  """Seconds to trace and to compile, bytes per device of state and of temporaries."""
  built = build.Built(config)
  run = optim.Run(1000 * config.batch_size, config.batch_size, config.total)
  schedule = optim.make_schedule(config.optim, run)
  tx = built.optimizer(schedule, run.steps_per_epoch)
  shardings = built.state_shardings(tx)
  rows = sharding.batch_sharding(built.mesh)
  key = jax.device_put(jax.random.key(0), built.replicated)
  step = step_lib.make_train_step(built.graphdef, tx, key, shardings, schedule)
  state = jax.eval_shape(lambda: step_lib.init_state(built.model, tx))
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  state = jax.tree.map(place, state, shardings)
  start = time.perf_counter()
  lowered = step.lower(state, batch(config, config.batch_size, rows))
  traced = time.perf_counter()
  memory = lowered.compile().memory_analysis()
  done = time.perf_counter()
  return dict(
    trace_s=traced - start,
    compile_s=done - traced,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are --config.key=value")
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  config = config_lib.resolve(_CONFIG.value, overrides)
  sizes = [tuple(map(int, size.split("x"))) for size in _SIZES.value]
  for size, accumulate in sizes or [(config.batch_size, config.accumulate)]:
    config.batch_size, config.accumulate = size, accumulate
    found = check(config)
    print(
      f"batch {size} in {accumulate} parts on {_DEVICES.value} devices: "
      f"trace {found['trace_s']:.1f} s, compile {found['compile_s']:.1f} s, per device "
      f"{found['arguments'] / 2**20:.0f} MiB of state and batch, "
      f"{found['temporaries'] / 2**20:.0f} MiB of temporaries",
      flush=True,
    )


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
