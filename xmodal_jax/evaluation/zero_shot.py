"""`--mode zeroshot_classify`: every picture gets the class whose texts score highest with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import records
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.distributed import sharding
from xmodal_jax.evaluation import metrics, retrieval
from xmodal_jax.models.base import l2_normalize
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import workdir as workdir_lib

Array = jax.Array

TEMPLATE = "a photo of a {}."


def class_ranks(scores: Array, label: Array) -> Array:
  """0-based rank of each row's own class, ties to the lower index: scores [B, C], label [B] -> [B].

  As `metrics` counts: a model that scores all classes alike is right by chance. -1 for a row that
  is not finite.
  """
  own = jnp.take_along_axis(scores, label[:, None], axis=1)
  before = jnp.arange(scores.shape[1]) < label[:, None]
  ahead = ((scores > own) | ((scores == own) & before)).sum(1)
  return jnp.where(jnp.isfinite(scores).all(1), ahead, -1)


def report(ranks: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """`metrics.accuracy`. Raises NonFiniteError where `class_ranks` found scores that are not."""
  if bad := int(np.count_nonzero(ranks < 0)):
    raise metrics.NonFiniteError(f"scores of {bad} of {len(ranks)} pictures hold NaN or infinity")
  return metrics.accuracy(ranks, labels)


def log_table(name: str, report: Mapping[str, float]) -> None:
  head = f"{'':14s} {'top-1':>7s} {'top-5':>7s} {'mean of classes':>15s}"
  row = f"{'accuracy':14s} {report['top1']:7.2f} {report['top5']:7.2f}"
  logging.info("%s\n%s\n%s", name, head, f"{row} {report['mean_per_class']:15.2f}")


def labelled(inputs: inputs_lib.Inputs, key: str) -> records.Split:
  """The split by its key, opened. Raises DatasetError where its pictures have no labels."""
  split = inputs.split(key)
  if not split.class_names:
    raise DatasetError(
      f"split {split.name!r}, config.data.{key}, has no class names: classification needs labelled "
      "pictures, such as `tools/prepare_data.py folders` or TFDS's imagenet2012 have"
    )
  return split


def check_labels(split: records.Split, image_id: np.ndarray, label: np.ndarray) -> None:
  """image_id, label int [N]: of the pictures read. Raises DatasetError for one without a label."""
  wrong = image_id[(label < 0) | (label >= len(split.class_names))]
  if len(wrong):
    raise DatasetError(
      f"{len(wrong)} of {len(label)} pictures of split {split.name!r} have no label among its "
      f"{len(split.class_names)} classes (records {wrong[:5].tolist()}): choose another split"
    )


def read_lines(path: str, key: str) -> list[str]:
  """The lines of config.KEY without space around them. Raises DatasetError for an empty one."""
  file = epath.Path(path).expanduser()
  if not file.is_file():
    raise DatasetError(f"config.{key}: there is no file {file}")
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise DatasetError(f"config.{key}: {file} is not UTF-8 text ({e}); save it so") from e
  lines = [line.strip() for line in text.rstrip().split("\n")]
  for number, line in enumerate(lines, 1):
    if not line:
      raise DatasetError(f"config.{key}: {file}:{number} is empty; expected one entry per line")
  return lines


def class_names(config: Any, split: records.Split) -> list[str]:
  """Names of the split's classes, from config.classify.names or its own. Raises DatasetError."""
  if not config.classify.names:
    return list(split.class_names)
  names = read_lines(config.classify.names, "classify.names")
  if len(names) != len(split.class_names):
    raise DatasetError(
      f"config.classify.names: {config.classify.names} has {len(names)} names, split "
      f"{split.name!r} {len(split.class_names)} classes; expected a line per class, in their order"
    )
  if twice := sorted({n for n in names if names.count(n) > 1}):
    # The published names of ImageNet have some: their classes cannot be told apart.
    logging.warning("%s: classes share the names %s", config.classify.names, ", ".join(twice))
  return names


def templates(config: Any) -> list[str]:
  """config.classify.templates. Raises DatasetError for one without a place for the name."""
  if not config.classify.templates:
    return [TEMPLATE]
  lines = read_lines(config.classify.templates, "classify.templates")
  for number, line in enumerate(lines, 1):
    if "{}" not in line:
      where = f"{config.classify.templates}:{number}"
      raise DatasetError(
        f"config.classify.templates: {where} is {line!r}; expected {{}} where the class's name goes"
      )
  return lines


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
  """All templates of the first class, then all of the second, and so on."""
  return [t.replace("{}", name) for name in names for t in templates]


