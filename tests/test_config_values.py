"""Every key of every config with every kind of wrong value: one ConfigError that names it."""

import ast
import functools
import re

import ml_collections
import pytest
import test_configs
from absl import flags
from ml_collections import config_flags

from xmodal_jax import config as config_lib
from xmodal_jax.config import checks, values
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import ndcg
from xmodal_jax.runtime import setup

TEXTS = ("None", "", "abc", "5", "-1", "2.5", "nan", "1e999", "True", "()", "(1, 2)", "5,")
TEXTS += (
  "((1, 2), (3, 4))",
  "('a', 'b')",
  "(('data', -1), ('data', 2))",
  "{}",
  "{'a': 1}",
  "[",
  "*",
)
TEXTS += ("5 epoch", "0 epochs", "-5 epochs", "(" * 300)


def leaves(config, prefix=""):
  """(dotted key, value, type) of all keys, sections among them."""
  for name, value in config.items():
    of = config.get_type(name)
    yield f"{prefix}{name}", value, of
    if isinstance(value, ml_collections.ConfigDict):
      yield from leaves(value, f"{prefix}{name}.")


@functools.cache
def all_keys():
  """key -> (config file, variant) of the first config that has it."""
  found = {}
  for name, variant in test_configs.ALL:
    for key, _, _ in leaves(test_configs.get_config(name, variant)):
      found.setdefault(key, (name, variant))
  return found


def resolved_with(config, key, text, of):
  """The config resolved with --config.KEY=TEXT, read as the type `of`."""
  *parents, last = key.split(".")
  config = config.copy_and_resolve_references()
  node = checks.find(config, ".".join(parents)) if parents else config
  node[last] = value = values.read(text, of)
  return config_lib.resolve(config, {key: value})


LATER = ("probe", "recipes")
SECTIONS = sorted({key.split(".")[0] for key in all_keys()})


@pytest.mark.parametrize(
  "name",
  [pytest.param(s, marks=pytest.mark.full) if s in LATER else s for s in SECTIONS],
)
def test_every_key_with_every_kind_of_wrong_value(name):
  default = {key: (value, of) for key, value, of in leaves(config_lib.base())}
  for key in (k for k in all_keys() if k.split(".")[0] == name):
    config = test_configs.get_config(*all_keys()[key])
    refused, section = 0, isinstance(checks.find(config, key), ml_collections.ConfigDict)
    of = default[key][1] if key in default else type(checks.find(config, key))
    for text in TEXTS:
      try:
        got = resolved_with(config, key, text, dict if section else of)
      except ConfigError as e:
        refused += 1
        assert key in str(e), (key, text, str(e))
        assert "expected" in str(e) or "is missing: set it" in str(e), str(e)
        continue
      # Accepted: the value has the key's type, and is what the text says.
      got = checks.find(got, key)
      assert text != "None" or default[key][0] is None, key
      if got is not None and not isinstance(got, ml_collections.ConfigDict):
        assert type(got) is of, (key, text, got)
        said = text if of is str else ast.literal_eval(text)
        assert got == (tuple(said) if of is tuple else said), (key, text)
    assert refused, key


def test_numbers_and_tuples_have_a_rule():
  """A new key of the default config states its range in xmodal_jax/config/checks.py."""
  free = ("model", "recipes", "rules", "recipe")
  for key, value, of in leaves(config_lib.base()):
    if of not in (bool, str, ml_collections.ConfigDict) and key.split(".")[0] not in free:
      assert key in checks.SPEC, key
    if not isinstance(value, ml_collections.ConfigDict) and key.split(".")[0] not in free:
      assert not checks.rule_of(key, value).fault(value), key
  known = {key for key, _, _ in leaves(config_lib.base())}
  assert set(checks.SPEC) <= known
  assert checks.SPEC["eval.ndcg"].holds(",".join(ndcg.METHODS))


def flag_of(*overrides):
  argv = ["main", f"--config={test_configs.ROOT}/configs/coco_ft.py:vit_b32", *overrides]
  parsed = flags.FlagValues()
  handle = config_flags.DEFINE_config_file("config", flag_values=parsed, sys_argv=argv)
  parsed(argv)
  return handle.value, config_flags.get_override_values(parsed["config"])


