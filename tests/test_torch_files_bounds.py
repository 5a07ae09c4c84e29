"""Reading costs time and memory in proportion to the length of a file, whatever is in it."""

import copy
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from xmodal_jax.interop import torch_files

WORKER = pathlib.Path(__file__).with_name("fuzz_torch_files.py")
P = (1 << 61) - 1  # Python's hash of an integer is its remainder


def measured(kind: str, folder: pathlib.Path, count: int, seed: int = 0) -> dict:
  """{"read": n, "refused": n}; fails with what failed, took 2 s or 200 MB."""
  command = [sys.executable, str(WORKER), kind, str(count), str(seed), str(folder)]
  out = subprocess.run(command, capture_output=True, text=True, cwd=WORKER.parent.parent)
  assert out.returncode == 0, out.stderr[-2000:]
  *problems, last = out.stdout.splitlines()
  assert not problems, "\n".join(problems[:20])
  return json.loads(last)


def archive(data: bytes, storages: dict[str, bytes] | None = None, method=zipfile.ZIP_STORED):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", method) as z:
    z.writestr("r/data.pkl", data)
    for key, content in (storages or {}).items():
      z.writestr(f"r/data/{key}", content)
  return out.getvalue()


def integer(n: int) -> bytes:
  data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
  return b"\x8a" + bytes([len(data)]) + data


def text(t: bytes) -> bytes:
  return b"X" + struct.pack("<I", len(t)) + t


def data(t: bytes) -> bytes:
  return b"B" + struct.pack("<I", len(t)) + t


def dtype(spec: bytes) -> bytes:
  return (
    b"cnumpy\ndtype\n("
    + text(spec)
    + b"K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
  )


def storage(key: bytes, nbytes: int) -> bytes:
  where = b"(X\x07\x00\x00\x00storagectorch\nByteStorage\n" + text(key) + text(b"cpu")
  return where + integer(nbytes) + b"tQ"


def array_of(memo: bytes, n: int) -> bytes:
  """An array of n bytes; its dtype is memo entry 2, its content entry `memo`."""
  shape = integer(n) + b"\x85"
  made = b"cnumpy.core.multiarray\n_reconstruct\n(NNNtR"
  return made + b"(K\x01" + shape + b"h\x02\x89h" + memo + b"tb"