def text_batches(config: Any, inputs: Any, texts: Sequence[str]) -> Iterator[dict]:
  """This process's rows of batches of texts, with the fields of `pipeline.eval_texts`.

  image_id is the position of the text, -1 in rows that fill up the last batch.
  """
  size, tokenizer = config.eval.batch_size, inputs.tokenizer
  own = inputs.local_rows(size)
  for start in range(0, len(texts), size):
    rows = start + (np.arange(size) if own is None else own)
    valid = rows < len(texts)
    mine = [texts[i] if i < len(texts) else "" for i in rows]
    ids, mask = tokenizer(mine, config.text.length, config.text.truncate)
    position = np.where(valid, rows, -1).astype(np.int32)
    fields = dict(text_ids=ids, text_mask=mask, image_id=position, caption_id=position)
    yield fields | dict(valid=valid)


def class_features(texts: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], int]:
  """Features of prompts [C * count, ...] -> what stands for the classes, and how many each have.

  Where a text is one vector, those of a class become one: their mean, of unit length, as CLIP has
  it. Other features are kept, and the scores of a class's texts are averaged.
  """
  if texts.keys() != {"embed"}:
    return texts, count
  embed = texts["embed"].reshape(-1, count, texts["embed"].shape[-1]).mean(1)
  return {"embed": np.asarray(l2_normalize(embed))}, 1


def make_step(
  graphdef: nnx.GraphDef, second_stage: Sequence[str], classes: int, count: int, out: Any
) -> Callable[..., dict[str, Array]]:
  """jitted (params, stats, batch, texts) -> rank, label, valid and image_id [B] of the batch.

  texts: features [N, block, ...] of `count` texts for each of the classes, class by class, and of
  padding at the end. The first stage scores.
  """

  def step(params, stats, batch, texts):
    model = nnx.merge(graphdef, params, stats)
    images = {k: v for k, v in model.encode_image(batch).items() if k not in second_stage}
    scores = jax.lax.map(lambda block: model.score(images, block), texts)  # [N, B, block]
    scores = jnp.moveaxis(scores, 1, 0).reshape(len(batch["label"]), -1)[:, : classes * count]
    scores = scores.astype(jnp.float32).reshape(-1, classes, count).mean(-1)  # [B, C]
    ids = {k: batch[k] for k in ("label", "valid", "image_id")}
    return ids | {"rank": class_ranks(scores, batch["label"])}

  return jax.jit(step, out_shardings=out)


def blocks(features: Any, size: int) -> Any:
  """[T, ...] -> [N, size, ...], the end filled up with zeros."""

  def one(x):
    x = np.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])

  return jax.tree.map(one, features)


def classify(config: Any, workdir: str) -> dict[str, Any]:
  """Classifies data.test with config.init, and writes results.json into the workdir.

  Raises ValueError and DatasetError for what the config, the names or the data lack.
  """
  if not config.init:
    raise ValueError(
      "config.init is empty: name the model that classifies, a file, a converted directory or a "
      "training workdir"
    )
  if not config.model.get("text"):
    raise ValueError("config.model has no text tower: zero-shot classification needs one")
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  split = labelled(inputs, "test")
  inputs.check_processes("test")
  names, forms = class_names(config, split), templates(config)
  state, info = retrieval.load_state(config, built, config.init)
  evaluator = retrieval.Evaluator(config, inputs, built)
  rows, whole = evaluator.batch_sharding, evaluator.whole
  batches = text_batches(config, inputs, prompts(names, forms))
  texts, _ = evaluator.encode(state, "text", batches)
  texts, count = class_features(texts, len(forms))
  texts = blocks(texts, min(config.classify.block, count * len(names)))
  texts = jax.tree.map(lambda x: sharding.place(x, whole), texts)
  step = make_step(built.graphdef, built.system.second_stage, len(names), count, whole)
  run = lambda b: step(state.params, state.stats, sharding.put_batch(b, rows), texts)
  found, image_id = retrieval.collect(run, inputs.images(split))
  check_labels(split, image_id, found["label"])
  result = report(found["rank"], found["label"])
  log_table(f"zero-shot, test, {info['kind']}", result)
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  protocol = dict(
    task="zero-shot classification",
    split=config.data.test,
    images=len(image_id),
    classes=len(names),
    names=config.classify.names or "the data set's",
    templates=forms,
    ties="lower index first",
  )
  return workdir_lib.write_results(
    folder,
    result,
    protocol=protocol,
    dataset=workdir_lib.dataset_name(config.data),
    fingerprint=split.fingerprint,
    source=info,
  )
