"""Evaluation: embed once, score all pairs in blocks of static shape, rank, report."""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax import build as build_lib
from xmodal_jax import config as config_lib
from xmodal_jax import init, metrics, sharding
from xmodal_jax import inputs as inputs_lib
from xmodal_jax import step as step_lib
from xmodal_jax import workdir as workdir_lib
from xmodal_jax.data import records


class Interrupted(Exception):
  """The run was asked to stop while it evaluated."""


class Evaluator:
  """Evaluates parameters on splits. Programs compile once: every split has the same shapes."""

  def __init__(
    self,
    config: Any,
    inputs: inputs_lib.Inputs,
    graphdef: nnx.GraphDef,
    mesh: jax.sharding.Mesh,
    stop: Callable[[], bool] = lambda: False,
  ):
    self.config, self.inputs, self.stop = config, inputs, stop
    self.rows, self.whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
    shards = math.prod(mesh.shape[a] for a in sharding.BATCH_AXES if a in mesh.shape)
    for key, size in (("batch_size", config.eval.batch_size), ("block", config.eval.block[0])):
      if size % shards:
        raise ValueError(f"config.eval.{key} has {size} rows, not a multiple of {shards} devices")
    self.embed = {s: step_lib.make_embed_step(graphdef, s, self.whole) for s in ("image", "text")}
    self.score = step_lib.make_score_step(graphdef, self.whole)

  def __call__(
    self, state: Any, split_key: str, cache: epath.Path | None = None
  ) -> dict[str, float]:
    """Metrics of `state` (anything with params and stats) on config.data[split_key].

    cache: an .npz with the features of this state and split, read if it exists, else written.
    Raises NonFiniteError where an embedding is NaN or infinite, Interrupted when asked to stop.
    """
    split = self.inputs.split(split_key)
    if cache and cache.exists():
      (images, image_id), (texts, caption_image) = _load_features(cache)
    else:
      images, image_id = self.encode(state, "image", self.inputs.images(split))
      texts, caption_image = self.encode(state, "text", self.inputs.texts(split))
      if cache and jax.process_index() == 0:
        _save_features(cache, (images, image_id), (texts, caption_image))
    caption_image, kept = positions(image_id, caption_image)
    if not kept.all():
      texts = jax.tree.map(lambda x: x[kept], texts)
    scores = self.scores(state, images, texts)
    return self.report(scores, caption_image, split, split_key)

  def encode(
    self, state: Any, side: str, batches: Iterator[Mapping[str, np.ndarray]]
  ) -> tuple[Any, np.ndarray]:
    """Features of all valid rows as host arrays [N, ...], and their image_id [N]."""
    parts, ids, pending = [], [], None
    for batch in batches:
      if self.stop():
        raise Interrupted
      features = self.embed[side](state.params, state.stats, sharding.put_batch(batch, self.rows))
      # One batch stays in flight, so that reading the next overlaps with computing this.
      if pending is not None:
        self._take(pending, parts, ids)
      pending = features
    self._take(pending, parts, ids)
    features = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(features):
      if np.issubdtype(leaf.dtype, np.floating):
        metrics.check_finite(f"{side} features{jax.tree_util.keystr(path)}", leaf)
    return features, np.concatenate(ids)

  @staticmethod
  def _take(features: Any, parts: list, ids: list) -> None:
    features = jax.device_get(features)
    valid = features.pop("valid")
    ids.append(features.pop("image_id")[valid])
    parts.append(jax.tree.map(lambda x: x[valid], features))

  def scores(self, state: Any, images: Any, texts: Any) -> np.ndarray:
    """First-stage scores of all pairs on the host, float32 [I, T]."""
    block_i, block_t = self.config.eval.block
    length = lambda tree: len(jax.tree.leaves(tree)[0])
    out = np.empty((length(images), length(texts)), np.float32)
    for t in range(0, out.shape[1], block_t):
      texts_block = jax.device_put(_block(texts, t, block_t), self.whole)
      for i in range(0, out.shape[0], block_i):
        if self.stop():
          raise Interrupted
        images_block = jax.device_put(_block(images, i, block_i), self.rows)
        block = self.score(state.params, state.stats, images_block, texts_block)
        rows, columns = min(block_i, len(out) - i), min(block_t, out.shape[1] - t)
        out[i : i + rows, t : t + columns] = jax.device_get(block)[:rows, :columns]
    return out

  def report(
    self, scores: np.ndarray, caption_image: np.ndarray, split: records.Split, split_key: str
  ) -> dict[str, float]:
    """The metrics that the config asks for; ECCV Caption and CxC only on the test split."""
    config = self.config.eval
    if config.score_dtype != "float32":
      scores = scores.astype(config.score_dtype)
    if config.eccv_dir and split_key == "test":
      ids = [(r.image_id, r.caption_ids) for r in split]
      all_captions = [c for _, captions in ids for c in captions]
      folder = epath.Path(config.eccv_dir).expanduser()
      report = metrics.coco_protocol(
        scores, [i for i, _ in ids], all_captions, caption_image, folder
      )
      # The 5K numbers keep their plain names, whatever else is reported.
      plain = {k.removeprefix("coco_5k_"): v for k, v in report.items() if k[:8] == "coco_5k_"}
      return plain | {k: v for k, v in report.items() if k[:8] != "coco_5k_"}
    report = metrics.summarise(scores, caption_image)
    if config.folds and split_key == "test":
      folds = metrics.folds(scores, caption_image, config.folds)
      report |= {f"folds{config.folds}_{k}": v for k, v in folds.items()}
    return report


