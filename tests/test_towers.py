"""config.init_image and config.init_text: towers initialised from public files."""

import dataclasses
import functools
import pathlib
import shutil

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import team_golden
import tiny
from flax import nnx

from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.errors import ConfigError
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion, meta, torch_files
from xmodal_jax.models import clip, team
from xmodal_jax.runtime import initial_state, setup
from xmodal_jax.training import loop

BERT = dict(vocab=61, context=12, width=24, depth=3, heads=2, mlp=48)


def model_config(image=None, **text) -> dict:
  """The model section of a toy TEAM."""
  return dict(
    system="team",
    embed=10,
    image=image or dict(kind="deit", size=16, patch=8, width=12, depth=2, heads=3),
    text=BERT | text,
    project_text=True,
    matching=dict(depth=1, heads=1, embed=8),
  )


def abstract(config) -> nnx.State:
  return nnx.state(nnx.eval_shape(lambda: team.build(config, rngs=nnx.Rngs(0))), nnx.Param)


def load(path, side: str, config=None, half: bool = False) -> dict[str, np.ndarray]:
  return restore.load_tower(str(path), side, "team", abstract(config or model_config()), half)


def numbers(shapes, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


# --- BERT ---------------------------------------------------------------------------------------


def bert_state(vocab, context, width, depth, mlp, **rest) -> dict[str, np.ndarray]:
  """A state dict of BertModel, made without transformers. rest: ignored config keys."""
  del rest
  shapes = {
    "embeddings.word_embeddings.weight": (vocab, width),
    "embeddings.position_embeddings.weight": (context, width),
    "embeddings.token_type_embeddings.weight": (2, width),
    "embeddings.LayerNorm.weight": (width,),
    "embeddings.LayerNorm.bias": (width,),
  }
  for i in range(depth):
    for name, (rows, columns) in {
      "attention.self.query": (width, width),
      "attention.self.key": (width, width),
      "attention.self.value": (width, width),
      "attention.output.dense": (width, width),
      "intermediate.dense": (mlp, width),
      "output.dense": (width, mlp),
    }.items():
      shapes[f"encoder.layer.{i}.{name}.weight"] = (rows, columns)
      shapes[f"encoder.layer.{i}.{name}.bias"] = (rows,)
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
      shapes |= {f"encoder.layer.{i}.{name}.{x}": (width,) for x in ("weight", "bias")}
  shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
  return numbers(shapes)


def oldest(state) -> dict[str, np.ndarray]:
  """Names as of 2018: a prefix, TensorFlow's LayerNorm names, heads of pre-training."""
  rename = lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"
  )
  out = {"bert." + rename(k): v for k, v in state.items()}
  vocab, width = state["embeddings.word_embeddings.weight"].shape
  return out | numbers(
    {
      "cls.predictions.bias": (vocab,),
      "cls.predictions.transform.dense.weight": (width, width),
      "cls.predictions.transform.LayerNorm.gamma": (width,),
      "cls.predictions.decoder.weight": (vocab, width),
      "cls.seq_relationship.weight": (2, width),
    }
  )


def with_positions(state) -> dict[str, np.ndarray]:
  return {"embeddings.position_ids": np.arange(BERT["context"], dtype=np.int64)[None]} | state


@pytest.mark.parametrize("names", [dict, with_positions, oldest])
def test_bert_names(names, tmp_path):
  state = bert_state(**BERT)
  torch_files.write(tmp_path / "pytorch_model.bin", names(state))
  ours = load(tmp_path / "pytorch_model.bin", "text")
  want = restore.flat(nnx.to_pure_dict(abstract(model_config())))
  assert ours.keys() == {k for k in want if k.startswith("text/")}
  layers = lambda x: np.stack([state[f"encoder.layer.{i}.{x}"] for i in range(BERT["depth"])])
  equal = lambda path, value: np.testing.assert_array_equal(ours[path], value, path)
  equal("text/word/embedding", state["embeddings.word_embeddings.weight"])
  equal("text/pos", state["embeddings.position_embeddings.weight"])
  equal("text/ln/scale", state["embeddings.LayerNorm.weight"])
  equal("text/blocks/ln_1/bias", layers("attention.output.LayerNorm.bias"))
  equal("text/blocks/ln_2/scale", layers("output.LayerNorm.weight"))
  for path, name in {"q": "query", "k": "key", "v": "value"}.items():
    equal(f"text/blocks/{path}/kernel", layers(f"attention.self.{name}.weight").swapaxes(1, 2))
  equal("text/blocks/wi/kernel", layers("intermediate.dense.weight").swapaxes(1, 2))
  equal("text/blocks/wo/bias", layers("output.dense.bias"))


