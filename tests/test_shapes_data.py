"""The embedded dataset: determinism, contents of scenes and captions, first use."""

import io
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image

from xmodal_jax.data import records
from xmodal_jax.data.preparing import shapes

SMALL = {"train": 12, "val": 4, "test": 4}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if "tfrecord" in p.name}


def test_deterministic_to_the_byte(tmp_path):
  one, two, other = (
    contents(shapes.write(tmp_path / str(i), seed=seed, sizes=SMALL))
    for i, seed in enumerate((3, 3, 4))
  )
  assert len(one) == 6 and one == two
  assert all(one[name] != other[name] for name in one)


def test_records(tmp_path):
  folder = shapes.write(tmp_path, sizes=SMALL)
  for name, size in SMALL.items():
    split = records.open_split(folder, name)
    assert len(split) == size and (split.captions_per_record == 5).all()
  record = split.read(1)
  assert len(set(record.captions)) == 5 and record.image_id == 17 and record.caption_ids[0] == 85
  for text in record.captions:  # of this scene, the 18th of the 20 of all splits
    assert all(colour in text for colour, *_ in shapes.scenes(0, 20)[17])
  image = Image.open(io.BytesIO(record.image))
  assert (image.size, image.mode, image.format) == ((96, 96), "RGB", "JPEG")
  assert record.regions.shape == (len(record.boxes), shapes.REGION_DIM)
  assert (record.boxes[:, 2:] - record.boxes[:, :2] > 8).all() and record.size == (96, 96)


def test_scenes_differ_and_keep_the_rules():
  scenes = shapes.scenes(0, 5000)
  assert len(set(scenes)) == 5000
  assert {len(s) for s in scenes} == {2, 3}
  for scene in scenes:
    assert len({cell for *_, cell in scene}) == len(scene)
  kinds = [{obj[i] for s in scenes for obj in s} for i in range(4)]
  assert [len(k) for k in kinds] == [8, 5, 2, 9]


def test_images_show_the_scene():
  """The pixel in the middle of each box has the object's colour, and the box is in its cell."""
  for i, scene in enumerate(shapes.scenes(1, 80)):
    image, boxes = shapes.render(scene, np.random.default_rng(i))
    pixels = np.asarray(image, np.float32)
    for (colour, shape, size, cell), box in zip(scene, boxes, strict=True):
      x, y = (box[:2] + box[2:]) / 2
      assert abs(pixels[int(y), int(x)] - shapes.COLOURS[colour]).max() < 25
      assert (int(x) // 32, int(y) // 32) == (cell % 3, cell // 3)
      if shape == "circle":
        assert (max(box[2:] - box[:2]) > 20) == (size == "large")


def test_captions_say_what_is_there():
  """Each caption names the colour of each object, three name all places; few words are used."""
  vocabulary = set()
  for i, scene in enumerate(shapes.scenes(2, 600)):
    texts = shapes.captions(scene, np.random.default_rng(i))
    for text in texts:
      words = text.replace(",", "").replace(";", "").replace(":", "").split()
      vocabulary |= set(words)
      assert sorted(w for w in words if w in shapes.COLOURS) == sorted(o[0] for o in scene)
    for text in texts[:3]:
      assert sum(text.count(f) for f in (" at the ", " in the ", " on the ")) + sum(
        text.startswith(f) for f in ("at the ", "in the ", "on the ")
      ) == len(scene)
  assert 65 <= len(vocabulary) <= 100


@pytest.mark.parametrize(
  "cell, to, words",
  [(0, 2, "left of"), (5, 3, "right of"), (1, 7, "above"), (8, 2, "below"), (0, 8, "above and")],
)
def test_relations(cell, to, words):
  found = {shapes._relation(cell, to, np.random.default_rng(i)) for i in range(40)}
  assert any(words in f for f in found) and len(found) > 1
  opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
  assert not any(opposite[words.split()[0]] in f for f in found)


def test_region_features_see_the_object():
  """Another colour in the same box changes the features; geometry is in fractions of the image."""
  scene = (("red", "circle", "large", 4), ("blue", "star", "small", 0))
  image, boxes = shapes.render(scene, np.random.default_rng(0))
  features = shapes.region_features(image, boxes)
  assert features.dtype == np.float32 and np.abs(features).max() <= 1
  np.testing.assert_allclose(features[:, -7:-3], boxes / 96, rtol=1e-6)
  swapped = (("green", *scene[0][1:]), scene[1])
  image, boxes = shapes.render(swapped, np.random.default_rng(0))
  other = shapes.region_features(image, boxes)
  assert np.abs(other[0] - features[0]).max() > 0.5
  np.testing.assert_array_equal(other[1], features[1])


def test_ensure_writes_once_also_in_a_race(tmp_path, monkeypatch):
  monkeypatch.setattr(shapes, "SIZES", SMALL)
  render, meet = shapes.examples, threading.Barrier(2)

  def both_at_once(*args):
    meet.wait(timeout=60)  # neither has seen the other's folder
    return render(*args)

  monkeypatch.setattr(shapes, "examples", both_at_once)
  found, threads = [], []
  for _ in range(2):
    threads.append(threading.Thread(target=lambda: found.append(shapes.ensure(tmp_path))))
    threads[-1].start()
  for thread in threads:
    thread.join()
  assert found == [tmp_path / "shapes" / shapes.VERSION] * 2
  left = [p.name for p in (tmp_path / "shapes").iterdir()]
  assert left == [shapes.VERSION]  # no temporary files are left
  monkeypatch.setattr(shapes, "examples", None)  # a second run renders nothing
  assert len(records.open_split(shapes.ensure(tmp_path), "train")) == 12


def test_regions_are_the_objects_and_then_background(tmp_path):
  """Background boxes lie in cells without an object, and the first ones are where the objects are;
  the images and captions are those of the scenes alone."""
  split = records.open_split(shapes.write(tmp_path, sizes={"train": 40}), "train")
  counts = set()
  for i, (record, scene) in enumerate(zip(split, shapes.scenes(0, 40), strict=True)):
    rng = np.random.default_rng((0, i))
    image, boxes = shapes.render(scene, rng)
    np.testing.assert_array_equal(record.boxes[: len(scene)], boxes)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95, subsampling=0)
    assert record.image == data.getvalue()
    assert list(record.captions) == shapes.captions(scene, rng)
    centre = (record.boxes[:, :2] + record.boxes[:, 2:]) / 2 // 32
    cells = (centre[:, 0] + 3 * centre[:, 1]).astype(int).tolist()
    assert cells[: len(scene)] == [item[3] for item in scene] and len(set(cells)) == len(cells)
    extra = len(cells) - len(scene)
    assert 2 <= extra <= 4 and len(cells) <= shapes.MAX_REGIONS
    counts.add(extra)
    assert (record.boxes >= 0).all() and (record.boxes <= 96).all()
  assert counts == {2, 3, 4}


def test_a_copy_of_an_earlier_version_is_rendered_again(tmp_path, monkeypatch):
  monkeypatch.setattr(shapes, "SIZES", SMALL)
  old = shapes.write(tmp_path, sizes=SMALL, version="1.0.0")
  folder = shapes.ensure(tmp_path)
  assert folder != old and records.open_split(folder, "val").read(0).size == (96, 96)