def check_splits(config: Any, inputs: inputs_lib.Inputs) -> None:
  """Opens what will be evaluated: a missing split or folds that do not divide show at once."""
  e = config.eval
  for key in {e.select} | ({"test"} if e.test else set()):
    images = len(inputs.split(key))
    if key == "test" and e.folds and images % e.folds:
      raise ValueError(
        f"config.eval.folds is {e.folds}, but split {config.data.test!r} has {images} pictures, "
        "which do not divide into them; set it to 0 for no folds"
      )


def positions(image_id: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the score matrix that captions belong to, once undecodable pictures are left out.

  image_id [I] ascending and caption_image [T] are positions in the split. Returns (int [T'],
  bool [T]): row of each kept caption, and which captions have their picture.
  """
  row = np.searchsorted(image_id, caption_image)
  kept = (row < len(image_id)) & (image_id[np.minimum(row, len(image_id) - 1)] == caption_image)
  return row[kept], kept


def cache_path(config: Any, workdir: epath.PathLike, split: records.Split, source: Any):
  """Where features of a split under these parameters are kept; None unless config.eval.cache."""
  if not config.eval.cache:
    return None
  flat = config_lib.flatten(config)
  relevant = {
    k: v for k, v in flat.items() if k.split(".")[0] in ("model", "text", "dtype", "data")
  }
  key = json.dumps([relevant, split.fingerprint, source], sort_keys=True, default=str)
  return epath.Path(workdir) / f"embeddings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _save_features(path: epath.Path, *sides: tuple[Any, np.ndarray]) -> None:
  arrays = {}
  for side, (features, ids) in zip(("image", "text"), sides, strict=True):
    arrays |= {f"{side}/features/{k}": v for k, v in init.flat(features).items()}
    arrays[f"{side}/ids"] = ids
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  temporary = path.parent / (path.name + ".tmp")
  temporary.write_bytes(buffer.getbuffer())
  temporary.replace(path)


def _load_features(path: epath.Path) -> list[tuple[Any, np.ndarray]]:
  with np.load(io.BytesIO(path.read_bytes())) as f:
    arrays = init.nested({k: f[k] for k in f.files})
  return [(arrays[side]["features"], arrays[side]["ids"]) for side in ("image", "text")]


def _block(tree: Any, start: int, size: int) -> Any:
  """Rows start .. start + size of every leaf, zero-padded to the static shape."""

  def one(x):
    part = x[start : start + size]
    return np.pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1))

  return jax.tree.map(one, tree)


def log_table(name: str, report: Mapping[str, float]) -> None:
  """The recalls as a table, then every other number on a line of its own."""
  rows = [f"{name:14s} {'R@1':>7s} {'R@5':>7s} {'R@10':>7s} {'median':>7s} {'mean':>8s}"]
  for title, key in (("image to text", "i2t"), ("text to image", "t2i")):
    values = [report[f"{key}_{m}"] for m in ("r1", "r5", "r10", "medr", "meanr")]
    rows.append(f"{title:14s} " + " ".join(f"{v:7.2f}" for v in values[:4]) + f" {values[4]:8.2f}")
  rows.append(f"RSUM {report['rsum']:.2f}")
  shown = ("i2t_", "t2i_")
  rest = [f"{k} {v:.2f}" for k, v in report.items() if not k.startswith(shown) and k != "rsum"]
  logging.info("%s", "\n".join(rows + (["  ".join(rest)] if rest else [])))


def evaluate(config: Any, workdir: str) -> dict[str, Any]:
  """`--mode eval`: the test split with config.init, or with the workdir's own best checkpoint."""
  built = build_lib.Built(config)
  inputs = inputs_lib.Inputs(config)
  source = config.init or workdir
  params, stats, info = init.load(source, config.model.system, built.params, built.stats)
  state = step_lib.TrainState(
    step=None,
    params=init.put(params, built.params_shardings),
    stats=init.put(stats, built.stats_shardings),
    opt_state=None,
  )
  evaluator = Evaluator(config, inputs, built.graphdef, built.mesh)
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  cache = cache_path(config, folder, inputs.split("test"), info)
  report = evaluator(state, "test", cache)
  log_table(f"test, {info['kind']}", report)
  return workdir_lib.write_results(folder, config, inputs, report, info)
