"""The reader and writer of PyTorch files: every format against torch.load."""

import argparse
import collections
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile

import ml_dtypes
import numpy as np
import pytest

from xmodal_jax.interop import torch_files
from xmodal_jax.interop.torch_files import FileFormatError, TensorRef


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def tree_without_torch() -> dict:
  """An example of each type that `write` accepts."""
  floats = np.arange(12, dtype=np.float32).reshape(3, 4)
  arrays = {
    d: floats.astype(d) for d in ("float16", "float32", "float64", "int64", "uint8", "bool")
  }
  return {
    "state_dict": arrays
    | {"bf16": floats.astype(ml_dtypes.bfloat16), "t": floats.T, "0d": floats[0, 1]},
    "list": [1, -5, 2**40, -(2**70), 0.5, "päx", None, True, (), (1, [2])],
    "empty": np.zeros((0, 3), np.int32),
  }


def same(a, b) -> bool:
  """Whether trees are equal: arrays in bits, shape and dtype; torch tensors count as arrays."""
  if hasattr(b, "detach"):
    b = b.detach()
    b = b.view(type(b)(0).short().dtype).numpy() if "bfloat" in str(b.dtype) else b.numpy()
    a = np.asarray(a).view(np.int16) if a.dtype == ml_dtypes.bfloat16 else a
  if isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
  if isinstance(b, list | tuple):
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
  if isinstance(b, np.ndarray):
    copy = a.read() if isinstance(a, TensorRef) else a
    a = np.asarray(a)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes() == copy.tobytes()
  return type(a) is type(b) and a == b


def torch_tree(torch) -> dict:
  base = torch.arange(24.0).reshape(4, 6)
  return {
    "state_dict": collections.OrderedDict(
      whole=base, turned=base.t(), part=base[1:3, ::2], row=base[2], half=base.half(),
      brain=base.bfloat16(), double=base.double(), flag=base > 3, long=torch.tensor(7),
      byte=base.byte(), none=torch.zeros(0, 3), again=base, wide=base[:1].expand(3, 6),
      parameter=torch.nn.Parameter(base[0].clone()),
    ),
    "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    "size": base.shape, "numbers": [1, 2.5, None, True, "text", b"bytes"],
  }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["a.pth", "b.pth.tar", "c.txt"])
def test_torch_save(torch, tmp_path, zipped, name):
  tree = torch_tree(torch)
  torch.save(tree, tmp_path / name, _use_new_zipfile_serialization=zipped)
  ours, kind = torch_files.read_with_format(tmp_path / name, verify=True)
  assert kind == ("zip" if zipped else "legacy")
  tree["size"] = tuple(tree["size"])
  tree["state_dict"] = dict(tree["state_dict"])
  assert same(ours, tree)
  weights = ours["state_dict"]
  assert weights["whole"].storage is weights["turned"].storage is weights["again"].storage
  assert weights["part"].stride == (6, 2) and weights["part"].offset == 6


def test_maps_are_read_only(torch, tmp_path):
  torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
  view = torch_files.read(tmp_path / "a.pt")["a"].view()
  with pytest.raises(ValueError, match="read-only"):
    view[0] = 2


def test_objects_become_placeholders(torch, tmp_path):
  tree = {
    "opt": argparse.Namespace(lr=0.1, name="x"),
    "version": torch.torch_version.TorchVersion("1.10.0"),
    "lr": np.float64(0.25), "int": np.int64(-3), "array": np.arange(6.0).reshape(2, 3).T,
    "dtype": torch.float16, "type": int, "device": torch.device("cuda", 1), "set": {1, 2},
    "default": collections.defaultdict(int, a=1),
  }  # fmt: skip
  torch.save(tree, tmp_path / "a.ckpt")
  ours = torch_files.read(tmp_path / "a.ckpt")
  assert ours["opt"].name == "argparse.Namespace" and ours["opt"].state == {"lr": 0.1, "name": "x"}
  assert ours["version"].name == "torch.torch_version.TorchVersion"
  assert ours["version"].args == ("1.10.0",)
  assert type(ours["lr"]) is np.float64 and ours["lr"] == 0.25 and ours["int"] == -3
  np.testing.assert_array_equal(ours["array"], tree["array"])
  assert ours["dtype"].name == "torch.float16" and ours["device"].args == ("cuda", 1)
  assert ours["type"].name == "builtins.long"  # protocol 2 uses Python 2's names
  assert ours["set"] == {1, 2} and ours["default"] == {"a": 1}