def overlapping(n: int, size: int) -> bytes:
  """A zip whose n entries are the same compressed bytes, each a storage of its own."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
    z.writestr(
      "r/data.pkl", b"\x80\x02(" + b"".join(storage(b"%d" % k, size) for k in range(n)) + b"l."
    )
    z.writestr("r/data/0", bytes(size))
    for k in range(1, n):
      entry = copy.copy(z.getinfo("r/data/0"))
      entry.filename = entry.orig_filename = f"r/data/{k}"
      z.filelist.append(entry)
      z.NameToInfo[entry.filename] = entry
  return out.getvalue()


def header(text: bytes) -> bytes:
  return struct.pack("<Q", len(text)) + text + bytes(8)


def script(levels: int) -> bytes:
  """A TorchScript archive whose modules have the module below them twice, under long names."""
  module = b"c__torch__\nM\nq\x01)\x81}bq\x02"
  for k in range(2, levels):
    below = b"h" + bytes([k])
    module += b"0h\x01)\x81}(" + text(b"a" * 2000) + below + text(b"b" * 2000) + below
    module += b"ubq" + bytes([k + 1])
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as z:
    z.writestr("r/data.pkl", b"\x80\x02" + module + b".")
    z.writestr("r/constants.pkl", b"\x80\x02).")
  return out.getvalue()


def rebuilt(shape: bytes, stride: bytes) -> bytes:
  """A tensor of a storage of 16 bytes, without its REDUCE."""
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x05(" + storage(b"0", 16) + b"K\x00" + shape + stride
  ) + b"\x89}tq\x06"


huge = b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000
expanded = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(b"0", 16)
expanded += b"K\x00(J\x00\x00\x80\x00t(K\x00t\x89}tR"  # 8 MB of one byte
many = lambda item, n: b"(" + b"".join(item(k) for k in range(1, n)) + b"l."
keys = lambda item, n: b"}(" + b"".join(item(k) + b"N" for k in range(1, n)) + b"u."
PICKLES = {
  "long tuples as keys": b"(" + b"K\x00" * 10_000 + b"tq\x01" + keys(lambda k: b"h\x01", 6000),
  "integers of one hash": keys(lambda k: integer(k * P), 20_000),
  "integers of one hash in a set": b"\x8f" + many(lambda k: integer(k * P), 20_000)[:-2] + b"\x90.",
  "integers of one hash in tuples": keys(lambda k: integer(k * P) + b"\x85", 20_000),
  "complex numbers of one hash": keys(
    lambda k: b"cbuiltins\ncomplex\n" + integer(-1000003 * k) + integer(k) + b"\x86R", 6000
  ),
  "memo entries of one hash": b"N" + b"".join(b"p%d\n" % (k * P) for k in range(20_000)) + b".",
  "two equal texts as keys": text(b"a" * 300_000) + b"q\x01" + text(b"a" * 300_000)
  + b"q\x02}h\x01Ns(" + b"h\x02N" * 100_000 + b"u.",
  "arrays of one text": text(b"a" * 500_000) + b"q\x01" + dtype(b"S1") + b"q\x02"
  + many(lambda k: array_of(b"\x01", 500_000), 4000),
  "scalars S999999": data(b"a" * 999_999) + b"q\x01" + dtype(b"S999999") + b"q\x02"
  + many(lambda k: b"cnumpy.core.multiarray\nscalar\nh\x02h\x01\x86R", 20_000),
  "scalars U100000": data(b"a\0\0\0" * 100_000) + b"q\x01" + dtype(b"U100000") + b"q\x02"
  + many(lambda k: b"cnumpy.core.multiarray\nscalar\nh\x02h\x01\x86R", 20_000),
  "encoded texts": text(b"a" * 500_000) + b"q\x01"
  + many(lambda k: b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R", 20_000),
  "many long arguments": b"(" + b"K\x00" * 200_000 + b"tq\x01"
  + b"ctorch._utils\n_rebuild_parameter\nq\x02"
  + many(lambda k: b"h\x02h\x01R", 100_000),
  "numbers of long texts": text(b"1" * 500_000) + b"q\x01"
  + many(lambda k: b"cbuiltins\ncomplex\nh\x01h\x01\x86R", 20_000),
  "the text of nested lists": b"]q\x00" + b"".join(
    b"](h" + bytes([k]) + b"h" + bytes([k]) + b"eq" + bytes([k + 1]) for k in range(60)
  ) + b"0(X\x07\x00\x00\x00storageh\x3cX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
}  # fmt: skip
FILES = {name: archive(b"\x80\x02" + code) for name, code in PICKLES.items()} | {
  "sizes of 1000 bytes": archive(
    b"\x80\x02" + rebuilt(b"(" + huge * 30 + b"K\x00t", b"(" + b"K\x00" * 31 + b"t")
    + many(lambda k: b"h\x05h\x06R", 100_000), {"0": bytes(16)},
  ),
  "expanded arrays": archive(
    b"\x80\x02}(" + b"".join(text(b"%d" % k) + expanded for k in range(1000)) + b"u.",
    {"0": bytes(16)},
  ),
  "a long prefix": archive(
    b"\x80\x02}" + text(b"module." * 30_000 + b"a") + rebuilt(b"(K\x04t", b"(K\x01t")[:-2] + b"Rs.",
    {"0": bytes(16)},
  ),
  "one entry, larger and larger": archive(
    b"\x80\x02" + many(lambda k: storage(b"0", k), 2000), {"0": bytes(10_000_000)},
    zipfile.ZIP_DEFLATED,
  ),
  "compressed zeros": archive(
    b"\x80\x02" + many(lambda k: storage(b"%d" % k, 10_000_000), 40),
    {str(k): bytes(10_000_000) for k in range(40)}, zipfile.ZIP_DEFLATED,
  ),
  "overlapping entries": overlapping(100, 10_000_000),
  "modules in modules": script(40),
  "a header with many axes": header(
    b'{"a":{"dtype":"F32","shape":[' + b"2," * 100_000 + b'2],"data_offsets":[0,8]}}'
  ),
  "a header with large numbers": header(
    b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 200) + b'],"data_offsets":[0,8]}}'
  ),
}  # fmt: skip


def test_no_file_costs_more_than_its_length(tmp_path):
  for i, content in enumerate(FILES.values()):
    (tmp_path / f"{i:02}").write_bytes(content)
  # That of a long prefix is a state dict: eight prefixes are stripped.
  assert measured("given", tmp_path, len(FILES)) == {"read": 1, "refused": len(FILES) - 1}


def test_honest_keys_are_data(tmp_path):
  tree = {(1, "a", (2.5, None)): 1, 2**70: 2, -(2**61): 3, 0.5: 4, 1j: 5, b"x": 6, ("a",): 7}
  tree |= {(i, j): i * j for i in range(100) for j in range(100)} | {i * 0.25: i for i in range(99)}
  (tmp_path / "a.pt").write_bytes(archive(pickle.dumps(tree, protocol=2)))
  assert torch_files.read(tmp_path / "a.pt") == tree


@pytest.fixture
def samples(tmp_path) -> pathlib.Path:
  """A folder per kind with small files to mutate."""
  tree = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.uint16), "n": 2,
    "model": {"module.c": np.zeros(3)}, "list": [1, 2.5, "x", None],
  }  # fmt: skip
  for kind in ("safetensors", "pickle"):
    (tmp_path / kind).mkdir()
  torch_files.write(tmp_path / "pickle" / "a.pt", tree)
  values = b'{"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"__metadata__":{"f":"pt"}}'
  content = struct.pack("<Q", len(values)) + values + bytes(range(12))
  (tmp_path / "safetensors" / "a").write_bytes(content)
  try:
    import torch
  except ImportError:
    return tmp_path
  tree |= {"t": {(1, "a"): 2, 3: np.array(["a"])}, "s": np.float64(2), "w": torch.ones(2, 2).T}
  for zipped in (True, False):
    file = tmp_path / "pickle" / f"{zipped}.pt"
    torch.save(tree, file, _use_new_zipfile_serialization=zipped)
  return tmp_path


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_mutated_files(samples, kind, count):
  """Refused or read, without another exception, 2 s or 200 MB."""
  seed = int(os.environ.get("XMODAL_FUZZ_SEED", "0"))
  done = measured(kind, samples / kind, count, seed)
  assert done["read"] > count // 100 and done["refused"] > count // 4
