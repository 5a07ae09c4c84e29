"""Evaluates a released TEAM: cosine of all pairs, then 16 candidates re-ranked in each direction.

  python -m xmodal_jax.main --config configs/team_eval.py:clip_l14 --mode eval --workdir DIR \
    --config.init=pretrained_14m_clip_large.pth

Data: the MS-COCO 5K test split with all captions from TFDS `coco_captions`, or --config.data.dir.
`chinese_l14` is ModelScope's `multi-modal_team-vit-large-patch14`: set --config.init to its
pytorch_model.bin, have its vocab.txt in the current folder or set --config.text.vocab, and prepare
COCO-CN, Flickr30K-CN or Flickr8K-CN (`tools/prepare_data.py karpathy` or `pairs`).
Published after the second stage, image to text and text to image R@1 / R@5 / R@10 (the Chinese
model: R@1 alone):

  vit_b16      pre-trained  74.9 91.8 95.3   54.7 79.5 86.6     fine-tuned  77.3 93.6 96.5   59.7 83.2 89.4
  clip_l14     pre-trained  82.8 95.6 97.6   63.9 85.1 90.4     fine-tuned  84.0 96.1 98.0   66.9 87.0 92.1
  chinese_l14  COCO-CN 67.7 / 66.7   Flickr30K-CN 88.1 / 69.8   Flickr8K-CN 77.7 / 63.3

These were computed in float32: --config.recipe=original does so on accelerators too.
"""  # noqa: E501

from xmodal_jax import config as base
from xmodal_jax.models import team


def get_config(variant=None):
  variant = base.choose_variant(variant, team.PRESETS, "clip_l14")
  c = base.base()
  c.model.update(team.preset(variant))
  c.text.tokenizer, c.text.length = "bert", 30
  c.data.image.resize, c.data.image.rgb_first = "exact", True
  if variant == "chinese_l14":
    c.text.vocab, c.text.lowercase = "vocab.txt", False
    c.data.image.exif = True
  else:
    c.text.clean, c.text.max_words = "albef", 30
    c.data.tfds, c.data.tfds_captions = "coco_captions", 0
  c.eval.batch_size = 64
  c.recipes.original = {"dtype": "float32", "precision": "highest"}
  return c
