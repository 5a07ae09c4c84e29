"""TGDT on Flickr30K and MS-COCO, with 36 bottom-up attention regions per image.

  python tools/prepare_data.py regions ...   (see --help; both need region features of every image)
  python -m xmodal_jax.main --config configs/tgdt.py:f30k_all --workdir DIR \
    --config.data.dir=DATA/f30k --config.init_text=bert-base-uncased/pytorch_model.bin
  python -m xmodal_jax.main --config configs/tgdt.py:f30k_all --mode eval --workdir DIR \
    --config.data.dir=DATA/f30k --config.recipe=original --config.init=model_best_rsum.pth.tar

Variants, each for f30k and coco: `all`, both losses and both stages of retrieval; `global` and
`local`, one loss and its score alone; `stage1`, the first stage of training (TERAN), and
`stage1_shared`, the same with one stack shared by images and texts. TERAN's other aggregations are
--config.model.mode=MwSr and symm.
Recipes: `default` trains all parameters at once, with local scores on the tokens of the lower
stacks and global scores on the upper stacks, which mask padding. `--config.recipe=original` is the
published program, where `all`, `global` and `local` train the upper stacks alone and start from a
workdir of `stage1`, which does not have them:

  --config.init=STAGE1 --config.init_missing=_upper/ --config.init_change=model.mask_upper_stack

Its upper stacks attend to padding, so embeddings depend on the batch, and the recipe also sets the
batch size of evaluation.

The authors' README has no table of results.
"""

from xmodal_jax import config as base
from xmodal_jax.models import tgdt

BATCH = {"f30k": 30, "coco": 40}
NETWORKS = {"stage1": "teran", "stage1_shared": "teran_shared"}
PARTS = ("all", "global", "local", *NETWORKS)


def get_config(variant=None):
  variants = [f"{source}_{part}" for source in BATCH for part in PARTS]
  source, _, part = base.choose_variant(variant, variants).partition("_")
  c = base.base()
  first = part.startswith("stage1")
  c.model.update(tgdt.preset(NETWORKS.get(part, "tgdt")))
  if first:
    c.model.scale = 1.0
  elif part != "all":
    c.model.loss = {"global": "matching", "local": "alignment"}[part]
    c.model.first_stage = part
    c.eval.top_k_text = c.eval.top_k_image = 0
  c.data.regions = 36
  if source == "coco":
    c.data.train = "train+restval"
    c.eval.folds = 5
  c.text.tokenizer, c.text.length = "bert", 64
  c.batch_size, c.total = 128, "30 epochs"
  c.eval.batch_size = 128
  o = c.optim
  o.lr, o.b2, o.eps, o.weight_decay, o.grad_clip = 2e-5, 0.999, 1e-8, 0.0, 2.0
  o.warmup = "3 %"
  c.recipes.original = original(source, first)
  return c


def original(source, first):
  changes = {
    "model/skip_last_word": True,
    "model/zero_slots": 36,
    "text/length": 88,
    "batch_size": BATCH[source],
    "eval/batch_size": BATCH[source],
    "eval/protocol": "original",
    "total": "30 epochs" if first else "60 epochs",
    "dtype": "float32",
    "precision": "highest",
    "optim/lr": 1e-5,
    "optim/schedule": "step",
    "optim/step_every": "20 epochs",
    "optim/step_factor": 0.1,
    "optim/warmup": "1000 steps" if source == "f30k" else "0 steps",
    "optim/warmup_from": "second",
  }
  if not first:
    changes |= {"model/stage": "upper", "model/mask_upper_stack": False}
  return changes
