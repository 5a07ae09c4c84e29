"""python -m xmodal_jax.main --config configs/coco_ft.py[:variant] --workdir DIR [--mode MODE]"""

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags, logging
from ml_collections import config_flags

from xmodal_jax import config as config_lib
from xmodal_jax.distributed import processes
from xmodal_jax.runtime import cli, logs

_CONFIG = config_lib.define_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, logs and results; local or gs://.")
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "linear_probe", "zeroshot_classify"],
  "train: train, evaluate and test; rerunning the command resumes the run. eval: test the "
  "workdir's best checkpoint, or config.init if that is given here or there is no checkpoint. "
  "linear_probe: train and test a linear classifier on the image tower of config.init. "
  "zeroshot_classify: classify images by prompts with their class names, by the model that eval "
  "would test.",
)
_CHANGE = flags.DEFINE_list(
  "change",
  [],
  "Keys of the config, or sections of them, with which a run that has saved steps goes on although "
  "they differ, e.g. optim.lr,total. config.json records each with its step.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "This is one of several processes started by a TPU slice, SLURM or Open MPI. Detected in a SLURM "
  "step. For processes started by hand set the next three flags instead.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes.", lower_bound=1)
_INDEX = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  del argv
  import tensorflow as tf

  # TensorFlow only reads data: keep it from reserving accelerator memory.
  tf.config.set_visible_devices([], "GPU")
  tf.config.set_visible_devices([], "TPU")
  processes.initialize(_COORDINATOR.value, _COUNT.value, _INDEX.value, cluster=_DISTRIBUTED.value)
  with processes.exit_together(cli.message):
    run()


def run() -> None:
  """Runs the mode, once the processes are connected."""
  logs.setup()
  processes.check_initialized()
  if jax.default_backend() == "cpu" and jax.device_count() > 1:
    # CPU programs read from the cache have lost the order of their collectives and hang (jaxlib
    # 0.10.2).
    jax.config.update("jax_enable_compilation_cache", False)
  from xmodal_jax.evaluation import retrieval, zero_shot
  from xmodal_jax.evaluation.probe import linear_probe
  from xmodal_jax.runtime import workdir
  from xmodal_jax.training import loop

  overrides = config_flags.get_override_values(flags.FLAGS["config"])
  config = config_lib.resolve(_CONFIG.value, overrides)
  if _CHANGE.value and _MODE.value != "train":
    raise cli.UsageError("--change is for --mode=train, which goes on with a run")
  workdir.check_processes(config_lib.flatten(config), _WORKDIR.value, _MODE.value)
  logging.info("devices: %s", jax.devices())
  modes = {
    "train": functools.partial(loop.train, change=_CHANGE.value),
    "eval": functools.partial(retrieval.evaluate, init_given="init" in overrides),
    "linear_probe": linear_probe.linear_probe,
    "zeroshot_classify": functools.partial(zero_shot.classify, init_given="init" in overrides),
  }
  modes[_MODE.value](config, _WORKDIR.value)


if __name__ == "__main__":
  cli.run_with_flags(main)
