"""Where the state dict of a file is: entries, prefixes, folders, shards, and what is beside it."""

import argparse
import collections
import datetime
import decimal
import functools
import io
import json
import os
import pathlib
import random
import re
import struct
import typing
import uuid
import zipfile

import numpy as np
import pytest

from xmodal_jax.interop import meta, torch_files
from xmodal_jax.interop.torch_files import FileFormatError, TensorRef

STATE = {"a.weight": np.ones(2, np.float32), "b": np.zeros((), np.int64)}
CASES = pathlib.Path(os.environ.get("XMODAL_SHARED", "../shared")) / "cases" / "checkpoints"


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def found(path, tree, **kw):
  """(arrays, info) of a file with this tree."""
  torch_files.write(path, tree)
  state, info = torch_files.state_dict(path, **kw)
  return {k: v.read() for k, v in state.items()}, info


def assert_is_state(ours) -> None:
  assert ours.keys() == STATE.keys()
  for k, v in STATE.items():
    np.testing.assert_array_equal(ours[k], v)


@pytest.mark.parametrize(
  "wrapper",
  [
    ("module",), ("state_dict_ema",), ("model_ema",), ("net",), ("weights",), ("teacher",),
    ("student",), ("state_dict", "model."), ("_orig_mod.",), ("module.", "_orig_mod."),
    ("_orig_mod.", "module.", "module."), ("state_dict", "clip."), ("model", "net", "net.model."),
  ],
)  # fmt: skip
def test_wrappers(tmp_path, wrapper):
  ours, info = found(tmp_path / "a.pt", meta.wrap(STATE, wrapper))
  assert_is_state(ours)
  assert "".join(info["wrapper"]) == "".join(wrapper) and info["notes"] == ()


def test_several_state_dicts(tmp_path):
  other = {k: np.asarray(v + 1) for k, v in STATE.items()}
  tree = {"model_ema": other, "model": STATE, "epoch": 3, "optimizer": {"state": {0: 1}}}
  ours, info = found(tmp_path / "a.pt", tree)
  assert_is_state(ours)
  (note,) = info["notes"]
  assert "'model'" in note and "'model_ema'" in note and "--key" in note
  assert info["extras"].keys() == {"model_ema", "epoch", "optimizer"}
  ours, info = found(tmp_path / "a.pt", tree, key="model_ema")
  assert ours["b"] == 1 and info["wrapper"] == ("model_ema",)
  ours, _ = found(tmp_path / "a.pt", {"mine": {"deep": {"model": STATE}}}, key="mine/deep")
  assert_is_state(ours)
  with pytest.raises(FileFormatError, match=r"a\.pt: no entry 'modle'.*model_ema"):
    found(tmp_path / "a.pt", tree, key="modle")
  with pytest.raises(FileFormatError, match=r"choose one with --key .*: mine"):
    found(tmp_path / "a.pt", {"mine": STATE, "epoch": 3})


def test_prefixes(tmp_path):
  tree = {f"clip.{k}": v for k, v in STATE.items()} | {"loss.weight": np.ones(3)}
  ours, info = found(tmp_path / "a.pt", tree)  # not shared by all names
  assert ours.keys() == tree.keys()
  for prefix in ("clip", "clip."):
    ours, info = found(tmp_path / "a.pt", tree, prefix=prefix)
    assert_is_state(ours)
    assert info["wrapper"] == ("clip.",) and "loss.weight" in info["notes"][0]
  with pytest.raises(FileFormatError, match=r"no name begins with 'x\.'.*clip\.a"):
    found(tmp_path / "a.pt", tree, prefix="x")


def test_names_from_inside_of_wrappers(tmp_path):
  tree = {"visual._orig_mod.a": STATE["b"], "text._fsdp_wrapped_module._orig_mod.b": STATE["b"]}
  ours, info = found(tmp_path / "a.pt", tree)
  assert list(ours) == ["visual.a", "text.b"] and "2 names" in info["notes"][0]
  with pytest.raises(FileFormatError, match="two names"):
    found(tmp_path / "a.pt", {"v._orig_mod.a": STATE["b"], "v.a": STATE["b"]})


