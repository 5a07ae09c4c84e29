"""ZeroVL's csv and images on disk, prepared and read as its evaluation tool reads them."""

import csv
import io
import pathlib

import golden_files
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tools import prepare_data
from xmodal_jax.data import image, records, wordpiece
from xmodal_jax.models import base

MANIFEST = golden_files.manifest("zerovl")
CONFIG = MANIFEST["config"]
# Section 4.1 of the published configs: those of the paper's runs, and of the released 100M file.
NORMS = {
  "imagenet_norm": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "half_norm": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
PIXELS = next(v for k, v in MANIFEST["tolerances"].items() if k.startswith("eval pixels"))


def annotations() -> str:
  return golden_files.path("zerovl", "disk_eval_valid_anno.csv.txt").read_bytes().decode()


def rows() -> list[dict[str, str]]:
  """The rows of the csv, in the order of the recorded arrays."""
  return list(csv.DictReader(io.StringIO(annotations(), newline="")))


def prepared(tmp_path: pathlib.Path) -> pathlib.Path:
  """Writes the csv and the images below tmp_path and prepares them.

  Returns:
    the data directory. Its split "val" has the images and captions in the order of the csv's rows.
  """
  root = tmp_path / "csv"
  (root / "valid").mkdir(parents=True)
  (root / "valid_anno.csv").write_bytes(annotations().encode())
  prefix = "disk_eval/image_"
  for name, pixels in golden_files.arrays("zerovl", "inputs.npz").items():
    if name.startswith(prefix):
      file = root / "valid" / f"{int(name.removeprefix(prefix))}.png"
      Image.fromarray(pixels).save(file)
  prepare_data.main(["csv", "--root", str(root), "--out", str(tmp_path / "out")])
  return tmp_path / "out"


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> records.Split:
  return records.open_split(prepared(tmp_path_factory.mktemp("disk")), "val")


def by_row(split: records.Split) -> list[tuple[records.Record, int]]:
  """(record, number of its caption) in the order of the csv."""
  pairs = [(record, j) for record in split for j in range(len(record.captions))]
  places = split.caption_positions.tolist()
  assert sorted(places) == list(range(len(pairs)))
  return [pairs[k] for k in np.argsort(places)]


def test_rows_and_images(split):
  assert [r.filename for r in split] == list(dict.fromkeys(row["image"] for row in rows()))
  for (record, j), row in zip(by_row(split), rows(), strict=True):
    assert (record.filename, record.image_id) == (row["image"], int(row["image_id"]))
    assert (record.captions[j], record.caption_ids[j]) == (row["caption"], int(row["caption_id"]))


@pytest.mark.parametrize("norm", NORMS)
def test_pixels(split, norm):
  outputs, prefix = golden_files.arrays("zerovl", "outputs.npz"), f"disk_eval/{norm}/pixels_first"
  (want,) = (v for k, v in outputs.items() if k.startswith(prefix))
  transform = image.Transform(CONFIG["eval_resize"], CONFIG["eval_crop"], "exact", "bilinear")

  class Pixels(base.System):
    mean, std = NORMS[norm]

  decoded = [image.load(r.image, transform) for r, _ in by_row(split)[: len(want)]]
  got = np.asarray(Pixels().pixels(jnp.asarray(np.stack(decoded)))).transpose(0, 3, 1, 2)
  np.testing.assert_allclose(got, want, rtol=0, atol=PIXELS)


def test_token_ids(split):
  outputs = golden_files.arrays("zerovl", "outputs.npz")
  assert MANIFEST["tolerances"]["token ids, ranks, recalls"].startswith("exact")
  tokenizer = wordpiece.BertTokenizer(golden_files.path("zerovl", "vocab.txt"))
  captions = [record.captions[j] for record, j in by_row(split)]
  ids, mask = tokenizer(captions, CONFIG["max_length"])
  np.testing.assert_array_equal(ids, outputs["disk_eval/input_ids"])
  np.testing.assert_array_equal(mask, outputs["disk_eval/attention_mask"].astype(bool))
