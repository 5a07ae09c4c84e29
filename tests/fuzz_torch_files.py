"""Reads mutated files in a process of its own, and prints the ones that cost too much or fail.

  python tests/fuzz_torch_files.py KIND COUNT SEED FOLDER

KIND: safetensors, pickle (torch.save's formats) or given (every file of FOLDER as it is). FOLDER:
samples to mutate. Prints a line of JSON per input that ends in another exception than UserError,
takes 2 s of CPU time or raises the memory of the process by 200 MB, then {"read": n, "refused": n}.
"""

import copy
import io
import json
import os
import pathlib
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile

sys.path.insert(0, os.getcwd())  # run from the root of the repository

from xmodal_jax.errors import UserError
from xmodal_jax.interop import torch_files
from xmodal_jax.interop.torch_files import names, pickles

SECONDS, MEGABYTES = 2, 200
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
ODD_JSON = (
  None, True, -1, 0, 1, 2**31, 2**62, 2**70, 1.5, float("nan"), "", "F32", "F4", [], [0], [1, 2],
  [0, 12], [2**40] * 3, [2] * 500, {}, {"dtype": "F16"}, "x" * 500,
)  # fmt: skip


def mutated(rng: random.Random, data: bytes) -> bytes:
  """Some bytes changed, inserted, removed, repeated, or the end cut off."""
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 30))):
    at, n = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 30))
    how = rng.randrange(6)
    if how <= 1:
      out[at : at + 1] = bytes([rng.randrange(256)])
    elif how == 2:
      number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
      out[at : at + len(number)] = number
    elif how == 3:
      del out[at : at + n]
    elif how == 4:
      out[at:at] = out[at : at + n] * rng.choice((1, 2, 50))
    else:
      start = rng.randrange(len(out) + 1)
      out[at:at] = out[start : start + n]
  return bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.1 else out)


# --- safetensors --------------------------------------------------------------------------------


def odd_header(rng: random.Random, data: bytes) -> bytes:
  """A safetensors file with odd values in its header, whose length is right."""
  (size,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + size])
  for _ in range(rng.choice((1, 1, 2, 5))):
    name = rng.choice(list(header))
    if rng.random() < 0.2 or not isinstance(header[name], dict) or not header[name]:
      header[rng.choice((name, "b", "__metadata__"))] = copy.deepcopy(rng.choice(ODD_JSON))
    else:
      entry = header[name]
      key = rng.choice(list(entry))
      if isinstance(entry[key], list) and entry[key] and rng.random() < 0.5:
        entry[key][rng.randrange(len(entry[key]))] = copy.deepcopy(rng.choice(ODD_JSON))
      else:
        entry[key] = copy.deepcopy(rng.choice(ODD_JSON))
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data[8 + size :]


# --- pickles ------------------------------------------------------------------------------------

GLOBALS = [*names.CALLS, *names._RECORDED, *names._STDLIB_DATA, "typing.Any", "a.B", "os.system"]
STORAGES = ("FloatStorage", "HalfStorage", "ByteStorage", "QInt8Storage", "BFloat16Storage")


def argument(rng: random.Random) -> bytes:
  """Opcodes that push one value."""
  number = rng.choice((*NUMBERS, -1, 2**61 - 1, 2**200))
  length = number.bit_length() // 8 + 1
  text = rng.choice((b"storage", b"0", b"cpu", b"<f4", b"S999999", b"V8", b"M8", b"latin1", b"a"))
  text *= rng.choice((1, 1, 1, 1, 1000))
  return rng.choice((
    b"N", b"\x88", b"]", b"}", b")", b"\x8f", b"K" + bytes([rng.randrange(256)]),
    b"\x8a" + bytes([length]) + number.to_bytes(length, "little", signed=True),
    b"X" + struct.pack("<I", len(text)) + text, b"B" + struct.pack("<I", len(text)) + text,
    b"G" + struct.pack(">d", rng.choice((0.5, 1e300, float("nan")))),
    b"h" + bytes([rng.randrange(9)]), b"(K\x02K\x03t", b"(K\x01t",
    b"(X\x07\x00\x00\x00storagectorch\n" + rng.choice(STORAGES).encode()
    + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes([rng.randrange(30)]) + b"tQ",
    b"c" + b"\n".join(s.encode() for s in rng.choice(GLOBALS).rsplit(".", 1)) + b"\n",
  ))  # fmt: skip


