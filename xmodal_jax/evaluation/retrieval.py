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
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import batching, cache, checks, metrics, rerank, tables
from xmodal_jax.evaluation import report as report_lib
from xmodal_jax.evaluation import scored as scored_lib
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.evaluation.batching import Interrupted
from xmodal_jax.runtime import results, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.runtime import workdir as workdir_lib

# Sections of the config that embeddings depend on; of eval.batch_size those of a model that attends
# to the padding of a batch (tgdt's model.mask_upper_stack).
_CACHE_SECTIONS = ("model", "text", "dtype", "precision", "data", "eval.batch_size")


def evaluate(config: Any, workdir: str, init_given: bool = False) -> dict[str, Any]:
  """`--mode eval`: tests a model and writes its results, see `results.write`.

  The model is the workdir's best checkpoint if it has one, unless init_given, that config.init was
  set on the command line; else config.init. Raises ConfigError, DatasetError, CheckpointError,
  NonFiniteError, FileNotFoundError.
  """
  folder = workdir_lib.absolute(workdir)
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  keys = ["test", *(["val"] if config.eval.stage_mixes else [])]
  checks.check_splits(config.eval, inputs, keys)
  inputs.check_processes(*keys)
  evaluator = from_config(config, inputs, built)
  state, source = state_lib.load_state(built, state_lib.choose(config.init, folder, init_given))
  folder.mkdir(parents=True, exist_ok=True)
  return test(evaluator, state, folder, source, config.data)


