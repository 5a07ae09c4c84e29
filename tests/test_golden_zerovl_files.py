"""ZeroVL's golden files: checkpoints, prefixes, positions, evaluation from files to recalls."""

import pathlib
import runpy

import compare_golden
import golden_files
import jax
import numpy as np
import pytest
import test_golden_zerovl_disk
import zerovl_golden
from flax import nnx
from zerovl_golden import EMBEDDING, close, recorded

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import checkpointer, facts, model_files, restore
from xmodal_jax.data import inputs
from xmodal_jax.evaluation import metrics, retrieval
from xmodal_jax.interop import conversion, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.interop import zerovl as zerovl_rules
from xmodal_jax.models import zerovl
from xmodal_jax.optim import train_state
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

FILES = [f for f in zerovl_golden.MANIFEST["files"] if f.endswith(".pth")]


def wrapper(file: str) -> tuple[str, ...]:
  """Keys and prefix around the weights of a checkpoint."""
  return ("model_state_dict", "module.") if "legacy_prefix" in file else ("state_dict",)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def tool():
  file = pathlib.Path(__file__).parents[1] / "tools" / "convert.py"
  return runpy.run_path(str(file))["main"]


@pytest.mark.parametrize("name", FILES)
def test_conversion_both_ways(name, tool, tmp_path):
  source = golden_files.path("zerovl", name)
  out, back = tmp_path / "ours", tmp_path / "back.pth"
  tool(["--system", "zerovl", "--checkpoint", str(source), "--out", str(out)])
  meta = meta_lib.read_meta(out)
  assert tuple(meta["wrapper"]) == wrapper(name)
  tool(["--system", "zerovl", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  theirs, info = torch_files.state_dict(source)
  ours, again = torch_files.state_dict(back)
  assert again["wrapper"] == info["wrapper"] and list(ours) == list(theirs)
  for key, value in theirs.items():
    a, b = value.read(), ours[key].read()
    assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes(), key


def test_layouts_hold_the_same_weights():
  want = zerovl_golden.state_dict("ckpt_init.pth")
  for name in ("ckpt_init_torchversion.pth", "ckpt_legacy_prefix.pth"):
    have = zerovl_golden.state_dict(name)
    assert have.keys() == want.keys()
    assert all(np.array_equal(have[k], want[k]) for k in want)


def test_config_from_shapes():
  """All sizes but heads, which are in no file."""
  state = zerovl_golden.state_dict("ckpt_init.pth")
  found = zerovl_rules.infer_config({k: v.shape for k, v in state.items()})
  want = zerovl_golden.config()
  for side in ("image", "text"):
    found[side].pop("heads")
    assert found[side].items() <= want[side].items()
  assert found["embed"] == want["embed"] and found["learn_temperature"]
  state = zerovl_golden.state_dict("ckpt_linear_init.pth")
  found = zerovl_rules.infer_config({k: v.shape for k, v in state.items()})
  assert found["classes"] == zerovl_golden.MANIFEST["linear_probe_config"]["classes"]
  assert "text" not in found


def abstract(section) -> tuple[nnx.State, nnx.State]:
  return step_lib.split(nnx.eval_shape(lambda: zerovl.build(section, rngs=nnx.Rngs(0))))[1:]


def test_positions_of_another_resolution():
  want = zerovl_golden.outputs()["pos_embed/interpolated"]
  section = zerovl_golden.config()
  section["image"] |= dict(size=zerovl_golden.CONFIG["pos_embed_big_image"])
  path = str(golden_files.path("zerovl", "ckpt_init.pth"))
  params, _, _ = restore.load(path, "zerovl", *abstract(section))
  close(params["image"]["pos"], want[0], EMBEDDING)


def test_temperature_that_is_in_no_file():
  """A file without a temperature starts a run that learns it; the reverse is an error."""
  section = zerovl_golden.config(learn=False)
  path = str(golden_files.path("zerovl", "ckpt_init.pth"))
  with pytest.raises(conversion.ConversionError, match=r"extra:\s+loss.temperature"):
    restore.load(path, "zerovl", *abstract(section))
  state = dict(zerovl_golden.state_dict("ckpt_init.pth"))
  del state["loss.temperature"]
  want = restore.flat(nnx.to_pure_dict(abstract(zerovl_golden.config())[0]))
  flat, report = conversion.to_jax(state, zerovl_rules.RULES, want)
  assert report.filled == ["loss.temperature"]
  assert flat["temperature"] == np.float32(zerovl.TEMPERATURE)
  assert "loss.temperature" not in conversion.to_torch(flat, zerovl_rules.RULES, order=list(state))


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (lambda s: s.pop("text_projection.linear.weight"), "not a ZeroVL state dict .*it seems to be"),
    (lambda s: s.update({"image_encoder.model.model.head.weight": np.ones((2, 2))}), "has no head"),
    (lambda s: s.update({"teacher.weight": np.ones(2)}), "teacher.weight"),
  ],
)
def test_files_of_other_programs_are_refused(change, error, tmp_path, tool):
  state = dict(zerovl_golden.state_dict("ckpt_init.pth"))
  change(state)
  source = tmp_path / "odd.pth"
  torch_files.write(source, state)
  with pytest.raises(SystemExit, match=error):
    tool(["--system", "zerovl", "--checkpoint", str(source), "--out", str(tmp_path / "out")])