def hugging_face(kind: str):
  """A BERT with large random weights, and its encoder."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import torchvision_ops

  torchvision_ops.declare()
  c = transformers.BertConfig(
    vocab_size=BERT["vocab"],
    hidden_size=BERT["width"],
    num_hidden_layers=BERT["depth"],
    num_attention_heads=BERT["heads"],
    intermediate_size=BERT["mlp"],
    max_position_embeddings=BERT["context"],
  )
  model = getattr(transformers, kind)(c).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.2 * torch.randn(p.shape, generator=generator))
  return model, model if kind == "BertModel" else model.bert


def save(model, kind: str, folder):
  """Writes the state dict in one of three formats of Hugging Face's hub."""
  torch = pytest.importorskip("torch")
  if kind == "model.safetensors":
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, str(folder / kind))  # without tied weights
    return folder / kind
  state = model.state_dict()
  if kind == "oldest":
    state = {
      k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
      ): v
      for k, v in state.items()
    }
  path = folder / "pytorch_model.bin"
  torch.save(state, path, _use_new_zipfile_serialization=kind != "oldest")
  return path


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "oldest"])
def test_hidden_states_of_hugging_face(kind, file, tmp_path):
  torch = pytest.importorskip("torch")
  model, encoder = hugging_face(kind)
  leaves = load(save(model, file, tmp_path), "text")
  rng = np.random.default_rng(0)
  ids = rng.integers(0, BERT["vocab"], (5, 10))
  lengths = np.array([10, 7, 1, 4, 9])
  mask = np.arange(10) < lengths[:, None]
  with torch.no_grad():
    want = encoder(
      input_ids=torch.tensor(ids),
      attention_mask=torch.tensor(mask.astype(np.int64)),
      output_hidden_states=True,
    )
  ours = nnx.eval_shape(lambda: team.build(model_config(), rngs=nnx.Rngs(0))).text
  graphdef, _ = nnx.split(ours)
  params = jax.tree.map(jnp.asarray, restore.nested(leaves)["text"])
  text = nnx.merge(graphdef, nnx.State(params))
  with jax.default_matmul_precision("highest"):
    run = jax.jit(lambda text, *args: (text.states(*args), text(*args)))
    states, last = run(text, jnp.asarray(ids), jnp.asarray(mask))
  assert len(states) == len(want.hidden_states) == BERT["depth"] + 1
  for k, theirs in enumerate(want.hidden_states):
    np.testing.assert_allclose(states[k], theirs.numpy(), rtol=1e-5, atol=1e-5, err_msg=str(k))
  np.testing.assert_allclose(last, want.last_hidden_state.numpy(), rtol=1e-5, atol=1e-5)
  assert abs(np.asarray(last)).max() > 0.5  # not all small


# --- DeiT and timm ------------------------------------------------------------------------------


def deit_state(size=16, patch=8, width=12, depth=2, head="head") -> dict[str, np.ndarray]:
  shapes = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 1 + (size // patch) ** 2, width),
    "patch_embed.proj.weight": (width, 3, patch, patch),
    "patch_embed.proj.bias": (width,),
  }
  for i in range(depth):
    for name, (rows, columns) in {
      "attn.qkv": (3 * width, width),
      "attn.proj": (width, width),
      "mlp.fc1": (4 * width, width),
      "mlp.fc2": (width, 4 * width),
    }.items():
      shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
      shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    for name in ("norm1", "norm2"):
      shapes |= {f"blocks.{i}.{name}.{x}": (width,) for x in ("weight", "bias")}
  shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
  shapes |= {f"{head}.weight": (1000, width), f"{head}.bias": (1000,)}
  return numbers(shapes)


