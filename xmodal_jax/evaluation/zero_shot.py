"""`--mode zeroshot_classify`: gives every image the class whose texts have the highest score."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from xmodal_jax.data import inputs as inputs_lib
from xmodal_jax.data import text as text_lib
from xmodal_jax.data.tfrecord import DatasetError
from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.evaluation import batching, labels, retrieval, scored, tables
from xmodal_jax.evaluation import state as state_lib
from xmodal_jax.models.base import l2_normalize
from xmodal_jax.runtime import results, setup
from xmodal_jax.runtime import workdir as workdir_lib

Array = jax.Array

TEMPLATE = "a photo of a {}."


def classify(config: Any, workdir: str, init_given: bool = False) -> dict[str, Any]:
  """Classifies the images of data.test with a model, and writes results, see `results.write`.

  The model is chosen as by `retrieval.evaluate`. Raises ConfigError for a config without a model or
  text tower, DatasetError for data or files of names and templates that do not fit,
  CheckpointError, NonFiniteError.
  """
  folder = workdir_lib.absolute(workdir)
  model = state_lib.choose(config.init, folder, init_given)
  _check_model(model, folder, config.model)
  built = setup.build(config)
  inputs = inputs_lib.from_config(config, built.batch_sharding)
  split = labels.labelled_split(inputs, "test")
  inputs.check_processes("test")
  names = class_names(config.classify.names, split.name, split.class_names)
  templates = read_templates(config.classify.templates)
  warn_same_tokens(names, templates, inputs.tokenizer, config.text.length, config.text.truncate)
  state, source = state_lib.load_state(built, model)
  texts, count = _text_blocks(config, built, inputs, state, names, templates)
  step = make_step(built.graphdef, built.system.second_stage, len(names), count, built.replicated)

  def classify_batch(batch):
    batch = sharding.put_batch(batch, built.batch_sharding)
    return step(state.params, state.stats, batch, texts)

  images = inputs.images(split)
  found, image_id = batching.collect(classify_batch, images)
  labels.check_labels(split, image_id, found["label"])
  report = labels.report(found["rank"], found["label"])
  tables.log_accuracy(f"zero-shot, test, {state_lib.describe(source)}", report)
  folder.mkdir(parents=True, exist_ok=True)
  protocol = dict(
    task="zero-shot classification",
    split=split.name,
    images=len(image_id),
    classes=len(names),
    names=config.classify.names or "the data set's",
    shared_names=shared_names(names),
    templates=templates,
    ties="lower index first",
  )
  if left_out := scored.left_out(split, image_id, images.bad):
    protocol["left_out"] = left_out
  return results.write(
    folder,
    report,
    protocol=protocol,
    dataset=results.dataset_name(config.data),
    fingerprint=split.fingerprint,
    source=source,
  )


def _text_blocks(
  config: Any,
  built: setup.Built,
  inputs: inputs_lib.Inputs,
  state: Any,
  names: Sequence[str],
  templates: Sequence[str],
) -> tuple[dict[str, Array], int]:
  """Features of all prompts as the texts of `make_step`, and how many there are per class."""
  batches = text_batches(
    prompts(names, templates),
    inputs.tokenizer,
    batch_size=config.eval.batch_size,
    length=config.text.length,
    truncate=config.text.truncate,
    rows=inputs.local_rows(config.eval.batch_size),
  )
  features, _ = retrieval.from_config(config, inputs, built).encode(state, "text", batches)
  texts, count = class_features(features, len(templates))
  texts = batching.split_blocks(texts, min(config.classify.block, count * len(names)))
  return jax.tree.map(lambda x: sharding.place(x, built.replicated), texts), count


def _check_model(source: str, workdir: epath.Path, model: Any) -> None:
  if source == str(workdir) and not (workdir / "checkpoints").exists():
    raise ConfigError(
      "config.init is empty: set it to the model that classifies, a file, a converted directory or "
      "a training workdir"
    )
  if not model.get("text"):
    raise ConfigError("config.model has no text tower: zero-shot classification needs one")


def read_lines(path: str, key: str) -> list[str]:
  """The stripped lines of a UTF-8 file that config.KEY names.

  Raises DatasetError for a missing file, another encoding, and an empty line before the end.
  """
  file = epath.Path(path).expanduser()
  if not file.is_file():
    raise DatasetError(f"config.{key}: there is no file {file}")
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise DatasetError(f"config.{key}: {file} is not UTF-8 text ({e}); save it as UTF-8") from e
  lines = [line.strip() for line in text.rstrip().split("\n")]
  for number, line in enumerate(lines, 1):
    if not line:
      raise DatasetError(f"config.{key}: {file}:{number} is empty; expected one entry per line")
  return lines


def class_names(path: str, split: str, own: Sequence[str]) -> list[str]:
  """Names of the classes: the lines of `path`, config.classify.names; `own` if it is empty.

  split: its name. Raises DatasetError for another number of names than classes.
  """
  names = read_lines(path, "classify.names") if path else list(own)
  if len(names) != len(own):
    raise DatasetError(
      f"config.classify.names: {path} has {len(names)} names, split {split!r} {len(own)} classes; "
      "expected a line per class, in their order"
    )
  if duplicates := shared_names(names):
    logging.warning(
      "%s: classes share the names %s: their texts are the same, so that only the first of them is "
      "ever chosen",
      path or f"split {split!r}", ", ".join(duplicates),
    )  # fmt: skip
  return names


def shared_names(names: Sequence[str]) -> list[str]:
  """The names that several classes have, as the published names of ImageNet do."""
  return sorted(name for name, n in Counter(names).items() if n > 1)


def read_templates(path: str) -> list[str]:
  """The lines of `path`, config.classify.templates; "a photo of a {}." if it is empty.

  Raises DatasetError for a line without {}.
  """
  if not path:
    return [TEMPLATE]
  lines = read_lines(path, "classify.templates")
  for number, line in enumerate(lines, 1):
    if "{}" not in line:
      raise DatasetError(
        f"config.classify.templates: {path}:{number} is {line!r}; expected {{}} where the class "
        "name goes"
      )
  return lines


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
  """All templates of the first class, then all of the second, and so on.

  >>> prompts(["cat", "dog"], ["a {}.", "two {}s."])
  ['a cat.', 'two cats.', 'a dog.', 'two dogs.']
  """
  return [t.replace("{}", name) for name in names for t in templates]


def warn_same_tokens(
  names: Sequence[str],
  templates: Sequence[str],
  tokenizer: text_lib.Tokenizer,
  length: int,
  truncate: bool,
) -> None:
  """Warns if the prompts of classes with different names have the same tokens.

  A template that is longer than `length` tokens loses the name at its end, and names may consist of
  words that the vocabulary does not have.
  """
  different = sorted(set(names))
  for template in templates:
    ids, _ = tokenizer(prompts(different, [template]), length, truncate)
    if (same := len(different) - len(np.unique(ids, axis=0))) > 0:
      logging.warning(
        "template %r: %d of %d names have the same tokens as another, so that their classes are "
        "never chosen: config.text.length=%d cuts the text, or the vocabulary lacks their words",
        template, same, len(different), length,
      )  # fmt: skip


def text_batches(
  texts: Sequence[str],
  tokenizer: text_lib.Tokenizer,
  *,
  batch_size: int,
  length: int,
  truncate: bool,
  rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of texts with the fields of `pipeline.eval_texts`.

  image_id is the position of the text, -1 in padding rows of the last batch. rows: int [b], the
  rows of each global batch that this process reads; None: all.
  """
  for start in range(0, len(texts), batch_size):
    position = start + (np.arange(batch_size) if rows is None else rows)
    valid = position < len(texts)
    own = [texts[i] if i < len(texts) else "" for i in position]
    ids, mask = tokenizer(own, length, truncate)
    position = np.where(valid, position, -1).astype(np.int32)
    yield dict(text_ids=ids, text_mask=mask, image_id=position, caption_id=position, valid=valid)


