"""The default config: every key that exists, with its meaning. configs/*.py change values only."""

from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

ConfigDict = ml_collections.ConfigDict


def base() -> ConfigDict:
  """Durations are strings, "500 steps" or "5 epochs". Lists of rules are (regex, value) pairs over
  parameter paths; the first that matches counts."""
  c = ConfigDict()
  c.seed = 0  # initialisation, data order, augmentation and dropout
  c.recipe = "default"  # a key of `recipes`: a named set of changes to this config
  c.recipes = ConfigDict({"default": ConfigDict()})  # name -> {dotted key with "/": value}
  c.init = ""  # converted directory, workdir, checkpoint or foreign file; "" for random weights
  # Public files of single towers, where a system starts from those: see its TOWERS. What they do
  # not hold is random. init_half: an image tower's matrices pass through float16 (CLIP).
  c.init_image, c.init_text, c.init_half = "", "", False
  # A PyTorch optimizer state that belongs to config.init, to go on with a published run.
  c.init_optimizer = ""
  c.model = ConfigDict()  # a preset of the system, filled in by the config file
  c.dtype = "auto"  # compute dtype: bfloat16 on accelerators, float32 on CPU; or a dtype's name
  c.precision = "default"  # of float32 matmuls: default, high, highest
  c.mesh = (("data", -1), ("fsdp", 1), ("model", 1))
  c.rules = ConfigDict(dict(vocab="model", heads="model", mlp="model", embed="fsdp"))
  c.min_shard = 2**16  # parameters with fewer elements stay replicated

  c.batch_size = 256  # global
  # A batch goes through the towers in so many parts, one after another, and the gradient is still
  # that of the whole batch: less memory for one more forward pass. See System.chunked.
  c.accumulate = 1
  # Losses over all pairs: 0 holds the scores of all of them, every device those of its rows; n, at
  # most n x n on a device at a time, with one side's rows passing by. The result is the same.
  c.loss_chunk = 0
  # The same parameters to the last bit on any number of devices and processes. Every batch is cut
  # into micro_shards, a power of two that the number of devices divides, and parameters are whole
  # on every device; it costs the towers' forward pass once more. See reproducible.
  c.reproducible, c.micro_shards = False, 8
  c.total = "5 epochs"
  c.log_every = 20
  c.profile = ConfigDict(dict(first_step=0, steps=5))  # 0: no profile

  d = c.data = ConfigDict()
  # A data set written by tools/prepare_data.py; "shapes" for the embedded one. Several, with commas
  # between them, are trained on together, as `mix` says; val and test are then those of eval_dir.
  d.dir = ""
  # "shuffle": one shuffle over all. "sequential": one after another in each epoch. "debias": every
  # batch is of one data set, drawn in proportion to their sizes (ZeroVL).
  d.mix = "shuffle"
  d.eval_dir = ""  # the data set whose val and test count; "" for data.dir
  d.tfds = ""  # where data.dir is empty: a data set by its TFDS name, in TFDS's own folder
  d.tfds_captions = 5  # captions of a picture that count there; 0 for all
  d.train, d.val, d.test = "train", "val", "test"
  d.captions = "all"  # "all": an epoch visits every caption; "one": every picture, one caption
  # The evaluation transform; size 0 is that of the model. See data.image.Transform.
  d.image = ConfigDict(dict(size=0, resize="shorter", interpolation="bicubic", rgb_first=False))
  d.image.exif = False  # turn pictures as their EXIF orientation says
  # For systems that read regions: so many of each picture, padded; 0 for pixels. A picture with
  # more is an error, unless truncate_regions: then the first ones count, of a detector the surest.
  d.regions, d.truncate_regions = 0, False
  # Training pictures are changed in this order; see data.augment.
  d.crop = "center"  # training crop: "center" as in evaluation, or "random" resized
  d.crop_scale = (0.5, 1.0)  # share of the area that a random crop keeps
  d.crop_ratio = (3 / 4, 4 / 3)  # width to height of a random crop, before it is resized
  d.jitter = (0.0, 0.0, 0.0, 0.0)  # of brightness, contrast, saturation and hue; 0: none
  d.jitter_p = 0.8  # probability of jitter, where there is any
  d.grayscale = 0.0  # probability that a training picture loses its colour
  d.blur = 0.0  # probability of a Gaussian blur
  d.blur_radius = (0.1, 2.0)  # range of its standard deviation in pixels
  d.flip = 0.0  # probability that a training picture is mirrored
  d.rand_augment = (0, 0)  # operations per picture (0: none), magnitude 0 to 10
  d.rand_augment_mode = "corrected"  # "original": with the overflows and one-sided warps of TEAM
  d.auto_augment = ""  # "imagenet": the learned policy of Cubuk et al. (2019), as ZeroVL has it
  d.erase = 0.0  # probability that boxes of a training picture are erased
  d.erase_mode = "pixel"  # noise per "pixel", per box and channel ("rand"), or the mean ("const")
  d.erase_count = (1, 1)  # fewest and most boxes
  d.max_bad_fraction = 1e-4  # share of undecodable training records that a run survives
  d.eval_max_bad_fraction = 0.0
  d.threads = 0  # host threads that decode; 0: TensorFlow's choice

  t = c.text = ConfigDict()
  t.tokenizer = "clip_bpe"  # or "bert": WordPiece
  t.vocab = ""  # file; "" for the packaged one
  t.max_merges = 0  # CLIP BPE: use only the first merges; 0 for all
  t.lowercase = True  # BERT: lower-case and strip accents; False keeps both
  t.clean = "none"  # BERT: caption clean-up before the tokenizer, "none" or "albef"
  t.max_words = 0  # words that the clean-up keeps; 0 for all
  # BERT, training only: share of word pieces that are masked, replaced or deleted (ZeroVL: 0.2).
  t.corrupt = 0.0
  t.length = 77
  t.truncate = True  # False: a caption that is too long is an error

  o = c.optim = ConfigDict()
  o.name = "adamw"  # or "lamb"
  # LAMB's norms: "optax", of each array and layer; "original", of the original's tensors (query,
  # key and value are one where they are fused), and no ratio where there is no weight decay.
  o.trust = "optax"
  o.lr, o.b1, o.b2, o.eps = 1e-5, 0.9, 0.98, 1e-6
  o.weight_decay = 0.2
  o.decay = ((r"kernel$", 1.0), (".*", 0.0))  # multiples of weight_decay
  o.lr_mult = ((".*", 1.0),)
  # (regex, duration): parameters that do not change before; their moments begin then, too.
  o.freeze = ()
  o.grad_clip = 0.0  # global norm; 0: none
  # A warm-up may also be a share of all steps, "2.5 %". warmup_from: rate of step s, from 0 on:
  # "first", lr (s + 1) / warmup; "zero", lr s / warmup, so that the first step changes nothing;
  # "second", lr (s + 2) / warmup (TGDT).
  o.schedule, o.warmup, o.end, o.warmup_from = "cosine", "500 steps", 0.0, "first"
  o.cycles = 0.5  # periods of the cosine: 0.5 only falls
  o.step_every, o.step_factor = "10 epochs", 0.1  # schedule "step": lr * factor ** (step // every)
  o.milestones = ()  # schedule "milestones": lr * step_factor at each of these durations
  o.bounds = ()  # (regex, low, high): parameters kept inside after every update
  # Decay of a moving average of the parameters; 0.0: none. The average is then what is evaluated,
  # and what everybody who reads a workdir gets; training goes on from the parameters themselves.
  o.ema = 0.0
  o.round_to, o.round_paths = "", ()  # dtype that parameters matching the regexes are rounded to

  e = c.eval = ConfigDict()
  e.every = "1 epochs"
  e.batch_size = 256
  e.block = (1024, 5120)  # images x captions scored at a time
  e.select = "val"  # split evaluated in training, which the best checkpoint is chosen on
  e.metric = "rsum"
  e.test = True  # evaluate data.test once at the end, with the best checkpoint
  # Second stage: candidates of a picture, of a caption, weight of the first stage in their scores.
  # None: the system's own; 0 candidates: first stage only.
  e.top_k_text = config_dict.placeholder(int)
  e.top_k_image = config_dict.placeholder(int)
  e.stage_mix = config_dict.placeholder(float)
  e.rerank_block = (8, 8)  # pictures x captions of each that a device scores in a call
  e.token_dtype = "auto"  # of the features kept on the devices for it, as `dtype`
  e.score_dtype = "float32"  # float16 reproduces CLIP_ITM's published decimals
  e.folds = 0  # COCO 1K: 5
  e.eccv_dir = ""  # id files of ECCV Caption and CxC, for the COCO 5K test split
  # NDCG at 25 by these relevances, with commas between them: "rougeL", "spice"; "" for none. Files
  # NAME-SPLIT-METHOD.npy of relevance_dir are read; ROUGE-L is computed where there is none.
  e.ndcg, e.relevance_dir = "", ""
  # "original": also the numbers of TGDT's program, as published_*: rank 0 where a shortlist has no
  # positive, six times the mean RSUM of folds, NDCG of image to text only over what is not 0.
  e.protocol = "right"
  e.cache = False  # keep embeddings in the workdir; not with a second stage

  c.checkpoint = ConfigDict(dict(every="1000 steps", keep=2))

  # --mode linear_probe: a linear classifier of what the frozen image tower makes of labelled
  # pictures, trained on data.train and tested on data.test. The values are ZeroVL's for ImageNet.
  p = c.probe = ConfigDict()
  p.optim = "lars"  # or "lbfgs": logistic regression on all features at once, until it converges
  # False: the tower sees every picture once, unchanged, and its features are kept in the workdir.
  # True: pictures change as data.crop and so on say, and pass through the tower in every epoch.
  p.augment = False
  p.batch_size, p.total = 16384, "90 epochs"
  p.every = "2 epochs"  # evaluations on eval.select
  p.lr, p.warmup, p.warmup_from = 6.4, "11.11 %", "zero"  # lr goes with the batch: 0.1 per 256
  p.momentum, p.dampening, p.nesterov = 0.9, 0.0, False
  p.weight_decay, p.eta = 0.0, 0.001
  # lbfgs: half of it times the squared weights is added to the summed loss, the inverse of what C
  # is elsewhere. None: the best of 1e-6 to 1e6 on data.val, or, where that is tested, on a share
  # `holdout` of the training pictures; the classifier is then trained on these pictures as well.
  p.l2 = config_dict.placeholder(float)
  p.holdout = 0.1
  p.max_steps = 1000
  # Evaluated in place of a trained one: a classifier.npz, or "model" for that of config.init.
  p.classifier = ""

  # --mode zeroshot_classify: pictures of data.test by the texts that score highest with them.
  k = c.classify = ConfigDict()
  k.names = ""  # a file with a line per class; "" for the names in the data set
  k.templates = ""  # a file with a line per template, {} for the name; "" for "a photo of a {}."
  k.block = 1024  # texts that a batch of pictures is scored with at a time
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
