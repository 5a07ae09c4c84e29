"""Malicious and damaged files are refused, by name or as a format error, and no code is run."""

import argparse
import io
import os
import pickle
import random
import struct
import sys
import zipfile

import numpy as np
import pytest

from xmodal_jax.interop import torch_files
from xmodal_jax.interop.torch_files import FileFormatError, Placeholder, TensorRef, UnsafeFileError


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def write_zip(
  path, data_pkl: bytes, storages: dict[str, bytes] | None = None, method=zipfile.ZIP_STORED
):
  with zipfile.ZipFile(path, "w", method) as z:
    z.writestr("r/data.pkl", data_pkl)
    z.writestr("r/version", "3\n")
    for key, data in (storages or {}).items():
      z.writestr(f"r/data/{key}", data)


def assert_all_refused(path, contents) -> None:
  for data in contents:
    path.write_bytes(data)
    with pytest.raises(FileFormatError):
      torch_files.read(path)


def test_class_as_dictionary_key(tmp_path):
  key = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
  write_zip(tmp_path / "a.ckpt", b"\x80\x02}(X\x01\x00\x00\x00c}" + key + b"K\x05su.")
  ours = torch_files.read(tmp_path / "a.ckpt")
  name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
  assert {k.name: v for k, v in ours["c"].items()} == {name: 5}