def test_the_command_line_lists_all_faults_at_once():
  wrong = {
    "batch_size": "abc", "optim.lr": "None", "mesh": "(('fsdp', 8),)", "eval.block": "5",
    "data.crop": "middle", "optim.warmup": "soon", "checkpoint.keep": "-2", "reproducible": "2",
    "optim.bounds": "('x', 1, 2)", "model.image.size": "2.5", "model.remat": "everything",
    "data.image": "5", "eval.ndcg": "bleu", "optim.freeze": "(('(', '1 epochs'),)", "init": "None",
    "rules.embed": "fsdpp", "optim.ema": "1.0", "profile": "{'steps': 3}",
  }  # fmt: skip
  config, overrides = flag_of(*(f"--config.{k}={v}" for k, v in wrong.items()))
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(config, overrides)
  head, *lines = str(e.value).splitlines()
  assert head == f"{len(wrong)} values of the config are wrong:"
  for key in wrong:
    assert sum(bool(re.match(rf"  config\.{key}[. ]", line)) for line in lines) == 1, (key, lines)


def test_the_command_line_with_right_values():
  config, overrides = flag_of(
    "--config.optim.lr=3", "--config.eval.top_k_text=None", "--config.eval.stage_mix=1",
    "--config.data.crop_scale=0.08,1", "--config.mesh=(('data',-1),('fsdp',8),('model',2))",
    "--config.reproducible", "--config.init=", "--config.optim.bounds=()",
    "--config.text.clean=none", "--config.data.eval_dir=none",
    "--config.rules={'embed': 'fsdp'}", "--config.total=1e3 steps", "--config.data.dir=a b",
  )  # fmt: skip
  c = config_lib.resolve(config, overrides)
  assert repr(c.optim.lr) == "3.0" and c.eval.top_k_text is None and repr(c.eval.stage_mix) == "1.0"
  assert c.data.crop_scale == (0.08, 1) and c.mesh[2] == ("model", 2) and c.reproducible is True
  assert (c.init, c.optim.bounds, c.total, c.data.dir) == ("", (), "1e3 steps", "a b")
  assert (c.text.clean, c.data.eval_dir) == ("none", "none")
  assert c.rules.to_dict() == {"embed": "fsdp"}


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"batch_size": 100, "accumulate": 3}, r"config\.accumulate is 3: .* config\.batch_size=100"),
    (
      {"data.rand_augment": (2, 11)},
      r"config\.data\.rand_augment has magnitude 11: expected 0 to 10",
    ),
    ({"optim.schedule": "milestones"}, r"config\.optim\.milestones is \(\)"),
    ({"optim.decay": ()}, r"config\.optim\.decay is \(\): expected \(regex, multiple\) pairs"),
    ({"model.system": "clop"}, r"config\.model\.system is 'clop': expected one of clip, zerovl"),
    ({"model.text.heads": 0}, r"config\.model\.text\.heads is 0: expected a whole number from 1"),
  ],
)
def test_values_that_do_not_fit(changes, text):
  config = test_configs.get_config("coco_ft", "vit_b32")
  for key, value in changes.items():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError, match=text):
    config_lib.resolve(config)


def test_a_key_that_does_not_exist():
  config = test_configs.get_config("coco_ft", "vit_b32")
  config.optim.lrr = 1.0
  config.recipes.default = {"optim/lrx": 1.0}
  with pytest.raises(ConfigError) as e:
    config_lib.resolve(config)
  assert "config.recipes.default.optim/lrx is no key of the config: expected" in str(e.value)
  assert "config.optim.lrr does not exist; did you mean lr?" in str(e.value)


@pytest.mark.parametrize(
  ("variant", "key", "value"),
  [
    ("clip", "model.loss", "triplet"),
    ("clip", "model.image.size", 47),
    ("clip", "model.image.kind", "vitt"),
    ("clip", "model.text.heads", 3),
    ("hat", "model.levels", (1, 2)),
    ("hat", "model.image.depths", (2,)),
    ("team", "model.same_image", "maybe"),
    ("tgdt", "model.mode", "best"),
    ("zerovl", "model.loss", {"name": "nce", "margin": 1.0}),
    ("zerovl", "model.text", {"width": 128}),
  ],
)
def test_what_a_system_refuses_is_a_fault_of_the_model_section(variant, key, value):
  config = test_configs.get_config("shapes", variant)
  *parents, last = key.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  node[last] = value
  with pytest.raises(ConfigError, match=r"config\.model"):
    setup.build(config_lib.resolve(config))
