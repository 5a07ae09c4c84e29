"""Fine-tuning CLIP on Flickr30K with the recipe of configs/coco_ft.py.

  python tools/prepare_data.py karpathy --annotations dataset_flickr30k.json --images DIR --out DATA
  python -m xmodal_jax.main --config configs/f30k_ft.py:vit_b32 --workdir DIR \
    --config.data.dir=DATA --config.init=ViT-B-32.pt

Flickr30K has 29,000 / 1,014 / 1,000 images with 5 captions each. CLIP_ITM has no published row for
it.
"""

import pathlib

from xmodal_jax import config as base


def get_config(variant=None):
  coco = base.load_module(pathlib.Path(__file__).with_name("coco_ft.py"))
  c = coco.get_config(base.choose_variant(variant, coco.VARIANTS, coco.DEFAULT))
  c.data.tfds = ""
  c.data.train = "train"
  c.eval.folds = 0
  for recipe in c.recipes.values():
    if "optim/warmup" in recipe:
      recipe["optim/warmup"] = "200 steps"  # there are fewer steps than on COCO
  return c