@pytest.mark.parametrize("wrapper", [["model"], []])
def test_deit(wrapper, tmp_path):
  """In DeiT's wrapper and without it (timm); the projection is not in the file."""
  state = deit_state()
  torch_files.write(tmp_path / "deit.pth", meta.wrap(state, wrapper))
  ours = load(tmp_path / "deit.pth", "image")
  want = restore.flat(nnx.to_pure_dict(abstract(model_config())))
  inside = {k for k in want if k.startswith("image/")} - {"image/deit/proj/kernel"}
  assert ours.keys() == inside and len(inside) == 22
  equal = lambda path, value: np.testing.assert_array_equal(ours[f"image/deit/{path}"], value, path)
  equal("cls", state["cls_token"][0, 0])
  equal("pos", state["pos_embed"][0])
  equal("patch/kernel", np.einsum("oihw->hwio", state["patch_embed.proj.weight"]))
  equal("patch/bias", state["patch_embed.proj.bias"])
  layers = lambda x: np.stack([state[f"blocks.{i}.{x}"] for i in range(2)])
  for x, third in zip("qkv", np.split(layers("attn.qkv.weight"), 3, axis=1), strict=True):
    equal(f"blocks/{x}/kernel", third.swapaxes(1, 2))
  equal("blocks/out/bias", layers("attn.proj.bias"))
  equal("blocks/ln_1/scale", layers("norm1.weight"))
  equal("blocks/ln_2/bias", layers("norm2.bias"))
  equal("blocks/wo/kernel", layers("mlp.fc2.weight").swapaxes(1, 2))
  equal("ln_post/scale", state["norm.weight"])


@pytest.mark.parametrize("kind", ["deit", "clip"])
@pytest.mark.parametrize("old, new", [(14, 16), (3, 5), (4, 2)])
def test_grid_of_another_size(kind, old, new, tmp_path):
  """Resized as in the original, recorded for DeiT and CLIP tables of width four."""
  arrays = golden_files.arrays("team", "preprocess", "pos_embed_interpolation.npz")
  table, want = arrays[f"deit_in_{old}_{new}"], arrays[f"{kind}_out_{old}_{new}"]
  image = dict(kind=kind, size=new, patch=1, width=4, depth=2, heads=1)
  if kind == "deit":
    state = deit_state(old, 1, 4) | {"pos_embed": table}
    want = want[0]
  else:
    state = clip_state(old, 1, 4) | {"visual.positional_embedding": table[0]}
  torch_files.write(tmp_path / "tower.pth", {"model": state})
  ours = load(tmp_path / "tower.pth", "image", model_config(image))[f"image/{kind}/pos"]
  np.testing.assert_array_equal(ours[0], table[0, 0])
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


def test_deit_of_a_golden_checkpoint(tmp_path):
  """A tower cut out of a whole checkpoint loads to the same parameters."""
  golden = team_golden.Golden("vitb16")
  state, _ = torch_files.state_dict(golden.path)
  prefix = "image_model.vit."
  tower = {k.removeprefix(prefix): np.asarray(v) for k, v in state.items() if k.startswith(prefix)}
  torch_files.write(tmp_path / "deit.pth", {"model": tower | numbers({"head.bias": (1000,)})})
  ours = load(tmp_path / "deit.pth", "image", golden.config)
  want = restore.flat(golden.params)
  assert len(ours) == 22
  for path, value in ours.items():
    np.testing.assert_array_equal(value, want[path], path)


# --- CLIP ---------------------------------------------------------------------------------------


def clip_state(size=16, patch=8, width=12, depth=2, embed=10) -> dict[str, np.ndarray]:
  """A CLIP's state dict, text tower included, made by our conversion rules."""
  image = dict(kind="vit", size=size, patch=patch, width=width, depth=depth, heads=1)
  text = dict(vocab=9, context=5, width=8, depth=1, heads=1)
  config = dict(system="clip", embed=embed, image=image, text=text)
  model = nnx.eval_shape(lambda: clip.build(config, rngs=nnx.Rngs(0)))
  want = restore.flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  flat = numbers({k: v.shape for k, v in want.items()})
  return dict(conversion.arrays(conversion.to_torch(flat, clip_rules.RULES)))


