"""Configs of runs that take seconds: a few dozen scenes, models of a few thousand parameters."""

import contextlib
import pathlib
from collections.abc import Iterator

from xmodal_jax import config as config_lib
from xmodal_jax.data.preparing import shapes
from xmodal_jax.models import registry

BERT = dict(vocab=30522, context=24, width=24, depth=2, heads=2, mlp=48)
BERT |= dict(dropout=0.1, attention_dropout=0.1)
SIZES = {"train": 48, "val": 12, "test": 12}


def data(folder: pathlib.Path) -> str:
  """Writes the dataset once per test session and returns its folder."""
  path = folder / shapes.NAME / shapes.VERSION
  return str(path if path.exists() else shapes.write(folder, sizes=SIZES))


def optim(**changes) -> dict:
  """The default `optim` section with changes."""
  return config_lib.base().optim.to_dict() | changes


def _change(c, changes):
  """changes: config keys with "__" in place of ".", e.g. optim__lr=1e-3."""
  for key, value in changes.items():
    *parents, last = key.split("__")
    node = c
    for name in parents:
      node = node[name]
    node[last] = value
  return c


def config(data_dir: str, **changes):
  c = config_lib.base()
  c.data.dir, c.data.captions = data_dir, "one"
  image = dict(kind="vit", size=16, patch=8, width=32, depth=2, heads=2)
  text = dict(vocab=714, context=24, width=32, depth=2, heads=2)
  c.model.update(dict(system="clip", embed=16, image=image, text=text))
  c.text.max_merges, c.text.length = 200, 24
  c.min_shard = 64
  c.batch_size, c.total, c.log_every = 16, "10 steps", 1
  c.optim.lr, c.optim.warmup = 1e-2, "2 steps"
  c.eval.batch_size, c.eval.block, c.eval.every = 16, (16, 64), "5 steps"
  c.checkpoint.every = "3 steps"
  return _change(c, changes)


def team(data_dir: str, **changes):
  """The same run with a TEAM: BERT, a DeiT and two token matching blocks."""
  c = config(data_dir)
  c.model = dict(
    system="team",
    embed=16,
    image=dict(kind="deit", size=16, patch=8, width=32, depth=2, heads=2),
    text=BERT,
    project_text=True,
    matching=dict(depth=2, heads=2, embed=16, dropout=0.1),
    same_image="exclude",
    negatives=1,
    layerwise=True,
  )
  c.text.tokenizer, c.text.max_merges = "bert", 0
  c.eval.top_k_text, c.eval.top_k_image = 4, 3
  c.eval.rerank_block = (2, 2)
  return _change(c, changes)


def zerovl(data_dir: str, **changes):
  """The same run with a ZeroVL: timm's ViT, BERT, a learned temperature and mixup."""
  c = config(data_dir)
  c.model = dict(
    system="zerovl",
    embed=16,
    image=dict(size=16, patch=8, width=32, depth=2, heads=2),
    text=BERT,
    temperature=0.05,
    learn_temperature=True,
    loss=dict(name="nce"),
    mixup=dict(beta=0.5, block=0),
  )
  c.text.tokenizer, c.text.max_merges = "bert", 0
  return _change(c, changes)


def tgdt(data_dir: str, **changes):
  """The same run with a TGDT: regions and BERT, both losses at once."""
  c = config(data_dir)
  stack = dict(depth=1, heads=2, mlp=32, dropout=0.1)
  c.model = dict(
    system="tgdt",
    embed=16,
    image=dict(features=shapes.REGION_DIM) | stack | dict(heads=5),
    text=BERT,
    lower=stack,
    upper=stack,
  )
  c.data.regions = shapes.MAX_REGIONS
  c.text.tokenizer, c.text.max_merges = "bert", 0
  c.eval.top_k_text, c.eval.top_k_image = 4, 3
  c.eval.rerank_block = (2, 2)
  return _change(c, changes)


def hat(data_dir: str, **changes):
  """The same run with a HAT: a Swin and BERT, compared at three depths."""
  c = config(data_dir)
  swin = dict(size=32, window=4, embed=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2))
  c.model = dict(
    system="hat",
    embed=16,
    image=dict(kind="swin", **swin, drop_path=0.1),
    text=BERT,
    levels=((3, 1), (1, 0), (2, 1)),
  )
  c.text.tokenizer, c.text.max_merges = "bert", 0
  return _change(c, changes)


def toy(data_dir: str, **changes):
  """The same run with the system of tests/toy, which compiles in a second; see `toy_registered`."""
  c = config(data_dir)
  c.model = dict(system="toy", embed=8, image=dict(size=16), text=dict(vocab=714))
  return _change(c, changes)


@contextlib.contextmanager
def toy_registered() -> Iterator[None]:
  registry.register("toy", model="toy.model", interop="toy.rules")
  try:
    yield
  finally:
    del registry.SYSTEMS["toy"]