def program(rng: random.Random) -> bytes:
  """A pickle of random opcodes, most of which find what they need on the stack."""
  out = [b"\x80\x02}", b"q\x00", *(argument(rng) + b"q" + bytes([i]) for i in range(1, 9))]
  simple = [bytes([code]) for code in pickles._OPS if code not in b"."]
  for _ in range(rng.choice((3, 10, 40))):
    how = rng.randrange(8)
    some = b"".join(argument(rng) for _ in range(rng.randrange(9)))
    if how == 0:
      out.append(rng.choice(simple) + rng.choice((b"", b"\x00", b"\x01\n")))
    elif how <= 3:  # a call
      called = "\n".join(rng.choice(GLOBALS).rsplit(".", 1)).encode()
      out.append(b"c" + called + b"\n(" + some + b"t" + rng.choice((b"R", b"\x81", b"R", b"R}b")))
    elif how == 4:
      out.append(b"q" + bytes([rng.randrange(9)]))
    else:
      pairs = argument(rng) + some if how == 5 else b""
      out.append(rng.choice((b"](%se", b"(%st", b"(%sl", b"\x8f(%s\x90", b"}(%su")) % pairs)
    if rng.random() < 0.05:
      out.append(out[-1] * rng.choice((2, 500)))
  return b"".join(out) + rng.choice((b".", b"}X\x01\x00\x00\x00wh\x01s."))


def zipped(rng: random.Random, data: bytes) -> bytes:
  """The zip `data` with its pickle mutated or replaced; sizes and CRCs are right."""
  out = io.BytesIO()
  method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
  with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
    for name in old.namelist():
      content = old.read(name)
      if name.endswith("data.pkl"):
        content = program(rng) if rng.random() < 0.6 else mutated(rng, content)
      new.writestr(name, content)
  return out.getvalue()


def inputs(kind: str, count: int, rng: random.Random, samples: list[bytes]):
  for i in range(count):
    data = samples[i % len(samples)]
    if kind == "given":
      yield data
    elif kind == "safetensors":
      yield odd_header(rng, data) if rng.random() < 0.5 else mutated(rng, data)
    else:
      inside = data[:2] == b"PK" and rng.random() < 0.7
      yield zipped(rng, data) if inside else mutated(rng, data)


def read(file: pathlib.Path) -> int:
  """1 if the file has a state dict, whose arrays are read."""
  try:
    for array in torch_files.state_dict(file, verify=True)[0].values():
      array.read()
      array.view()
    return 1
  except UserError:
    return 0


def memory() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB


def main(kind: str, count: str, seed: str, folder: str) -> None:
  samples = [p.read_bytes() for p in sorted(pathlib.Path(folder).iterdir())]
  limit = resource.RLIMIT_AS, (8 << 30, 8 << 30)  # what goes wrong must not take the machine down
  resource.setrlimit(*limit)
  have, done, rng = memory(), [0, 0], random.Random(int(seed))
  with tempfile.TemporaryDirectory() as temporary:
    file = pathlib.Path(temporary) / "x"
    for i, data in enumerate(inputs(kind, int(count), rng, samples)):
      file.write_bytes(data)
      start, error = time.process_time(), ""
      try:
        done[1 - read(file)] += 1
      except Exception as e:
        error = f"{type(e).__name__}: {e}"[:300]
      seconds, now = time.process_time() - start, memory()
      if error or seconds > SECONDS or now > have + MEGABYTES:
        print(json.dumps(dict(
          input=i, bytes=len(data), error=error, seconds=round(seconds, 1), MB=round(now - have)
        )))  # fmt: skip
        have = now
  print(json.dumps(dict(read=done[0], refused=done[1])))


if __name__ == "__main__":
  main(*sys.argv[1:])
