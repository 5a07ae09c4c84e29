"""Evaluation: embed once, score all pairs in blocks of static shape, rank, report."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.checkpoints import restore
from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import records
from xmodal_jax.distributed import processes, sharding
from xmodal_jax.evaluation import metrics, rerank
from xmodal_jax.evaluation import report as report_lib
from xmodal_jax.interop.local import local_copy
from xmodal_jax.models.base import System
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.runtime import workdir as workdir_lib


class Interrupted(Exception):
  """The run was asked to stop while it evaluated."""


class Evaluator:
  """Evaluates parameters on splits. Programs compile once: every split has the same shapes."""

  def __init__(
    self,
    config: Any,
    inputs: inputs_lib.Inputs,
    built: setup.Built,
    stop: Callable[[], bool] = lambda: False,
  ):
    self.config, self.inputs, self.stop = config, inputs, stop
    mesh, system, graphdef = built.mesh, built.system, built.graphdef
    self.batch_sharding, self.whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
    self.second = second_stage(config, system)
    report_lib.methods(config)  # raises for names that do not exist
    shards = sharding.batch_shards(mesh)
    for key, size in (("batch_size", config.eval.batch_size), ("block", config.eval.block[0])):
      if size % shards:
        raise ValueError(f"config.eval.{key} has {size} rows, not a multiple of {shards} devices")
    self.embed = {
      s: step_lib.make_embed_step(graphdef, s, self.whole, self.batch_sharding, system.second_stage)
      for s in ("image", "text")
    }
    self.score = step_lib.make_score_step(graphdef, self.whole)
    self.streams = system.stream and self.second is None
    self.token_dtype = setup.compute_dtype(config.eval.token_dtype, built.platform)
    self.narrow = _make_narrow(self.token_dtype, self.whole)
    self.keep = step_lib.make_embed_step(graphdef, "image", self.whole, self.batch_sharding, None)
    self.reranker = rerank.Reranker(
      graphdef, self.batch_sharding, block=config.eval.block[1], shape=config.eval.rerank_block
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
    if cache and processes.visible_everywhere(cache):
      (images, image_id), (texts, caption_image) = _load_features(cache)
    elif self.streams:
      texts, caption_image = self.encode(state, "text", self.inputs.texts(split))
      scores, image_id = self.stream(state, self.inputs.images(split), texts)
    else:
      images, image_id = self.encode(state, "image", self.inputs.images(split), image_bank)
      texts, caption_image = self.encode(state, "text", self.inputs.texts(split), text_bank)
      if cache and jax.process_index() == 0:
        _save_features(cache, (images, image_id), (texts, caption_image))
    caption_image, kept = positions(image_id, caption_image)
    if self.streams:
      scores = scores if kept.all() else scores[:, kept]
    else:
      if not kept.all():
        texts = jax.tree.map(lambda x: x[kept], texts)
      scores = self.scores(state, images, texts)
    graded = report_lib.grades(self.config, self.inputs, split_key)
    published = self.config.eval.protocol == "original"

    def first(part):
      rows, columns = part
      block, owner = scores[part], caption_image[columns] - (rows.start or 0)
      return metrics.Ranked(block, block, owner)

    def second(part):
      # Each part has shortlists of its own: captions of other folds are no candidates.
      ranked = first(part)
      lists = self.second_scores(state, ranked.i2t, image_bank, text_bank, kept, part)
      return rerank.combine(ranked, *lists)

    report = functools.partial(report_lib.report, self.config, split, split_key, graded=graded)
    if self.second is None:
      return report(first, published=published)
    out = report(second, published=published)
    return out | {f"first_{k}": v for k, v in report(first).items()}

  def cache_path(
    self, workdir: epath.PathLike, split: records.Split, source: Any
  ) -> epath.Path | None:
    """Where features of a split under the parameters of `source` are kept.

    None unless config.eval.cache, and where tokens of pictures are needed, which are not kept.
    """
    if not self.config.eval.cache or self.second is not None or self.streams:
      return None
    sections = ("model", "text", "dtype", "data")
    return cache_file(workdir, "embeddings", self.config, sections, split, source)

  def bank(self, steps: int) -> rerank.Bank | None:
    """Where features of the second stage are kept; None without one."""
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
    """Features of all valid rows as host arrays [N, ...], and their image_id [N].

    Those that only the second stage reads go into the bank. Features of texts that pictures are
    streamed past, which can be gigabytes, have config.eval.token_dtype.
    """

    def step(batch):
      batch = sharding.put_batch(batch, self.batch_sharding)
      features, kept = self.embed[side](state.params, state.stats, batch)
      if bank is not None:
        bank.add(kept, features["valid"])
      return self.narrow(features) if self.streams else features

    features, ids = collect(step, batches, self.stop)
    for path, leaf in jax.tree_util.tree_leaves_with_path(features):
      if jnp.issubdtype(leaf.dtype, jnp.floating):  # numpy's own does not know bfloat16
        metrics.check_finite(f"{side} features{jax.tree_util.keystr(path)}", leaf)
    return features, ids

  def scores(self, state: Any, images: Any, texts: Any) -> np.ndarray:
    """First-stage scores of all pairs on the host, float32 [I, T]."""
    block_i, block_t = self.config.eval.block
    length = lambda tree: len(jax.tree.leaves(tree)[0])
    out = np.empty((length(images), length(texts)), np.float32)
    for t in range(0, out.shape[1], block_t):
      texts_block = _block(texts, t, block_t, self.whole)
      for i in range(0, out.shape[0], block_i):
        self._check_stop()
        images_block = _block(images, i, block_i, self.batch_sharding)
        block = self.score(state.params, state.stats, images_block, texts_block)
        rows, columns = min(block_i, len(out) - i), min(block_t, out.shape[1] - t)
        out[i : i + rows, t : t + columns] = jax.device_get(block)[:rows, :columns]
    return out

  def stream(
    self, state: Any, batches: Iterator[Mapping[str, np.ndarray]], texts: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """First-stage scores float32 [I, T] with host features of texts, and image_id [I].

    Batch by batch: the features of a picture, which can be megabytes, never leave the devices.
    """
    count, block = len(jax.tree.leaves(texts)[0]), self.config.eval.block[1]

    def step(batch):
      out, images = self.keep(
        state.params, state.stats, sharding.put_batch(batch, self.batch_sharding)
      )
      parts = []
      for t in range(0, count, block):
        self._check_stop()
        # Or all texts would be on their way to the devices while the first are scored.
        jax.block_until_ready(parts[-2:-1])
        part = _block(texts, t, block, self.whole)
        parts.append(self.score(state.params, state.stats, images, part))
      return out | {"scores": jnp.concatenate(parts, axis=1)}

    found, ids = collect(step, batches, self.stop)
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
  ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(candidates, their second-stage scores), both [Q, k], of pictures and of captions.

    scores: first stage, [I, T] of the part of the pictures and captions that takes part. kept: bool
    [T'], which captions of the bank count.
    """
    top_text, top_image, mix = self.second
    captions = metrics.top(scores, top_text)  # [I, k]
    pictures = metrics.top(scores.T, top_image)  # [T, k]
    row = lambda candidates: np.repeat(np.arange(len(candidates)), candidates.shape[1])
    picture = np.concatenate([row(captions), pictures.ravel()])
    caption = np.concatenate([captions.ravel(), row(pictures)])
    # A pair that both directions chose is scored once.
    pair, back = np.unique(picture * scores.shape[1] + caption, return_inverse=True)
    picture, caption = np.divmod(pair, scores.shape[1])
    image_rows, text_rows = images.places[part[0]], texts.places[kept][part[1]]
    out = self.reranker.scores(
      state, images, texts, image_rows[picture], text_rows[caption], self._check_stop
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


def _make_narrow(dtype: Any, out_sharding: Any) -> Callable[[Any], Any]:
  """jitted tree -> the tree with its floating arrays in dtype."""
  one = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
  return jax.jit(functools.partial(jax.tree.map, one), out_shardings=out_sharding)


def collect(
  step: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
  batches: Iterator[Mapping[str, np.ndarray]],
  stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], np.ndarray]:
  """What `step` gives for all valid rows, as host arrays [N, ...], and their image_id [N].

  step: a host batch -> arrays [B, ...] on the devices, `valid` and `image_id` among them. Raises
  Interrupted when asked to stop.
  """
  found, filled, pending = None, 0, None

  def take(out):
    nonlocal found, filled
    out = jax.device_get(out)
    valid = out.pop("valid")
    new = jax.tree.map(lambda x: x[valid], out)
    if found is None:
      found = jax.tree.map(lambda x: np.empty((0, *x.shape[1:]), x.dtype), new)
    for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(new), strict=True):
      # In place: the system moves pages, so that gigabytes are never there twice.
      whole.resize((filled + len(part), *part.shape[1:]), refcheck=False)
      whole[filled:] = part
    filled += int(valid.sum())

  for batch in batches:
    if stop():
      raise Interrupted
    # One batch stays in flight, so that reading the next overlaps with computing this.
    out = step(batch)
    if pending is not None:
      take(pending)
    pending = out
  take(pending)
  return found, found.pop("image_id")


