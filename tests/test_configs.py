"""Configs: all of them build, match their recorded parameter tables, and reject bad keys."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax.data import inputs
from xmodal_jax.interop import conversion, tables
from xmodal_jax.optim import factory, schedules
from xmodal_jax.runtime import setup

ROOT = pathlib.Path(__file__).parents[1]
CLIP = ["rn50", "rn101", "rn50x4", "rn50x16", "rn50x64"]
CLIP += ["vit_b32", "vit_b16", "vit_l14", "vit_l14_336"]
TGDT = ["all", "global", "local", "stage1", "stage1_shared"]
CONFIGS = {
  "shapes": ["clip", "zerovl", "team", "tgdt", "hat"],
  "zerovl_pretrain": ["zerovl", "dga"],
  "zerovl_eval": ["14m", "100m"],
  "zerovl_ft": ["coco", "f30k", "coco_14m", "f30k_14m"],
  "zerovl_linear_probe": ["14m", "100m"],
  "coco_ft": [*CLIP, "tiny"],
  "f30k_ft": [*CLIP, "tiny"],
  "coco_zeroshot": CLIP,
  "tgdt": [f"{s}_{p}" for s in ("f30k", "coco") for p in TGDT],
  "hat": ["f30k", "coco"],
  "hat_clip_vit": ["", "shapes"],
  "team_swin": ["", "shapes"],
  "team_pretrain": ["vit_b16", "clip_l14"],
  "team_ft": ["coco_clip_l14", "coco_vit_b16", "f30k_clip_l14", "f30k_vit_b16"],
  "team_eval": ["vit_b16", "clip_l14", "chinese_l14"],
}
ALL = [(name, variant) for name, variants in CONFIGS.items() for variant in variants]


def get_config(name, variant):
  return config_lib.load(ROOT / "configs" / f"{name}.py", variant or None)


def test_every_config_is_listed():
  assert {p.stem for p in (ROOT / "configs").glob("*.py")} == set(CONFIGS)


# Configs without training; the others have a recorded parameter table.
UNTRAINED = {"coco_zeroshot", "zerovl_eval", "zerovl_linear_probe", "team_eval"}

# Configs with equal tables: (pattern of NAME-VARIANT, whose file is used); the first match counts.
SHARED = [
  (r"f30k_ft-(.*)", r"coco_ft-\1"),
  (r"tgdt-(f30k|coco)_(all|global|local)", "tgdt-f30k_all"),
  (r"tgdt-coco_(.*)", r"tgdt-f30k_\1"),
  (r"hat-coco", "hat-f30k"),
  (r"zerovl_pretrain-zerovl", "zerovl_pretrain-dga"),
  (r"zerovl_ft-.*", "zerovl_ft-coco"),
  (r"team_ft-(coco|f30k)_(.*)", r"team_pretrain-\2"),
]
TABLES = ROOT / "tests" / "tables"


def table_file(name, variant) -> pathlib.Path:
  own = f"{name}-{variant}" if variant else name
  owner = next((re.sub(p, to, own) for p, to in SHARED if re.fullmatch(p, own)), own)
  return TABLES / f"{owner}.txt"


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    pytest.param(name, variant, marks=[pytest.mark.full] if variant != variants[0] else [])
    for name, variants in CONFIGS.items()
    for variant in variants
  ],
)
def test_config_builds_full_size(name, variant, tmp_path):
  """Shapes, shardings and optimizer at full size, abstractly, against the recorded table.

  The tables make a change of a recipe visible in review. XMODAL_WRITE_TABLES=1 rewrites them.
  """
  config = config_lib.resolve(get_config(name, variant))
  if config.text.vocab:  # a file that the user provides
    config.text.vocab = str(tmp_path / "vocab.txt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(config.model.text.vocab - 4))]
    pathlib.Path(config.text.vocab).write_text("\n".join(words))
  config.mesh = (("data", 2), ("fsdp", 2), ("model", 2))
  built = setup.build(config)
  run = schedules.RunLength(100_000, config.batch_size, config.total)
  tx = built.optimizer(
    config.optim, schedules.make_schedule(config.optim, run), run.steps_per_epoch
  )
  built.state_shardings(tx)
  schedules.duration_to_steps(config.eval.every, run.steps_per_epoch)
  schedules.duration_to_steps(config.checkpoint.every, run.steps_per_epoch)
  transform = inputs.from_config(config).transform
  assert transform is None if config.data.regions else transform.crop == config.model.image.size
  if name in UNTRAINED:
    return
  table = factory.table(config.optim, built.params, built.params_shardings) + "\n"
  path = table_file(name, variant)
  if os.environ.get("XMODAL_WRITE_TABLES") and path.stem in (f"{name}-{variant}", name):
    path.write_text(table)
  assert table == path.read_text(), (
    f"{name}:{variant} differs from {path}. If intended, XMODAL_WRITE_TABLES=1 rewrites the "
    "file; if several configs share it and only some changed, remove those from SHARED"
  )


def test_every_table_belongs_to_a_config_and_none_is_duplicated():
  files = {table_file(*c) for c in ALL if c[0] not in UNTRAINED}
  assert files == set(TABLES.iterdir())
  assert len({f.read_text() for f in files}) == len(files)


@pytest.mark.parametrize("recipe", ["original", "original_fp16"])
def test_original_recipe(recipe):
  config = get_config("coco_ft", "vit_b16")
  config.recipe = recipe
  c = config_lib.resolve(config)
  assert (c.data.train, c.eval.select, c.optim.schedule) == ("train", "test", "clip_itm")
  assert c.batch_size == 128 and c.optim.bounds == ()
  half = recipe == "original_fp16"
  assert (c.dtype, c.optim.round_to) == (("float16", "float16") if half else ("float32", ""))
  # The command line takes precedence.
  config.optim.schedule = "cosine"
  assert config_lib.resolve(config, {"optim.schedule": "cosine"}).optim.schedule == "cosine"
  config.recipe = "orginal"
  with pytest.raises(
    ValueError, match=r"'orginal': expected one of config\.recipes, default, orig"
  ):
    config_lib.resolve(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_recipes_in_float32_multiply_in_float32(path):
  """At the default precision, accelerators round the inputs of float32 products."""
  for recipe in config_lib.load(path).recipes.values():
    values = {k.replace("/", "."): v for k, v in recipe.items()}
    if values.get("dtype") == "float32":
      assert values.get("precision") == "highest"


def test_original_recipe_of_team():
  """LAMB with trust ratios of the original's tensors covers every parameter at full size."""
  config = get_config("team_ft", "coco_clip_l14")
  config.recipe = "original"
  c = config_lib.resolve(config)
  assert (c.model.same_image, c.data.rand_augment_mode) == ("zero", "original")
  assert (c.optim.trust, c.optim.schedule, c.optim.bounds) == ("original", "step", ())
  built = setup.build(c)
  schedule = schedules.make_schedule(c.optim, schedules.RunLength(100_000, c.batch_size, c.total))
  assert built.optimizer(c.optim, schedule).update
  params = nnx.to_pure_dict(built.params)
  decay = factory.per_param("optim.decay", c.optim.decay, params)
  tensors = conversion.tensors_of(tables.rule_table(c.model.system).RULES, params)
  groups = factory.trust_groups("original", decay, params, tensors)
  assert sum(len(paths) for paths, _ in groups) == len(jax.tree.leaves(params))
  qkv = tuple(f"image/clip/blocks/{x}/kernel" for x in "qkv")
  assert (qkv, True) in groups