CLIP_IMAGE = dict(kind="clip", size=16, patch=8, width=12, depth=2, heads=1)


@pytest.mark.parametrize("scalars", [False, True])
def test_clip_names(scalars, tmp_path):
  """float16 as in the archives; the text tower and the temperature are ignored."""
  state = clip_state()
  half = lambda k: not any(x in k for x in ("ln_", "embedding", "logit_scale"))
  state = {k: v.astype(np.float16) if half(k) else v for k, v in state.items()}
  if scalars:
    names = ("input_resolution", "context_length", "vocab_size")
    state |= {k: np.array(v) for k, v in zip(names, (16, 5, 9), strict=True)}
  torch_files.write(tmp_path / "clip.pt", state)
  ours = load(tmp_path / "clip.pt", "image", model_config(CLIP_IMAGE))
  want = restore.flat(nnx.to_pure_dict(abstract(model_config(CLIP_IMAGE))))
  assert ours.keys() == {k for k in want if k.startswith("image/")}
  assert all(v.dtype == np.float32 for v in ours.values())
  equal = lambda path, value: np.testing.assert_array_equal(ours[f"image/clip/{path}"], value, path)
  equal("cls", state["visual.class_embedding"])
  equal("pos", state["visual.positional_embedding"])
  equal("proj/kernel", state["visual.proj"])
  equal("ln_pre/bias", state["visual.ln_pre.bias"])
  equal("ln_post/scale", state["visual.ln_post.weight"])
  fused = [state[f"visual.transformer.resblocks.{i}.attn.in_proj_bias"] for i in range(2)]
  for x, third in zip("qkv", np.split(np.stack(fused), 3, axis=1), strict=True):
    equal(f"blocks/{x}/bias", third)


@pytest.mark.parametrize("file", ["released_style.pt", "state_dict.pth"])
def test_archive_of_clip(file, tmp_path):
  """A released file gives TEAM and CLIP the same tower and embeddings."""
  import clip_golden

  golden, c = clip_golden.Golden("vit", file), clip_golden.config("vit")
  image = {k: c["image"][k] for k in ("size", "patch", "width", "depth", "heads")}
  config = model_config(image | dict(kind="clip")) | dict(embed=c["embed"])
  ours = load(golden_files.path("clip", "vit", file), "image", config)
  theirs = restore.flat({"image": golden.params["image"]})
  rename = lambda k: k.replace("image/", "image/clip/")
  assert ours.keys() == {rename(k) for k in theirs}
  for path, value in theirs.items():
    np.testing.assert_array_equal(ours[rename(path)], value, path)
  graphdef, params = jax.jit(lambda: nnx.split(team.build(config, rngs=nnx.Rngs(0))))()
  params = restore.flat(nnx.to_pure_dict(params)) | ours
  params = jax.tree.map(jnp.asarray, restore.nested(params))
  model = nnx.merge(graphdef, nnx.State(params))
  pixels = np.random.default_rng(0).integers(0, 256, (3, image["size"], image["size"], 3), np.uint8)
  with jax.default_matmul_precision("highest"):
    embed = jax.jit(lambda model: model.encode_image({"image": jnp.asarray(pixels)})["embed"])
    got, want = embed(model), embed(golden.model())
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# --- files that do not fit ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wrong:
  side: str
  state: dict
  words: str
  image: dict | None = None


