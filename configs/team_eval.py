"""A released TEAM in both stages: cosine of all pairs, then 16 candidates each way.

  python -m xmodal_jax.main --config configs/team_eval.py:clip_l14 --mode eval --workdir DIR \
    --config.init=pretrained_14m_clip_large.pth

Data: the MS-COCO 5K test split with all captions from TFDS `coco_captions`, or --config.data.dir.
`chinese_l14` is the model of ModelScope's `multi-modal_team-vit-large-patch14`: its pytorch_model.bin
as init, its vocab.txt in the current folder or --config.text.vocab, and data of one's own (COCO-CN,
Flickr30K-CN, Flickr8K-CN as Karpathy json or pairs). Published after the second stage, R@1 / R@5 /
R@10, image to text and text to image (the Chinese model: R@1 alone):

  vit_b16      pre-trained  74.9 91.8 95.3   54.7 79.5 86.6     fine-tuned  77.3 93.6 96.5   59.7 83.2 89.4
  clip_l14     pre-trained  82.8 95.6 97.6   63.9 85.1 90.4     fine-tuned  84.0 96.1 98.0   66.9 87.0 92.1
  chinese_l14  COCO-CN 67.7 / 66.7   Flickr30K-CN 88.1 / 69.8   Flickr8K-CN 77.7 / 63.3

They were computed in float32: --config.recipe=original does so on accelerators too.
"""  # noqa: E501

from xmodal_jax import config as base
from xmodal_jax.models import team


def get_config(variant=None):
  variant = variant or "clip_l14"
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
