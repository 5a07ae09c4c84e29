"""The quickstart: a small system from scratch on the embedded `shapes` data set, on a laptop CPU.

  python -m xmodal_jax.main --config configs/shapes.py:clip --workdir DIR

Scenes of two or three coloured shapes, five captions each; 500 test scenes, chance R@1 is 0.2.
Expected: image to text R@1 55, R@10 98; text to image R@1 52, R@10 99; two minutes on 2 CPU cores.
"""

import math

from xmodal_jax import config as base


def get_config(variant=None):
  c = base.base()
  c.data.dir = "shapes"
  c.data.captions = "one"
  c.batch_size = 250
  c.eval.block = (512, 2560)
  return {"clip": clip}[variant or "clip"](c)


def clip(c):
  c.model.update(
    dict(
      system="clip",
      embed=128,
      image=dict(kind="vit", size=48, patch=8, width=128, depth=3, heads=4),
      remat="",
      unroll=1,
      text=dict(vocab=512 + 6000 + 2, context=40, width=128, depth=2, heads=4),
    )
  )
  c.text.max_merges, c.text.length = 6000, 40
  c.total = "16 epochs"
  c.eval.every = "8 epochs"
  c.checkpoint.every = "8 epochs"
  o = c.optim
  o.lr, o.b2, o.warmup, o.weight_decay = 1.5e-3, 0.98, "3 epochs", 0.1
  o.grad_clip = 1.0
  o.bounds = (("^logit_scale$", 0.0, math.log(100)),)
  return c
