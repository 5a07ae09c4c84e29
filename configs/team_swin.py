"""TEAM's token alignment on Swin-B and BERT: an example of combining parts of systems.

  python -m xmodal_jax.main --config configs/team_swin.py --workdir DIR --config.data.dir=DATA \
    --config.init_text=bert-base-uncased/pytorch_model.bin

Variant `shapes`: a small model trained from scratch on the embedded dataset.
"""

from xmodal_jax import config as base
from xmodal_jax.models import team
from xmodal_jax.models.towers import swin


def get_config(variant=None):
  small = base.choose_variant(variant, ("", "shapes")) == "shapes"
  c, model = base.base(), team.preset("vit_b16")
  model["image"] = dict(kind="swin", **swin.SIZES["base"])
  model["project_text"], model["matching"]["heads"] = True, 16
  if small:
    model["image"] |= dict(size=64, window=4, embed=16, depths=(1, 1, 2, 1), heads=(1, 1, 2, 4))
    model["text"] |= dict(context=40, width=64, depth=2, heads=2, mlp=256, dropout=0.0)
    model["matching"] |= dict(depth=1, heads=2, embed=64, dropout=0.0)
    model["embed"], c.data.dir = 64, "shapes"
  c.model.update(model)
  c.text.tokenizer, c.text.length = "bert", 37 if small else 30
  c.batch_size, c.total = (64, "4 epochs") if small else (512, "10 epochs")
  c.eval.batch_size, c.eval.every = 128, "4 epochs"
  c.optim.lr, c.optim.grad_clip = 1e-3 if small else 1e-4, 1.0
  c.optim.warmup = "18 %" if small else "1 %"
  return c
