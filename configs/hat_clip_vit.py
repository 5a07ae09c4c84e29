"""HAT's token alignment on CLIP's ViT-B/16 and BERT: an example of combining parts of systems.

  python -m xmodal_jax.main --config configs/hat_clip_vit.py --workdir DIR --config.data.dir=DATA \
    --config.init_image=ViT-B-16.pt --config.init_text=bert-base-uncased/pytorch_model.bin

Variant `shapes`: a small model trained from scratch on the embedded dataset.
"""

from xmodal_jax import config as base
from xmodal_jax.models import hat


def get_config(variant=None):
  small = base.choose_variant(variant, ("", "shapes")) == "shapes"
  c, model = base.base(), hat.preset("swin_b")
  model["image"] = dict(kind="clip", size=224, patch=16, width=768, depth=12, heads=12)
  model["image"]["act"] = "quick_gelu"  # a LAION or DataComp file: "gelu"
  model["levels"] = ((11, 11), (3, 3), (9, 9))  # (image block, text block)
  if small:
    model["image"] |= dict(size=48, patch=12, width=64, depth=3, heads=2)
    model["text"] |= dict(context=40, width=64, depth=3, heads=2, mlp=256, dropout=0.0)
    model |= dict(embed=64, levels=((2, 2), (0, 0), (1, 1)), reduce="sum")
    model["direction"] = "t2i"  # learns faster from scratch, see shapes.py
    c.data.dir = "shapes"
  c.model.update(model)
  c.text.tokenizer, c.text.length = "bert", 37 if small else 32
  c.batch_size, c.total = (40, "1 epochs") if small else (64, "20 epochs")
  c.eval.batch_size, c.eval.block, c.eval.every = 64, (64, 512), "1 epochs" if small else "4 epochs"
  c.optim.lr, c.optim.grad_clip = 1e-3 if small else 1e-4, 2.0
  c.optim.warmup = "20 %" if small else "1 %"
  c.optim.lr_mult = ((r"^image/", 1.0 if small else 0.1), (".*", 1.0))
  return c
