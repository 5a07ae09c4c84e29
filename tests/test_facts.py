"""What config.init is compared in beyond shapes: by keys of a config."""

import json
import logging
import pathlib
import re
import tarfile

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer, facts, restore
from xmodal_jax.runtime import initial_state, setup, step, workdir

ROOT = pathlib.Path(__file__).parents[1]

# (config that a model is trained with, config that starts from its workdir)
CHAINS = [
  ("coco_ft:vit_b32", "coco_zeroshot:vit_b32"),
  ("coco_ft:rn50", "f30k_ft:rn50"),
  ("zerovl_pretrain:dga", "zerovl_ft:coco_14m"),
  ("zerovl_pretrain:dga", "zerovl_eval:14m"),
  ("zerovl_ft:coco", "zerovl_eval:100m"),
  ("zerovl_pretrain:dga", "zerovl_linear_probe:14m"),
  ("team_pretrain:clip_l14", "team_ft:coco_clip_l14"),
  ("team_ft:coco_vit_b16", "team_eval:vit_b16"),
  ("tgdt:f30k_stage1", "tgdt:f30k_all"),
  ("tgdt:coco_stage1", "tgdt:coco_global"),
  ("tgdt:f30k_stage1", "tgdt:f30k_local"),
]


def load(name: str):
  file, variant = name.split(":")
  return config_lib.resolve(config_lib.load(ROOT / "configs" / f"{file}.py", variant or None))


@pytest.mark.parametrize(("before", "after"), CHAINS)
def test_configs_that_follow_each_other_agree(before, after, caplog):
  with caplog.at_level(logging.WARNING):
    facts.check("source", facts.of(load(before)), facts.of(load(after)))
  # TGDT's first stage has no upper stacks.
  assert not caplog.records or caplog.messages[0].endswith(" model.upper.heads")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model.text.heads", 1),
    ("model.image.heads", 4),
    ("model.act", "gelu"),
    ("model.image.pool", "mean"),
    ("model.text.causal", False),
    ("model.mean", (0.5, 0.5, 0.5)),
    ("model.std", (0.5, 0.5, 0.5)),
    ("text.tokenizer", "bert"),
    ("text.length", 20),
    ("text.max_merges", 100),
    ("data.image.resize", "exact"),
    ("data.image.interpolation", "bilinear"),
    ("data.image.rgb_first", True),
    ("data.image.exif", True),
  ],
)
def test_each_other_value_is_refused_by_name(key, value):
  want = facts.of(tiny.config("unused"))
  have = facts.of(tiny.config("unused", **{key.replace(".", "__"): value}))
  with pytest.raises(checkpointer.CheckpointError) as e:
    facts.check("source", have, want)
  value = list(value) if isinstance(value, tuple) else value
  assert f"{key}: {value!r} there, {want[key]!r} in this config" in str(e.value)
  assert f"--config.init_change={key}" in str(e.value)
  facts.check("source", have, want, may_change=(key, "text.clean"))


def test_what_shows_in_shapes_or_is_of_training_alone_may_differ():
  c = tiny.config("unused")
  want = facts.of(c)
  c.model.image.update(size=32, depth=1, remat="nothing_saveable")
  c.model.loss, c.optim.lr, c.data.crop, c.text.corrupt = "sigmoid", 1.0, "random", 0.5
  assert facts.of(c) == want


def test_a_flat_config_of_a_workdir_is_read_alike():
  """Also one that an earlier version wrote: keys of today have its values."""
  c = load("coco_ft:vit_b32")
  old = workdir.json_like(config_lib.flatten(c))
  for key in ("model.act", "model.mean", "model.std", "model.image.pool", "model.text.causal"):
    del old[key]
  assert facts.of(old) == facts.of(c)


def test_a_run_of_an_earlier_version_had_the_defaults():
  """It resumes, and not with another activation."""
  new = config_lib.flatten(load("coco_ft:vit_b32"))
  old = {k: v for k, v in new.items() if k not in ("model.act", "model.mean", "init_change")}
  assert not workdir.difference(old, new)
  changed = workdir.difference(old, new | {"model.act": "gelu"})
  assert changed == {"model.act": ("quick_gelu", "gelu")}


def test_a_vocabulary_may_move():
  c = load("team_eval:chinese_l14")
  want = facts.of(c)
  facts.check("source", want | {"text.vocab": "/data/vocab.txt"}, want)
  with pytest.raises(checkpointer.CheckpointError, match=r"text\.vocab"):
    facts.check("source", want | {"text.vocab": "/data/other.txt"}, want)


def test_an_old_converted_directory_loads_with_a_line(caplog, tmp_path):
  with tarfile.open(ROOT / "tests" / "legacy" / "converted.tar.xz") as tar:
    tar.extractall(tmp_path, filter="data")
  folder = tmp_path / "converted"
  meta = json.loads((folder / "meta.json").read_text())
  c = tiny.config("unused")
  c.model = meta["config"]
  built = setup.build(c)
  with caplog.at_level(logging.WARNING):
    restore.load(str(folder), "clip", built.params, built.stats, built.facts)
  (line,) = [r.getMessage() for r in caplog.records]
  assert "does not record, so not compared with this config: data.image.*, model.act" in line
  heads = c.model.text.heads
  c.model.text.heads = 2 * heads
  with pytest.raises(
    checkpointer.CheckpointError, match=f"model.text.heads: {heads} there, {2 * heads} in this"
  ):
    restore.load(str(folder), "clip", built.params, built.stats, facts.of(c))


def test_streams_of_initialisation_and_training_differ():
  """A step had the key of the parameter of its number."""
  rngs = nnx.Rngs(7)
  first = {tuple(np.asarray(jax.random.key_data(rngs.params()))) for _ in range(20)}
  stream = step.stream(7, "train")
  steps = (jax.random.fold_in(stream, n) for n in range(20))
  keys = {tuple(np.asarray(jax.random.key_data(key))) for key in steps}
  assert len(keys) == 20 and not keys & first
  other = step.stream(7, "other")
  assert (jax.random.key_data(other) != jax.random.key_data(stream)).any()


@pytest.mark.parametrize("name", ["clip", "team", "hat"])
def test_an_unknown_choice_is_named(name):
  c = load(dict(clip="coco_ft:vit_b32", team="team_eval:clip_l14", hat="hat_clip_vit:")[name])
  section = c.model if name == "clip" else c.model.image
  section.act = "swish"
  with pytest.raises(ValueError, match=r"act is 'swish'; there are quick_gelu, gelu"):
    setup.build(c)


def test_heads_that_do_not_divide_the_width_are_named():
  c = tiny.config("unused", model__text__heads=3)
  with pytest.raises(ValueError, match="3 heads do not divide a width of 32"):
    setup.build(c)


def test_arguments_of_another_tower_are_named():
  c = tiny.config("unused")
  c.model.image.window = 7
  with pytest.raises(ValueError, match=re.escape("model.image.window is no argument of kind=")):
    setup.build(c)


def test_parameters_that_config_init_lacks_have_their_initial_values():
  """TGDT's published second stage starts from a first one that has no upper stacks."""
  built = setup.build(tiny.tgdt("unused"))
  shapes = restore.flat(nnx.to_pure_dict(built.params))
  given = {k: np.full(v.shape, 3, np.float32) for k, v in shapes.items() if "_upper/" not in k}
  params, stats = initial_state._complete(built, restore.nested(given), {})
  found = restore.flat(params)
  assert found.keys() == shapes.keys() and not stats
  assert all((found[k] == 3).all() for k in given)
  assert any(found[k].std() > 0 for k in shapes.keys() - given.keys())
