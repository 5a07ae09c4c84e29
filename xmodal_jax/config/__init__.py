"""The default config: every key, with its meaning. configs/*.py only change values.

What values a key may have is in `checks.py`, and `resolve` lists everything that is wrong at once.
"""

import functools
import importlib.util
import os
import pathlib
import traceback
import types
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from xmodal_jax.config import values
from xmodal_jax.errors import ConfigError

ConfigDict = ml_collections.ConfigDict


class _Reader(flags.ArgumentParser):
  """Reads an override of the command line without errors of its own, which `resolve` lists."""

  def __init__(self, of: type):
    self.of = of

  def parse(self, argument: Any) -> Any:
    return values.read(argument, self.of) if isinstance(argument, str) else argument

  def flag_type(self) -> str:
    return self.of.__name__


for _type in (bool, int, float, str, tuple, list):
  config_flags.register_flag_parser_for_type(_type, _Reader(_type))
config_flags.register_flag_parser_for_type(ConfigDict, _Reader(dict))

# Types are for `resolve` to check, together with everything else.
_section = functools.partial(ConfigDict, type_safe=False)


def base() -> ConfigDict:
  """The default config.

  Durations are strings: "500 steps" or "5 epochs"; a number above 0 is at least one step. Periods
  of 0 mean never, but for the last step. Rules are lists of (regex, value) pairs over parameter
  paths; the first match wins.
  """
  c = _section()
  c.seed = 0  # of initialisation, data order, augmentation and dropout
  c.recipe = "default"  # a key of `recipes`: a named set of changes to this config
  c.recipes = _section({"default": _section()})  # name -> {dotted key with "/": value}
  c.init = ""  # converted directory, workdir, checkpoint or PyTorch file; "": random parameters
  # Keys, separated by commas, in which this config may differ from what config.init was made with,
  # "text.length,data.image". Any other difference in what is computed is an error.
  c.init_change = ""
  # Regex of parameters that config.init need not have; training starts from initial values of them.
  c.init_missing = ""
  # Public files of single towers, for systems that define TOWERS; parameters missing from them are
  # randomly initialised. init_half: round the image tower's matrices to float16, as CLIP does.
  c.init_image, c.init_text, c.init_half = "", "", False
  # PyTorch optimizer state that belongs to config.init, to continue a published run.
  c.init_optimizer = ""
  c.model = _section()  # a preset of the system, set by the config file
  c.dtype = "auto"  # compute dtype: bfloat16 on accelerators, float32 on CPU; or a dtype's name
  c.precision = "default"  # of float32 matmuls: default, high, highest; see docs/sharding.md
  c.mesh = (("data", -1), ("fsdp", 1), ("model", 1))
  c.rules = _section(dict(vocab="model", heads="model", mlp="model", embed="fsdp"))
  c.min_shard = 2**16  # parameters with fewer elements are replicated

  c.batch_size = 256  # global
  # Gradient accumulation with exact contrastive gradients (GradCache): the towers encode a batch in
  # this many parts, which saves memory and costs one more forward pass. See System.chunked.
  c.accumulate = 1
  # Losses over all pairs. 0: every device holds the scores of its rows with the whole batch; n:
  # tiles of at most n x n scores per device, computed in a ring. The result is the same.
  c.loss_chunk = 0
  # Bitwise the same parameters on any number of devices and processes: batches are cut into
  # micro_shards (a power of two that the number of devices divides) and parameters are replicated.
  # Costs one more forward pass of the towers. See runtime/deterministic.py.
  c.reproducible, c.micro_shards = False, 8
  c.total = "5 epochs"
  c.log_every = 20  # steps; 0: only the last
  c.profile = _section(dict(first_step=0, steps=5))  # first_step 0: no profile

  d = c.data = _section()
  # Folder of a dataset written by tools/prepare_data.py; "shapes": the embedded one. Several,
  # separated by commas, are mixed for training (see mix); eval_dir then has the val and test split.
  d.dir = ""
  # "shuffle": all samples in one shuffle. "sequential": dataset after dataset in each epoch.
  # "debias": each batch from one dataset, drawn in proportion to their sizes (ZeroVL).
  d.mix = "shuffle"
  d.eval_dir = ""  # dataset of the val and test split; "": data.dir
  d.tfds = ""  # TFDS name of a dataset in the TFDS folder, used if data.dir is empty
  d.tfds_captions = 5  # captions used per image of a TFDS dataset; 0: all
  d.train, d.val, d.test = "train", "val", "test"
  d.captions = "all"  # an epoch has "all" captions, or "one" caption per image
  # The evaluation transform; size 0: that of the model. See data.image.Transform.
  d.image = _section(dict(size=0, resize="shorter", interpolation="bicubic", rgb_first=False))
  d.image.exif = False  # rotate images by their EXIF orientation
  # For systems that read region features: the number of regions per image, padded; 0: pixels.
  # More regions are an error, or with truncate_regions only the first (most confident) are used.
  d.regions, d.truncate_regions = 0, False
  # Augmentation of training images, in this order; see data.augment.
  d.crop = "center"  # "center", as in evaluation, or "random" resized
  d.crop_scale = (0.5, 1.0)  # fraction of the area that a random crop keeps
  d.crop_ratio = (3 / 4, 4 / 3)  # aspect ratio (width / height) of a random crop
  d.jitter = (0.0, 0.0, 0.0, 0.0)  # strength of brightness, contrast, saturation, hue; 0: none
  d.jitter_p = 0.8  # probability of jitter
  d.grayscale = 0.0  # probability of conversion to grey
  d.blur = 0.0  # probability of a Gaussian blur
  d.blur_radius = (0.1, 2.0)  # range of its standard deviation, pixels
  d.flip = 0.0  # probability of a horizontal flip
  d.rand_augment = (0, 0)  # number of operations (0: none), magnitude 0 to 10
  d.rand_augment_mode = "corrected"  # "original": TEAM's, with its overflows and one-sided warps
  d.auto_augment = ""  # "imagenet": the policy of Cubuk et al. (2019), as used by ZeroVL
  d.erase = 0.0  # probability of random erasing
  d.erase_mode = "pixel"  # noise per "pixel", per box and channel ("rand"), or the mean ("const")
  d.erase_count = (1, 1)  # minimum and maximum number of boxes
  d.max_bad_fraction = 1e-4  # training records that may fail to decode, as a fraction
  d.eval_max_bad_fraction = 0.0  # the same for evaluation
  d.max_pixels = 178_956_970  # width x height of an image; a larger one is a bad record
  d.threads = 0  # host threads for decoding; 0: TensorFlow chooses

  t = c.text = _section()
  t.tokenizer = "clip_bpe"  # or "bert": WordPiece
  t.vocab = ""  # file; "": the packaged one
  t.max_merges = 0  # CLIP BPE: use only the first merges; 0: all
  t.lowercase = True  # BERT: lower-case and strip accents
  t.clean = "none"  # BERT: caption clean-up before the tokenizer, "none" or "albef"
  t.max_words = 0  # words that the clean-up keeps; 0: all
  # BERT, training only: fraction of word pieces that are masked, replaced or deleted (ZeroVL: 0.2).
  t.corrupt = 0.0
  t.length = 77  # tokens
  t.truncate = True  # False: a longer caption is an error

  o = c.optim = _section()
  o.name = "adamw"  # or "lamb"
  # LAMB's trust ratios. "optax": per array and layer; "original": per tensor of the PyTorch model,
  # where query, key and value may be fused, and none for tensors without weight decay.
  o.trust = "optax"
  o.lr, o.b1, o.b2, o.eps = 1e-5, 0.9, 0.98, 1e-6
  o.weight_decay = 0.2
  o.decay = ((r"kernel$", 1.0), (".*", 0.0))  # rules: multiples of weight_decay
  o.lr_mult = ((".*", 1.0),)  # rules: multiples of lr
  # (regex, duration): parameters frozen for the duration; their moments start after it. BatchNorm
  # whose scale and bias are frozen also keeps its statistics, and normalises with them.
  o.freeze = ()
  o.grad_clip = 0.0  # global norm; 0: none
  # A warm-up may also be a share of all steps, "2.5 %". warmup_from, with steps s from 0:
  # "first": lr (s + 1) / warmup; "zero": lr s / warmup, so that the first step changes nothing;
  # "second": lr (s + 2) / warmup (TGDT).
  o.schedule, o.warmup, o.end, o.warmup_from = "cosine", "5 %", 0.0, "first"
  o.cycles = 0.5  # periods of the cosine; 0.5: it only decreases
  o.step_every, o.step_factor = "10 epochs", 0.1  # schedule "step": lr * factor ** (step // every)
  o.milestones = ()  # schedule "milestones": lr * step_factor at each of these durations
  o.bounds = ()  # (regex, low, high): parameters clipped to this range after every update
  # Decay of an exponential moving average of the parameters and of BatchNorm's statistics; 0: none.
  # Evaluation and readers of a workdir use the average; training continues from the raw parameters.
  # ema_schedule: "growing", (1 + n) / (10 + n) after n steps until it is `ema`, or "constant", with
  # which the initial parameters keep a share of ema ** n. See optim.transforms.average.
  o.ema, o.ema_schedule = 0.0, "growing"
  o.round_to, o.round_paths = "", ()  # dtype that parameters matching the regexes are rounded to

  e = c.eval = _section()
  e.every = "1 epochs"
  e.batch_size = 256
  e.block = (1024, 5120)  # images x captions scored at a time
  e.select = "val"  # split that is evaluated while training, to select the best checkpoint
  e.metric = "rsum"  # by which the best checkpoint is selected
  e.test = True  # evaluate data.test once at the end, with the best checkpoint
  # Second stage: candidates per image and per caption, weight of the first-stage score. None: the
  # system's own; 0 candidates: first stage only.
  e.top_k_text = config_dict.placeholder(int)
  e.top_k_image = config_dict.placeholder(int)
  e.stage_mix = config_dict.placeholder(float)
  # Weights such as (0.0, 0.5, 1.0, 2.0): every evaluation uses the one with the best eval.metric on
  # data.val under the same parameters; a large one, 1e6, is the order of the first stage. ():
  # stage_mix.
  e.stage_mixes = ()
  e.rerank_block = (8, 8)  # images x captions of each that a device scores per call
  e.token_dtype = "auto"  # of the features kept on the devices for the second stage, as `dtype`
  # Of the scores of a single stage: float16 reproduces CLIP_ITM's published decimals.
  e.score_dtype = "float32"
  e.folds = 0  # COCO 1K: 5
  e.eccv_dir = ""  # id files of ECCV Caption and CxC, for the COCO 5K test split
  # NDCG@25 by relevances "rougeL", "spice", separated by commas; "": none. Read from relevance_dir,
  # NAME-SPLIT-METHOD.npy; ROUGE-L is computed where its file is missing.
  e.ndcg, e.relevance_dir = "", ""
  # "original": also report TGDT's published numbers as published_*: rank 0 for a shortlist without
  # a positive, six times the mean RSUM over folds, image-to-text NDCG over nonzero values only.
  e.protocol = "right"
  e.cache = False  # keep embeddings in the workdir; first stage only

  # keep: the latest checkpoints that are kept beside the best one; 0 or -1: all.
  c.checkpoint = _section(dict(every="1000 steps", keep=2))

  # --mode linear_probe: a linear classifier on features of the frozen image tower, trained on
  # data.train and tested on data.test. The values are ZeroVL's for ImageNet.
  p = c.probe = _section()
  p.optim = "lars"  # or "lbfgs": logistic regression on all features, until convergence
  # False: features of unaugmented images are computed once and cached in the workdir. True: images
  # are augmented as in `data` and encoded in every epoch.
  p.augment = False
  p.batch_size, p.total = 16384, "90 epochs"
  p.every = "2 epochs"  # evaluations on eval.select
  p.lr, p.warmup, p.warmup_from = 6.4, "11.11 %", "zero"  # lr scales with the batch: 0.1 per 256
  p.momentum, p.dampening, p.nesterov = 0.9, 0.0, False
  p.weight_decay, p.eta = 0.0, 0.001
  # lbfgs: the penalty l2 / 2 * |weights|^2 is added to the summed loss (1 / C in scikit-learn).
  # None: the best of 1e-6 to 1e6 on data.val, or, if that is the test split, on a fraction
  # `holdout` of the training images; the final classifier is trained on the held-out images too.
  p.l2 = config_dict.placeholder(float)
  p.holdout = 0.1
  p.max_steps = 1000
  # Evaluate this classifier instead of training one: a classifier.npz, or "model": config.init's.
  p.classifier = ""

  # --mode zeroshot_classify: classify images of data.test by the best-scoring class prompt.
  k = c.classify = _section()
  k.names = ""  # file with a class name per line; "": the names in the dataset
  k.templates = ""  # file with a prompt template per line, {} for the name; "": "a photo of a {}."
  k.block = 1024  # prompts that a batch of images is scored with at a time
  return c


