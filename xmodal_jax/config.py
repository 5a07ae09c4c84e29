"""The default config: every key that exists, with its meaning. configs/*.py change values only."""

from collections.abc import Mapping
from typing import Any

import ml_collections

ConfigDict = ml_collections.ConfigDict

# What may differ when a workdir is resumed: where and how it runs, not what it computes.
FREE = (
  "mesh", "rules", "min_shard", "log_every", "profile", "checkpoint", "data.dir", "data.threads",
  "eval.batch_size", "eval.block", "eval.cache", "eval.eccv_dir", "eval.folds",
)  # fmt: skip


def base() -> ConfigDict:
  """Durations are strings, "500 steps" or "5 epochs". Lists of rules are (regex, value) pairs over
  parameter paths; the first that matches counts."""
  c = ConfigDict()
  c.seed = 0  # initialisation, data order, augmentation and dropout
  c.recipe = "default"  # a key of `recipes`: a named set of changes to this config
  c.recipes = ConfigDict({"default": ConfigDict()})  # name -> {dotted key with "/": value}
  c.init = ""  # converted directory, workdir, checkpoint or foreign file; "" for random weights
  c.model = ConfigDict()  # a preset of the system, filled in by the config file
  c.dtype = "auto"  # compute dtype: bfloat16 on accelerators, float32 on CPU; or a dtype's name
  c.precision = "default"  # of float32 matmuls: default, high, highest
  c.mesh = (("data", -1), ("fsdp", 1), ("model", 1))
  c.rules = ConfigDict(dict(vocab="model", heads="model", mlp="model", embed="fsdp"))
  c.min_shard = 2**16  # parameters with fewer elements stay replicated

  c.batch_size = 256  # global
  c.total = "5 epochs"
  c.log_every = 20
  c.profile = ConfigDict(dict(first_step=0, steps=5))  # 0: no profile

  d = c.data = ConfigDict()
  d.dir = ""  # a data set written by tools/prepare_data.py; "shapes" for the embedded one
  d.tfds = ""  # where data.dir is empty: a data set by its TFDS name, in TFDS's own folder
  d.tfds_captions = 5  # captions of a picture that count there; 0 for all
  d.train, d.val, d.test = "train", "val", "test"
  d.captions = "all"  # "all": an epoch visits every caption; "one": every picture, one caption
  # The evaluation transform; size 0 is that of the model. See data.image.Transform.
  d.image = ConfigDict(dict(size=0, resize="shorter", interpolation="bicubic", rgb_first=False))
  d.crop = "center"  # training crop: "center" as in evaluation, or "random" resized
  d.crop_scale = (0.5, 1.0)  # share of the area that a random crop keeps
  d.flip = 0.0  # probability that a training picture is mirrored
  d.max_bad_fraction = 1e-4  # share of undecodable training records that a run survives
  d.eval_max_bad_fraction = 0.0
  d.threads = 0  # host threads that decode; 0: TensorFlow's choice

  t = c.text = ConfigDict()
  t.tokenizer = "clip_bpe"
  t.vocab = ""  # file; "" for the packaged one
  t.max_merges = 0  # CLIP BPE: use only the first merges; 0 for all
  t.length = 77
  t.truncate = True  # False: a caption that is too long is an error

  o = c.optim = ConfigDict()
  o.name = "adamw"
  o.lr, o.b1, o.b2, o.eps = 1e-5, 0.9, 0.98, 1e-6
  o.weight_decay = 0.2
  o.decay = ((r"kernel$", 1.0), (".*", 0.0))  # multiples of weight_decay
  o.lr_mult = ((".*", 1.0),)
  o.grad_clip = 0.0  # global norm; 0: none
  o.schedule, o.warmup, o.end = "cosine", "500 steps", 0.0
  o.bounds = ()  # (regex, low, high): parameters kept inside after every update
  o.round_to, o.round_paths = "", ()  # dtype that parameters matching the regexes are rounded to

  e = c.eval = ConfigDict()
  e.every = "1 epochs"
  e.batch_size = 256
  e.block = (1024, 5120)  # images x captions scored at a time
  e.select = "val"  # split evaluated in training, which the best checkpoint is chosen on
  e.metric = "rsum"
  e.test = True  # evaluate data.test once at the end, with the best checkpoint
  e.score_dtype = "float32"  # float16 reproduces CLIP_ITM's published decimals
  e.folds = 0  # COCO 1K: 5
  e.eccv_dir = ""  # id files of ECCV Caption and CxC, for the COCO 5K test split
  e.cache = False  # keep embeddings in the workdir

  c.checkpoint = ConfigDict(dict(every="1000 steps", keep=2))
  return c


def resolve(config: ConfigDict, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """Applies config.recipes[config.recipe]; what was set on the command line (overrides) wins.

  Raises ValueError for an unknown recipe or a recipe that names an unknown key.
  """
  config = config.copy_and_resolve_references()
  config.lock()
  if config.recipe not in config.recipes:
    raise ValueError(
      f"config.recipe is {config.recipe!r}; this config has {', '.join(sorted(config.recipes))}"
    )
  for key, value in config.recipes[config.recipe].items():
    key = key.replace("/", ".")
    if key not in (overrides or {}):
      _set(config, key, value)
  return config


def _set(config: ConfigDict, key: str, value: Any) -> None:
  *parents, last = key.split(".")
  node = config
  for name in parents:
    if name not in node:
      raise ValueError(f"recipe {config.recipe!r} sets {key!r}, but there is no key {name!r}")
    node = node[name]
  if last not in node:
    raise ValueError(f"recipe {config.recipe!r} sets {key!r}, which does not exist")
  with node.ignore_type():
    node[last] = value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested config -> {dotted key: value}, tuples as lists, as json would give it back."""
  out: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ConfigDict) and len(value):
      out |= flatten(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = _listed(value)
  return out


def _listed(value: Any) -> Any:
  return [_listed(v) for v in value] if isinstance(value, tuple | list) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Lines "key: old -> new" for what differs between two flat configs and is not in FREE."""
  free = lambda key: any(key == f or key.startswith(f + ".") for f in FREE)
  missing = "(absent)"
  return [
    f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
    for key in sorted(old.keys() | new.keys())
    if not free(key) and old.get(key, missing) != new.get(key, missing)
  ]