def test_torchscript(torch, tmp_path):
  class Inner(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.seq = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
      self.register_buffer("input_resolution", torch.tensor(30))
      self.register_buffer("vocab_size", torch.tensor(11))

    def forward(self, x):
      return self.seq(x)

  module = Inner().eval()
  torch.jit.script(module).save(tmp_path / "m.pt")
  state, info = torch_files.state_dict(tmp_path / "m.pt", verify=True)
  want = module.state_dict()
  assert info["format"] == "torchscript"
  assert info["scalars"] == {"input_resolution": 30, "vocab_size": 11}
  assert state.keys() == want.keys() - info["scalars"].keys()
  assert same(state, {k: want[k] for k in state})


def test_tar_of_old_torch(torch, tmp_path):
  dump = lambda x: pickle.dumps(x, protocol=2)
  data = np.arange(6, dtype=np.float32)
  kind = dump(torch.FloatStorage)  # torch.FloatStorage by name
  storages = dump(1) + b"\x80\x02(X\x01\x00\x00\x007X\x03\x00\x00\x00cpu" + kind[2:-1] + b"t."
  storages += struct.pack("<q", 6) + data.tobytes() + dump([])
  tensors = dump(2)
  for key, shape, stride, offset in ((1, (2, 3), (3, 1), 0), (2, (2,), (3,), 1)):
    tensors += b"\x80\x02(K" + bytes([key]) + b"X\x01\x00\x00\x007ctorch\nFloatTensor\nt."
    n = len(shape)
    tensors += struct.pack(f"<ii{2 * n + 1}q", n, 0, *shape, *stride, offset)
  tree = b"\x80\x02}(X\x01\x00\x00\x00aK\x01QX\x01\x00\x00\x00bK\x02Qu."
  with tarfile.open(tmp_path / "a.pth", "w", format=tarfile.PAX_FORMAT) as tar:
    for name, content in (
      ("sys_info", dump({})),
      ("storages", storages),
      ("tensors", tensors),
      ("pickle", tree),
    ):
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  ours, found = torch_files.read_with_format(tmp_path / "a.pth")
  assert found == "tar"
  theirs = torch.load(tmp_path / "a.pth", weights_only=False)
  assert same(ours, theirs)
  np.testing.assert_array_equal(ours["b"], data[[1, 4]])
  whole = (tmp_path / "a.pth").read_bytes()
  end = whole.index(tree) + len(tree)
  bad_header = bytearray(whole)
  bad_header[whole.index(b"storages\0")] ^= 1  # another name: the checksum of the header is wrong
  for damaged in (bytes(bad_header), *(whole[:n] for n in range(0, end, 61))):
    (tmp_path / "x").write_bytes(damaged)
    with pytest.raises(FileFormatError, match="checksum" if len(damaged) == len(whole) else "a"):
      torch_files.read(tmp_path / "x")


def test_safetensors(tmp_path):
  library = pytest.importorskip("safetensors.numpy")
  tree = {
    "a": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b": np.array(3),
    "c": np.zeros((0, 2)),
  }
  library.save_file(tree, tmp_path / "m.safetensors", metadata={"format": "pt"})
  state, info = torch_files.state_dict(tmp_path / "m.safetensors")
  assert info["format"] == "safetensors"
  assert same(state, tree)


@pytest.mark.parametrize(
  "header",
  [
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # too few bytes for the shape
    {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},  # beyond the end
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a gap
    {k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"},  # overlap
    {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}},
    {"a": 5}, {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
  ],
)  # fmt: skip
def test_safetensors_with_wrong_headers(tmp_path, header):
  text = json.dumps(header).encode()
  (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
  with pytest.raises(FileFormatError):
    torch_files.read(tmp_path / "a")


# --- wrappers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "wrapper", [(), ("model",), ("state_dict", "module."), ("model_state_dict",)]
)
def test_wrappers_are_found(tmp_path, wrapper):
  state = {"a.weight": np.ones(2, np.float32), "b": np.zeros((), np.int64)}
  tree = state
  for key in reversed(wrapper):
    tree = {key + k: v for k, v in tree.items()} if key == "module." else {key: tree, "epoch": 3}
  torch_files.write(tmp_path / "a.pth", tree)
  found, info = torch_files.state_dict(tmp_path / "a.pth")
  assert same(found, state)
  assert info["wrapper"] == wrapper
  assert info["extras"] == ({"epoch": 3} if wrapper else {})


@pytest.mark.parametrize(
  "tree", [[1, 2], {}, {"a": 1}, {"model": {"a": [1]}}, 5, {"state_dict": {}}]
)
def test_files_without_arrays_are_refused(tmp_path, tree):
  torch_files.write(tmp_path / "a.pth", tree)
  with pytest.raises(FileFormatError, match=r"a\.pth"):
    torch_files.state_dict(tmp_path / "a.pth")


# --- the writer ---------------------------------------------------------------------------------


def test_written_files_come_back(tmp_path):
  tree = tree_without_torch()
  torch_files.write(tmp_path / "a.pth", tree)
  ours = torch_files.read(tmp_path / "a.pth", verify=True)
  tree["state_dict"]["0d"] = 1.0  # a numpy scalar is written as a number
  assert same(ours, tree)
  assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_torch_loads_what_is_written(torch, tmp_path):
  tree = tree_without_torch()
  torch_files.write(tmp_path / "a.pth", tree)
  theirs = torch.load(tmp_path / "a.pth", weights_only=True)
  assert same(torch_files.read(tmp_path / "a.pth"), theirs)
  mapped = torch.load(tmp_path / "a.pth", weights_only=True, mmap=True)
  assert mapped["state_dict"]["float32"].equal(theirs["state_dict"]["float32"])


def test_entries_are_aligned_and_streamed(tmp_path):
  alive = []

  def make(i):
    alive.append(i)
    return np.full(100 + i, i, np.uint8)

  tree = {
    f"k{i}": torch_files.Lazy((100 + i,), np.dtype("uint8"), lambda i=i: make(i)) for i in range(5)
  }
  torch_files.write(tmp_path / "a.pth", tree)
  assert alive == list(range(5))  # each made once, in order
  ours = torch_files.read(tmp_path / "a.pth")
  assert all(v.storage.offset % 64 == 0 for v in ours.values())
  assert (np.asarray(ours["k4"]) == 4).all()


def test_a_failure_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.pth"
  torch_files.write(path, {"a": np.ones(2)})
  before = path.read_bytes()
  wrong = torch_files.Lazy((3,), np.dtype("float32"), lambda: np.ones(2))
  for tree, error in (({"a": wrong}, ValueError), ({"a": object()}, TypeError)):
    with pytest.raises(error):
      torch_files.write(path, tree)
  assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_no_torch_is_imported():
  code = (
    "import sys; import xmodal_jax.interop.torch_files; "
    "print('torch' in sys.modules, 'jax' in sys.modules)"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.split() == ["False", "False"]