WRONG = {
  "bert as image": Wrong("image", bert_state(**BERT), r"config\.init_image: .*seems to be of BERT"),
  "deit as text": Wrong("text", deit_state(), r"config\.init_text: .*seems to be of timm"),
  "clip as deit": Wrong("image", clip_state(), r"missing:\n *cls_token -> image/deit/cls"),
  "deit as clip": Wrong(
    "image", deit_state(), r"missing:\n *visual\.conv1\.weight -> image/clip", CLIP_IMAGE
  ),
  "distilled deit": Wrong(
    "image", deit_state() | numbers({"dist_token": (1, 1, 12)}), r"unknown:\n *dist_token"
  ),
  "another depth": Wrong("image", deit_state(depth=3), r"extra:\n *blocks\.2\.attn\.qkv\.weight"),
  "another width": Wrong(
    "image", deit_state(width=24), r"image/deit/cls: \(24,\) in the file, \(12,\) in config\.model"
  ),
  "another vocabulary": Wrong(
    "text",
    bert_state(**BERT | dict(vocab=62)),
    r"text/word/embedding: \(62, 24\) in the file, \(61, 24\) in config\.model",
  ),
  "a key less": Wrong(
    "text",
    {k: v for k, v in bert_state(**BERT).items() if k != "encoder.layer.1.output.dense.bias"},
    r"missing:\n *bert\.encoder\.layer\.1\.output\.dense\.bias -> text/blocks/wo/bias$",
  ),
  "no square": Wrong(
    "image", deit_state() | numbers({"pos_embed": (1, 8, 12)}), "8 rows cannot become one of 5"
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, tmp_path):
  wrong = WRONG[name]
  torch_files.write(tmp_path / "tower.pth", wrong.state)
  with pytest.raises((checkpointer.CheckpointError, conversion.ConversionError)) as e:
    load(tmp_path / "tower.pth", wrong.side, model_config(wrong.image))
  assert e.match(wrong.words) and e.match("tower.pth")


def test_half_a_file(tmp_path):
  path = tmp_path / "deit.pth"
  torch_files.write(path, {"model": deit_state()})
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(torch_files.FileFormatError, match=r"deit\.pth"):
    load(path, "image")


def test_a_folder(tmp_path):
  torch_files.write(tmp_path / "pytorch_model.bin", {"model": deit_state()})
  ours, want = load(tmp_path, "image"), load(tmp_path / "pytorch_model.bin", "image")
  assert ours.keys() == want.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(value, want[path], path)


def test_no_file(tmp_path):
  for path, what in ((tmp_path, "holds no weights"), (tmp_path / "gone.bin", "does not exist")):
    with pytest.raises(checkpointer.CheckpointError, match=rf"config\.init_text: .* {what}"):
      load(path, "text")


def test_a_system_without_towers(tmp_path):
  torch_files.write(tmp_path / "clip.pt", clip_state())
  load = functools.partial(restore.load_tower, str(tmp_path / "clip.pt"), "image")
  with pytest.raises(
    ConfigError, match=r"no public file of one image tower is known for clip; use"
  ):
    load("clip", nnx.State({}))
  with pytest.raises(ConfigError, match=r"for tgdt; use config.init .* or config.init_text"):
    load("tgdt", nnx.State({}))


def test_half_of_a_file_that_is_not_rounded(files, tiny_data):
  """A system without a list of such parameters, a tower without one, and no file of a tower."""
  params = setup.build(tiny.team(tiny_data)).params
  for side in ("image", "text"):
    with pytest.raises(ConfigError, match=r"config.init_half: .* set it to False"):
      restore.load_tower(files[f"init_{side}"], side, "team", params, half=True)
  for init in ("", "whole.pt"):
    c = tiny.team(tiny_data, **SHORT, init=init, init_half=True)
    with pytest.raises(ConfigError, match=r"config.init_half"):
      first_params(c)


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
  """Towers of tiny.team's sizes; the image at half its resolution."""
  folder, c = tmp_path_factory.mktemp("towers"), tiny.team("").model.to_dict()
  torch_files.write(folder / "bert.bin", oldest(bert_state(**c["text"])))
  image = {k: c["image"][k] for k in ("patch", "width", "depth")}
  torch_files.write(folder / "deit.pth", {"model": deit_state(size=8, **image)})
  return dict(init_image=str(folder / "deit.pth"), init_text=str(folder / "bert.bin"))


SHORT = dict(
  total="1 steps", eval__test=False, eval__every="0 steps", optim__lr=0.0, optim__warmup="0 steps"
)


class Nothing:
  """A workdir without checkpoints."""

  def latest(self):
    return None

  def restore_latest(self, want, check):
    return None


def first_params(c) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], setup.Built]:
  """Initial parameters of a run, fresh parameters without files, and what it was built from."""
  built = setup.build(c, jax.devices()[:1])  # one compiles faster than eight
  tx = built.optimizer(c.optim, lambda step: 0.0)
  sources = initial_state.Sources.from_config(c)
  state, step, _ = initial_state.first_state(
    built, tx, built.state_shardings(tx), Nothing(), "", sources
  )
  assert step == 0 and int(state.step) == 0
  have = restore.flat(state.params)
  places = restore.flat(built.params_shardings)
  assert {k: v.sharding for k, v in have.items()} == places
  new = restore.flat(nnx.to_pure_dict(nnx.state(jax.jit(built.init_model)(), nnx.Param)))
  return jax.device_get(have), jax.device_get(new), built


