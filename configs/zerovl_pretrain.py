"""Pre-training ZeroVL on several datasets of web pairs (SBU and CC3M in the published configs).

  python tools/prepare_data.py csv --root sbu --name sbu --out DATA   (or img2dataset, pairs)
  python tools/prepare_data.py csv --root cc3m --name cc3m --out DATA
  python tools/prepare_data.py karpathy --annotations dataset_flickr30k.json ... --out DATA
  python -m xmodal_jax.main --config configs/zerovl_pretrain.py:dga --workdir DIR \
    --config.data.dir=DATA/sbu,DATA/cc3m --config.data.eval_dir=DATA/f30k \
    --config.init_image=vit_base_patch16_224_in21k.safetensors \
    --config.init_text=bert-base-uncased/model.safetensors

zerovl: batches of 1,024 from one shuffle over all datasets. dga: batches of 16,384, each from one
dataset (debiased sampling), mixup of either the images or the texts, and gradient accumulation in
16 parts (exact in both recipes).
Recipes: `default` starts its warm-up above 0 and decays matrices only. `--config.recipe=original`
is the published program: weight decay on all parameters, a learning rate of 0 in the first step,
and mixup partners within the 128 samples that one of 8 GPUs encodes at a time.

Published RSUM (image to text and text to image R@1 + R@5 + R@10), ViT-B/16 and BERT-base, 8 V100:

  pairs   COCO zero-shot  COCO fine-tuned  F30K zero-shot  F30K fine-tuned
  14.2M   425.0           485.0            536.2           561.6
  100M    442.1           500.5            546.5           573.6
"""

from xmodal_jax import config as base
from xmodal_jax.models import zerovl


def get_config(variant=None):
  variant = base.choose_variant(variant, ("zerovl", "dga"))
  c = base.base()
  c.model.update(zerovl.preset("pretrain"))
  preprocessing(c)
  c.data.crop, c.data.crop_scale = "random", (0.6, 1.0)
  c.data.auto_augment = "imagenet"
  c.text.corrupt = 0.2
  c.batch_size, c.total = 1024, "20 epochs"
  c.eval.every, c.eval.test = "1 epochs", False
  c.checkpoint.every = "2000 steps"
  o = c.optim
  o.lr, o.b1, o.b2, o.eps, o.weight_decay = 1e-4, 0.9, 0.98, 1e-6, 0.001
  o.warmup, o.end = "2.5 %", 0.1
  c.recipes.original = {
    "optim/decay": ((".*", 1.0),),
    "optim/warmup_from": "zero",
    "model/mixup/block": 128,
  }
  if variant == "dga":
    c.data.mix = "debias"
    c.batch_size, c.accumulate = 16384, 16
    c.model.mixup.beta = 0.1
  return c


def preprocessing(c):
  """Preprocessing of captions and images, the same for all ZeroVL models."""
  c.text.tokenizer, c.text.length = "bert", 25
  i = c.data.image
  i.size, i.resize, i.interpolation, i.rgb_first = 256, "exact", "bilinear", True
