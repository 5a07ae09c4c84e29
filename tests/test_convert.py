"""The conversion on small artificial models, and the tool on a small CLIP."""

import functools
import json
import pathlib
import runpy
import types

import numpy as np
import pytest
from flax import nnx

from xmodal_jax.checkpoints import model_files, restore
from xmodal_jax.interop import clip as clip_rules
from xmodal_jax.interop import conversion, rules, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.interop.rules import Ignore, Rule
from xmodal_jax.models import clip

RULES = [
  Rule("net.{layer}.w", "blocks/w/kernel", rules.linear),
  Rule("net.{layer}.qkv", ("blocks/q", "blocks/k", "blocks/v"), rules.split(3, rules.linear)),
  Rule("stage{s}.0.conv", "stage{s}/first", rules.conv),
  Rule("stage{s}.{layer}.conv", "stage{s}/rest", rules.conv, first=1),
  Rule("cls", "cls", rules.squeeze(0, 1)),
  Rule("scale", "scale"),
  Ignore("*.count"),
  Ignore("mask", keep=False),
]


def small() -> dict[str, np.ndarray]:
  """Two layers, two stages of one and three blocks; all values differ."""
  shapes = {"scale": (), "cls": (1, 1, 5), "net.1.w": (4, 3), "net.0.w": (4, 3)}
  shapes |= {"net.0.qkv": (6, 4), "net.1.qkv": (6, 4), "net.0.count": (), "mask": (9, 9)}
  shapes |= {f"stage1.{i}.conv": (2, 3, 1, 1) for i in range(1)}
  shapes |= {f"stage2.{i}.conv": (2, 3, 3, 5) for i in range(3)}
  rng = np.random.default_rng(0)
  state = {k: rng.normal(size=s).astype(np.float16) for k, s in shapes.items()}
  return state | {"net.0.count": np.array(7, np.int64), "scale": np.array(2.5, np.float32)}


def abstract(**changes) -> dict[str, types.SimpleNamespace]:
  shapes = {"scale": (), "cls": (5,), "blocks/w/kernel": (2, 3, 4), "stage1/first": (1, 1, 3, 2)}
  shapes |= {f"blocks/{x}": (2, 4, 2) for x in "qkv"}
  shapes |= {"stage2/first": (3, 5, 3, 2), "stage2/rest": (2, 3, 5, 3, 2)}
  shapes |= {k.replace("__", "/"): v for k, v in changes.items()}
  return {k: types.SimpleNamespace(shape=v) for k, v in shapes.items() if v is not None}


def test_values_at_their_paths():
  state = small()
  flat, report = conversion.to_jax(state, RULES, abstract())
  assert {k: v.shape for k, v in flat.items()} == {k: v.shape for k, v in abstract().items()}
  for layer in range(2):
    np.testing.assert_array_equal(flat["blocks/w/kernel"][layer], state[f"net.{layer}.w"].T)
    for i, x in enumerate("qkv"):
      rows = state[f"net.{layer}.qkv"][2 * i : 2 * i + 2]
      np.testing.assert_array_equal(flat[f"blocks/{x}"][layer], rows.T)
  for i in range(2):
    want = np.einsum("oihw->hwio", state[f"stage2.{i + 1}.conv"])
    np.testing.assert_array_equal(flat["stage2/rest"][i], want)
  np.testing.assert_array_equal(flat["cls"], state["cls"][0, 0])
  assert flat["blocks/w/kernel"].dtype == np.float16 and flat["scale"].dtype == np.float32
  assert report.kept == {"net.0.count": 7} and report.dropped == ["mask"]
  assert report.keys == list(state)


def test_round_trip_is_the_identity():
  state = small()
  flat, report = conversion.to_jax(state, RULES, abstract())
  back = conversion.to_torch(flat, RULES, kept=report.kept, order=report.keys)
  assert list(back) == [k for k in state if k != "mask"]
  for name, array in conversion.arrays(back):
    assert array.shape == back[name].shape == state[name].shape
    assert array.dtype == back[name].dtype == state[name].dtype
    np.testing.assert_array_equal(array, state[name], name)