def class_features(texts: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], int]:
  """Features of `count` prompts per class, [C * count, ...] -> (features, how many per class).

  If a text is one vector, each class gets one: the normalised mean, as in CLIP. Other features are
  returned as they are, and the scores of a class's texts are averaged.
  """
  if texts.keys() != {"embed"}:
    return texts, count
  embed = texts["embed"].reshape(-1, count, texts["embed"].shape[-1]).mean(1)
  return {"embed": np.asarray(l2_normalize(embed))}, 1


def make_step(
  graphdef: nnx.GraphDef, second_stage: Sequence[str], classes: int, count: int, out_sharding: Any
) -> Callable[..., dict[str, Array]]:
  """jitted (params, stats, batch, texts) -> rank, label, valid and image_id [B] of the batch.

  texts: features [N, block, ...] of `count` texts per class, class by class, padded at the end.
  Scores are those of the first stage; second_stage names the features that it does not read.
  """

  def step(params, stats, batch, texts):
    model = nnx.merge(graphdef, params, stats)
    images = {k: v for k, v in model.encode_image(batch).items() if k not in second_stage}
    scores = jax.lax.map(lambda block: model.score(images, block), texts)  # [N, B, block]
    scores = jnp.moveaxis(scores, 1, 0).reshape(len(batch["label"]), -1)[:, : classes * count]
    scores = scores.astype(jnp.float32).reshape(-1, classes, count).mean(-1)  # [B, C]
    ids = {k: batch[k] for k in ("label", "valid", "image_id")}
    return ids | {"rank": labels.class_ranks(scores, batch["label"])}

  return jax.jit(step, out_shardings=out_sharding)
