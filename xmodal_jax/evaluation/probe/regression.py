"""Logistic regression on all features at once, with l2 chosen on held-out images."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.data import order
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import batching
from xmodal_jax.evaluation.probe import lbfgs
from xmodal_jax.evaluation.probe.classifier import Fitted, Params, Scorer
from xmodal_jax.evaluation.probe.features import Features
from xmodal_jax.runtime import metric_writers, setup


def regress(
  options: Any,
  built: setup.Built,
  train: Features,
  validation: Features | None,
  *,
  seed: int,
  writer: metric_writers.Writer,
  stop: Callable[[], bool],
) -> Fitted:
  """Fits the classifier with config.probe.l2, or with the best l2 if that is None.

  The best l2 has the highest top-1 on `validation`, or without one on a random share
  options.holdout of `train`. The returned classifier is fitted to these images as well.

  Args:
    options: config.probe. seed: draws the share. writer: gets a line for each l2 that is tried.

  Raises:
    Interrupted: `stop`, called before each fit, returned True.
  """
  x, y, held = _rows(options, train, validation, seed)
  shards = sharding.batch_shards(built.mesh)
  block = min(options.batch_size, -(-len(y) // shards) * shards)
  to = NamedSharding(built.mesh, P(None, *built.batch_sharding.spec))

  def put(array: np.ndarray) -> jax.Array:
    return sharding.place(batching.split_blocks(array, block), to)

  features, label = put(x), put(y)
  solve = lbfgs.make_fit(len(train.split.class_names), options.max_steps, built.replicated)

  def fit(l2: float, weight: jax.Array) -> tuple[Params, dict[str, float]]:
    if stop():
      raise batching.Interrupted
    l2_on_devices = sharding.place(np.float32(l2), built.replicated)
    params, facts = solve(features, label, weight, l2_on_devices)
    facts = {"l2": l2} | {k: v.item() for k, v in jax.device_get(facts).items()}
    if not facts["gradient"] <= lbfgs.TOLERANCE:
      text = "l2 %g: stopped after %d steps with a gradient of %.1e; see config.probe.max_steps"
      logging.warning(text, l2, facts["steps"], facts["gradient"])
    return params, facts

  tries, l2 = itertools.count(1), options.l2
  if l2 is None:
    scorer = Scorer(built.mesh, dataclasses.replace(train, features=x[held], label=y[held]), block)
    seen = put(np.asarray(~held, np.float32))

    def score(l2: float) -> float:
      params, facts = fit(l2, seen)
      report = scorer(params)
      writer.scalars(next(tries), "val", report | facts)
      logging.info("l2 %g: top-1 %.2f after %d steps", l2, report["top1"], facts["steps"])
      return report["top1"]

    l2 = lbfgs.search(score)
  params, facts = fit(l2, put(np.ones(len(y), np.float32)))
  return Fitted(next(tries), params, facts | dict(optim="lbfgs", train_images=len(y)))


def _rows(
  options: Any, train: Features, validation: Features | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(features [N, D], label [N], held bool [N]): rows to fit, and those that l2 is chosen on."""
  x, y = train.features, train.label
  if options.l2 is not None:
    return x, y, np.zeros(len(y), bool)
  if validation is None:
    permute = lambda positions: order.permute(positions, len(train), seed, 0)
    return x, y, lbfgs.held_out(len(train), options.holdout, permute)
  x = np.concatenate([x, validation.features])
  y = np.concatenate([y, validation.label])
  return x, y, np.arange(len(y)) >= len(train)
