"""CLIP's tokenizer and image transform against values recorded from the original code."""

import json
import re

import golden_files
import numpy as np
import pytest
from PIL import Image

from xmodal_jax.data import image, text

MANIFEST = golden_files.manifest("clip")
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@pytest.fixture(scope="module")
def tokenizer():
  return text.ClipTokenizer()


@pytest.fixture(scope="module")
def captions():
  return json.loads(golden_files.path("clip", "tokenizer", "captions.json").read_text())


def read(*parts):
  return golden_files.arrays("clip", *parts)


def test_clean_encode_decode(tokenizer, captions):
  assert MANIFEST["tolerance"]["tokens"] == "exact"
  for row in captions:
    ids = tokenizer.encode(row["text"])
    assert text.clean(row["text"]) == row["clean"], row["text"]
    assert [tokenizer.start_id, *ids, tokenizer.end_id] == row["ids"], row["text"]
    assert tokenizer.decode(ids) == row["decoded"], row["text"]


def test_truncated_rows(tokenizer, captions):
  texts, lengths = [c["text"] for c in captions], [len(c["ids"]) for c in captions]
  for expected in read("tokenizer", "ids.npz").values():
    width = expected.shape[1]
    ids, mask = tokenizer(texts, width, truncate=True)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(mask.sum(1), np.minimum(lengths, width))


def test_too_long_is_an_error(tokenizer, captions):
  """Captions that the original refuses are longer than any that it accepts."""
  width = max(len(c["ids"]) for c in captions if not c["too_long"])
  for row in captions:
    if row["too_long"]:
      with pytest.raises(ValueError, match=re.escape(repr(row["text"]))):
        tokenizer([row["text"]], width, truncate=False)
    else:
      tokenizer([row["text"]], width, truncate=False)


def pil_image(name, info, arrays):
  out = Image.fromarray(arrays[name])
  if info["mode"] == "P":
    # A palette image is stored as its indices and, beside them, the colours.
    out = Image.frombytes("P", out.size, arrays[name].tobytes())
    out.putpalette(arrays[f"{name}_palette"].tobytes())
  assert (out.mode, out.width, out.height) == (info["mode"], info["width"], info["height"])
  return out


def normalise(pixels):
  """uint8 [n, n, 3] -> float32 [3, n, n]."""
  return ((pixels.astype(np.float32) / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)


IMAGES = [(k, n) for k, info in MANIFEST["preprocess"]["images"].items() for n in info["n_px"]]


@pytest.mark.parametrize(("name", "n"), IMAGES)
def test_transform(name, n):
  info = MANIFEST["preprocess"]["images"][name]
  source = pil_image(name, info, read("preprocess", "inputs.npz"))
  got = image.load(source, image.clip_transform(n))
  prefix = f"{name}/{n}/"
  want = {
    k.removeprefix(prefix): v
    for k, v in read("preprocess", "outputs.npz").items()
    if k.startswith(prefix)
  }
  note = MANIFEST["tolerance"]["preprocess_uint8"]
  assert note.startswith("exact")
  inexact = re.search(r"rgba: up to (\d+) levels", note) if info["mode"] == "RGBA" else None
  levels = int(inexact[1]) if inexact else 0
  assert got.dtype == np.uint8 and got.shape == (n, n, 3)
  assert np.abs(got.astype(int) - want.pop("uint8")).max() <= levels
  atol = MANIFEST["tolerance"]["preprocess_normalised"]["atol"] + levels / 255 / STD.min()
  floats = normalise(got)
  for kind, expected in want.items():
    if kind == "norm_mean_std":
      flat = floats.reshape(3, -1).astype(np.float64)
      value = np.stack([flat.mean(1), flat.std(1, ddof=1)])
    elif rows := re.fullmatch(r"normalised_rows((?:_\d+)+)", kind):
      value = floats[:, [int(i) for i in rows[1].split("_")[1:]]]
    else:
      assert kind == "normalised"
      value = floats
    np.testing.assert_allclose(value, expected, rtol=0, atol=atol, err_msg=kind)


def test_mini_coco_test_split():
  """Merge file, annotations and images of the small dataset: its recorded tokens and pixels."""
  info = MANIFEST["models"][MANIFEST["mini_coco"]["model"]]
  inputs, outputs = read("mini_coco", "inputs.npz"), read("mini_coco", "outputs.npz")
  file = golden_files.path("clip", "mini_coco", "captions_val2014.json")
  annotations = json.loads(file.read_text())
  caption = {a["id"]: a for a in annotations["annotations"]}
  file_name = {i["id"]: i["file_name"] for i in annotations["images"]}
  ids = inputs["ids/coco_test_ids"].tolist()

  tokenizer = text.make_tokenizer(
    "clip_bpe", path=golden_files.path("clip", "mini_coco", "tiny_bpe.txt")
  )
  assert tokenizer.vocab_size == info["vocab_size"]
  assert (tokenizer.start_id, tokenizer.end_id) == (info["sot_id"], info["eot_id"])
  length = outputs["test_tokens"].shape[1]
  rows, _ = tokenizer([caption[i]["caption"] for i in ids], length, truncate=False)
  np.testing.assert_array_equal(rows, outputs["test_tokens"])

  names = dict.fromkeys(file_name[caption[i]["image_id"]] for i in ids)
  transform = image.clip_transform(info["image_resolution"])
  for name, expected in zip(names, outputs["test_pixels"], strict=False):
    got = normalise(image.load(inputs[f"image/{name}"], transform))
    atol = MANIFEST["tolerance"]["preprocess_normalised"]["atol"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
