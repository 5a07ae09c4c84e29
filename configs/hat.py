"""HAT on Flickr30K and MS-COCO: Swin-B and BERT with token alignment at three depths.

  python -m xmodal_jax.main --config configs/hat.py:f30k --workdir DIR --config.data.dir=DATA/f30k \
    --config.init_image=swin_base_patch4_window7_224_22k.pth \
    --config.init_text=bert-base-uncased/pytorch_model.bin
  python -m xmodal_jax.main --config configs/hat.py:f30k --mode eval --workdir DIR \
    --config.data.dir=DATA/f30k --config.init=hat_f30k.ckpt

Flickr30K has to be prepared (`tools/prepare_data.py karpathy`); COCO comes from TFDS
`coco_captions`, or --config.data.dir. --config.model.direction is i2t (as released), t2i, or both
(their sum, the rows with a star in the paper). --config.model.first_levels="(0,)" retrieves in two
stages: the level with the fewest tokens selects the candidates.
The towers are frozen for eleven epochs, in which only the projections are trained; then everything
is trained at a tenth of the learning rate.
Recipes: `default` trains on COCO's train+restval and selects the checkpoint by RSUM on val;
`--config.recipe=original` is the published program: train alone, batches of 58, float32, and the
checkpoint with the best mean R@1 of both directions.

The release has no table of results.
"""

from xmodal_jax import config as base
from xmodal_jax.models import hat


def get_config(variant=None):
  variant = base.choose_variant(variant, ("f30k", "coco"))
  c = base.base()
  c.model.update(hat.preset("swin_b"))
  i = c.data.image
  i.size, i.interpolation, i.rgb_first = 256, "bilinear", True
  c.data.crop, c.data.crop_scale, c.data.flip = "random", (0.08, 1.0), 0.5
  c.text.tokenizer, c.text.length = "bert", 32
  if variant == "coco":
    c.data.tfds = "coco_captions"
    c.data.train = "train+restval"
    c.eval.folds = 5
  c.batch_size, c.total = 64, "40 epochs"
  c.eval.batch_size, c.eval.block = 64, (64, 512)
  o = c.optim
  o.lr, o.b2, o.eps, o.weight_decay = 1e-4, 0.999, 1e-8, 0.0
  o.schedule, o.step_every, o.step_factor, o.warmup = "step", "10 epochs", 0.1, "0 steps"
  o.freeze = (("^(image|text)/", "11 epochs"),)
  c.recipes.original = {
    "data/train": "train",
    "batch_size": 58,
    "total": "100 epochs",
    "dtype": "float32",
    "precision": "highest",
    "eval/metric": "mean_r1",
    "checkpoint/keep": 5,
  }
  return c
