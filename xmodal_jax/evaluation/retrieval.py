"""Image-text retrieval: embed a split once, score all pairs in blocks, rank, report."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import records
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.evaluation import batching, cache, metrics, rerank, tables
from xmodal_jax.evaluation import report as report_lib
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.evaluation.batching import Interrupted
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.runtime import workdir as workdir_lib

# Sections of the config that embeddings depend on; of eval.batch_size those of a model that attends
# to the padding of a batch (tgdt's model.mask_upper_stack).
_CACHE_SECTIONS = ("model", "text", "dtype", "precision", "data", "eval.batch_size")


def evaluate(config: Any, workdir: str) -> dict[str, Any]:
  """`--mode eval`: tests config.init, or the workdir's best checkpoint, and writes results.json.

  Raises ValueError, DatasetError, CheckpointError, NonFiniteError.
  """
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  inputs.check_processes("test")
  state, source = state_lib.load_state(built, config.init or workdir)
  evaluator = from_config(config, inputs, built)
  split = inputs.split("test")
  report_lib.grades(config.eval, split, compute=False)  # files that do not fit raise early
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  report = evaluator(state, "test", evaluator.cache_path(folder, split, source))
  tables.log_retrieval(f"test, {source['kind']}", report)
  return workdir_lib.write_results(
    folder,
    report,
    protocol=protocol(config.eval, split),
    dataset=workdir_lib.dataset_name(config.data),
    fingerprint=split.fingerprint,
    source=source,
  )


def from_config(
  config: Any,
  inputs: inputs_lib.Inputs,
  built: setup.Built,
  stop: Callable[[], bool] = lambda: False,
) -> "Evaluator":
  """The evaluator that the whole config describes."""
  cache_keys = cache.config_keys(config, _CACHE_SECTIONS, built.platform)
  return Evaluator(config.eval, inputs, built, cache_keys=cache_keys, stop=stop)


class Evaluator:
  """Retrieval metrics of parameters on splits. All splits have the same shapes: one compilation.

  options: config.eval. cache_keys: the config keys that embeddings depend on, part of the cache's
  file name. stop: called between batches and blocks; Interrupted is raised when it returns True.
  Raises ValueError for options that do not fit the mesh or the system.

  >>> evaluator = retrieval.from_config(config, inputs, built)
  >>> evaluator(state, "test")
  {"i2t_r1": 58.4, "i2t_r5": 81.5, ..., "rsum": 420.3, "mean_r": 70.05, "mean_r1": 48.1}
  """

  def __init__(
    self,
    options: Any,
    inputs: inputs_lib.Inputs,
    built: setup.Built,
    *,
    cache_keys: Mapping[str, Any],
    stop: Callable[[], bool] = lambda: False,
  ):
    report_lib.check(options)
    shards = sharding.batch_shards(built.mesh)
    for key, size in (("batch_size", options.batch_size), ("block", options.block[0])):
      if size % shards:
        raise ValueError(f"config.eval.{key} has {size} rows, not a multiple of {shards} devices")
    self.options, self.inputs, self.cache_keys, self.stop = options, inputs, cache_keys, stop
    self.batch_sharding, self.replicated = built.batch_sharding, built.replicated
    self.second = rerank.second_stage(options, built.system)
    self.streams = built.system.stream and self.second is None
    self.token_dtype = setup.compute_dtype(options.token_dtype, built.platform)
    self._make_steps(built)

  def _make_steps(self, built: setup.Built) -> None:
    graphdef, shardings = built.graphdef, (self.replicated, self.batch_sharding)
    self.embed = {
      side: step_lib.make_embed_step(graphdef, side, *shardings, built.system.second_stage)
      for side in ("image", "text")
    }
    # For streaming: image features keep the sharding of the batch.
    self.embed_sharded = step_lib.make_embed_step(graphdef, "image", *shardings, None)
    self.to_token_dtype = _make_cast(self.token_dtype, self.replicated)
    self.score = step_lib.make_score_step(graphdef, self.replicated)
    self.reranker = rerank.Reranker(
      graphdef,
      self.batch_sharding,
      block=self.options.block[1],
      shape=self.options.rerank_block,
    )

  def __call__(
    self, state: Any, split_key: str, cache_path: epath.Path | None = None
  ) -> dict[str, float]:
    """Metrics of `state` (anything with params and stats) on config.data[split_key].

    With two stages the final numbers have the plain names and those of the first stage begin with
    first_. cache_path: features of this state and split, read if the file exists, else written.
    Raises NonFiniteError for NaN or infinity in embeddings or scores, and Interrupted.
    """
    split = self.inputs.split(split_key)
    image_bank = self.bank(self._steps(len(split)))
    text_bank = self.bank(self._steps(int(split.captions_per_record.sum())))
    scores, caption_image, kept = self._first_stage(state, split, image_bank, text_bank, cache_path)

    def rank_first(part: report_lib.Part) -> metrics.Ranked:
      rows, columns = part
      block = scores[part]
      return metrics.Ranked(block, block, caption_image[columns] - (rows.start or 0))

    def rank_second(part: report_lib.Part) -> metrics.Ranked:
      # Each fold has its own shortlists: captions of other folds are no candidates.
      ranked = rank_first(part)
      lists = self.second_scores(state, ranked.i2t, image_bank, text_bank, kept, part)
      return rerank.combine(ranked, *lists)

    report = functools.partial(
      report_lib.report,
      self.options,
      split,
      graded=report_lib.grades(self.options, split),
      is_test=split_key == "test",
    )
    published = self.options.protocol == "original"
    if self.second is None:
      return report(rank_first, published=published)
    first_stage = {f"first_{k}": v for k, v in report(rank_first).items()}
    return report(rank_second, published=published) | first_stage

  def cache_path(
    self, workdir: epath.PathLike, split: records.Split, source: Any
  ) -> epath.Path | None:
    """Where the features of a split under the parameters of `source` are cached.

    None without config.eval.cache, and for systems whose token features are too large to cache.
    """
    if not self.options.cache or self.second is not None or self.streams:
      return None
    return cache.cache_file(workdir, "embeddings", self.cache_keys, split.fingerprint, source)

  def bank(self, steps: int) -> rerank.Bank | None:
    """Storage for the second-stage features of `steps` batches; None without a second stage."""
    if self.second is None:
      return None
    return rerank.Bank(steps, self.batch_sharding, self.token_dtype)

  def encode(
    self,
    state: Any,
    side: str,
    batches: Iterator[Mapping[str, np.ndarray]],
    bank: rerank.Bank | None = None,
  ) -> tuple[Any, np.ndarray]:
    """First-stage features of all valid rows as host arrays [N, ...], and their image_id int [N].

    side: "image" or "text". bank: where second-stage features are stored. When images are streamed,
    features have config.eval.token_dtype, because those of all texts can be gigabytes. Raises
    NonFiniteError.
    """

    def step(batch):
      batch = sharding.put_batch(batch, self.batch_sharding)
      features, second_stage = self.embed[side](state.params, state.stats, batch)
      if bank is not None:
        bank.add(second_stage, features["valid"])
      return self.to_token_dtype(features) if self.streams else features

    features, ids = batching.collect(step, batches, self.stop)
    for path, leaf in jax.tree_util.tree_leaves_with_path(features):
      if jnp.issubdtype(leaf.dtype, jnp.floating):  # np.issubdtype does not know bfloat16
        metrics.check_finite(f"{side} features{jax.tree_util.keystr(path)}", leaf)
    return features, ids

  def scores(self, state: Any, images: Any, texts: Any) -> np.ndarray:
    """First-stage scores float32 [I, T] of host features [I, ...] and [T, ...], on the host."""
    block_i, block_t = self.options.block
    out = np.empty((_length(images), _length(texts)), np.float32)
    for t in range(0, out.shape[1], block_t):
      texts_block = batching.put_block(texts, t, block_t, self.replicated)
      for i in range(0, out.shape[0], block_i):
        self._check_stop()
        images_block = batching.put_block(images, i, block_i, self.batch_sharding)
        block = self.score(state.params, state.stats, images_block, texts_block)
        rows, columns = min(block_i, len(out) - i), min(block_t, out.shape[1] - t)
        out[i : i + rows, t : t + columns] = jax.device_get(block)[:rows, :columns]
    return out

  def stream(
    self, state: Any, batches: Iterator[Mapping[str, np.ndarray]], texts: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """First-stage scores float32 [I, T] of image batches with host features of texts [T, ...].

    Returns the scores and image_id int [I]. Each batch is scored as it is encoded: image features,
    which can be megabytes per image, never leave the devices. Raises NonFiniteError, Interrupted.
    """
    count, block = _length(texts), self.options.block[1]

    def step(batch):
      batch = sharding.put_batch(batch, self.batch_sharding)
      out, images = self.embed_sharded(state.params, state.stats, batch)
      parts = []
      for t in range(0, count, block):
        self._check_stop()
        # Bounds the text blocks in flight, or all would be transferred before the first is scored.
        jax.block_until_ready(parts[-2:-1])
        texts_block = batching.put_block(texts, t, block, self.replicated)
        parts.append(self.score(state.params, state.stats, images, texts_block))
      return out | {"scores": jnp.concatenate(parts, axis=1)}

    found, ids = batching.collect(step, batches, self.stop)
    scores = found["scores"][:, :count]
    metrics.check_finite("scores", scores)
    return scores, ids

  def second_scores(
    self,
    state: Any,
    scores: np.ndarray,
    images: rerank.Bank,
    texts: rerank.Bank,
    kept: np.ndarray,
    part: report_lib.Part = report_lib.WHOLE,
  ) -> tuple[metrics.Shortlist, metrics.Shortlist]:
    """Second-stage scores of the best candidates of every image and of every caption.

    Args:
      scores: first stage, [I, T] of `part` of the images and captions.
      images, texts: the banks that `encode` filled.
      kept: bool, which valid captions of the bank are columns of the whole score matrix.

    Returns:
      (captions [I, k], their scores [I, k]) and (images [T, k'], their scores [T, k']).
    """
    top_k_text, top_k_image, mix = self.second
    captions = metrics.top(scores, top_k_text)  # [I, k]
    candidate_images = metrics.top(scores.T, top_k_image)  # [T, k']
    image, caption, inverse = rerank.unique_pairs(captions, candidate_images)
    image_places, text_places = images.places[part[0]], texts.places[kept][part[1]]
    out = self.reranker.scores(
      state, images, texts, image_places[image], text_places[caption], self._check_stop
    )
    if mix:
      out = out + np.float32(mix) * scores[image, caption]
    of_images, of_captions = np.split(out[inverse], [captions.size])
    return (
      (captions, of_images.reshape(captions.shape)),
      (candidate_images, of_captions.reshape(candidate_images.shape)),
    )

  def _first_stage(
    self,
    state: Any,
    split: records.Split,
    image_bank: rerank.Bank | None,
    text_bank: rerank.Bank | None,
    cache_path: epath.Path | None,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores float32 [I, T], caption_image int [T], kept): see `positions` for the last two."""
    if self.streams:
      texts, text_ids = self.encode(state, "text", self.inputs.texts(split))
      scores, image_ids = self.stream(state, self.inputs.images(split), texts)
      caption_image, kept = positions(image_ids, text_ids)
      return scores if kept.all() else scores[:, kept], caption_image, kept
    if cache_path and processes.visible_everywhere(cache_path):
      images, texts = cache.load_features(cache_path)
    else:
      images = self.encode(state, "image", self.inputs.images(split), image_bank)
      texts = self.encode(state, "text", self.inputs.texts(split), text_bank)
      if cache_path and jax.process_index() == 0:
        cache.save_features(cache_path, images, texts)
    (images, image_ids), (texts, text_ids) = images, texts
    caption_image, kept = positions(image_ids, text_ids)
    if not kept.all():
      texts = jax.tree.map(lambda x: x[kept], texts)
    return self.scores(state, images, texts), caption_image, kept

  def _steps(self, count: int) -> int:
    """Batches of `count` rows."""
    return -(-count // self.options.batch_size)

  def _check_stop(self) -> None:
    if self.stop():
      raise Interrupted


def protocol(options: Any, split: records.Split) -> dict[str, Any]:
  """How the numbers of a split are computed, for results.json. options: config.eval."""
  return dict(
    split=split.name,
    images=len(split),
    captions=int(split.captions_per_record.sum()),
    folds=options.folds,
    score_dtype=options.score_dtype,
    eccv_caption=bool(options.eccv_dir),
    ndcg=options.ndcg,
    published=options.protocol == "original",
    ties="lower index first",
  )


def evaluated_splits(options: Any) -> list[str]:
  """Keys of the splits that a training run evaluates. options: config.eval."""
  return sorted({options.select} | ({"test"} if options.test else set()))


def check_splits(options: Any, inputs: inputs_lib.Inputs) -> None:
  """Opens the splits of `evaluated_splits`, so that missing or unfit data raise before training.

  Raises ValueError, DatasetError, and FileNotFoundError for missing relevances.
  """
  for key in evaluated_splits(options):
    split = inputs.split(key)
    if key == "test" and options.folds and len(split) % options.folds:
      raise ValueError(
        f"config.eval.folds is {options.folds}, but split {split.name!r} has {len(split)} images, "
        "which do not divide into equal folds; set it to 0 for no folds"
      )
    report_lib.grades(options, split, compute=False)


def positions(image_id: np.ndarray, caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the score matrix that captions belong to, after unreadable images are left out.

  image_id [I], ascending, and caption_image [T] are positions in the split. Returns int [T'], the
  row of each kept caption, and bool [T], whether a caption's image was read.
  """
  row = np.searchsorted(image_id, caption_image)
  kept = (row < len(image_id)) & (image_id[np.minimum(row, len(image_id) - 1)] == caption_image)
  return row[kept], kept


def _make_cast(dtype: Any, out_sharding: Any) -> Callable[[Any], Any]:
  """A jitted function: tree -> the tree with its floating-point arrays in `dtype`."""

  def cast(x):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.jit(functools.partial(jax.tree.map, cast), out_shardings=out_sharding)


def _length(tree: Any) -> int:
  return len(jax.tree.leaves(tree)[0])
