"""The whole program on a miniature COCO, from annotation files and images to final parameters."""

import clip_golden
import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from xmodal_jax.data import image, pipeline, records, text
from xmodal_jax.data.preparing import annotations, builder, coco
from xmodal_jax.models import clip
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import step as step_lib

MANIFEST = golden_files.manifest("clip")
PROGRAM, TOLERANCE = MANIFEST["mini_coco"], MANIFEST["tolerance"]
MODEL = PROGRAM["model"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  """The recorded files as the original reads them, prepared as a user prepares COCO."""
  root = tmp_path_factory.mktemp("mini_coco")
  images, lists = root / "images", root / "annotations"
  images.mkdir(), lists.mkdir()
  for key, value in golden_files.arrays("clip", "mini_coco", "inputs.npz").items():
    kind, name = key.split("/")
    if kind == "image":
      Image.fromarray(value).save(images / name)
    else:
      np.save(lists / f"{name}.npy", value)
  for name in ("captions_train2014.json", "captions_val2014.json"):
    file = golden_files.path("clip", "mini_coco", name)
    (lists / name).write_bytes(file.read_bytes())
  splits = coco.read_coco(lists, images)
  annotations.check_images(splits)
  examples = {name: annotations.examples(split) for name, split in splits.items()}
  return builder.write_dataset(root / "out", "coco", "1.0.0", examples, description="miniature")


@pytest.fixture(scope="module")
def tokenizer():
  return text.ClipTokenizer(golden_files.path("clip", "mini_coco", "tiny_bpe.txt"))


def evaluate(model, dataset, tokenizer):
  split = records.open_split(dataset, "test")
  size, context = clip_golden.config(MODEL)["image"]["size"], model.text.pos.shape[0]
  read = dict(batch_size=PROGRAM["eval_batch_size"])
  images = pipeline.eval_images(split, image_transform=image.clip_transform(size), **read)
  texts = pipeline.eval_texts(split, tokenizer=tokenizer, text_length=context, **read)
  encode = {
    "image": jax.jit(lambda m, b: m.encode_image(b)["embed"]),
    "text": jax.jit(lambda m, b: m.encode_text(b)["embed"]),
  }

  def embed(side, batches):
    rows = [(np.asarray(encode[side](model, b)), b["valid"], b["image_id"]) for b in batches]
    x, valid, ids = map(np.concatenate, zip(*rows, strict=True))
    return x[valid], ids[valid]

  (i, _), (t, caption_image) = embed("image", images), embed("text", texts)
  scale = np.exp(np.asarray(model.logit_scale[...]))
  return scale * i @ t.T, caption_image


def check_evaluation(model, dataset, tokenizer, want, prefix):
  sim, caption_image = evaluate(model, dataset, tokenizer)
  np.testing.assert_allclose(sim, want[f"{prefix}/sim_matrix"], **TOLERANCE["eval_fp32"])
  clip_golden.check_retrieval(
    sim, caption_image, want, prefix, want[f"{prefix}/sim_matrix"], rounded=True
  )


def batches(dataset, tokenizer, order, epochs):
  """Training batches of our pipeline in the recorded order of captions."""
  split = records.open_split(dataset, "train")
  # Recorded positions are those of the id list; samples count captions record after record.
  sample = np.argsort(split.caption_positions)
  per_epoch = order.reshape(epochs, -1)
  model = clip_golden.config(MODEL)
  return pipeline.train_batches(
    split,
    batch_size=PROGRAM["batch_size"],
    image_transform=image.clip_transform(model["image"]["size"]),
    tokenizer=tokenizer,
    text_length=model["text"]["context"],
    seed=0,
    order=lambda epoch: sample[per_epoch[epoch % epochs]],
  )


def pixels(b):
  """The fields that the loss reads, on the device."""
  return {k: jnp.asarray(b[k]) for k in ("image", "text_ids")}


def train(dataset, tokenizer, kind, **changes):
  want = golden_files.arrays("clip", "mini_coco", "outputs.npz")
  dtype = jnp.float16 if kind == "half" else jnp.float32
  file = PROGRAM["model_file"].split("/")[-1]
  golden = clip_golden.Golden(MODEL, file, dtype)
  run = schedules.RunLength(
    PROGRAM["train_captions"], PROGRAM["batch_size"], f"{PROGRAM['epochs']} epochs"
  )
  settings = MANIFEST["models"][MODEL]["train"] | {k: PROGRAM[k] for k in ("lr", "warmup")}
  schedule = clip_golden.schedule(settings, run)
  steps = np.arange(run.total_steps)
  np.testing.assert_allclose(schedule(steps, np), want[f"{kind}/lr"], **TOLERANCE["lr"])
  tx = clip_golden.optimizer(settings, schedule, golden.params, **changes)
  step = step_lib.make_train_step(golden.graphdef, tx, jax.random.key(0), None, schedule)
  stream = batches(dataset, tokenizer, want[f"{kind}/order"], PROGRAM["epochs"])
  state, losses = golden.state(tx), []
  for i in range(run.total_steps):
    state, m = step(state, pixels(next(stream)))
    losses.append(float(m["loss"]))
    if (i + 1) % run.steps_per_epoch == 0:
      yield np.array(losses), nnx.merge(golden.graphdef, state.params, state.stats), state, golden


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def test_zero_shot(dataset, tokenizer):
  want = golden_files.arrays("clip", "mini_coco", "outputs.npz")
  model = clip_golden.Golden(MODEL, PROGRAM["model_file"].split("/")[-1]).model()
  check_evaluation(model, dataset, tokenizer, want, "zeroshot_fp32/eval0")


def test_float32_run(dataset, tokenizer):
  want = golden_files.arrays("clip", "mini_coco", "outputs.npz")
  for epoch, after in enumerate(train(dataset, tokenizer, "fp32")):
    losses, model, state, golden = after
    check_evaluation(model, dataset, tokenizer, want, f"fp32/eval{epoch}")
  np.testing.assert_allclose(losses, want["fp32/loss"], rtol=0, **TOLERANCE["loss_fp32"])
  final = clip_golden.to_torch(state.params, state.stats)
  prefix = "fp32/final/"
  recorded = {k.removeprefix(prefix): v for k, v in want.items() if k.startswith(prefix)}
  noise = clip_golden.noise_allowance(golden, state)
  atol, drop = TOLERANCE["final_fp32"]["atol"], clip_golden.drop_null
  compare_golden.check_trained(final, recorded, noise, atol, drop=drop)


@pytest.mark.full
def test_half_precision_run(dataset, tokenizer):
  want = golden_files.arrays("clip", "mini_coco", "outputs.npz")
  changes = dict(round_to="float16", round_paths=clip.HALF_PATHS)
  *_, (losses, *_) = train(dataset, tokenizer, "half", **changes)
  np.testing.assert_allclose(losses, want["half/loss"], rtol=0, **TOLERANCE["half_losses"])
