"""Pre-training TEAM on CC3M, Visual Genome, COCO and SBU (4M images, 5M pairs).

  python tools/prepare_data.py albef --out DATA \
    --train cc3m/cc_albef_qy.json cc3m --train VG/vg_pretrain.json . \
    --train coco2014/annotations/albef_coco_pretrain.json coco2014 \
    --train SBU/sbucaptions/sbu_albef.json SBU/sbucaptions \
    --val albef_coco_val.json coco2014 --test albef_coco_test.json coco2014
  python -m xmodal_jax.main --config configs/team_pretrain.py:clip_l14 --workdir DIR \
    --config.data.dir=DATA --config.init_image=ViT-L-14.pt --config.init_text=bert/model.safetensors

The towers are initialised from public files: DeiT `deit_base_patch16_224` (vit_b16) or OpenAI's
ViT-L/14 (clip_l14), and Hugging Face's bert-base-uncased.
Recipes: `default` is optax's LAMB with weight decay on matrices only, warm-up and cosine schedule,
pairs of the same image excluded from the contrastive loss, RandAugment with its bugs fixed, and
bfloat16 on accelerators. `--config.recipe=original` is the published program: LAMB with trust
ratios per tensor of the PyTorch model, weight decay on all parameters, a staircase without warm-up,
pairs of the same image at logit 0, and RandAugment with its bugs.

Published, MS-COCO 5K test after the second stage, image to text and text to image R@1 / R@5 / R@10:

  vit_b16   4M    74.9 91.8 95.3   54.7 79.5 86.6   8 GPUs, batch 1920, 30 epochs
  clip_l14  14M   82.8 95.6 97.6   63.9 85.1 90.4   (on more data than the 4M above)
"""

import math

from xmodal_jax import config as base
from xmodal_jax.models import team


def get_config(variant=None):
  variant = base.choose_variant(variant, ("vit_b16", "clip_l14"))
  c = base.base()
  c.model.update(team.preset(variant))
  data(c)
  c.data.captions, c.data.crop, c.data.crop_scale = "one", "random", (0.2, 1.0)
  c.data.jitter, c.data.grayscale, c.data.blur = (0.4, 0.4, 0.4, 0.1), 0.2, 0.5
  c.data.flip, c.data.rand_augment = 0.5, (2, 7)
  c.batch_size, c.total = 1920, "30 epochs"
  o = c.optim
  o.name, o.lr, o.b1, o.b2, o.eps = "lamb", 1e-3, 0.9, 0.999, 1e-6
  o.weight_decay, o.grad_clip = 0.01, 1.0
  o.warmup = "1 epochs"
  if variant == "clip_l14":  # CLIP's image tower is well pre-trained: a tenth of the rate
    o.lr_mult = (("^image/", 0.1), (".*", 1.0))
  o.bounds = (("^logit_scale", 0.0, math.log(team.MAX_SCALE)),)
  c.recipes.original = original()
  return c


def data(c):
  """Preprocessing of captions and images, the same for all TEAM models."""
  c.text.tokenizer, c.text.length = "bert", 30
  c.text.clean, c.text.max_words = "albef", 30
  c.data.image.resize, c.data.image.rgb_first = "exact", True


def original():
  return {
    "init_half": True,
    "model/same_image": "zero",
    "data/rand_augment_mode": "original",
    "optim/trust": "original",
    "optim/decay": ((".*", 1.0),),
    "optim/bounds": (),
    "optim/schedule": "step",
    "optim/warmup": "0 steps",
  }