def load_module(path: str | os.PathLike) -> types.ModuleType:
  """A config file as a module, wherever its folder is. Raises ConfigError."""
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ConfigError(f"there is no config file {path}")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None:
    raise ConfigError(f"{path} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  _call(path, spec.loader.exec_module, module)
  if not hasattr(module, "get_config"):
    raise ConfigError(f"{path} has no function get_config")
  return module


def load(name: str | os.PathLike, variant: str | None = None) -> ConfigDict:
  """The config of a file, as `--config` loads it, before `resolve`.

  name: path of a config file, with `:variant` behind it unless `variant` is given, e.g.
  "configs/coco_ft.py:vit_b32". Raises ConfigError for a file that is no config or has no such
  variant.
  """
  path, _, named = os.fspath(name).partition(":")
  variant = variant or named
  return _call(path, load_module(path).get_config, *([variant] if variant else []))


def _call(path: str | os.PathLike, function: Any, *args: Any) -> Any:
  """Calls code of a config file; an error in it becomes a ConfigError with its file and line."""
  try:
    return function(*args)
  except ConfigError as e:
    raise ConfigError(f"{path}: {e}") from e
  except Exception as e:
    if isinstance(e, KeyError) and e.args == args:  # variants[variant]
      raise ConfigError(f"{path}: there is no variant {args[0]!r}") from e
    where = os.fspath(path)
    own = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == where]
    line = e.lineno if isinstance(e, SyntaxError) else own[-1].lineno if own else None
    where += f", line {line}" if line else ""
    raise ConfigError(f"{where}: {type(e).__name__}: {e}") from e