def test(
  evaluator: "Evaluator",
  state: Any,
  folder: epath.Path,
  source: Mapping[str, Any],
  data: Any,
  *,
  run: bool = False,
  files: str = "",
) -> dict[str, Any]:
  """Evaluates the test split, logs a table, and writes and returns the results.

  Args:
    source: where the parameters of `state` come from. data: config.data.
    run: whether `folder` is the workdir of the run that trained `state`.
    files: digest of the parameters, if `source` does not have one.

  Raises:
    NonFiniteError, and Interrupted.
  """
  split = evaluator.inputs.split("test")
  path = evaluator.cache_path(folder, split, dict(source) | ({"files": files} if files else {}))
  report, scored = evaluator.evaluate(state, "test", path)
  tables.log_retrieval(f"test, {state_lib.describe(source)}", report, evaluator.options.metric)
  return results.write(
    folder,
    report,
    protocol=evaluator.protocol(split, report) | scored.facts(),
    dataset=results.dataset_name(data),
    fingerprint=split.fingerprint,
    source=source,
    run=run,
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
  Raises ConfigError for options that do not fit the mesh or the system.

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
        raise ConfigError(f"config.eval.{key} has {size} rows, not a multiple of {shards} devices")
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
    """The numbers of `evaluate`."""
    return self.evaluate(state, split_key, cache_path)[0]

  def evaluate(
    self, state: Any, split_key: str, cache_path: epath.Path | None = None
  ) -> tuple[dict[str, float], scored_lib.Scored]:
    """Metrics of `state` (anything with params and stats) on config.data[split_key], and of what.

    With two stages the final numbers have the plain names and those of the first stage begin with
    first_; if their weights are chosen (config.eval.stage_mixes), stage_mix is the chosen one.
    cache_path: features of this state and split, read if the file exists, else written. Raises
    NonFiniteError for NaN or infinity in embeddings or scores, and Interrupted.
    """
    split = self.inputs.split(split_key)
    mix = self._mix(state, split_key)  # before the banks of this split take up memory
    banks = tuple(
      self.bank(self._steps(n)) for n in (len(split), int(split.captions_per_record.sum()))
    )
    scores, scored = self._first_stage(state, split, *banks, cache_path)
    report = functools.partial(
      report_lib.report,
      self.options,
      split,
      graded=report_lib.grades(self.options, split),
      is_test=split_key == "test",
      image_id=scored.image_id,
    )

    def rank_first(part: report_lib.Part) -> metrics.Ranked:
      rows, columns = part
      block = scores[part]
      return metrics.Ranked(block, block, scored.caption_image[columns] - (rows.start or 0))

    def candidates(part: report_lib.Part) -> rerank.Lists:
      # Each fold has its own shortlists: captions of other folds are no candidates.
      return self.second_scores(state, scores[part], *banks, scored.kept, part, mix=0)

    def rank_second(part: report_lib.Part, mix: float, lists: rerank.Lists | None = None):
      ranked = rank_first(part)
      lists = rerank.mixed(ranked.i2t, lists or candidates(part), mix)
      return rerank.combine(ranked, *lists)

    published = self.options.protocol == "original"
    if self.second is None:
      return report(rank_first, published=published), scored
    first_stage = {f"first_{k}": v for k, v in report(rank_first).items()}
    report = functools.partial(report, published=published)
    if mix is not None:
      numbers = report(functools.partial(rank_second, mix=mix))
    else:  # the validation split, which has no folds
      lists = candidates(report_lib.WHOLE)
      mix, numbers = report_lib.best_of(
        self.second.mixes,
        lambda mix: report(functools.partial(rank_second, mix=mix, lists=lists)),
        self.options.metric,
      )
    chosen = {"stage_mix": mix} if self.second.mixes else {}
    return numbers | chosen | first_stage, scored

  def _mix(self, state: Any, split_key: str) -> float | None:
    """Weight of the first-stage score; None if it is chosen on this split, which is "val"."""
    if self.second is None or not self.second.mixes:
      return self.second and self.second.mix
    return None if split_key == "val" else self(state, "val")["stage_mix"]

  def protocol(self, split: records.Split, report: Mapping[str, float]) -> dict[str, Any]:
    """How the numbers `report` of a split are computed, for results.json."""
    options, second = self.options, {}
    if self.second is not None:
      second = dict(top_k_text=self.second.top_k_text, top_k_image=self.second.top_k_image)
      second["stage_mix"] = report.get("stage_mix", self.second.mix)
    return second | dict(
      split=split.name,
      folds=options.folds,
      score_dtype=options.score_dtype,
      eccv_caption=bool(options.eccv_dir),
      ndcg=options.ndcg,
      published=options.protocol == "original",
      ties="lower index first",
    )

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
    mix: float | None = None,
  ) -> rerank.Lists:
    """Second-stage scores of the best candidates of every image and of every caption.

    Args:
      scores: first stage, [I, T] of `part` of the images and captions.
      images, texts: the banks that `encode` filled.
      kept: bool, which valid captions of the bank are columns of the whole score matrix.
      mix: weight of the first-stage score; None: that of the config.

    Returns:
      (captions [I, k], their scores [I, k]) and (images [T, k'], their scores [T, k']).
    """
    captions = metrics.top(scores, self.second.top_k_text)  # [I, k]
    candidate_images = metrics.top(scores.T, self.second.top_k_image)  # [T, k']
    image, caption, inverse = rerank.unique_pairs(captions, candidate_images)
    image_places, text_places = images.places[part[0]], texts.places[kept][part[1]]
    out = self.reranker.scores(
      state, images, texts, image_places[image], text_places[caption], self._check_stop
    )
    of_images, of_captions = np.split(out[inverse], [captions.size])
    lists = (
      (captions, of_images.reshape(captions.shape)),
      (candidate_images, of_captions.reshape(candidate_images.shape)),
    )
    return rerank.mixed(scores, lists, self.second.mix if mix is None else mix)

  def _first_stage(
    self,
    state: Any,
    split: records.Split,
    image_bank: rerank.Bank | None,
    text_bank: rerank.Bank | None,
    cache_path: epath.Path | None,
  ) -> tuple[np.ndarray, scored_lib.Scored]:
    """Scores float32 [I, T], and which images and captions they are of."""
    images = texts = None
    if cache_path and processes.visible_everywhere(cache_path):
      (images, image_ids), (texts, text_ids), left_out = cache.load_features(cache_path)
    else:
      text_batches, image_batches = self.inputs.texts(split), self.inputs.images(split)
      if self.streams:
        texts, text_ids = self.encode(state, "text", text_batches)
        scores, image_ids = self.stream(state, image_batches, texts)
      else:
        images, image_ids = self.encode(state, "image", image_batches, image_bank)
        texts, text_ids = self.encode(state, "text", text_batches, text_bank)
      left_out = scored_lib.left_out(split, image_ids, text_batches.bad | image_batches.bad)
      if cache_path and jax.process_index() == 0:
        cache.save_features(cache_path, (images, image_ids), (texts, text_ids), left_out)
    scored = scored_lib.match(image_ids, text_ids, left_out)
    if self.streams:
      return scores if scored.kept.all() else scores[:, scored.kept], scored
    if not scored.kept.all():
      texts = jax.tree.map(lambda x: x[scored.kept], texts)
    return self.scores(state, images, texts), scored

  def _steps(self, count: int) -> int:
    """Batches of `count` rows."""
    return -(-count // self.options.batch_size)

  def _check_stop(self) -> None:
    if self.stop():
      raise Interrupted


def _make_cast(dtype: Any, out_sharding: Any) -> Callable[[Any], Any]:
  """A jitted function: tree -> the tree with its floating-point arrays in `dtype`."""

  def cast(x):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.jit(functools.partial(jax.tree.map, cast), out_shardings=out_sharding)


def _length(tree: Any) -> int:
  return len(jax.tree.leaves(tree)[0])
