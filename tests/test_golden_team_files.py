"""TEAM's golden files: checkpoints, optimizer states and the outputs of the Chinese release."""

import functools
import pathlib
import runpy

import compare_golden
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import team_golden
from flax import nnx
from team_golden import CHINESE, FILES, MANIFEST, OF_CLIP

from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.data import image
from xmodal_jax.interop import conversion, meta, optimizer_state, torch_files
from xmodal_jax.interop import team as team_rules
from xmodal_jax.models import clip as clip_lib
from xmodal_jax.models import team

OF_CHINESE = [name for name in FILES if name == CHINESE]


def path(name: str) -> pathlib.Path:
  return golden_files.path("team", name, FILES[name])


@functools.cache
def load(name: str):
  return torch_files.state_dict(path(name), verify=True)


def abstract(config) -> dict[str, nnx.Variable]:
  model = nnx.eval_shape(lambda: team.build(config, rngs=nnx.Rngs(0)))
  return restore.flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def section(name: str) -> dict:
  """The manifest's, with the sizes of a model."""
  return MANIFEST["variants"].get(name) or MANIFEST[name]


@functools.cache
def inferred(name: str) -> dict:
  return team_rules.infer_config({k: v.shape for k, v in load(name)[0].items()})


@pytest.fixture(scope="module")
def tool():
  file = pathlib.Path(__file__).parents[1] / "tools" / "convert.py"
  return runpy.run_path(str(file))["main"]


