"""Fine-tuning a released TEAM on MS-COCO or Flickr30K.

  python -m xmodal_jax.main --config configs/team_ft.py:coco_clip_l14 --workdir DIR \
    --config.init=pretrained_14m_clip_large.pth

Variants: coco_clip_l14, coco_vit_b16, f30k_clip_l14, f30k_vit_b16. COCO comes from TFDS
`coco_captions` (2014, Karpathy splits) or a prepared dataset (--config.data.dir); Flickr30K has to
be prepared (`tools/prepare_data.py karpathy`).
The authors state only that they fine-tuned with the losses of pre-training and milder crops:
learning rate, number of epochs and batch size are ours. Recipes as in configs/team_pretrain.py.

Published, MS-COCO 5K test after the second stage, image to text and text to image R@1 / R@5 / R@10:

  coco_vit_b16   77.3 93.6 96.5   59.7 83.2 89.4
  coco_clip_l14  84.0 96.1 98.0   66.9 87.0 92.1
"""

import pathlib

from xmodal_jax import config as base

FILES = {"vit_b16": "pretrained_4m.pth", "clip_l14": "pretrained_14m_clip_large.pth"}


def get_config(variant=None):
  variants = [f"{source}_{tower}" for source in ("coco", "f30k") for tower in FILES]
  source, _, tower = base.choose_variant(variant, variants, "coco_clip_l14").partition("_")
  c = base.load(pathlib.Path(__file__).with_name("team_pretrain.py"), tower)
  c.init = FILES[tower]  # in the current folder; another path with --config.init
  c.data.crop_scale = (0.5, 1.0)
  if source == "coco":
    c.data.tfds, c.data.tfds_captions = "coco_captions", 0
    c.data.train = "train+restval"
  c.batch_size, c.total = 512, "10 epochs"
  c.optim.lr = 2e-4
  return c
