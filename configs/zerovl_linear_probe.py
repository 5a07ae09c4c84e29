"""A linear probe of ZeroVL's image tower on ImageNet-1K.

  python -m xmodal_jax.main --config configs/zerovl_linear_probe.py --mode linear_probe \
    --workdir DIR --config.init=zerovl_100m.pth

Data: TFDS `imagenet2012`, or --config.data.dir: folders of labelled images that
`tools/prepare_data.py folders` has written as a dataset.
Recipes: `default` computes the features of every image once and trains on them with LARS at the
published values; `--config.probe.optim=lbfgs` is logistic regression to convergence, with the
penalty selected on held-out images. `--config.recipe=original` is the published program: random
crops, and so new features in each of the 90 epochs, which is 90 times the work.

Published top-1 of the 100M model with the original: 80.6.
"""

import pathlib

from xmodal_jax import config as base
from xmodal_jax.models import zerovl


def get_config(variant=None):
  variant = base.choose_variant(variant, ("14m", "100m"), "100m")
  c = base.base()
  c.model.update(zerovl.preset(variant))
  pretrain = base.load_module(pathlib.Path(__file__).with_name("zerovl_pretrain.py"))
  pretrain.preprocessing(c)
  c.data.tfds = "imagenet2012"
  c.data.train, c.data.val, c.data.test = "train", "validation", "validation"
  c.eval.batch_size = 1024
  c.recipes.original = {
    "probe/augment": True,
    "data/crop": "random",
    "data/crop_scale": (0.08, 1.0),
    "dtype": "float32",
    "precision": "highest",
  }
  return c