def test_an_averaged_model(torch, tmp_path):
  model = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
  torch.save(model.state_dict(), tmp_path / "a.pt")
  state, info = torch_files.state_dict(tmp_path / "a.pt")
  assert state.keys() == {"weight", "bias"} and "n_averaged" in info["notes"][0]


def test_numbers_beside_arrays_are_passed_over(tmp_path):
  ours, info = found(tmp_path / "a.pt", STATE | {"epoch": 3, "name": "x", "lr": [0.1], "c": None})
  assert_is_state(ours)
  assert info["extras"] == {"epoch": 3, "name": "x", "lr": [0.1], "c": None}
  assert all(f"{k} (" in info["notes"][0] for k in info["extras"])


# --- objects beside the weights -----------------------------------------------------------------


class Color(typing.NamedTuple):
  red: int


ODD = {
  "typing": (typing.Any, typing.Optional[int], dict[str, int], int | None),  # noqa: UP045
  "functools": functools.partial(int, base=2),
  "generators": (np.random.default_rng(0), np.random.RandomState(0), random.Random(0)),
  "dates": (np.datetime64("2020-01-01"), np.array(["2020"], "M8[D]"), datetime.datetime.now()),
  "records": (np.zeros(2, [("a", "i4")]), np.zeros(2, [("a", "i4")])[0], np.dtype([("a", "i4")])),
  "texts": (np.array(["a", "bc"]), np.array([{}, None], object), np.void(b"abc")),
  "standard library": (decimal.Decimal("1.5"), uuid.uuid4(), re.compile("a+"), pathlib.Path("a")),
  "containers": (collections.ChainMap({}), collections.deque([1]), Color(1), Ellipsis, range(3)),
  "masked": np.ma.masked_array([1, 2], [0, 1]),
  "keys": {(1, (2, 3)): 4, np.int64(3): 1, frozenset([1]): 2, np.str_("x"): 3, 1.5: 4},
  "error": ValueError("x"),
  "namespace": argparse.Namespace(type=int),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_odd_objects_do_not_block_weights(torch, tmp_path, protocol, zipped):
  kw = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
  for name, odd in ODD.items():
    torch.save({"state_dict": {"w": torch.ones(2)}, "odd": odd}, tmp_path / "a.pt", **kw)
    state, info = torch_files.state_dict(tmp_path / "a.pt")
    assert list(state) == ["w"] and "odd" in info["extras"], name


@pytest.mark.parametrize("zipped", [True, False])
def test_odd_tensors_are_passed_over(torch, tmp_path, zipped):
  tree = {
    "w": torch.ones(2), "q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "c": torch.zeros(2, dtype=torch.complex32), "s": torch.eye(3).to_sparse(),
  }  # fmt: skip
  torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
  state, info = torch_files.state_dict(tmp_path / "a.pt")
  assert list(state) == ["w"]
  assert "q (torch._utils._rebuild_qtensor)" in info["notes"][0] and "torch.complex32" in str(info)


def test_arrays_of_numpy_in_protocol_5(torch, tmp_path):
  tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(6).reshape(2, 3).T}
  torch.save(tree, tmp_path / "a.pt", pickle_protocol=5)
  state, _ = torch_files.state_dict(tmp_path / "a.pt")
  for name, value in tree.items():
    np.testing.assert_array_equal(state[name].read(), value)


@pytest.mark.parametrize("zipped", [True, False])
def test_conjugate_and_negative_bits(torch, tmp_path, zipped):
  z = torch.complex(torch.arange(6.0), torch.arange(6.0) + 1).reshape(2, 3)
  tree = {
    "conj": z.conj(),
    "neg": z.clone().conj().imag,
    "turned": z.conj().T,
    "part": z.conj()[1, ::2],
  }
  torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
  state, _ = torch_files.state_dict(tmp_path / "a.pt")
  for name, value in tree.items():
    want = value.resolve_conj().resolve_neg().numpy()
    np.testing.assert_array_equal(state[name].read(), want)
    np.testing.assert_array_equal(np.asarray(state[name]), want)
    with pytest.raises(ValueError, match="read-only"):
      state[name].view()[0] = 0