def same_bits(a, b, name: str) -> None:
  a, b = np.asarray(a), np.asarray(b)
  assert (a.shape, a.dtype) == (b.shape, b.dtype), name
  assert a.tobytes() == b.tobytes(), name


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_converts_and_comes_back(name, tool, tmp_path, capsys):
  """The file's names come back, with the prefix that DistributedDataParallel gives them."""
  out, back = tmp_path / "dir", tmp_path / "back.pth"
  tool(["--system", "team", "--checkpoint", str(path(name)), "--out", str(out)])
  said = capsys.readouterr().out
  tool(["--system", "team", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  theirs, ours = torch_files.read(path(name)), torch_files.read(back)
  assert list(ours) == list(theirs)
  for key, value in theirs.items():
    same_bits(ours[key], value, key)
  chinese = name == CHINESE
  assert all(k.startswith("module.") for k in ours) == (not chinese)
  assert any(k.startswith("cross_model.0.") for k in ours) == chinese
  assert any("logit_scale" in k for k in ours) == (not chinese)
  positions = next(k for k in ours if k.endswith("embeddings.position_ids"))
  assert ours[positions].dtype == np.int64
  assert ("2 not in the file: logit_scale, logit_scale_team" in said) == chinese
  if chinese:
    params = model_files.load_model(out)["params"]
    want = np.float32(team.TEMPERATURE)
    assert params["logit_scale"] == params["logit_scale_team"] == want
  config = meta.read_meta(out)["config"]
  assert config["matching"]["depth"] == section(name)["team_blocks"]


@pytest.mark.parametrize("name", FILES)
def test_parameters_are_counted(name):
  state, _ = load(name)
  flat, report = conversion.to_jax(state, team_rules.RULES, abstract(inferred(name)))
  count = sum(v.size for k, v in state.items() if not k.endswith("position_ids"))
  assert report.parameters == count
  assert sum(v.size for v in flat.values()) == count + len(report.filled)
  assert list(report.kept) == ["text_model.bert.embeddings.position_ids"]


@pytest.mark.parametrize("name", FILES)
def test_config_from_shapes(name):
  """All sizes of the manifest; heads, which no file has, where they are width / 64 as published."""
  config = inferred(name)
  want = team_golden.config(name, {k: v.shape for k, v in load(name)[0].items()})
  assert config.keys() <= want.keys()
  for key, value in config.items():
    if not isinstance(value, dict):
      assert value == want[key], key
      continue
    width = value.get("width") or config["image"]["width"]  # the blocks have the image's
    for part, size in value.items():
      if part != "heads" or want[key]["heads"] * 64 == width:
        assert size == want[key][part], (key, part)


@pytest.mark.parametrize("name", FILES)
def test_where_values_go(name):
  """Two swapped paths survive a round trip, so some are written out here."""
  state = {k: np.asarray(v) for k, v in load(name)[0].items()}
  flat, _ = conversion.to_jax(state, team_rules.RULES, abstract(inferred(name)))
  equal = lambda ours, value: np.testing.assert_array_equal(flat[ours], value, ours)
  block = "cross_model" if name == CHINESE else "team_block_list"
  depth = inferred(name)["matching"]["depth"]
  layers = lambda x: np.stack([state[f"{block}.{k}.{x}"] for k in range(depth)])
  for attention in ("self_attn", "cross_attn"):
    thirds = np.split(layers(f"{attention}.in_proj_weight"), 3, axis=1)
    for x, third in zip("qkv", thirds, strict=True):
      equal(f"matching/blocks/{attention}/{x}/kernel", third.swapaxes(1, 2))
  for i in (1, 2, 3):
    equal(f"matching/blocks/ln_{i}/scale", layers(f"norm{i}.weight"))
    equal(f"matching/blocks/ln_{i}/bias", layers(f"norm{i}.bias"))
  equal("matching/blocks/wi/bias", layers("ffn.fc1.bias"))
  equal("matching/blocks/wo/bias", layers("ffn.fc2.bias"))
  for side in ("image", "text"):
    equal(f"matching/{side}_fc/kernel", state[f"{side}_tensor_fc.weight"].T)
  bert = "text_model.bert."
  equal("text/type", state[bert + "embeddings.token_type_embeddings.weight"])
  equal("text/ln/bias", state[bert + "embeddings.LayerNorm.bias"])
  for ours, theirs in {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "wi": "intermediate.dense",
    "wo": "output.dense",
    "ln_1": "attention.output.LayerNorm",
    "ln_2": "output.LayerNorm",
  }.items():
    n = inferred(name)["text"]["depth"]
    values = [state[f"{bert}encoder.layer.{i}.{theirs}.bias"] for i in range(n)]
    equal(f"text/blocks/{ours}/bias", values)
  if inferred(name)["image"]["kind"] == "deit":
    depth = inferred(name)["image"]["depth"]
    equal("image/deit/proj/kernel", state["image_model.projector.weight"].T)
    equal("image/deit/ln_post/scale", state["image_model.vit.norm.weight"])
    fused = np.stack([state[f"image_model.vit.blocks.{n}.attn.qkv.bias"] for n in range(depth)])
    for x, third in zip("qkv", np.split(fused, 3, axis=1), strict=True):
      equal(f"image/deit/blocks/{x}/bias", third)
  else:
    equal("image/clip/proj/kernel", state["image_model.vision_transformer.proj"])
    equal("image/clip/ln_pre/bias", state["image_model.vision_transformer.ln_pre.bias"])
    equal("text_tokens/kernel", state["text_model.projector_token_embeds.weight"].T)
  equal("text_proj/kernel", state["text_model.projector.weight"].T)


@pytest.mark.parametrize("name", FILES)
def test_keys_that_do_not_fit_are_listed(name, tool, tmp_path):
  state = {k: np.asarray(v) for k, v in load(name)[0].items()}
  want = abstract(inferred(name))
  del state["text_tensor_fc.bias"], state["text_model.bert.encoder.layer.0.output.dense.bias"]
  # A key of the other image tower: the rules have it, this model does not.
  extra = "image_model.vision_transformer.ln_pre.bias"
  if inferred(name)["image"]["kind"] == "clip":
    extra = "image_model.vit.cls_token"
  state |= {extra: np.zeros((1, 1, 3), np.float32), "momentum_encoder.x": np.zeros(3, np.float32)}
  state["image_tensor_fc.bias"] = np.append(state["image_tensor_fc.bias"], np.float32(0))
  with pytest.raises(conversion.ConversionError) as e:
    conversion.to_jax(state, team_rules.RULES, want)
  assert e.value.unknown == ["momentum_encoder.x [3]"]
  assert e.value.extra == [f"{extra} [1, 1, 3]"]
  assert sorted(m.split()[0] for m in e.value.missing) == [
    "text_model.bert.encoder.layer.0.output.dense.bias",
    "text_tensor_fc.bias",
  ]
  assert [m.split()[0] for m in e.value.misshapen] == ["image_tensor_fc.bias"]
  source, out = tmp_path / "m.pth", tmp_path / "dir"
  torch_files.write(source, state)
  with pytest.raises(SystemExit, match=r"momentum_encoder\.x[\s\S]*text_tensor_fc\.bias"):
    tool(["--system", "team", "--checkpoint", str(source), "--out", str(out)])
  assert not out.exists()


@pytest.mark.parametrize("name", OF_CHINESE)
def test_a_block_under_both_of_its_names(name):
  state = dict(load(name)[0])
  state["team_block_list.0.norm1.bias"] = state["cross_model.0.norm1.bias"]
  with pytest.raises(conversion.ConversionError) as e:
    conversion.to_jax(state, team_rules.RULES, abstract(inferred(name)))
  text = str(e.value)
  assert "cross_model.0.norm1.bias" in text and "team_block_list.0.norm1.bias" in text
  assert "norm2" not in text


@pytest.mark.parametrize("name", FILES)
def test_one_temperature_without_the_other(name):
  """Only the Chinese layout may lack one: it is filled in, and left out on the way back."""
  state = {k: v for k, v in load(name)[0].items() if k != "logit_scale_team"}
  state["logit_scale"] = np.float32(1.5)
  if name != CHINESE:
    with pytest.raises(conversion.ConversionError, match=r"1 missing:\s+logit_scale_team"):
      conversion.to_jax(state, team_rules.RULES, abstract(inferred(name)))
    return
  flat, report = conversion.to_jax(state, team_rules.RULES, abstract(inferred(name)))
  assert report.filled == ["logit_scale_team"] and report.missing == []
  assert flat["logit_scale"] == 1.5 and flat["logit_scale_team"] == np.float32(team.TEMPERATURE)
  back = conversion.to_torch(flat, team_rules.RULES, kept=report.kept, order=report.keys)
  assert list(back) == list(state)


def test_clip_files_are_refused(tool, tmp_path):
  model = next(iter(golden_files.manifest("clip")["models"]))
  file, out = golden_files.path("clip", model, "state_dict.pth"), tmp_path / "dir"
  with pytest.raises(SystemExit, match="not a TEAM state dict"):
    tool(["--system", "team", "--checkpoint", str(file), "--out", str(out)])
  assert not out.exists()


@pytest.mark.parametrize("name", FILES)
def test_clip_refuses_team_files(name, tool, tmp_path):
  out = tmp_path / "dir"
  with pytest.raises(SystemExit, match=r"not a CLIP state dict .*seems to be of TEAM"):
    tool(["--system", "clip", "--checkpoint", str(path(name)), "--out", str(out)])
  assert not out.exists()
  model = nnx.eval_shape(lambda: clip_lib.build(clip_lib.preset("vit_b32"), rngs=nnx.Rngs(0)))
  with pytest.raises(conversion.ConversionError, match=r"not a CLIP state dict .*TEAM"):
    restore.load(str(path(name)), "clip", nnx.state(model, nnx.Param), nnx.State({}))


def test_an_optimizer_file_is_no_checkpoint(tool, tmp_path):
  file, out = team_golden.some_optimizer_file(), tmp_path / "dir"
  with pytest.raises(SystemExit, match=r"state: |no state dict"):
    tool(["--system", "team", "--checkpoint", str(file), "--out", str(out)])
  assert not out.exists()


@pytest.mark.parametrize("name", team_golden.VARIANTS)
def test_a_converted_directory_of_another_system(name, tool, tmp_path):
  out = tmp_path / "dir"
  tool(["--system", "team", "--checkpoint", str(path(name)), "--out", str(out)])
  with pytest.raises(SystemExit, match="holds a team model, not clip"):
    args = ["--checkpoint", str(out), "--out", str(tmp_path / "x.pth")]
    tool(["--system", "clip", "--to", "torch", *args])
  with pytest.raises(checkpointer.CheckpointError, match="holds a team model"):
    restore.load(str(out), "clip", nnx.State({}), nnx.State({}))


@pytest.mark.parametrize("name", FILES)
def test_same_as_torch_load(name):
  torch = pytest.importorskip("torch")
  state, info = load(name)
  tree = torch.load(path(name), map_location="cpu", weights_only=True)
  assert [k.removeprefix("module.") for k in tree] == list(state)
  assert info["wrapper"] == (() if name == CHINESE else ("module.",))
  for (_, tensor), key in zip(tree.items(), state, strict=True):
    same_bits(state[key], tensor.numpy(), key)


@pytest.mark.parametrize("name", team_golden.VARIANTS)
def test_another_resolution(name):
  """restore.load resizes the image's position table, no other table; the tool resizes none."""
  config = inferred(name)
  patch = config["image"]["patch"]
  size = config["image"]["size"] + 2 * patch
  config = config | {"image": config["image"] | {"size": size}}
  model = nnx.eval_shape(lambda: team.build(config, rngs=nnx.Rngs(0)))
  ours, _, _ = restore.load(str(path(name)), "team", nnx.state(model, nnx.Param), nnx.State({}))
  kind = config["image"]["kind"]
  have = ours["image"][kind]["pos"]
  table = {"deit": "vit.pos_embed", "clip": "vision_transformer.positional_embedding"}[kind]
  table = np.asarray(load(name)[0][f"image_model.{table}"])
  table = table[0] if kind == "deit" else table
  assert have.shape == (1 + (size // patch) ** 2, table.shape[1])
  assert len(table) == 1 + (size // patch - 2) ** 2
  np.testing.assert_array_equal(have[0], table[0])
  with pytest.raises(checkpointer.CheckpointError, match="text/pos"):
    text = config["text"] | {"context": config["text"]["context"] + 1}
    other = nnx.eval_shape(lambda: team.build(config | {"text": text}, rngs=nnx.Rngs(0)))
    restore.load(str(path(name)), "team", nnx.state(other, nnx.Param), nnx.State({}))


# --- CLIP's rounding ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", OF_CLIP)
def test_rounding_of_a_clip_archive(variant, tmp_path):
  """What the original's constructor makes of a float32 CLIP file, bit for bit."""
  arrays = golden_files.arrays("team", variant, "clip_init_rounding.npz")
  given = {k.removeprefix("in/"): v for k, v in arrays.items() if k.startswith("in/")}
  want = {k.removeprefix("out/"): v for k, v in arrays.items() if k.startswith("out/")}
  assert {k.removeprefix("visual.") for k in given} == {
    k.removeprefix("vision_transformer.") for k in want
  }
  ours, theirs = "image_model.vision_transformer.", "visual."
  state = {
    theirs + k.removeprefix(ours): np.asarray(v)
    for k, v in load(variant)[0].items()
    if k.startswith(ours)
  }
  assert given.keys() <= state.keys()
  state |= given
  rest = ("logit_scale", "positional_embedding", "token_embedding.weight", "ln_final.bias")
  rest += ("transformer.resblocks.0.attn.in_proj_bias", "text_projection")
  torch_files.write(tmp_path / "clip.pt", state | {k: np.zeros((2, 3), np.float32) for k in rest})
  model = nnx.eval_shape(lambda: team.build(inferred(variant), rngs=nnx.Rngs(0)))
  params = nnx.state(model, nnx.Param)
  read = {}
  for half in (True, False):
    leaves = restore.load_tower(str(tmp_path / "clip.pt"), "image", "team", params, half)
    assert all(k.startswith("image/clip/") and v.dtype == np.float32 for k, v in leaves.items())
    back = conversion.arrays(conversion.to_torch(leaves, team_rules.RULES))
    read[half] = {k.removeprefix("image_model."): np.asarray(v) for k, v in back}
  changed = set()
  for name, value in want.items():
    same_bits(read[True][name], value, name)
    before = given[name.replace("vision_transformer.", "visual.")]
    same_bits(read[False][name], before, name)
    changed |= {name} if (before != value).any() else set()
  # LayerNorms and embeddings stay float32; the others do not fit into float16.
  assert {n for n in want if "ln_" in n or "embedding" in n} == want.keys() - changed
  same = [k for k in read[True] if (read[True][k] == read[False][k]).all()]
  for name in read[True]:
    kept = "ln_" in name or "embedding" in name
    assert (name in same) == kept or not read[False][name].any(), name


# --- optimizer states ---------------------------------------------------------------------------


@functools.cache
def order(name: str) -> tuple[list[str], list[int]]:
  """Parameter names as the original lists them, and the sizes of its optimizer's groups."""
  out = golden_files.arrays("team", name, "outputs.npz")
  names = [str(n).removeprefix("module.") for n in out["param_names_in_order"]]
  return names, out["schedule/group_sizes"].tolist()


@pytest.mark.parametrize("name", team_golden.VARIANTS)
def test_optimizer_names(name):
  names, sizes = order(name)
  want = {k: v.shape for k, v in abstract(inferred(name)).items()}
  assert conversion.parameter_names(team_rules.RULES, want, load(name)[0]) == names
  ours = team_rules.optimizer_names(names, sizes)
  if len(sizes) == 1:
    assert ours == names
    return
  fast = [n for n in names if not n.startswith("image_model.")]
  slow = [n for n in names if n.startswith("image_model.")]
  assert [len(fast), len(slow)] == sizes and ours == fast + slow
  assert "image_tensor_fc.weight" in fast and ours != names


def moments_of(state) -> dict[str, dict[str, np.ndarray]]:
  """{"exp_avg": by torch name, "exp_avg_sq": ...} of an optax state."""
  adam = compare_golden.adam_state(state)
  return {"exp_avg": team_golden.to_torch(adam.mu), "exp_avg_sq": team_golden.to_torch(adam.nu)}


def loaded_moments(name: str, file) -> tuple[dict, int]:
  golden = team_golden.Golden(name)
  tx = team_golden.optimizer(name, None, golden.params)
  state, step = optimizer_state.for_init(str(path(name)), str(file), "team", golden.params, tx)
  return moments_of(state), step


@pytest.mark.parametrize("variant", team_golden.WITH_OPTIMIZER or [None])
def test_optimizer_file(variant):
  """Every moment of the original's file, by the ids of its groups."""
  file = team_golden.optimizer_file(variant) if variant else team_golden.some_optimizer_file()
  saved, (ours, step) = torch_files.read(file), loaded_moments(variant, file)
  assert step == saved["param_groups"][0]["step"] > 0
  names, sizes = order(variant)
  assert [len(g["params"]) for g in saved["param_groups"]] == sizes
  ids = [i for g in saved["param_groups"] for i in g["params"]]
  in_order = team_rules.optimizer_names(names, sizes)
  for key in ("exp_avg", "exp_avg_sq"):
    assert ours[key].keys() == set(names)
    for name, i in zip(in_order, ids, strict=True):
      same_bits(ours[key][name], saved["state"][i][key], f"{key} of {name}")


@pytest.mark.parametrize("variant", team_golden.VARIANTS)
def test_optimizer_file_of_two_groups(variant, tmp_path):
  """In the layout of the original, the image tower last, with a random value for every moment."""
  names, sizes = order(variant)
  if len(sizes) == 1:
    pytest.skip(f"{variant} was trained with one group")
  fast = [n for n in names if not n.startswith("image_model.")]
  in_order = fast + [n for n in names if n not in fast]
  state, _ = load(variant)
  rng = np.random.default_rng(0)
  values = [rng.random((2, *state[n].shape), np.float32) for n in in_order]
  ends = np.cumsum([0, *sizes]).tolist()
  (common, *_) = torch_files.read(team_golden.some_optimizer_file())["param_groups"]
  groups = [
    common | dict(lr=lr, params=list(range(a, b)))
    for lr, a, b in zip((1e-3, 1e-4), ends[:-1], ends[1:], strict=True)
  ]
  saved = {
    i: dict(exp_avg=np.asarray(v[0]), exp_avg_sq=np.asarray(v[1])) for i, v in enumerate(values)
  }
  torch_files.write(tmp_path / "opt.pth", dict(state=saved, param_groups=groups))
  ours, step = loaded_moments(variant, tmp_path / "opt.pth")
  assert step == common["step"]
  for name, value in zip(in_order, values, strict=True):
    same_bits(ours["exp_avg"][name], value[0], name)
    same_bits(ours["exp_avg_sq"][name], value[1], name)


# --- the Chinese release ------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_CHINESE)
def test_chinese_outputs(name):
  inputs, want = (golden_files.arrays("team", name, f"{x}.npz") for x in ("inputs", "outputs"))
  golden = team_golden.Golden(name)

  @jax.jit
  def run(model, b):
    i, t = model.encode_image(b), model.encode_text(b)
    n = len(b["image"])
    each = jax.tree.map(lambda x: x[:, None], t)  # one text for each image
    every = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), t)
    return {
      "text_tensors": t["tokens"],
      "image_tensors": i["tokens"],
      "text_embedding": t["embed"],
      "img_embedding": i["embed"],
      "score_image_by_text": model.rerank(i, every),
      "scores": model.rerank(i, each)[:, 0],
    }

  with jax.default_matmul_precision("highest"):
    ours = run(golden.model(), team_golden.batch(inputs))
  assert ours.keys() == want.keys()
  for key, value in want.items():
    team_golden.close(ours[key], value, key)


@pytest.mark.parametrize("name", OF_CHINESE)
def test_chinese_images(name):
  """Resized to a square and normalised, from the arrays that the pipeline was given."""
  inputs = golden_files.arrays("team", name, "inputs.npz")
  model = team_golden.Golden(name).model()
  size = section(name)["image_size"]
  transform = image.Transform(size, size, resize="exact", exif=True)
  for k, want in enumerate(inputs["images"]):
    got = image.load(inputs[f"raw_image_{k}"], transform)
    ours = np.asarray(model.pixels(jnp.asarray(got)[None]))[0].transpose(2, 0, 1)
    np.testing.assert_allclose(ours, want, atol=1e-5, err_msg=str(k))