def run_main(*args):
  command = [sys.executable, "-m", "xmodal_jax.main", *args]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_unknown_key_is_an_error(tmp_path):
  out = run_main("--config=configs/shapes.py", f"--workdir={tmp_path}", "--config.optim.lrr=1")
  assert out.returncode != 0 and 'Did you mean "lr" instead of "lrr"' in out.stderr


@pytest.mark.full
def test_missing_data_set_is_an_error(tmp_path):
  config = "--config=configs/coco_ft.py:tiny"
  data = f"--config.data.dir={tmp_path / 'none'}"
  out = run_main(config, f"--workdir={tmp_path}", data)
  last = out.stderr.strip().splitlines()[-1]
  assert out.returncode != 0 and "no such dataset folder" in last and "prepare_data.py" in last


def test_import_is_light():
  code = (
    "import sys, time; t = time.time(); import xmodal_jax; "
    "bad = [m for m in ('tensorflow', 'torch', 'jax') if m in sys.modules]; "
    "assert not bad, bad; assert time.time() - t < 2; "
    "import xmodal_jax.runtime.step, xmodal_jax.models.clip; "
    "import xmodal_jax.evaluation.metrics, xmodal_jax.checkpoints.restore; "
    "bad = [m for m in ('tensorflow', 'torch') if m in sys.modules]; assert not bad, bad"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_durations():
  assert schedules.duration_to_steps("500 steps", 7) == 500
  assert schedules.duration_to_steps("2.5 epochs", 10) == 25
  assert schedules.duration_to_steps("1 epoch", 10) == 10
  with pytest.raises(ValueError, match=r"expected e\.g\. '500 steps'"):
    schedules.duration_to_steps("five epochs", 10)


def test_rules_first_match_wins_and_none_is_an_error():
  rules = ((r"bias$", 0.0), (r"^image/", 0.1))
  assert factory.first_match("optim.decay", rules, "image/q/bias") == 0.0
  assert factory.first_match("optim.decay", rules, "image/q/kernel") == 0.1
  with pytest.raises(ValueError, match=r"optim\.decay: no rule matches parameter text/pos"):
    factory.first_match("optim.decay", rules, "text/pos")


def optimizer(params, **changes):
  c = config_lib.base().optim
  for key, value in changes.items():
    with c.ignore_type():
      c[key] = value
  schedule = lambda step, xp=jnp: xp.asarray(0.1)
  return factory.make_optimizer(c, schedule, params)


def step(tx, params, grads):
  updates, _ = tx.update(grads, tx.init(params), params)
  return jax.tree.map(jnp.add, params, updates)


def test_decay_multiples_bounds_and_rounding():
  params = {"a": {"kernel": jnp.float32([2.0])}, "b": {"bias": jnp.float32([2.0])}}
  zero = jax.tree.map(jnp.zeros_like, params)
  new = step(optimizer(params, weight_decay=0.5), params, zero)
  np.testing.assert_allclose(new["a"]["kernel"], 2 - 0.1 * 0.5 * 2)  # lr * decay * parameter
  np.testing.assert_allclose(new["b"]["bias"], 2.0)
  one = jax.tree.map(jnp.ones_like, params)
  lr_mult = ((r"^a/", 0.1), (".*", 1.0))
  new = step(optimizer(params, weight_decay=0.0, lr_mult=lr_mult), params, one)
  np.testing.assert_allclose(new["a"]["kernel"], 2 - 0.01, rtol=1e-6)
  np.testing.assert_allclose(new["b"]["bias"], 2 - 0.1, rtol=1e-6)
  new = step(optimizer(params, weight_decay=0.0, bounds=(("^b/", 1.99, 5.0),)), params, one)
  np.testing.assert_allclose(new["a"]["kernel"], 1.9, rtol=1e-6)
  np.testing.assert_allclose(new["b"]["bias"], 1.99, rtol=1e-6)
  rounding = dict(round_to="float16", round_paths=("kernel$",))
  new = step(optimizer(params, weight_decay=0.0, **rounding), params, one)
  assert new["a"]["kernel"] == np.float32(np.float16(1.9))
  assert new["b"]["bias"] != np.float32(np.float16(1.9))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedule_in_jax_is_the_float64_one(name):
  run = schedules.RunLength(413_915, 128, "5 epochs")
  c = tiny.optim(lr=1e-5, warmup="500 steps", end=0.1, schedule=name, milestones=["3000 steps"])
  schedule = schedules.make_schedule(c, run)
  steps = np.array([0, 1, 499, 500, 501, 3232, 3233, 9000, run.total_steps - 1])
  np.testing.assert_allclose(jax.jit(schedule)(steps), schedule(steps, np), rtol=2e-5)
  if name == "cosine":
    assert schedule(0, np) == pytest.approx(2e-8) and schedule(499, np) == pytest.approx(1e-5)
    assert schedule(run.total_steps, np) == pytest.approx(1e-6)


@pytest.mark.parametrize("total", ["5 epochs", "500 steps", "300 steps"])
def test_staircase_decays_over_the_whole_run(total):
  """Its position after the last step is the end of the cosine, however the length is given."""
  run = schedules.RunLength(1000, 10, total)
  config = tiny.optim(lr=1.0, warmup="0 steps", end=0.0, schedule="clip_itm")
  schedule = schedules.make_schedule(config, run)
  half, end = (schedule(run.total_steps * x // 2, np) for x in (1, 2))
  assert end == pytest.approx(0, abs=1e-9) and 0.4 < half < 0.75
  in_epochs = schedules.RunLength(1000, 10, f"{run.total_steps / 100} epochs")
  steps = np.arange(run.total_steps)
  np.testing.assert_array_equal(
    schedules.make_schedule(config, in_epochs)(steps, np), schedule(steps, np)
  )


def test_published_learning_rates():
  import golden_files

  want = golden_files.arrays("clip", "eval", "lr_schedule.npz")
  runs = {"vit_b16": (128, "5 epochs"), "vit_b32_10ep": (256, "10 epochs")}
  make = functools.partial(tiny.optim, warmup="500 steps", end=0.0, schedule="clip_itm")
  checked = 0
  for name, (batch, total) in runs.items():
    keys = [k for k in want if k.startswith(name)]
    if not keys:
      continue
    run = schedules.RunLength(413_915, batch, total)
    schedule = schedules.make_schedule(make(lr=1e-5), run)
    step = want[next(k for k in keys if "step" in k)]
    lr = want[next(k for k in keys if "lr" in k.removeprefix(name))]
    # Recorded positions count captions; the schedule counts steps.
    ours = step // run.samples * run.steps_per_epoch + step % run.samples
    np.testing.assert_allclose(
      schedule(ours, np), lr, **golden_files.manifest("clip")["tolerance"]["lr"]
    )
    checked += 1
  assert checked


def test_frozen_parameters_start_later():
  """Frozen parameters do not change, not even by weight decay; their moments start after it."""
  params = {"a": {"kernel": jnp.float32([2.0, -1.0])}, "b": {"kernel": jnp.float32([2.0, -1.0])}}
  grads = [jax.tree.map(lambda p: p * k, params) for k in (3.0, -0.7, 1.3, 0.4)]
  settings = tiny.optim(weight_decay=0.3, grad_clip=1e9)
  schedule = lambda step, xp=jnp: xp.asarray(0.1)
  late = factory.make_optimizer(
    settings | dict(freeze=[("^b/", "2 epochs")]), schedule, params, (), 1
  )
  plain = factory.make_optimizer(settings, schedule, params)

  def run(tx, params, grads):
    state, out = tx.init(params), []
    for g in grads:
      updates, state = tx.update(g, state, params)
      params = jax.tree.map(jnp.add, params, updates)
      out.append(params)
    return out

  ours, from_start = run(late, params, grads), run(plain, params, grads)
  fresh = run(plain, params, grads[2:])
  for k in range(4):
    np.testing.assert_allclose(ours[k]["a"]["kernel"], from_start[k]["a"]["kernel"], rtol=1e-5)
    want = params if k < 2 else fresh[k - 2]
    np.testing.assert_allclose(ours[k]["b"]["kernel"], want["b"]["kernel"], rtol=1e-5)