def choose_variant(variant: str | None, variants: Iterable[str], default: str | None = None) -> str:
  """The variant that a config file makes: the one that was asked for, or the default.

  variants: all that exist. default: by default the first of them. Raises ConfigError, which lists
  them, for one that does not exist.
  """
  names = list(variants)
  chosen = variant or (names[0] if default is None else default)
  if chosen not in names:
    listing = ", ".join(filter(None, names))
    raise ConfigError(f"there is no variant {variant!r}; there are {listing}")
  return chosen


class _FileParser(flags.ArgumentParser):
  """ml_collections' parser of a config file, with the errors of `load`."""

  def parse(self, path: Any) -> Any:
    config = load(path)
    config.lock()
    return config


def define_flag() -> flags.FlagHolder[ConfigDict]:
  """Defines `--config FILE[:VARIANT]` and its overrides `--config.key=value`."""
  holder = config_flags.DEFINE_config_file(
    "config", lock_config=True, help_string="A file of configs/, with :VARIANT behind it."
  )
  flags.FLAGS["config"].parser = _FileParser()
  return holder


def resolve(config: ConfigDict, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """Returns a locked and checked copy with config.recipes[config.recipe] applied.

  overrides: keys set on the command line, which take precedence over the recipe, and their values.
  Raises ConfigError, which lists everything that is wrong.
  """
  from xmodal_jax.config import checks  # it knows the package, and config files import this module

  config = config.copy_and_resolve_references()
  config.lock()
  overrides, default = overrides or {}, base()
  _apply_recipe(config, overrides)
  if found := checks.faults(config, default, overrides):
    head = f"{len(found)} values of the config are wrong:\n  " if len(found) > 1 else ""
    raise ConfigError(head + "\n  ".join(found))
  _as_default_types(config, default)
  _expand_home(config)
  return config


def _expand_home(config: ConfigDict) -> None:
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      _expand_home(value)
    elif isinstance(value, str):
      config[key] = expand_home(value)


def expand_home(value: str) -> str:
  """A path, or several with commas between them, with `~` replaced by the home folder."""
  return ",".join(map(os.path.expanduser, value.split(","))) if "~" in value else value


def _apply_recipe(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
  """Sets the values of the chosen recipe. What is wrong with it, the checks say."""
  recipes = config.get("recipes")
  chosen = recipes.get(str(config.get("recipe"))) if isinstance(recipes, ConfigDict) else None
  for key, value in chosen.items() if isinstance(chosen, ConfigDict) else ():
    key = key.replace("/", ".")
    *parents, last = key.split(".")
    section = config
    for parent in parents:
      section = section.get(parent) if isinstance(section, ConfigDict) else None
    if key not in overrides and isinstance(section, ConfigDict) and last in section:
      section[last] = value


def _as_default_types(config: ConfigDict, default: ConfigDict) -> None:
  """Whole numbers become floats where the default is one, so that 1 and 1.0 are the same config."""
  for key, standard in default.items():
    if isinstance(standard, ConfigDict):
      if key not in ("model", "recipes", "rules"):
        _as_default_types(config[key], standard)
    elif default.get_type(key) is float and isinstance(config[key], int):
      config[key] = float(config[key])


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested config -> {dotted key: value}, with tuples as lists, as json reads them back.

  >>> flatten({"optim": {"lr": 0.1, "decay": (("kernel$", 1.0),)}})
  {'optim.lr': 0.1, 'optim.decay': [['kernel$', 1.0]]}
  """
  out: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ConfigDict) and len(value):
      out |= flatten(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = as_lists(value)
  return out


def as_lists(value: Any) -> Any:
  """Tuples as lists, as json reads them back."""
  return [as_lists(v) for v in value] if isinstance(value, tuple | list) else value