def test_pooler_is_kept_but_not_read(tmp_path, tool):
  state = dict(zerovl_golden.state_dict("ckpt_init.pth"))
  pooler = "text_encoder.model.model.pooler.dense.weight"
  state[pooler] = np.arange(6, dtype=np.float32).reshape(2, 3)
  source, out, back = tmp_path / "a.pth", tmp_path / "out", tmp_path / "b.pth"
  torch_files.write(source, state)
  tool(["--system", "zerovl", "--checkpoint", str(source), "--out", str(out)])
  tool(["--system", "zerovl", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  again, _ = torch_files.state_dict(back)
  assert list(again) == list(state)
  np.testing.assert_array_equal(again[pooler].read(), state[pooler])


def test_directory_records_the_normalisation_of_pixels(tmp_path):
  """The two released models differ only in it."""
  path = str(golden_files.path("zerovl", "ckpt_init.pth"))
  section = zerovl_golden.config()
  params, stats, _ = restore.load(path, "zerovl", *abstract(section))
  report = conversion.Report([], {}, [], [], 0)
  info = dict(format="zip", wrapper=(), scalars={})
  meta = meta_lib.meta(
    system="zerovl", variant="100m", config=section | zerovl.HALF, source="a.pth", sha256="",
    info=info, report=report,
  )  # fmt: skip
  model_files.save_model(tmp_path / "out", params, stats, meta)

  def load(model):
    config = facts.of({"model": model | dict(system="zerovl")})
    restore.load(str(tmp_path / "out"), "zerovl", *abstract(section), config)

  load(section | zerovl.HALF)
  with pytest.raises(checkpointer.CheckpointError, match=r"model.mean: \[0.5, 0.5, 0.5\] there"):
    load(section | zerovl.IMAGENET)


@pytest.mark.parametrize("side", ["image", "text"])
def test_public_files_of_one_tower(side, tmp_path):
  """timm's ViT with its head, at another resolution; Hugging Face's BERT with pooler and prefix."""
  state = zerovl_golden.state_dict("ckpt_init.pth")
  prefix = f"{side}_encoder.model.model."
  tower = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
  section = zerovl_golden.config()
  extra = np.ones((2, 2), np.float32)
  if side == "image":
    tower |= {"head.weight": extra, "pre_logits.fc.weight": extra}
    section["image"] |= dict(size=zerovl_golden.CONFIG["pos_embed_big_image"])
  else:
    tower = {f"bert.{k}": v for k, v in tower.items()} | {"cls.predictions.bias": extra}
    tower |= {"bert.pooler.dense.weight": extra}
  torch_files.write(tmp_path / "tower.bin", tower)
  params, _ = abstract(section)
  leaves = restore.load_tower(str(tmp_path / "tower.bin"), side, "zerovl", params)
  want = {k for k in restore.flat(nnx.to_pure_dict(params)) if k.startswith(f"{side}/")}
  assert leaves.keys() == want
  if side == "image":
    table = zerovl_golden.outputs()["pos_embed/interpolated"][0]
    close(leaves["image/pos"], table, EMBEDDING)


# --- evaluation -----------------------------------------------------------------------------------

NAMES = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")


ATOL = 1e-3  # percent


def check_metrics(report, theirs, scores, owner, *, rounded: bool):
  """Recalls and their sum. scores: the original's. rounded: see compare_golden.rank_bounds."""
  bounds = compare_golden.rank_bounds(scores, owner, rounded)
  for name, want in zip(NAMES[:-1], theirs[:-1], strict=True):
    side, _, k = name.partition("_r")
    compare_golden.check_recall(report[name], want, int(k), bounds[side], ATOL)
  if all((low == high).all() for low, high in bounds.values()):
    assert report["rsum"] == pytest.approx(theirs[-1], abs=ATOL)


def test_ranks_of_a_score_matrix():
  scores = zerovl_golden.inputs()["retrieval/scores"]
  want = recorded(zerovl_golden.outputs(), "retrieval")
  owner = compare_golden.owners(scores)
  report = metrics.summarise(scores, owner)
  check_metrics(report, want["metrics"], scores, owner, rounded=False)
  bounds = compare_golden.rank_bounds(scores, owner)
  for side, ranks in zip(("i2t", "t2i"), metrics.retrieval_ranks(scores, owner), strict=True):
    compare_golden.check_ranks(ranks, want[f"{side}_ranks"], bounds[side])


@pytest.mark.parametrize("hook", ["distributed", "single_eval"])
def test_rows_of_caption_pairs(hook):
  """The original has one row per caption with a copy of its image, and repeats rows to fill up the
  last batch; its single-process hook drops the image of id 0."""
  x = recorded(zerovl_golden.inputs(), "retrieval_rows")
  want = zerovl_golden.outputs()[f"retrieval_rows/metrics_{hook}_hook"]
  keep = x["image_id"] > (-1 if hook == "distributed" else 0)
  _, first, owner = np.unique(x["image_id"][keep], return_index=True, return_inverse=True)
  scores = x["image_embeddings"][keep][first] @ x["text_embeddings"][keep].T
  check_metrics(metrics.summarise(scores, owner), want, scores, owner, rounded=True)


@pytest.mark.parametrize("norm", test_golden_zerovl_disk.NORMS)
def test_from_files_to_recalls(norm, tmp_path):
  """The csv and its images, prepared as a user would, to recorded embeddings and recalls."""
  want = recorded(zerovl_golden.outputs(), f"disk_eval/{norm}")
  mean, std = test_golden_zerovl_disk.NORMS[norm]
  golden = zerovl_golden.Golden()
  c = config_lib.base()
  c.model = golden.config | dict(mean=mean, std=std)
  c.data.dir, c.data.test = str(test_golden_zerovl_disk.prepared(tmp_path)), "val"
  i = c.data.image
  i.size, i.resize = zerovl_golden.CONFIG["eval_resize"], "exact"
  i.interpolation, i.rgb_first = "bilinear", True
  c.text.tokenizer, c.text.vocab = "bert", str(golden_files.path("zerovl", "vocab.txt"))
  c.text.length = zerovl_golden.CONFIG["max_length"]
  c.eval.batch_size, c.eval.block = 8, (8, 32)
  built = setup.build(c)
  read = inputs.from_config(c)
  ev = retrieval.from_config(c, read, built)
  state = train_state.TrainState(None, golden.params, {}, None)
  split = read.split("test")
  texts, _ = ev.encode(state, "text", read.texts(split))
  ours = texts["embed"][np.argsort(split.caption_positions)]
  close(ours, want["text_embeddings"], EMBEDDING)
  rows = test_golden_zerovl_disk.rows()
  ids = np.array([int(row["image_id"]) for row in rows])
  images, owner = want["image_embeddings"], np.unique(ids, return_inverse=True)[1]
  if len(images) == len(rows):  # one row per caption
    images = images[np.unique(ids, return_index=True)[1]]
  scores = images @ want["text_embeddings"].T
  check_metrics(ev(state, "test"), want["metrics"], scores, owner, rounded=True)
