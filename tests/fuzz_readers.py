"""Reads mutated small inputs: python fuzz_readers.py READER COUNT FOLDER, run by test_prepare_fuzz.

Prints a JSON object: how many inputs were read, refused, and read with a message, and the growth of
the peak of memory in MB. Raises for an input that ends in another error than DatasetError, takes
more than 2 s of processor time, or gives without a message what a plain reader does not give. The
input is then FOLDER/input.*.
"""

import collections
import csv
import io
import json
import logging
import pathlib
import random
import resource
import signal
import sys
import tarfile

from etils import epath

from xmodal_jax.data.preparing import coco, img2dataset, pairs, sources, tables, web_samples
from xmodal_jax.data.tfrecord import DatasetError

SECONDS = 2
TOKENS = [
  b'"', b'""', b",", b"\t", b";", b"|", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xc2\x85", b"#1\t",
  b"\xe2\x80\xa8", b"\\", b"\\ud83d", b"null", b"true", b"1e999", b"-1", b"9" * 25, b"9" * 5000,
  b"[", b"]", b"{", b"}", b"[" * 3000, b":", b"NaN", b'["a", "b"]', b"['a']", b" ", b"./", b"../",
  b"image", b"caption", b"split", b"image_id", b"filename", b"'", b"x" * 140_000, b"\xef\xbb\xbf",
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
  """The data with one to four changes: bytes changed, cut, repeated, moved, or tokens put in."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
    i, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 1, 4, 512))
    match rng.randrange(9):
      case 0 | 1:
        data[i:i] = rng.choice(TOKENS)
      case 7 | 8:  # in text the input often stays well formed
        data[i : i + 1] = rng.choice(b"abc012.,;\t '-").to_bytes()
      case 2:
        data[i : i + n] = rng.choice(TOKENS)[:600]
      case 3:
        del data[i : i + n]
      case 4:
        data[i : i + 1] = bytes([rng.randrange(256)])
      case 5:
        j = rng.randrange(len(data) + 1)
        data[j:j] = data[i : i + n]
      case 6:
        del data[-rng.randrange(1, len(data) + 2) :]
  return bytes(data)


def table(delimiter: str, plain: bool) -> bytes:
  out = io.StringIO()
  rows = [
    ("image", "caption"),
    ("a.jpg", "one"),
    ("b/2.jpg", "two"),
    ("c.jpg", "é\u2028\u0085 'a'"),
  ]
  if not plain:
    rows += [("d.jpg", 'two, "q"'), ("e.jpg", "a\nb"), ("f.jpg", '["x", "y"]')]
    rows = [(*row, i or "image_id", "train" if i else "split") for i, row in enumerate(rows)]
  csv.writer(out, delimiter=delimiter).writerows(rows)
  return out.getvalue().encode()


def check_table(path: pathlib.Path, delimiter: str) -> None:
  """Compares rows with those of `csv`, unless a message says more."""
  known = [name for names in pairs.COLUMNS.values() for name in names]
  with logged() as messages:
    found = [row for _, row in tables.rows(epath.Path(path), known=known)]
  text = path.read_bytes().decode("utf-8-sig")
  lines = [r for r in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if r]
  names = [name.strip() for name in lines[0]] if lines else []
  want = [dict(zip(names, [*r, *[None] * len(names)], strict=False)) for r in lines[1:]]
  assert messages or found == want, (found, want)
  pairs.read_pairs(path, path.parent)


def check_json_lines(path: pathlib.Path) -> None:
  found = [row for _, row in tables.rows(epath.Path(path))]
  lines = path.read_bytes().decode("utf-8-sig").encode().split(b"\n")
  assert repr(found) == repr([json.loads(line) for line in lines if line.strip()])
  pairs.read_pairs(path, path.parent)


JSON_LINES = b"".join(
  json.dumps(row).encode() + b"\n"
  for row in [
    {"image": "a.jpg", "caption": "one" * 30, "image_id": 1, "split": "train"},
    {"image": "b.jpg", "caption": ["two" * 30, "é" * 30], "image_id": 2, "split": "val"},
    {"image": "a.jpg", "caption": "\u2028 \ud83d\ude00", "image_id": 1, "split": "train"},
  ]
)
KARPATHY = {
  "images": [
    {
      "filename": f"{i}.jpg",
      "imgid": i,
      "split": "train" if i else "test",
      "sentences": [{"raw": f"{i} {j}" * 20, "sentid": 6 * i + j} for j in range(5)],
    }
    for i in range(3)
  ]
}
ALBEF = [{"image": f"{i}.jpg", "caption": ["x" * 30, "é"] if i else "one" * 20} for i in range(4)]
TOKEN = "".join(f"{i}.jpg#{j}\tcaption {j} of é {i}\n" for i in range(3) for j in range(2))
COCO = {
  "images": [{"id": i, "file_name": f"{i}.jpg", "width": 3, "height": 4} for i in range(3)],
  "annotations": [{"id": 10 + i, "image_id": i % 3, "caption": f"c{i}" * 30} for i in range(6)],
}


def check_karpathy(path: pathlib.Path) -> None:
  with logged() as messages:
    splits = sources.read_karpathy(path, path.parent)
  want = collections.defaultdict(list)
  for item in json.loads(path.read_bytes().decode("utf-8-sig"))["images"]:
    captions = tuple(s["raw"] for s in item["sentences"])
    want[item["split"]].append((item["filename"], captions))
  found = {k: [(p.filename, p.captions) for p in v] for k, v in splits.items()}
  assert messages or found == want, (found, want)


def check_albef(path: pathlib.Path) -> None:
  with logged() as messages:
    (images,) = sources.read_albef({"train": [(path, path.parent)]}).values()
  want = [(item["image"], item["caption"]) for item in json.loads(path.read_bytes())]
  want = [(name, tuple(c) if isinstance(c, list) else (c,)) for name, c in want]
  assert messages or [(p.filename, p.captions) for p in images] == want


def check_token(path: pathlib.Path) -> None:
  found = [row["caption"] for _, row in tables.rows(epath.Path(path))]
  lines = path.read_bytes().decode("utf-8-sig").split("\n")
  want = [line.removesuffix("\r").partition("\t")[2] for line in lines if line.strip()]
  assert found == want, (found, want)
  pairs.read_pairs(path, path.parent)


def check_coco(path: pathlib.Path) -> None:
  with logged() as messages:
    (images,) = coco.read_coco(path, path.parent).values()
  data = json.loads(path.read_bytes().decode("utf-8-sig"))
  want: dict[int, list] = {}
  for item in data["annotations"]:
    want.setdefault(int(item["image_id"]), []).append(item["caption"])
  # One message, which is expected, is of the split.
  assert len(messages) > 1 or {p.image_id: list(p.captions) for p in images} == want


def tar_bytes() -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as f:
    for i in range(3):
      about = json.dumps({"status": "success", "caption": f"c{i}"}).encode()
      for name, data in ((f"{i}.jpg", b"x" * 99), (f"{i}.json", about), (f"{i}.txt", b"c%d" % i)):
        member = tarfile.TarInfo(name if i < 2 else f"é/{name}")
        member.size = len(data)
        f.addfile(member, io.BytesIO(data))
  return out.getvalue()


def examples(path: pathlib.Path) -> list[tuple] | None:
  """(file name, image, captions) of a shard; None if something was left out, with its reason."""
  left_out = collections.Counter()
  found = list(img2dataset.read(str(path), left_out))
  left_out.pop(img2dataset.UNRECORDED, None)
  return None if left_out else [(e["filename"], e["image"], e["captions"]) for e in found]


def check_tar(path: pathlib.Path) -> None:
  found = examples(path)
  if found is None:
    logging.info("something is left out")
    return
  want: dict[str, dict] = {}
  with tarfile.open(path) as f:
    for member in f:
      if member.isreg():
        key, _, suffix = member.name.removeprefix("./").rpartition("/")[2].partition(".")
        key = member.name.removeprefix("./").rpartition("/")[0] + "/" + key
        want.setdefault(key.lstrip("/"), {})[suffix.lower()] = f.extractfile(member).read()
  rows = []
  for key, parts in want.items():
    suffix = next(s for s in web_samples.TYPES if s in parts)
    caption = parts["txt"].decode() if "txt" in parts else json.loads(parts["json"])["caption"]
    captions = tuple(caption) if isinstance(caption, list) else (caption,)
    rows.append((f"{path.stem}/{key}.{suffix}", parts[suffix], captions))
  assert sorted(found) == sorted(rows), (found, rows)


def parquet_bytes() -> bytes:
  import pyarrow
  from pyarrow import parquet

  rows = [
    {"key": f"{i}", "jpg": b"x" * 30, "caption": f"c{i}", "status": "success"} for i in range(5)
  ]
  out = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression="none")
  return out.getvalue()


def check_parquet(path: pathlib.Path) -> None:
  from pyarrow import parquet

  found = examples(path)
  if found is None:
    logging.info("something is left out")
    return
  columns = ["key", "jpg", "caption", "status"]
  rows = parquet.ParquetFile(path).read().to_pylist()
  rows = [tuple(row.get(c) for c in columns) for row in rows]
  want = [(f"{path.stem}/{k}.jpg", image, (caption,)) for k, image, caption, _ in rows]
  assert found == want, (found, want)


READERS = {
  "csv": (
    "input.csv",
    [table(",", plain) for plain in (True, False)],
    lambda path: check_table(path, ","),
  ),
  "tsv": (
    "input.tsv",
    [table("\t", plain) for plain in (True, False)],
    lambda path: check_table(path, "\t"),
  ),
  "jsonl": ("input.jsonl", [JSON_LINES], check_json_lines),
  "karpathy": ("input.json", [json.dumps(KARPATHY).encode()], check_karpathy),
  "coco": ("input_val.json", [json.dumps(COCO).encode()], check_coco),
  "albef": ("input_albef.json", [json.dumps(ALBEF).encode()], check_albef),
  "token": ("input.token", [TOKEN.encode()], check_token),
  "tar": ("input.tar", None, check_tar),
  "parquet": ("input.parquet", None, check_parquet),
}
MADE = {"tar": tar_bytes, "parquet": parquet_bytes}


class logged(logging.Handler):
  """Context: a list of the messages that are logged in it."""

  def __enter__(self) -> list[str]:
    self.messages = []
    logging.getLogger().addHandler(self)
    return self.messages

  def __exit__(self, *args) -> None:
    logging.getLogger().removeHandler(self)

  def emit(self, record: logging.LogRecord) -> None:
    self.messages.append(record.getMessage())


def main(reader: str, count: int, folder: pathlib.Path) -> dict[str, int]:
  name, seeds, check = READERS[reader]
  seeds = seeds or [MADE[reader]()]
  path, counts, rng = folder / name, collections.Counter(), random.Random(reader)
  logging.getLogger().setLevel(logging.INFO)
  for data in seeds:
    path.write_bytes(data)
    check(path)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for _ in range(count):
    path.write_bytes(mutated(rng.choice(seeds), rng))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends this process
    with logged() as messages:
      try:
        check(path)
        counts["with a message" if messages else "read"] += 1
      except DatasetError as e:
        assert str(e).startswith(str(path)), e
        counts["refused"] += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
  growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  return {**counts, "MB": growth >> 10}


if __name__ == "__main__":
  print(json.dumps(main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))))