def cache_file(
  folder: epath.PathLike,
  name: str,
  config: Any,
  sections: Sequence[str],
  split: records.Split,
  source: Any,
) -> epath.Path:
  """NAME-HASH.npz in the folder, for what depends on these keys of the config and all keys below
  them, on the pictures of the split, and on the parameters of `source`."""
  flat = workdir_lib.flatten(config)
  below = lambda key: any(key == s or key.startswith(f"{s}.") for s in sections)
  relevant = {k: v for k, v in flat.items() if below(k)}
  key = json.dumps([relevant, split.fingerprint, source], sort_keys=True, default=str)
  return epath.Path(folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def load_state(config: Any, built: setup.Built, source: str) -> tuple[Any, dict[str, Any]]:
  """The parameters of `source` on the devices, and where they came from; see `init.load`."""
  params, stats, info = restore.load(
    source, config.model.system, built.params, built.stats, config.model
  )
  if "sha256" not in info:  # of a workdir, whose step may come again with other parameters
    info = dict(info) | {"sha256": _digest({"params": params, "stats": stats})}
  params = restore.put(params, built.params_shardings)
  stats = restore.put(stats, built.stats_shardings)
  return train_state.TrainState(step=None, params=params, stats=stats, opt_state=None), info


def _digest(tree: Mapping[str, Any]) -> str:
  """sha256 of the names and bytes of host arrays in nested dicts."""
  digest = hashlib.sha256()
  for path, leaf in sorted(restore.flat(tree).items()):
    digest.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()


def second_stage(config: Any, system: System) -> tuple[int, int, float] | None:
  """(captions per picture, pictures per caption, weight of the first stage); None: one stage."""
  e = config.eval
  pick = lambda given, own: own if given is None else given
  top = pick(e.top_k_text, system.top_k_text), pick(e.top_k_image, system.top_k_image)
  if top == (0, 0):
    return None
  if not system.second_stage or min(top) <= 0:
    raise ValueError(
      f"config.eval.top_k_text and top_k_image are {top}: a second stage needs both, and "
      f"{type(system).__name__} {'has' if system.second_stage else 'has none'}"
    )
  return *top, pick(e.stage_mix, system.stage_mix)


def splits(config: Any) -> list[str]:
  """Which splits a training run evaluates."""
  return sorted({config.eval.select} | ({"test"} if config.eval.test else set()))


def check_splits(config: Any, inputs: inputs_lib.Inputs) -> None:
  """Opens what will be evaluated: what is missing or does not fit shows at once."""
  e = config.eval
  for key in splits(config):
    images = len(inputs.split(key))
    if key == "test" and e.folds and images % e.folds:
      raise ValueError(
        f"config.eval.folds is {e.folds}, but split {config.data.test!r} has {images} pictures, "
        "which do not divide into them; set it to 0 for no folds"
      )
    report_lib.grades(config, inputs, key, compute=False)


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
    arrays |= {f"{side}/features/{k}": v for k, v in restore.flat(features).items()}
    arrays[f"{side}/ids"] = ids
  save_arrays(path, arrays)


def save_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes an .npz atomically: a reader sees no file, or all of it."""
  temporary = path.parent / (path.name + ".tmp")
  if "://" in str(path):  # an archive is written with seeking back, which object stores do not have
    np.savez(buffer := io.BytesIO(), **arrays)
    temporary.write_bytes(buffer.getbuffer())
  else:
    with temporary.open("wb") as f:
      np.savez(f, **arrays)
  temporary.replace(path)


def load_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """What `save_arrays` wrote."""
  with local_copy(path) as local, np.load(local, allow_pickle=False) as f:
    return {k: f[k] for k in f.files}


def _load_features(path: epath.Path) -> list[tuple[Any, np.ndarray]]:
  arrays = restore.nested(load_arrays(path))
  return [(arrays[side]["features"], arrays[side]["ids"]) for side in ("image", "text")]


def _block(tree: Any, start: int, size: int, to: NamedSharding) -> Any:
  """Rows start .. start + size of every leaf, zero-padded to the static shape, on the devices."""

  def one(x):
    part = x[start : start + size]
    part = np.pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1))
    return sharding.place(part, to)

  return jax.tree.map(one, tree)


def protocol(config: Any, name: str, split: records.Split) -> dict[str, Any]:
  """How the numbers of a split came about, for results.json; config: the `eval` section."""
  return dict(
    split=name,
    images=len(split),
    captions=int(split.captions_per_record.sum()),
    folds=config.folds,
    score_dtype=config.score_dtype,
    eccv_caption=bool(config.eccv_dir),
    ndcg=config.ndcg,
    published=config.protocol == "original",
    ties="lower index first",
  )


def log_table(name: str, report: Mapping[str, float]) -> None:
  """A table of each stage and of the published protocol, then every other number on one line."""
  first = "first_rsum" in report
  tables = {"first_": f"{name}, first stage"} if first else {}
  tables[""] = f"{name}, second stage" if first else name
  if "published_rsum" in report:
    tables["published_"] = f"{name}, published protocol"
  rows = [row for prefix, title in tables.items() for row in _table(title, report, prefix)]
  shown = ("first_", *(f"{p}{key}" for p in tables for key in ("i2t_", "t2i_", "rsum")))
  number = lambda k, v: f"{k} {v:.4f}" if "ndcg_" in k else f"{k} {v:.2f}"
  rest = [number(k, v) for k, v in report.items() if not k.startswith(shown)]
  logging.info("%s", "\n".join(rows + (["  ".join(rest)] if rest else [])))


def _table(name: str, report: Mapping[str, float], prefix: str = "") -> list[str]:
  start = f"{prefix}i2t_ndcg_"
  graded = [key.removeprefix(start) for key in report if key.startswith(start)]
  head = f"{'':14s} {'R@1':>7s} {'R@5':>7s} {'R@10':>7s} {'median':>7s} {'mean':>8s}"
  rows = [name, head + "".join(f" {'NDCG ' + g:>11s}" for g in graded)]
  for title, key in (("image to text", "i2t"), ("text to image", "t2i")):
    get = lambda m, key=key: report[f"{prefix}{key}_{m}"]
    recalls = " ".join(f"{get(m):7.2f}" for m in ("r1", "r5", "r10", "medr"))
    gains = "".join(f" {get(f'ndcg_{g}'):11.4f}" for g in graded)
    rows.append(f"{title:14s} {recalls} {get('meanr'):8.2f}{gains}")
  return [*rows, f"RSUM {report[f'{prefix}rsum']:.2f}"]


def evaluate(config: Any, workdir: str) -> dict[str, Any]:
  """`--mode eval`: the test split with config.init, or with the workdir's own best checkpoint."""
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  inputs.check_processes("test")
  source = config.init or workdir
  state, info = load_state(config, built, source)
  evaluator = Evaluator(config, inputs, built)
  report_lib.grades(config, inputs, "test", compute=False)  # a file that does not fit shows at once
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  cache = evaluator.cache_path(folder, inputs.split("test"), info)
  report = evaluator(state, "test", cache)
  log_table(f"test, {info['kind']}", report)
  split = inputs.split("test")
  return workdir_lib.write_results(
    folder,
    report,
    protocol=protocol(config.eval, config.data.test, split),
    dataset=workdir_lib.dataset_name(config.data),
    fingerprint=split.fingerprint,
    source=info,
  )
