"""Fine-tuning a released ZeroVL on MS-COCO or Flickr30K.

  python -m xmodal_jax.main --config configs/zerovl_ft.py:coco --workdir DIR \
    --config.init=zerovl_100m.pth

Variants: coco, f30k (the 100M model), coco_14m, f30k_14m. COCO comes from TFDS `coco_captions` or a
prepared dataset (--config.data.dir); Flickr30K has to be prepared (`tools/prepare_data.py
karpathy`). The authors published results but no recipe: learning rate, number of epochs and batch
size are ours, everything else is as in pre-training.
Published RSUM: 14m COCO 485.0, F30K 561.6; 100m COCO 500.5, F30K 573.6.
"""

import pathlib

from xmodal_jax import config as base
from xmodal_jax.models import zerovl


def get_config(variant=None):
  variants = ("coco", "f30k", "coco_14m", "f30k_14m")
  source, _, model = base.choose_variant(variant, variants).partition("_")
  model = model or "100m"
  c = base.load(pathlib.Path(__file__).with_name("zerovl_pretrain.py"), "zerovl")
  c.model.update(zerovl.preset(model))
  c.init = f"zerovl_{model}.pth"  # in the current folder; another path with --config.init
  if source == "coco":
    c.data.tfds = "coco_captions"
    c.data.train = "train+restval"
  c.data.captions = "one"  # two captions of an image in a batch would be each other's negatives
  c.text.corrupt = 0.0
  c.batch_size, c.total = 512, "15 epochs"
  c.optim.lr, c.optim.warmup, c.eval.test = 2e-5, "1 epochs", True
  return c
