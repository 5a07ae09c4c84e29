"""Names files and folders that are not checkpoints, and says what to do with them."""

import re
from collections.abc import Sequence

_AGAIN = "download it again"
_STARTS = (
  (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` there"),
  (b"<", f"a web page or XML, not a checkpoint (a login or error page?): {_AGAIN}"),
  (b"\x89HDF", "an HDF5 file (Keras?), which is not read: take the PyTorch weights"),
  (b"\x93NUMPY", "a NumPy array (.npy), not a state dict"),
  (b"\x1f\x8b", "a gzip archive: unpack it first (gunzip, tar -xzf)"),
  (b"BZh", "a bzip2 archive: unpack it first"),
  (b"\xfd7zXZ", "an xz archive: unpack it first"),
  (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
  (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
  (b"Rar!", "a rar archive: unpack it first"),
  (b"GGUF", "a GGUF file (llama.cpp), which is not read: take the PyTorch weights"),
  (b"%PDF", f"a PDF: {_AGAIN}"),
  (b"\xff\xd8\xff", "a picture (JPEG), not a checkpoint"),
  (b"\x89PNG", "a picture (PNG), not a checkpoint"),
)
_LORA = (
  "a LoRA or PEFT adapter, which has no weights of its own: merge it into its base "
  "(merge_and_unload) and save model.state_dict()"
)


def other_file(head: bytes) -> str | None:
  """What a file with these first bytes is, if it is recognisably no checkpoint."""
  if not head:
    return f"an empty file: {_AGAIN}"
  if not head.strip(b"\0"):
    return f"a file that begins with {len(head)} zero bytes (an unfinished download?): {_AGAIN}"
  for start, what in _STARTS:
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
      return what
  return None


def text_file(head: bytes) -> str | None:
  """The same for text; asked last, because pickles can be text, too."""
  if len(head) >= 8 and re.fullmatch(rb"[\x20-\x7e\s]+", head):
    return f"a text file, not a checkpoint; it begins with {head[:60].decode()!r}"
  return None


def other_zip(entries: Sequence[str]) -> str:
  """What a zip archive with these entries is, which has no data.pkl where torch.save puts it."""
  inside = [n for n in entries if re.search(r"\.(pt|pth|ckpt|bin|safetensors)$", n)]
  if any(n.endswith("data.pkl") for n in entries):
    what = "whose data.pkl is not in its one folder; an unpacked checkpoint, packed again?"
  elif inside:
    what = f"with {', '.join(inside[:3])} in it: unpack it first"
  elif entries and all(n.endswith(".npy") for n in entries):
    what = "of NumPy (.npz), not a state dict of PyTorch"
  elif entries:
    what = f"with {', '.join(n[:60] for n in entries[:3])} in it"
  else:
    what = "that is empty"
  return f"a zip archive {what}; not one of torch.save"


def other_folder(names: Sequence[str]) -> str:
  """What a folder with these files is, which has no weights under the usual names."""
  have = set(names)
  if {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} & have:
    return f"holds {_LORA}"
  if ".metadata" in have and any(n.endswith(".distcp") for n in names):
    return (
      "holds a checkpoint of torch.distributed.checkpoint: convert it to one file with "
      "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`"
    )
  if "meta.json" in have and "model" in have:
    return "is a converted directory already"
  if "checkpoints" in have:
    return "is a workdir of this package, not PyTorch weights"
  if "saved_model.pb" in have or any(n.endswith(".index") for n in names):
    return "holds TensorFlow weights, which are not read: take the PyTorch ones"
  some = f"; it holds {', '.join(sorted(names)[:8])}" if names else "; it is empty"
  return f"holds no weights under a known name (model.safetensors, pytorch_model.bin, ...){some}"
