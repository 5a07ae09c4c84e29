"""Zero-shot retrieval with a released ZeroVL.

  python -m xmodal_jax.main --config configs/zerovl_eval.py:100m --mode eval --workdir DIR \
    --config.init=zerovl_100m.pth

Variants 14m and 100m: they normalise pixels differently, which cannot be read from the files.
Data: the MS-COCO 5K test split from TFDS `coco_captions`, or --config.data.dir, e.g. Flickr30K
prepared by `tools/prepare_data.py karpathy`, or ZeroVL's own csv.
Published RSUM: 14m COCO 425.0, F30K 536.2; 100m COCO 442.1, F30K 546.5.
These were computed in float32: --config.recipe=original does so on accelerators too.
"""

import pathlib

from xmodal_jax import config as base
from xmodal_jax.models import zerovl


def get_config(variant=None):
  variant = base.choose_variant(variant, ("14m", "100m"), "100m")
  c = base.base()
  c.model.update(zerovl.preset(variant))
  pretrain().preprocessing(c)
  c.data.tfds = "coco_captions"
  c.recipes.original = {"dtype": "float32", "precision": "highest"}
  return c


def pretrain():
  """The module configs/zerovl_pretrain.py, relative to this file."""
  return base.load_module(pathlib.Path(__file__).with_name("zerovl_pretrain.py"))