def test_all_problems_are_listed_at_once():
  state = small()
  state |= {"new.thing": np.zeros(2), "net.2.w": np.zeros((4, 3)), "cls": np.zeros((1, 1, 6))}
  del state["net.1.qkv"], state["scale"]
  with pytest.raises(conversion.ConversionError) as e:
    conversion.to_jax(state, RULES, abstract(nobody=(3,)))
  assert e.value.unknown == ["new.thing [2]"]
  assert e.value.extra == ["net.2.w [4, 3]"]
  assert sorted(m.split()[0] for m in e.value.missing) == ["net.1.qkv", "scale"]
  assert [m.split()[0] for m in e.value.misshapen] == ["cls"]
  assert e.value.parameters_without_a_rule == ["nobody [3]"]
  for word in ("new.thing", "net.2.w", "net.1.qkv", "scale", "cls", "nobody"):
    assert word in str(e.value)


def test_numbers_are_not_matched_loosely():
  state = small()
  state["net.01.w"] = state.pop("net.1.w")
  with pytest.raises(conversion.ConversionError) as e:
    conversion.to_jax(state, RULES, abstract())
  assert e.value.unknown == ["net.01.w [4, 3]"] and len(e.value.missing) == 1


def test_missing_keys_pass_only_when_named_in_full():
  state = small()
  del state["scale"]
  with pytest.raises(conversion.ConversionError, match="scale"):
    conversion.to_jax(state, RULES, abstract(), allow_missing="scal")
  flat, report = conversion.to_jax(state, RULES, abstract(), allow_missing="scal.")
  assert "scale" not in flat and report.missing == ["scale"]


def test_a_stack_needs_all_of_its_layers():
  state = small()
  del state["net.1.w"]
  with pytest.raises(conversion.ConversionError, match="only some of its layers"):
    conversion.to_jax(state, RULES, abstract(), allow_missing=r"net\.1\.w")


@pytest.mark.parametrize("shape", [(7, 4), (6, 5), (6,), (6, 4, 1)])
def test_misshapen_pieces_of_fused_weights(shape):
  state = small() | {"net.0.qkv": np.zeros(shape, np.float16)}
  with pytest.raises(conversion.ConversionError) as e:
    conversion.to_jax(state, RULES, abstract())
  assert [m.split()[0] for m in e.value.misshapen] == ["net.0.qkv"]


def test_layers_of_two_dtypes_are_refused():
  state = small()
  state["net.1.w"] = state["net.1.w"].astype(np.float32)
  with pytest.raises(conversion.ConversionError, match=r"float32.*beside float16"):
    conversion.to_jax(state, RULES, abstract())


def test_shapes_of_the_file_are_kept_on_request():
  flat, _ = conversion.to_jax(small(), RULES, abstract(cls=(9,)), check_shapes=False)
  assert flat["cls"].shape == (5,)


def test_a_table_with_two_rules_for_a_key_is_an_error():
  with pytest.raises(ValueError, match="two rules"):
    conversion.plan([Rule("a", "x"), Rule("a", "y")], {"x": (), "y": ()})


@pytest.mark.parametrize(
  "array",
  [np.array(5), np.arange(600).reshape(1, 600), np.array([[0, -np.inf]], np.float16)],
)
def test_buffers_survive_json(array):
  back = meta_lib.unpack(json.loads(json.dumps(meta_lib.pack(array))))
  assert back.dtype == array.dtype and back.shape == array.shape
  assert back.tobytes() == array.tobytes()


def test_wrappers_come_back():
  assert meta_lib.wrap({"a": 1}, ["model", "module."]) == {"model": {"module.a": 1}}


# --- CLIP ---------------------------------------------------------------------------------------

OPENAI = dict(act="quick_gelu", mean=clip.MEAN, std=clip.STD)
CONFIGS = {
  "vit": dict(
    system="clip", embed=24, **OPENAI,
    image=dict(kind="vit", size=20, patch=5, width=64, depth=3, heads=1, pool="cls"),
    text=dict(vocab=70, context=9, width=128, depth=2, heads=2, causal=True),
  ),
  "resnet": dict(
    system="clip", embed=24, **OPENAI,
    image=dict(kind="resnet", size=64, width=4, depths=(1, 3, 1, 2), heads=2),
    text=dict(vocab=70, context=9, width=64, depth=2, heads=1, causal=True),
  ),
}  # fmt: skip