CALLS = {  # name of a global -> pickles that call it
  "os.system": [b"cos\nsystem\n(X\x02\x00\x00\x00iditR.", b"(S'id'\nios\nsystem\n.",
                b"(cos\nsystem\nX\x02\x00\x00\x00ido.",
                b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."],
  "posix.system": [b"cposix\nsystem\n(X\x02\x00\x00\x00iditR."],
  "nt.system": [b"cnt\nsystem\n)R."],
  "builtins.eval": [b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.", b"cbuiltins\neval\n)\x81."],
  "builtins.exec": [b"cbuiltins\nexec\n)R."],
  "builtins.getattr": [b"cbuiltins\ngetattr\n0]."],  # without a call
  "builtins.__import__": [b"c__builtin__\n__import__\n)R."],
  "subprocess.Popen": [b"csubprocess\nPopen\n)\x81."],
  "importlib.import_module": [b"cimportlib\nimport_module\n)R."],
  "collections.OrderedDict.fromkeys": [b"ccollections\nOrderedDict.fromkeys\n)R."],
  "argparse.Namespace.__init__": [b"cargparse\nNamespace.__init__\n)R."],
  "torch.hub.load": [b"ctorch.hub\nload\n)R."],
  "torch.storage._load_from_bytes": [b"ctorch.storage\n_load_from_bytes\n(C\x00tR."],
  "numpy.load": [b"cnumpy\nload\n)R."],
  "somewhere.function": [b"csomewhere\nfunction\n)R."],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_by_name(tmp_path, name):
  for code in CALLS[name]:
    write_zip(tmp_path / "a.pt", code)
    (tmp_path / "bare.pkl").write_bytes(code)
    for file in ("a.pt", "bare.pkl"):
      with pytest.raises(UnsafeFileError, match="refused") as e:
        torch_files.read(tmp_path / file)
      assert e.value.name == name and name in str(e.value)


def test_nothing_is_run(tmp_path, torch):
  mark = tmp_path / "mark"

  class Harm:
    def __reduce__(self):
      return os.system, (f"touch {mark}",)

  for zipped in (True, False):
    torch.save(
      {"a": torch.ones(2), "x": Harm()}, tmp_path / "a", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UnsafeFileError):
      torch_files.read(tmp_path / "a")
    assert not mark.exists()
    torch.load(tmp_path / "a", weights_only=False)  # torch runs the code in the file
    assert mark.exists()
    mark.unlink()


def test_placeholders_are_inert(tmp_path):
  code = b"cevil.mod\nThing\n(K\x01tR}X\x01\x00\x00\x00aK\x02sb."
  write_zip(tmp_path / "a.pt", code)
  thing = torch_files.read(tmp_path / "a.pt")
  assert type(thing) is Placeholder and thing.name == "evil.mod.Thing"
  assert (thing.args, thing.state) == ((1,), {"a": 2})
  assert "evil" not in sys.modules and not callable(thing)
  write_zip(tmp_path / "a.pt", code[:-1] + b")R.")  # calls the object itself
  with pytest.raises(FileFormatError, match="calls an object"):
    torch_files.read(tmp_path / "a.pt")


def tensor(
  numel: int, offset: int, size: bytes, stride: bytes, cls: bytes = b"FloatStorage"
) -> bytes:
  i = lambda n: b"\x8a\x09" + n.to_bytes(9, "little", signed=True)
  storage = b"(X\x07\x00\x00\x00storagectorch\n" + cls + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
  storage += i(numel) + b"tQ"
  return (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + i(offset)
    + size
    + stride
    + b"\x89}tR."
  )


BOMBS = {
  "larger than the storage": tensor(4, 0, b"(K\x05t", b"(K\x01t"),
  "an offset beyond": tensor(4, 3, b"(K\x02t", b"(K\x01t"),
  "a negative offset": tensor(4, -1, b"(K\x02t", b"(K\x01t"),
  "a negative size": tensor(4, 0, b"(J\xff\xff\xff\xfft", b"(K\x01t"),
  "a negative stride": tensor(4, 3, b"(K\x02t", b"(J\xff\xff\xff\xfft"),
  "a repeated element": tensor(4, 0, b"(J\x00\x00\x00\x7ft", b"(K\x00t"),
  "storage beyond the entry": tensor(2**40, 0, b"(K\x02t", b"(K\x01t"),
  "storage that ends in the next entry": tensor(8, 0, b"(K\x08t", b"(K\x01t"),
  "a negative storage": tensor(-4, 0, b"(K\x00t", b"(K\x01t"),
  "more strides than sizes": tensor(4, 0, b"(K\x02t", b"(K\x01K\x01t"),
  "an unknown storage": tensor(4, 0, b"(K\x02t", b"(K\x01t", b"FurryStorage"),
  "a huge string": b"\x80\x02B\xff\xff\xff\x7fab.",
  "a huge bytes object": b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"a.",
  "a huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
  "a huge integer": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".",
  "bytearray of a number": b"cbuiltins\nbytearray\n(J\x00\x00\x00\x7ftR.",
  "nested keys": b"\x80\x02)" + b"2\x86" * 200 + b"q\x01}h\x01K\x01s.",  # hash takes 2^200 steps
  "copies of a copy": b"\x80\x02]q\x00("
  + b"K\x00" * 9000
  + b"e"
  + b"cbuiltins\nset\nh\x00\x85R" * 9000
  + b".",
  "no end": b"\x80\x02]",
  "an empty stack": b"\x80\x02.",
  "no mark": b"\x80\x02K\x01t.",
  "an unknown opcode": b"\x80\x02\xff.",
  "the extension registry": b"\x80\x02\x82\x01.",
  "state for a class": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x02sb.",
  "a persistent id of text": b"\x80\x02X\x01\x00\x00\x00aQ.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_pickles_beyond_the_limits(tmp_path, what):
  write_zip(tmp_path / "a.pt", BOMBS[what], {"0": bytes(16)})
  with pytest.raises(FileFormatError):
    torch_files.read(tmp_path / "a.pt")


def test_far_memo_and_deep_nesting_are_data(tmp_path):
  # Python's own unpickler sizes its memo by the largest index: 2^31 * 16 bytes.
  write_zip(tmp_path / "a.pt", b"\x80\x02]r\xff\xff\xff\x7f.")
  assert torch_files.read(tmp_path / "a.pt") == []
  write_zip(tmp_path / "a.pt", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
  assert len(torch_files.read(tmp_path / "a.pt")) == 1
  write_zip(tmp_path / "a.pt", b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.")  # contains itself
  with pytest.raises(FileFormatError, match="no state dict"):
    torch_files.state_dict(tmp_path / "a.pt")


def test_damaged_zips(tmp_path):
  file = tmp_path / "a.pt"
  good = tensor(4, 0, b"(K\x04t", b"(K\x01t")
  write_zip(file, good, {"0": bytes(range(16))}, zipfile.ZIP_DEFLATED)
  np.testing.assert_array_equal(torch_files.read(file).view().view(np.uint8), np.arange(16))
  write_zip(file, good, {"0": bytes(range(16))})
  data = bytearray(file.read_bytes())
  data[data.index(bytes(range(16)))] ^= 1
  file.write_bytes(data)
  torch_files.read(file)  # without verify the values are not checked
  with pytest.raises(FileFormatError, match="CRC"):
    torch_files.read(file, verify=True)
  write_zip(file, good, {})
  with pytest.raises(FileFormatError, match="no zip entry"):
    torch_files.read(file)
  with zipfile.ZipFile(file, "a") as z, pytest.warns(UserWarning, match="Duplicate"):
    z.writestr("r/data.pkl", good)
  with pytest.raises(FileFormatError, match="two entries"):
    torch_files.read(file)


@pytest.mark.parametrize(
  "data, what",
  [
    (b"", "empty"),
    (pickle.dumps({"a": 1}), "bare pickle"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"neither a zip nor a pickle\xff" * 40, "neither"),
  ],
)
def test_other_files_are_named(tmp_path, data, what):
  (tmp_path / "a.pth").write_bytes(data)
  with pytest.raises(FileFormatError, match=what):
    torch_files.read(tmp_path / "a.pth")
  buffer = io.BytesIO()
  np.savez(buffer, a=np.ones(2))
  (tmp_path / "a.pth").write_bytes(buffer.getvalue())
  with pytest.raises(FileFormatError, match=r"not one of torch\.save"):
    torch_files.read(tmp_path / "a.pth")


@pytest.fixture
def samples(torch, tmp_path) -> list[bytes]:
  """A small file of each format, with tensors, numpy values and objects."""
  tree = {
    "a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16(), "l": np.float64(2),
    "n": argparse.Namespace(x=1), "r": np.arange(3),
  }  # fmt: skip
  out, file = [], tmp_path / "sample"
  for zipped in (True, False):
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
    out.append(file.read_bytes())
  text = b'{"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}'
  return [*out, struct.pack("<Q", len(text)) + text + bytes(range(12))]


def test_prefixes(samples, tmp_path):
  for data in samples:
    ends = {*range(0, len(data), max(len(data) // 150, 1)), len(data) - 1, 1, 2, 4, 8, 9}
    assert_all_refused(tmp_path / "x", [data[:n] for n in ends])


def use(value) -> None:
  """Reads every array in a tree."""
  todo, seen = [value], set()
  while todo:
    value = todo.pop()
    if isinstance(value, TensorRef):
      if not value.dtype.hasobject and value.storage is not None:
        value.read()
    elif id(value) not in seen and isinstance(value, dict | list | tuple):
      seen.add(id(value))
      todo += value.values() if isinstance(value, dict) else value


def test_flipped_bytes(samples, tmp_path):
  rng, file, read = random.Random(0), tmp_path / "x", 0
  for data in samples:
    for _ in range(250):
      damaged = bytearray(data)
      for _ in range(rng.choice((1, 1, 3, 20))):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
      file.write_bytes(damaged)
      try:
        use(torch_files.read(file))
        read += 1
      except FileFormatError:
        pass
  assert read  # damage to values alone is not detected
