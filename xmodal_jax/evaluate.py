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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax import build as build_lib
from xmodal_jax import config as config_lib
from xmodal_jax import init, metrics, rerank, sharding
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
    built: build_lib.Built,
    stop: Callable[[], bool] = lambda: False,
  ):
    self.config, self.inputs, self.stop = config, inputs, stop
    mesh, system, graphdef = built.mesh, built.system, built.graphdef
    self.rows, self.whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
    self.second = second_stage(config, system)
    shards = math.prod(mesh.shape[a] for a in sharding.BATCH_AXES if a in mesh.shape)
    for key, size in (("batch_size", config.eval.batch_size), ("block", config.eval.block[0])):
      if size % shards:
        raise ValueError(f"config.eval.{key} has {size} rows, not a multiple of {shards} devices")
    self.embed = {
      s: step_lib.make_embed_step(graphdef, s, self.whole, self.rows, system.second_stage)
      for s in ("image", "text")
    }
    self.score = step_lib.make_score_step(graphdef, self.whole)
    self.reranker = rerank.Reranker(
      graphdef, self.rows, block=config.eval.block[1], shape=config.eval.rerank_block
    )

  def __call__(
    self, state: Any, split_key: str, cache: epath.Path | None = None
  ) -> dict[str, float]:
    """Metrics of `state` (anything with params and stats) on config.data[split_key].

    With a second stage its metrics have the plain names, those of the first begin with first_.
    cache: an .npz with the features of this state and split, read if it exists, else written.
    Raises NonFiniteError where an embedding is NaN or infinite, Interrupted when asked to stop.
    """
    split = self.inputs.split(split_key)
    batches = lambda n: -(-n // self.config.eval.batch_size)
    image_bank = self.bank(batches(len(split)))
    text_bank = self.bank(batches(int(split.captions_per_record.sum())))
    if cache and cache.exists():
      (images, image_id), (texts, caption_image) = _load_features(cache)
    else:
      images, image_id = self.encode(state, "image", self.inputs.images(split), image_bank)
      texts, caption_image = self.encode(state, "text", self.inputs.texts(split), text_bank)
      if cache and jax.process_index() == 0:
        _save_features(cache, (images, image_id), (texts, caption_image))
    caption_image, kept = positions(image_id, caption_image)
    if not kept.all():
      texts = jax.tree.map(lambda x: x[kept], texts)
    scores = self.scores(state, images, texts)
    report = self.report(scores, caption_image, split, split_key)
    if self.second is None:
      return report
    reranked = self.rerank(state, scores, image_bank, text_bank, kept)
    parts = [self.report(s, caption_image, split, split_key) for s in reranked]
    return metrics.merge_directions(*parts) | {f"first_{k}": v for k, v in report.items()}

  def cache_path(
    self, workdir: epath.PathLike, split: records.Split, source: Any
  ) -> epath.Path | None:
    """Where features of a split under the parameters of `source` are kept.

    None unless config.eval.cache, and with a second stage, which needs all tokens again anyway.
    """
    if not self.config.eval.cache or self.second is not None:
      return None
    flat = config_lib.flatten(self.config)
    relevant = {
      k: v for k, v in flat.items() if k.split(".")[0] in ("model", "text", "dtype", "data")
    }
    key = json.dumps([relevant, split.fingerprint, source], sort_keys=True, default=str)
    return epath.Path(workdir) / f"embeddings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"

  def bank(self, steps: int) -> rerank.Bank | None:
    """Where features of the second stage are kept; None without one."""
    if self.second is None:
      return None
    return rerank.Bank(steps, self.rows, build_lib.compute_dtype(self.config.eval.token_dtype))

  def encode(
    self,
    state: Any,
    side: str,
    batches: Iterator[Mapping[str, np.ndarray]],
    bank: rerank.Bank | None = None,
  ) -> tuple[Any, np.ndarray]:
    """Features of all valid rows as host arrays [N, ...], and their image_id [N].

    Those that only the second stage reads go into the bank.
    """
    parts, ids, pending = [], [], None
    for batch in batches:
      self._check_stop()
      features, kept = self.embed[side](
        state.params, state.stats, sharding.put_batch(batch, self.rows)
      )
      if bank is not None:
        bank.add(kept, features["valid"])
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
        self._check_stop()
        images_block = jax.device_put(_block(images, i, block_i), self.rows)
        block = self.score(state.params, state.stats, images_block, texts_block)
        rows, columns = min(block_i, len(out) - i), min(block_t, out.shape[1] - t)
        out[i : i + rows, t : t + columns] = jax.device_get(block)[:rows, :columns]
    return out

  def rerank(
    self,
    state: Any,
    scores: np.ndarray,
    images: rerank.Bank,
    texts: rerank.Bank,
    kept: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores [I, T] of both directions, image to text and text to image, with the candidates of
    each query in front in the order of the second stage. kept: bool [T'], which captions count.
    """
    by_image, by_text = self.second_scores(state, scores, images, texts, kept)
    i2t = rerank.promote(scores, *by_image)
    t2i = rerank.promote(scores.T, *by_text)
    return i2t, np.ascontiguousarray(t2i.T)

  def second_scores(
    self, state, scores, images, texts, kept
  ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(candidates, their scores), both [Q, k], of pictures and of captions; see `rerank`."""
    top_text, top_image, mix = self.second
    captions = rerank.top(scores, top_text)  # [I, k]
    pictures = rerank.top(scores.T, top_image)  # [T, k]
    row = lambda candidates: np.repeat(np.arange(len(candidates)), candidates.shape[1])
    picture = np.concatenate([row(captions), pictures.ravel()])
    caption = np.concatenate([captions.ravel(), row(pictures)])
    # A pair that both directions chose is scored once.
    pair, back = np.unique(picture * scores.shape[1] + caption, return_inverse=True)
    picture, caption = np.divmod(pair, scores.shape[1])
    out = self.reranker.scores(
      state, images, texts, images.rows[picture], texts.rows[kept][caption], self._check_stop
    )
    if mix:
      out = out + np.float32(mix) * scores[picture, caption]
    out = out[back]
    first = captions.size
    by_image = captions, out[:first].reshape(captions.shape)
    return by_image, (pictures, out[first:].reshape(pictures.shape))

  def _check_stop(self) -> None:
    if self.stop():
      raise Interrupted

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


def second_stage(config: Any, system: type) -> tuple[int, int, float] | None:
  """(captions per picture, pictures per caption, weight of the first stage); None: one stage."""
  e = config.eval
  pick = lambda given, own: own if given is None else given
  top = pick(e.top_k_text, system.top_k_text), pick(e.top_k_image, system.top_k_image)
  if top == (0, 0):
    return None
  if not system.second_stage or min(top) <= 0:
    raise ValueError(
      f"config.eval.top_k_text and top_k_image are {top}: a second stage needs both, and "
      f"{system.__name__} {'has' if system.second_stage else 'has none'}"
    )
  return *top, pick(e.stage_mix, system.stage_mix)


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
  """The recalls of each stage as a table, then every other number on a line of its own."""
  first = {k.removeprefix("first_"): v for k, v in report.items() if k.startswith("first_")}
  rows = _table(f"{name}, first stage", first) if first else []
  rows += _table(f"{name}, second stage" if first else name, report)
  shown = ("i2t_", "t2i_", "first_")
  rest = [f"{k} {v:.2f}" for k, v in report.items() if not k.startswith(shown) and k != "rsum"]
  logging.info("%s", "\n".join(rows + (["  ".join(rest)] if rest else [])))


def _table(name: str, report: Mapping[str, float]) -> list[str]:
  rows = [name, f"{'':14s} {'R@1':>7s} {'R@5':>7s} {'R@10':>7s} {'median':>7s} {'mean':>8s}"]
  for title, key in (("image to text", "i2t"), ("text to image", "t2i")):
    values = [report[f"{key}_{m}"] for m in ("r1", "r5", "r10", "medr", "meanr")]
    rows.append(f"{title:14s} " + " ".join(f"{v:7.2f}" for v in values[:4]) + f" {values[4]:8.2f}")
  return [*rows, f"RSUM {report['rsum']:.2f}"]


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
  evaluator = Evaluator(config, inputs, built)
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  cache = evaluator.cache_path(folder, inputs.split("test"), info)
  report = evaluator(state, "test", cache)
  log_table(f"test, {info['kind']}", report)
  return workdir_lib.write_results(folder, config, inputs, report, info)