@pytest.mark.parametrize("sides", [("image", "text"), ("text",)])
def test_a_run_starts_from_them(sides, files, tiny_data):
  """Towers have the parameters of the files, the rest the random ones of a run without files."""
  given = {k: v for k, v in files.items() if k.removeprefix("init_") in sides}
  have, new, built = first_params(tiny.team(tiny_data, **SHORT, **given))
  replaced = {}
  for side in sides:
    replaced |= restore.load_tower(files[f"init_{side}"], side, "team", built.params)
  assert have.keys() == new.keys() and {k.split("/")[0] for k in replaced} == set(sides)
  if "image" in sides:
    assert replaced["image/deit/pos"].shape == (5, 32)  # of a 1 x 1 grid in the file
  for path, value in have.items():
    np.testing.assert_array_equal(value, replaced.get(path, new[path]), path)
    if path in replaced:
      assert (value != new[path]).any(), path


@pytest.mark.full
def test_half_precision_is_of_the_image_tower(tmp_path, tiny_data):
  """init_half rounds what CLIP's files have in float16, and nothing of the text tower."""
  c = tiny.team(tiny_data, **SHORT)
  c.model.image.kind, c.init_half = "clip", True
  image, text = c.model.image.to_dict(), c.model.text.to_dict()
  sizes = {k: image[k] for k in ("size", "patch", "width", "depth")}
  torch_files.write(tmp_path / "clip.pt", clip_state(**sizes, embed=c.model.embed))
  torch_files.write(tmp_path / "bert.bin", bert_state(**text))
  c.init_image, c.init_text = str(tmp_path / "clip.pt"), str(tmp_path / "bert.bin")
  have, _, built = first_params(c)
  exact = restore.load_tower(c.init_image, "image", "team", built.params)
  exact |= restore.load_tower(c.init_text, "text", "team", built.params)
  rounded = {k for k, v in exact.items() if (have[k] != v).any()}
  for path in rounded:
    np.testing.assert_array_equal(have[path], exact[path].astype(np.float16), path)
  blocks = {
    f"blocks/{x}/{y}" for x in ("q", "k", "v", "out", "wi", "wo") for y in ("kernel", "bias")
  }
  assert rounded == {f"image/clip/{x}" for x in blocks | {"patch/kernel", "proj/kernel"}}


@pytest.mark.full
def test_a_run_trains_on_and_resumes_without_them(files, tiny_data, tmp_path):
  """A step at learning rate 0 keeps the towers; a resumed run does not read the files."""
  copies = {}
  for key, source in files.items():
    copies[key] = str(tmp_path / key)
    shutil.copy(source, copies[key])
  c, run = tiny.team(tiny_data, **SHORT, **copies), tmp_path / "run"
  loop.train(c, str(run))
  saved = model_files.load_model(run / "checkpoints" / "1")
  have, params = restore.flat(saved["params"]), setup.build(c).params
  for side in ("image", "text"):
    for path, value in restore.load_tower(copies[f"init_{side}"], side, "team", params).items():
      np.testing.assert_array_equal(have[path], value, path)
  for path in copies.values():
    pathlib.Path(path).unlink()
  loop.train(c, str(run))


@pytest.mark.parametrize("side", ["init_image", "init_text"])
def test_not_beside_a_whole_model(side, files, tiny_data, tmp_path):
  c = tiny.team(tiny_data, **SHORT, init=str(tmp_path / "whole.pth"), **{side: files[side]})
  with pytest.raises(ValueError, match=r"config\.init is a whole model.*not both"):
    loop.train(c, str(tmp_path / "run"))