def test_strides_of_axes_of_length_one():
  storage = torch_files.tensor.Storage(np.arange(4, dtype=np.uint8).tobytes(), 0, 4)
  with pytest.raises(FileFormatError):
    TensorRef(storage, 0, (2, 1), (2, 1 << 60), np.dtype("uint8"))
  ref = TensorRef(storage, 0, (2, 1), (2, 1 << 55), np.dtype("uint8"))
  np.testing.assert_array_equal(ref.read(), [[0], [2]])
  np.testing.assert_array_equal(ref.view(), [[0], [2]])


# --- folders and shards -------------------------------------------------------------------------


def shards(folder, ext="bin", names=("model", "pytorch_model")) -> dict[str, np.ndarray]:
  """Two shards and an index in a folder."""
  name = names[ext == "bin"]
  files = [f"{name}-{i:05}-of-00002.{ext}" for i in (1, 2)]
  tree = {f"module.{i}": np.full(3, i, np.float32) for i in range(4)}
  for file, part in zip(files, ((0, 1), (2, 3)), strict=True):
    content = {f"module.{i}": tree[f"module.{i}"] for i in part}
    if ext == "bin":
      torch_files.write(folder / file, content)
    else:
      pytest.importorskip("safetensors.numpy").save_file(content, folder / file)
  where = {k: files[int(k[-1]) // 2] for k in tree}
  (folder / f"{name}.{ext}.index.json").write_text(json.dumps({"weight_map": where}))
  return {k.removeprefix("module."): v for k, v in tree.items()}


@pytest.mark.parametrize("ext", ["bin", "safetensors"])
def test_shards(tmp_path, ext):
  want = shards(tmp_path, ext)
  index = next(tmp_path.glob("*.index.json"))
  first = next(tmp_path.glob("*-00001-*"))
  digests = set()
  for path in (tmp_path, index, first):
    state, info = torch_files.state_dict(path, verify=True)
    assert {k: list(v.read()) for k, v in state.items()} == {k: list(v) for k, v in want.items()}
    assert info["wrapper"] == ("module.",) and "2 shards" in info["notes"][-1]
    digests.add(torch_files.sha256(path))
  assert len(digests) == 1
  index.write_text(index.read_text().replace("module.3", "module.4"))
  with pytest.raises(FileFormatError, match=r"1 arrays of the index are in no shard.*module\.4"):
    torch_files.state_dict(tmp_path)
  first.unlink()
  with pytest.raises(FileFormatError, match=r"1 of 2 shards are not there.*00001"):
    torch_files.state_dict(tmp_path)
  index.write_text('{"weight_map": {"a": "../a.bin"}}')
  with pytest.raises(FileFormatError, match="outside of its folder"):
    torch_files.state_dict(index)
  index.write_text("{")
  with pytest.raises(FileFormatError, match="not an index of shards"):
    torch_files.state_dict(index)


def test_folders(tmp_path):
  with pytest.raises(FileFormatError, match="it is empty"):
    torch_files.state_dict(tmp_path)
  torch_files.write(tmp_path / "epoch_3.pt", STATE)
  torch_files.write(tmp_path / "optimizer.pt", {"state": {}})
  assert torch_files.state_dict(tmp_path)[0].keys() == STATE.keys()
  assert torch_files.sha256(tmp_path) == torch_files.sha256(tmp_path / "epoch_3.pt")
  torch_files.write(tmp_path / "epoch_4.pt", STATE)
  with pytest.raises(FileFormatError, match=r"name one of epoch_3\.pt, epoch_4\.pt"):
    torch_files.state_dict(tmp_path)
  torch_files.write(tmp_path / "pytorch_model.bin", STATE)
  torch_files.write(tmp_path / "open_clip_pytorch_model.bin", STATE)
  _, info = torch_files.state_dict(tmp_path)
  assert "took pytorch_model.bin" in info["notes"][0]
  assert "open_clip_pytorch_model.bin" in info["notes"][0]


@pytest.mark.parametrize(
  "files, what",
  [
    (["adapter_config.json", "adapter_model.safetensors"], "LoRA .*merge"),
    ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
    (["meta.json", "model"], "converted directory"),
    (["saved_model.pb"], "TensorFlow"),
    (["README.md"], r"holds no weights.*README\.md"),
  ],
)
def test_other_folders_are_named(tmp_path, files, what):
  for name in files:
    (tmp_path / name).write_bytes(b"")
  with pytest.raises(FileFormatError, match=what):
    torch_files.state_dict(tmp_path)


# --- other files --------------------------------------------------------------------------------


def zip_of(**entries) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as z:
    for name, content in entries.items():
      z.writestr(name, content)
  return out.getvalue()


@pytest.mark.parametrize(
  "content, what",
  [
    (b"", "an empty file: download"),
    (bytes(600), "zero bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"\n  <!doctype html><html>", "web page"),
    (b"\x1f\x8b\x08" + bytes(9), "gzip"),
    (b"GGUF\3\0\0\0" + bytes(9), "GGUF"),
    (b'{"error": "Repository not found"}', "text file.*Repository not found"),
    (b"Entry not found, sorry", "text file.*Entry not found"),
    (zip_of(**{"ViT-B-32.pt": b"x"}), r"ViT-B-32\.pt in it: unpack"),
    (zip_of(**{"a/b/data.pkl": b"x"}), "packed again"),
    (zip_of(**{"word/document.xml": b"x"}), r"word/document\.xml"),
    (zip_of(), "empty"),
    (zip_of(**{"r/data.pkl": b"\x80\x02}.", "r/byteorder": b"big"}), "big-endian.*save it again"),
  ],
)  # fmt: skip
def test_other_files_are_named(tmp_path, content, what):
  (tmp_path / "a.pth").write_bytes(content)
  with pytest.raises(FileFormatError, match=rf"(?s)a\.pth: .*{what}"):
    torch_files.state_dict(tmp_path / "a.pth")


def test_an_unsupported_dtype_is_named(tmp_path):
  text = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
  (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
  with pytest.raises(FileFormatError, match=r"'a' has the dtype F4, which is not read .*F32"):
    torch_files.read(tmp_path / "a")


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}])
def test_a_whole_module_is_named(torch, tmp_path, wrap):
  torch.save(wrap(torch.nn.Linear(2, 3)), tmp_path / "a.pt")
  with pytest.raises(FileFormatError, match=r"whole pickled module, torch\.nn.*state_dict\(\)"):
    torch_files.state_dict(tmp_path / "a.pt")


# --- the collected files ------------------------------------------------------------------------

REFUSED = {
  "bigendian.pt": "big-endian",
  "st_f4.safetensors": "dtype F4",
  "whole_model.pt": r"open_clip\.model\.CLIP.*state_dict",
}
READ = {
  "compiled.pt": ("_orig_mod.",),
  "deepspeed_mp_rank_00.pt": ("module",),
  "ema_only.pt": ("state_dict_ema",),
  "hf_clip": (),
  "hf_sharded": (),
  "lightning_model.ckpt": ("state_dict", "model."),
  "typing_any.ckpt": ("state_dict",),
}


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the collected files, XMODAL_SHARED")
def test_collected_files():
  for name, wrapper in READ.items():
    state, info = torch_files.state_dict(CASES / name)
    assert info["wrapper"] == wrapper and len(state) >= 38, name
  for name, what in REFUSED.items():
    with pytest.raises(FileFormatError, match=f"{re.escape(name)}: .*{what}"):
      torch_files.state_dict(CASES / name)
  np.testing.assert_array_equal(
    torch_files.state_dict(CASES / "hf_clip")[0]["logit_scale"].read(),
    torch_files.state_dict(CASES / "hf_sharded")[0]["logit_scale"].read(),
  )
