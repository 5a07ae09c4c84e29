"""Durations below one step, schedules that do not fit a run, and regexes without effect."""

import logging
import pathlib
import re

import numpy as np
import pytest
import tiny

from xmodal_jax import config as config_lib
from xmodal_jax.errors import ConfigError
from xmodal_jax.optim import factory, schedules
from xmodal_jax.optim.schedules import RunLength, duration_to_steps
from xmodal_jax.runtime import setup

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
README = RunLength(samples=7000, batch_size=256, total="5 epochs")  # 135 steps


def test_what_is_shorter_than_a_step_is_one_step():
  for text in ("0.1 epochs", ".01 epoch", "1e-3 epochs", "0.4 steps", "1 epochs"):
    assert duration_to_steps(text, 4) == (4 if text == "1 epochs" else 1), text
  for text in ("0 epochs", "0 steps", "0.0 epochs"):
    assert duration_to_steps(text, 4) == 0, text
  assert duration_to_steps("5 epochs", 0) == 0  # fewer samples than a batch: nothing to train
  short = RunLength(samples=40, batch_size=10, total="2 epochs")  # 8 steps; 1 % of them: one
  share = schedules.make_schedule(tiny.optim(lr=1.0, warmup="1 %", warmup_from="zero"), short)
  assert share(0, np) == 0 and share(1, np) == 1


@pytest.mark.parametrize(
  "text",
  ["", "5", "epochs", "-1 steps", "1.2.3 steps", "1e999 steps", "nan epochs", "5 %", 5, None],
)
def test_other_durations_are_one_message(text):
  with pytest.raises(ConfigError, match=r"^duration .*: expected e\.g\. '500 steps'"):
    duration_to_steps(text, 10)


@pytest.mark.parametrize("name", ["coco_ft.py:vit_b32", "f30k_ft.py:vit_b32", "tgdt.py:f30k_all"])
def test_recipes_reach_their_rate_and_their_end_on_seven_thousand_captions(name):
  optim = config_lib.resolve(config_lib.load(f"{CONFIGS}/{name}")).optim
  rates = schedules.make_schedule(optim, README)(np.arange(README.total_steps), np)
  assert rates.max() == pytest.approx(optim.lr, rel=1e-2)
  assert rates[-1] < 0.01 * optim.lr and not schedules.unreached(optim, README)


def test_the_published_warm_ups_are_kept():
  for name, want in (("coco_ft", "500 steps"), ("f30k_ft", "200 steps")):
    config = config_lib.load(f"{CONFIGS}/{name}.py:vit_b16")
    for config.recipe in ("original", "original_fp16"):
      assert config_lib.resolve(config).optim.warmup == want


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    (dict(warmup="500 steps"), "has 500 steps and the run has 135 steps: .* 0.27 of 0.002 and nev"),
    (dict(warmup="135 steps", warmup_from="zero"), "reaches 0.99 of 0.002"),
    (dict(schedule="step", warmup="0 steps"), "step_every='10 epochs' is 270 steps and the run ha"),
    (dict(schedule="milestones", milestones=("2 epochs", "9 epochs")), "'9 epochs' .step 243. are"),
  ],
)
def test_a_run_too_short_for_its_schedule_says_so(changes, text, caplog):
  optim = tiny.optim(lr=2e-3, **changes)
  with caplog.at_level(logging.WARNING):
    schedules.warn_of_unreached(optim, README)
  (record,) = caplog.records
  assert record.getMessage().startswith("config.optim: ")
  assert re.search(text, record.getMessage()), record.getMessage()


def test_schedules_that_fit_say_nothing():
  fit = [dict(warmup="135 steps"), dict(warmup="0 steps"), dict(schedule="constant")]
  fit += [dict(schedule="step", step_every="4 epochs"), dict(schedule="linear", warmup="1 epochs")]
  for changes in fit:
    assert not schedules.unreached(tiny.optim(**changes), README), changes


PARAMS = {
  "image": {"q": {"kernel": np.ones(2), "bias": np.ones(2)}},
  "text": {"q": {"kernel": np.ones(2)}},
  "logit_scale": np.ones(()),
}


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    (dict(bounds=(("^logit_scal$", 0.0, 4.6),)), r"bounds: '\^logit_scal\$' matches no parameter"),
    (dict(freeze=(("^vision/", "1 epochs"),)), r"freeze: '\^vision/' matches no parameter"),
    (dict(lr_mult=(("kernels", 0.1), (".*", 1.0))), r"lr_mult: 'kernels' matches no parameter"),
    (dict(decay=(("bias", 0.0), ("scale0", 1.0), (".*", 1.0))), r"decay: 'scale0' matches no"),
    (dict(round_to="float16", round_paths=("kernel", "wi")), r"round_paths: 'wi' matches no par"),
    (dict(decay=((".*", 1.0), ("bias$", 0.0))), r"decay: 'bias\$' has no effect, .* 1 parameters"),
  ],
)
def test_a_regex_without_effect_is_an_error(changes, text):
  with pytest.raises(ConfigError, match=r"^config\.optim\." + text) as e:
    factory.check_rules(tiny.optim(**changes), PARAMS)
  listed = "The parameters are:\n  image/q/bias\n  image/q/kernel\n  logit_scale" in str(e.value)
  assert listed == ("matches no parameter" in str(e.value))


def test_all_regexes_without_effect_are_listed_and_those_with_effect_pass():
  wrong = dict(bounds=(("xx", 0, 1), ("yy", 0, 1)), freeze=(("z", "1 steps"),))
  with pytest.raises(ConfigError) as e:
    factory.check_rules(tiny.optim(**wrong), PARAMS)
  assert len(re.findall("matches no parameter", str(e.value))) == 3
  right = dict(bounds=(("^logit_scale$", 0, 1),), freeze=(("^image/", "1 steps"),))
  right |= dict(decay=(("kernel$|bias$|scale$", 1.0), (".*", 0.0)), round_paths=("unused",))
  factory.check_rules(tiny.optim(**right), PARAMS)


def test_the_program_checks_the_regexes():
  built = setup.build(tiny.config("unused"))
  optim = tiny.optim(freeze=(("^visual/", "1 epochs"),))
  with pytest.raises(ConfigError, match=r"config\.optim\.freeze: '\^visual/' matches no parameter"):
    built.optimizer(optim, lambda step, xp=np: 0.1)
