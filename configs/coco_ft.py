"""Fine-tuning CLIP on MS-COCO captions (CLIP_ITM).

  python -m xmodal_jax.main --config configs/coco_ft.py:vit_b32 --workdir DIR \
    --config.init=ViT-B-32.pt

Data: TFDS `coco_captions` (2014, Karpathy splits), or a prepared dataset (`--config.data.dir`).
Recipes: `default` trains on train+restval with float32 master weights, selects the checkpoint by
RSUM on val and evaluates it once on test. `--config.recipe=original` is the published program:
staircase learning rate, weight decay on all parameters, train alone, checkpoint selected on test.
`original_fp16` also runs forward and backward in float16 and rounds the weights to float16 after
every step, as the published program does.

Published rows, MS-COCO 5K test, image to text and text to image R@1 / R@5 / R@10:

  vit_b32  original, batch 256, 5 epochs   62.22 85.62 91.66   46.94 74.88 83.56
  vit_b16  original, batch 128, 5 epochs   68.76 88.66 93.94   52.45 78.66 86.66   (one GPU, 2.6 h)

The other seven have no published fine-tuned row and use the recipe of vit_b16. `tiny` is a small
ViT trained from scratch on two CPU cores; set --config.data.dir to a prepared dataset, for example
Flickr8K.
"""

import math

from xmodal_jax import config as base
from xmodal_jax.models import clip

FILES = {
  "rn50": "RN50.pt",
  "rn101": "RN101.pt",
  "rn50x4": "RN50x4.pt",
  "rn50x16": "RN50x16.pt",
  "rn50x64": "RN50x64.pt",
  "vit_b32": "ViT-B-32.pt",
  "vit_b16": "ViT-B-16.pt",
  "vit_l14": "ViT-L-14.pt",
  "vit_l14_336": "ViT-L-14-336px.pt",
}
VARIANTS = (*FILES, "tiny")
DEFAULT = "vit_b32"


def get_config(variant=None):
  variant = base.choose_variant(variant, VARIANTS, DEFAULT)
  c = base.base()
  c.model.update(clip.preset(variant))
  if variant.startswith("vit_l14"):
    c.model.remat = "nothing_saveable"
  c.data.tfds = "coco_captions"
  c.data.train, c.data.val, c.data.test = "train+restval", "val", "test"
  c.batch_size = 256 if variant == "vit_b32" else 128
  c.total = "5 epochs"
  c.eval.folds = 5
  # The logit scale is clipped to at most 100 (Radford et al., 2021, section 2.5).
  c.optim.bounds = (("^logit_scale$", 0.0, math.log(100)),)
  if variant == "tiny":
    return tiny(c)
  c.init = FILES[variant]  # in the current folder; another path with --config.init
  original = {
    "seed": 99,
    "dtype": "float32",
    "precision": "highest",
    "data/train": "train",
    "eval/select": "test",
    "eval/metric": "mean_r1",
    "optim/schedule": "clip_itm",
    "optim/warmup": "500 steps",
    "optim/decay": ((".*", 1.0),),
    "optim/bounds": (),
  }
  half = {
    "dtype": "float16",
    "precision": "default",
    "optim/round_to": "float16",
    "optim/round_paths": clip.HALF_PATHS,
    "eval/score_dtype": "float16",
  }
  c.recipes.original = original
  c.recipes.original_fp16 = original | half
  return c


def tiny(c):
  c.text.max_merges = 6000
  c.model.text.vocab = 512 + 6000 + 2
  c.text.length = c.model.text.context = 32
  c.batch_size, c.total = 128, "80 epochs"
  c.data.captions, c.data.crop, c.data.flip = "one", "random", 0.5
  c.data.crop_scale = (0.4, 1.0)
  c.data.train = "train"
  c.optim.lr, c.optim.warmup, c.optim.weight_decay = 7e-4, "4 epochs", 0.3
  c.optim.grad_clip = 1.0
  c.eval.every, c.eval.folds = "10 epochs", 0
  return c
