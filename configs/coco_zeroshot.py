"""Zero-shot retrieval with a released CLIP on COCO 5K and 1K (five folds), ECCV Caption and CxC.

  python -m xmodal_jax.main --config configs/coco_zeroshot.py:vit_b32 --mode eval --workdir DIR \
    --config.init=ViT-B-32.pt [--config.eval.eccv_dir=DIR]

Expected, raw captions without a prompt, image to text and text to image R@1 / R@5 / R@10:

  rn50         49.10 73.04 82.02   28.56 53.00 64.54
  rn101        49.56 74.48 82.38   30.65 55.47 66.06
  rn50x4       53.12 76.90 84.82   33.42 58.10 68.36
  rn50x16      55.24 78.68 86.60   35.45 60.05 70.12
  rn50x64      58.60 80.70 87.60   35.45 59.92 70.20
  vit_b32      50.16 75.02 83.58   30.42 56.04 66.88
  vit_b16      52.38 76.86 84.76   33.05 58.49 69.16
  vit_l14      56.36 79.50 86.66   36.54 60.97 71.16
  vit_l14_336  58.06 81.12 87.92   37.18 61.59 71.42

These were scored in float16, which ties many captions; float32, the default here, differs by about
0.1.
"""

from xmodal_jax import config as base
from xmodal_jax.models import clip


def get_config(variant=None):
  variant = base.choose_variant(variant, clip.PRESETS, "vit_b32")
  c = base.base()
  c.model.update(clip.preset(variant))
  c.data.tfds = "coco_captions"
  c.eval.folds = 5
  return c