def clip_state(kind: str) -> dict[str, np.ndarray]:
  """A torch state dict of random values, converted from our model."""
  module = nnx.eval_shape(lambda: clip.build(CONFIGS[kind], rngs=nnx.Rngs(0)))
  shapes = restore.flat(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
  rng = np.random.default_rng(1)
  flat = {k: rng.normal(size=v.shape).astype(np.float16) for k, v in shapes.items()}
  return dict(conversion.arrays(conversion.to_torch(flat, clip_rules.RULES)))


@pytest.fixture(scope="module")
def tool():
  path = pathlib.Path(__file__).parents[1] / "tools" / "convert.py"
  return runpy.run_path(str(path))["main"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_is_read_off_the_shapes(kind):
  shapes = {k: v.shape for k, v in clip_state(kind).items()}
  config = clip_rules.infer_config(shapes)
  assert config == CONFIGS[kind]
  size = config["image"]["size"]
  assert clip_rules.infer_config(shapes, {"input_resolution": size}) == config
  with pytest.raises(conversion.ConversionError, match="input_resolution"):
    clip_rules.infer_config(shapes, {"input_resolution": size + 1})


@pytest.mark.parametrize("kind", CONFIGS)
def test_clip_values_at_their_paths(kind):
  """A round trip does not detect two swapped paths, so this lists some of them."""
  state = clip_state(kind)
  module = nnx.eval_shape(lambda: clip.build(CONFIGS[kind], rngs=nnx.Rngs(0)))
  shapes = restore.flat(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
  ours, _ = conversion.to_jax(state, clip_rules.RULES, shapes)
  equal = lambda path, value: np.testing.assert_array_equal(ours[path], value, path)
  towers = {"text": "transformer"} | ({"image": "visual.transformer"} if kind == "vit" else {})
  for tower, torch in towers.items():
    layers = lambda name, t=torch: [state[f"{t}.resblocks.{i}.{name}"] for i in range(depth)]
    depth = CONFIGS[kind][tower]["depth"]
    for i, x in enumerate("qkv"):
      thirds = [np.split(w, 3)[i] for w in layers("attn.in_proj_weight")]
      equal(f"{tower}/blocks/{x}/kernel", [w.T for w in thirds])
      equal(f"{tower}/blocks/{x}/bias", [np.split(w, 3)[i] for w in layers("attn.in_proj_bias")])
    equal(f"{tower}/blocks/out/bias", layers("attn.out_proj.bias"))
    equal(f"{tower}/blocks/ln_1/scale", layers("ln_1.weight"))
    equal(f"{tower}/blocks/ln_2/scale", layers("ln_2.weight"))
    equal(f"{tower}/blocks/wi/kernel", [w.T for w in layers("mlp.c_fc.weight")])
    equal(f"{tower}/blocks/wo/kernel", [w.T for w in layers("mlp.c_proj.weight")])
  equal("text/proj/kernel", state["text_projection"])
  equal("text/pos", state["positional_embedding"])
  if kind == "vit":
    equal("image/proj/kernel", state["visual.proj"])
    equal("image/ln_pre/scale", state["visual.ln_pre.weight"])
    equal("image/patch/kernel", np.einsum("oihw->hwio", state["visual.conv1.weight"]))
    return
  for i in (1, 2, 3):
    equal(f"image/stem/bn{i}/mean", state[f"visual.bn{i}.running_mean"])
    equal(f"image/stem/bn{i}/var", state[f"visual.bn{i}.running_var"])
    rest = [state[f"visual.layer2.{b}.bn{i}.weight"] for b in (1, 2)]
    equal(f"image/stage2/rest/bn{i}/scale", rest)
  equal("image/stage2/first/bn3/bias", state["visual.layer2.0.bn3.bias"])
  equal("image/stage4/first/down_bn/var", state["visual.layer4.0.downsample.1.running_var"])
  for x in "qkvc":
    equal(f"image/pool/{x}/kernel", state[f"visual.attnpool.{x}_proj.weight"].T)


@pytest.mark.parametrize(
  "key, what",
  [
    ("team_block_list.0.norm1.weight", "TEAM"),
    ("vit_model.layers.0.blocks.0.norm1.weight", "HAT"),
    ("img_txt_enc.txt_enc.map.weight", "TGDT"),
    ("image_encoder.model.model.pos_embed", "ZeroVL"),
    ("bert.embeddings.word_embeddings.weight", "BERT"),
    ("some.thing", "some.thing"),
    ("base_model.model.visual.conv1.lora_A.weight", "LoRA .*merge"),
    ("dist_token", "distilled DeiT"),
    ("vision_model.embeddings.class_embedding", "the image tower of Hugging Face's CLIP alone"),
    ("text_model.embeddings.token_embedding.weight", "the text tower of Hugging Face's CLIP alone"),
    ("visual.class_embedding", "the image tower of OpenAI CLIP alone"),
    ("visual.trunk.pos_embed", "open_clip with an image tower of timm"),
    ("text.transformer.resblocks.0.ln_1.weight", "CustomTextCLIP.*OpenAI's .pt"),
    ("embeddings.patch_embeddings.projection.weight", "Hugging Face's names.*timm's file"),
  ],
)
def test_other_files_are_named(key, what):
  with pytest.raises(conversion.ConversionError, match=f"not a CLIP state dict .*{what}"):
    clip_rules.infer_config({key: (3, 3)})


def test_files_of_hugging_face_are_named():
  clip_keys = [f"{side}_model.encoder.layers.0.layer_norm1.weight" for side in ("text", "vision")]
  siglip_keys = [*clip_keys, "vision_model.head.probe", "logit_bias"]
  for keys, what in (
    (clip_keys, "CLIP in Hugging Face's names.*OpenAI's"),
    (siglip_keys, "SigLIP"),
  ):
    with pytest.raises(conversion.ConversionError, match=what):
      clip_rules.infer_config({key: (3,) for key in keys})


def test_a_prefix_of_all_keys_is_pointed_out():
  with pytest.raises(conversion.ConversionError, match=r"all begin with 'tower\.'.*--prefix"):
    clip_rules.infer_config({"tower.a": (3,), "tower.b": (3,)})


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("wrapper", [[], ["state_dict"], ["model", "module."]])
def test_the_tool_in_both_directions(kind, wrapper, tool, tmp_path, capsys):
  state = clip_state(kind) | {"visual.bn9.num_batches_tracked": np.array(3)}
  source, out, back = tmp_path / "m.pt", tmp_path / "dir", tmp_path / "m.pth"
  torch_files.write(source, meta_lib.wrap(state, wrapper))
  tool(["--system", "clip", "--checkpoint", str(source), "--out", str(out)])
  assert "clip of its own size" in capsys.readouterr().out
  meta = meta_lib.read_meta(out)
  assert (meta["system"], meta["source"], meta["wrapper"]) == ("clip", "m.pt", wrapper)
  assert meta["sha256"] == torch_files.sha256(source)
  tree = model_files.load_model(out)
  stats = {path.rpartition("/")[2] for path in restore.flat(tree.get("stats") or {})}
  assert stats == ({"mean", "var"} if kind == "resnet" else set())
  tool(["--system", "clip", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  assert back.read_bytes() == source.read_bytes()


def there_and_back(tool, source: pathlib.Path, folder: pathlib.Path, *flags: str) -> pathlib.Path:
  """Converts a file of CLIP and back; returns the converted directory."""
  out, back = folder / "dir", folder / "back.pt"
  tool(["--system", "clip", "--checkpoint", str(source), "--out", str(out), *flags])
  tool(["--system", "clip", "--to", "torch", "--checkpoint", str(out), "--out", str(back)])
  assert back.read_bytes() == source.read_bytes()
  return out


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_scalar_with_axes(shape, tool, tmp_path):
  """open_clip's older training wrote logit_scale with one axis. It comes back with it."""
  state = clip_state("vit")
  state["logit_scale"] = np.full(shape, 2.5, np.float32)
  torch_files.write(tmp_path / "m.pt", state)
  out = there_and_back(tool, tmp_path / "m.pt", tmp_path)
  assert model_files.load_model(out)["params"]["logit_scale"] == np.float32(2.5)
  module = nnx.eval_shape(lambda: clip.build(CONFIGS["vit"], rngs=nnx.Rngs(0)))
  params = nnx.state(module, nnx.Param)
  have, _, _ = restore.load(str(tmp_path / "m.pt"), "clip", params, nnx.State({}))
  assert have["logit_scale"].shape == () and have["logit_scale"] == np.float32(2.5)
  state["logit_scale"] = np.ones(2, np.float32)
  torch_files.write(tmp_path / "two.pt", state)
  with pytest.raises(SystemExit, match=r"two.pt: .*\n.*misshapen:\n *logit_scale \[2\]"):
    tool(["--system", "clip", "--checkpoint", str(tmp_path / "two.pt"), "--out", str(out / "x")])


def test_a_file_of_the_sigmoid_loss(tool, tmp_path):
  """model.loss is read off the bias; a config without it says what to set."""
  config = CONFIGS["vit"] | dict(loss="sigmoid")
  state = clip_state("vit") | dict(logit_bias=np.array(-7, np.float16))
  assert clip_rules.infer_config({k: v.shape for k, v in state.items()}) == config
  torch_files.write(tmp_path / "m.pt", state)
  out = there_and_back(tool, tmp_path / "m.pt", tmp_path)
  assert meta_lib.read_meta(out)["config"]["loss"] == "sigmoid"

  def load(config):
    module = nnx.eval_shape(lambda: clip.build(config, rngs=nnx.Rngs(0)))
    return restore.load(
      str(tmp_path / "m.pt"), "clip", nnx.state(module, nnx.Param), nnx.State({})
    )[0]

  assert load(config)["logit_bias"] == -7
  with pytest.raises(restore.CheckpointError, match=r"set config\.model\.loss to 'sigmoid'"):
    load(CONFIGS["vit"])


def test_a_vit_without_projection_is_named(tool, tmp_path):
  state = clip_state("vit")
  del state["visual.proj"]
  torch_files.write(tmp_path / "m.pt", state)
  with pytest.raises(SystemExit, match=r"m.pt: .*\n.*\n.*; no visual\.proj$"):
    tool(["--system", "clip", "--checkpoint", str(tmp_path / "m.pt"), "--out", str(tmp_path / "o")])


def test_what_is_given_and_what_a_json_says(tool, tmp_path, capsys):
  """A flag outweighs the json, which is said; the json of another model is not used."""
  file, json_file = tmp_path / "m.pt", tmp_path / "open_clip_config.json"
  torch_files.write(file, clip_state("vit"))
  vision, text = dict(width=64, layers=3, head_width=32), dict(width=128, layers=2, heads=2)
  cfg = dict(embed_dim=24, vision_cfg=vision, text_cfg=text)
  preprocess = dict(mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash", interpolation="bilinear")
  json_file.write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=preprocess)))
  there_and_back(tool, file, tmp_path, "--act", "quick_gelu")
  printed = capsys.readouterr().out
  assert "act=quick_gelu as given, although open_clip_config.json says gelu" in printed
  assert "assumed" not in printed
  meta = meta_lib.read_meta(tmp_path / "dir")
  assert (meta["config"]["mean"], meta["config"]["image"]["heads"]) == ([0.5] * 3, 2)
  assert meta["facts"] == {
    "data.image.resize": "exact", "data.image.interpolation": "bilinear",
  }  # fmt: skip
  assert "warning: back.pt cannot say that model.image.heads is 2; its readers assume 1" in printed
  assert "model.mean is [0.5, 0.5, 0.5]; its readers assume [0.48" in printed

  other = dict(cfg, vision_cfg=vision | dict(width=1024))
  json_file.write_text(json.dumps(dict(model_cfg=other)))
  there_and_back(tool, file, tmp_path / "b", "--heads", "2,4")
  printed = capsys.readouterr().out
  assert "is of another model (model.image.width is 1024 there, 64 in the file); assumed" in printed
  assert "model.text.heads is 4; its readers assume 2" in printed

  json_file.write_text(json.dumps(dict(model_cfg=cfg | dict(text_cfg=dict(pool_type="last")))))
  with pytest.raises(SystemExit, match=r"pool_type='last', which this package does not compute"):
    tool(["--system", "clip", "--checkpoint", str(file), "--out", str(tmp_path / "c")])
  (tmp_path / "config.json").write_text(
    json.dumps(dict(
      model_type="clip", projection_dim=24,
      vision_config=dict(hidden_act="gelu", hidden_size=64, num_hidden_layers=3,
                         num_attention_heads=4),
      text_config=dict(hidden_act="gelu", hidden_size=128, num_hidden_layers=2),
    ))
  )  # fmt: skip
  json_file.unlink()
  there_and_back(tool, file, tmp_path / "d")
  config = meta_lib.read_meta(tmp_path / "d" / "dir")["config"]
  heads = config["image"]["heads"], config["text"]["heads"]
  assert (config["act"], heads) == ("gelu", (4, 8))
  assert "assumed mean=" in capsys.readouterr().out  # Hugging Face has them in another file


@pytest.mark.parametrize(
  ("flags", "error"),
  [
    (("--act", "swish"), "model.*act is 'swish'; there are quick_gelu"),
    (("--heads", "3"), "3 heads do not divide a width of 64"),
    (("--mean", "0.5"), r"model.mean is \(0.5,\), expected three numbers"),
    (("--pool", "max"), "model.image.pool is 'max'; there are cls, mean"),
  ],
)
def test_choices_that_do_not_exist(flags, error, tool, tmp_path):
  torch_files.write(tmp_path / "m.pt", clip_state("vit"))
  with pytest.raises(SystemExit, match=error):
    source, out = str(tmp_path / "m.pt"), str(tmp_path / "o")
    tool(["--system", "clip", "--checkpoint", source, "--out", out, *flags])


def test_a_choice_that_a_system_does_not_have(tool, tmp_path):
  with pytest.raises(SystemExit, match=r"a file of team leaves no choice of image\.pool"):
    tool(["--system", "team", "--checkpoint", "x", "--out", str(tmp_path / "o"), "--pool", "mean"])


def test_the_tool_takes_an_entry_of_a_file_in_a_folder(tool, tmp_path, capsys):
  state, folder = clip_state("vit"), tmp_path / "hub"
  folder.mkdir()
  raw = {name: np.zeros_like(x) for name, x in state.items()}
  tree = {"model": raw, "model_ema": meta_lib.wrap(state, ["module."])}
  torch_files.write(folder / "pytorch_model.bin", tree)
  args = ["--system", "clip", "--checkpoint", str(folder)]
  tool([*args, "--out", str(tmp_path / "raw")])
  printed = capsys.readouterr().out
  assert "took the entry 'model'; beside it: 'model_ema'" in printed and "--key" in printed
  tool([*args, "--key", "model_ema", "--out", str(tmp_path / "ema")])
  assert "beside it" not in capsys.readouterr().out
  assert meta_lib.read_meta(tmp_path / "ema")["wrapper"] == ["model_ema", "module."]
  kernel = lambda name: model_files.load_model(tmp_path / name)["params"]["text"]["proj"]["kernel"]
  np.testing.assert_array_equal(kernel("ema"), state["text_projection"])
  assert not kernel("raw").any()


def test_the_tool_names_the_file_that_does_not_fit(tool, tmp_path):
  torch_files.write(tmp_path / "m.pt", {"visual.conv1.lora_A": np.ones(3, np.float32)})
  with pytest.raises(SystemExit, match=r"m\.pt: (?s:.*)LoRA"):
    tool(["--system", "clip", "--checkpoint", str(tmp_path / "m.pt"), "--out", str(tmp_path / "o")])


def test_the_tool_lists_what_is_missing(tool, tmp_path, capsys):
  state = clip_state("vit")
  del state["visual.ln_pre.bias"]
  source, out = tmp_path / "m.pt", tmp_path / "dir"
  torch_files.write(source, state)
  args = ["--system", "clip", "--checkpoint", str(source), "--out", str(out)]
  with pytest.raises(SystemExit, match=r"visual\.ln_pre\.bias"):
    tool(args)
  assert not out.exists()
  tool([*args, "--allow-missing", r"visual\.ln_pre\.bias"])
  assert meta_lib.read_meta(out)["missing"] == ["visual.ln_pre.bias"]
  assert "lacks visual.ln_pre.bias: --to torch reads it" in capsys.readouterr().out
  module = nnx.eval_shape(lambda: clip.build(CONFIGS["vit"], rngs=nnx.Rngs(0)))
  params = nnx.state(module, nnx.Param)
  with pytest.raises(restore.CheckpointError, match=r"--allow-missing .*visual.ln_pre.bias"):
    restore.load(str(out), "clip", params, nnx.State({}))
  for path in (source, out):
    load = functools.partial(restore.load, str(path), "clip", params, nnx.State({}))
    have = restore.flat(load(may_miss="ln_pre")[0])
    assert restore.flat(nnx.to_pure_dict(params)).keys() - have.keys() == {"image/ln_pre/bias"}
    with pytest.raises((restore.CheckpointError, conversion.ConversionError), match="ln_pre"):
      load(may_miss="ln_post")


def test_the_tool_overwrites_nothing(tool, tmp_path):
  with pytest.raises(SystemExit, match="exists already"):
    tool(["--system", "clip", "--checkpoint", "x.pt", "--out", str(tmp_path)])


def test_the_tool_names_a_file_that_is_not_there(tool, tmp_path):
  with pytest.raises(SystemExit, match=r"gone\.pt"):
    tool(["--system", "clip", "--checkpoint", "gone.pt", "--out", str(tmp_path / "o")])
