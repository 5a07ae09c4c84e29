"""What words look at: words, places, numbers, and the tool on a small TEAM."""

import base64
import importlib.util
import io
import itertools
import pathlib
import re

import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

from xmodal_jax import config as config_lib
from xmodal_jax.checkpoints import model_files
from xmodal_jax.data import image, records
from xmodal_jax.data.preparing import shapes
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.runtime import setup
from xmodal_jax.visual import alignment

GRID = alignment.TokenBoxes(alignment.patch_boxes(2, 2), 1, (2, 2))


def words_of(pieces, mask=None):
  return alignment.words(pieces, [True] * len(pieces) if mask is None else mask)


def test_pieces_of_a_word_are_joined_and_padding_is_left_out():
  pieces = ["[CLS]", "a", "tri", "##ang", "##le", ",", "a", "[SEP]", "[PAD]", "[PAD]"]
  found = words_of(pieces, [True] * 8 + [False] * 2)
  assert [w.text for w in found] == ["[CLS]", "a", "triangle", ",", "a", "[SEP]"]
  assert [w.tokens for w in found] == [(0,), (1,), (2, 3, 4), (5,), (6,), (7,)]
  assert [w.special for w in found] == [True, False, False, False, False, True]
  values = alignment.word_means(np.arange(20.0).reshape(10, 2), found)
  np.testing.assert_array_equal(values, [[0, 1], [2, 3], [6, 7], [10, 11], [12, 13], [14, 15]])


def test_words_at_the_edges():
  # A piece that goes on with nothing stands alone; names spelt out in a caption are its words.
  found = words_of(["[CLS]", "##le", "##", "[SEP]", "[UNK]", "[SEP]"])
  assert [w.text for w in found] == ["[CLS]", "##le", "##", "[SEP]", "[UNK]", "[SEP]"]
  assert [w.special for w in found] == [True, False, False, False, False, True]
  assert [w.text for w in words_of(["[CLS]", "[SEP]"])] == ["[CLS]", "[SEP]"]


def test_places_are_patches_or_boxes_or_an_error():
  where = alignment.token_boxes(7, 16, 24, 8)
  assert where.grid == (2, 3) and where.extra == 1
  np.testing.assert_allclose(where.boxes[4], [1 / 3, 1 / 2, 2 / 3, 1])  # second row, second column
  assert alignment.token_boxes(6, 16, 24, 8).extra == 0
  boxes = np.array([[0, 0, 12, 8], [12, 8, 24, 20]], np.float32)
  where = alignment.token_boxes(3, 16, 24, None, boxes)
  assert where.grid is None and where.extra == 1
  np.testing.assert_allclose(where.boxes, [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
  with pytest.raises(
    ValueError, match=r"9 tokens, but patches of 8 pixels make 2 x 3.*boxes of re"
  ):
    alignment.token_boxes(9, 16, 24, 8)
  with pytest.raises(ValueError, match=r"there are no patches.*as many boxes as regions, not 2"):
    alignment.token_boxes(9, 16, 24, None, boxes)


def test_pointing():
  """A box over the right half, and a small one around the middle of the image."""
  boxes = np.array([[0.5, 0, 1, 1], [0.4, 0.4, 0.55, 0.6]])
  attention = np.array([[0.2, 0.1, 0.4, 0.2, 0.1], [0.5, 0.3, 0.1, 0.0, 0.1]])
  got = alignment.pointing_metrics(attention, GRID, boxes)
  np.testing.assert_allclose(got["extra"], [0.2, 0.5])
  np.testing.assert_allclose(got["area"], [0.5, 0.03])
  np.testing.assert_allclose(got["mass"], [5 / 8, (0.3 * 0.04 + 0.1 * 0.02 + 0.1 * 0.02) / 0.5])
  # No patch has its centre in the small box: the left ones are covered most, both alike.
  assert got["hit"].tolist() == [True, True]
  np.testing.assert_allclose(got["chance"], [0.5, 0.5])
  away = alignment.pointing_metrics(attention[:, [0, 2, 1, 4, 3]], GRID, boxes)
  assert away["hit"].tolist() == [False, False]


def test_attention_without_preference_has_the_mass_of_the_area():
  rng = np.random.default_rng(0)
  low, size = rng.random((2, 50, 2)) / 2
  where = alignment.TokenBoxes(alignment.patch_boxes(4, 6), 0, (4, 6))
  got = alignment.pointing_metrics(np.ones((50, 24)), where, np.concatenate([low, low + size], 1))
  np.testing.assert_allclose(got["mass"], got["area"], rtol=1e-5)
  assert (got["chance"] > 0).all()


def test_heat_is_scaled_to_the_strongest_place():
  attention = np.array([0.6, 0.1, 0.2, 0.0, 0.1])
  np.testing.assert_allclose(
    alignment.heatmap(attention, GRID, 4, 4)[::2, ::2], [[0.5, 1], [0, 0.5]], atol=1e-6
  )
  smooth = alignment.heatmap(attention, GRID, 4, 4, smooth=True)
  assert smooth[0, 0] == 0.5 and 0.5 < smooth[0, 1] < smooth[0, 2] < smooth[0, 3] == 1
  # Boxes that overlap: the stronger is on top, whatever their order.
  boxes = alignment.TokenBoxes(np.array([[0.5, 0, 1, 1], [0, 0, 0.75, 1]], np.float32), 0)
  np.testing.assert_allclose(alignment.heatmap([0.8, 0.2], boxes, 1, 4), [[0.25, 0.25, 1, 1]])


def test_overlay_marks_places_and_outlines_regions():
  picture = np.full((40, 40, 3), 128, np.uint8)
  got = alignment.overlay(picture, np.array([0.6, 0.0, 0.4, 0.0, 0.0]), GRID)
  assert (got[5, 5] == got[30, 30]).all() and got[5, 30, 0] > got[5, 5, 0] > got[5, 30, 2]
  boxes = alignment.TokenBoxes(np.array([[0.25, 0.25, 0.5, 0.5]], np.float32), 0)
  got = alignment.overlay(picture, np.array([1.0]), boxes)
  assert (got[10, 10:20] == 0).all() and (got[15, 15] != 0).any() and (got[25, 25] != 0).all()


def test_page_stands_alone_and_escapes():
  panel = lambda title: alignment.Panel(title, "5%", np.zeros((2, 3, 3), np.uint8))
  page = alignment.html_page('<b> & "it"', panel("plain"), [panel("<script>  +0.1")])
  assert "<b> &" not in page and "<script" not in page and "http" not in page
  alts = re.findall(r'alt="([^"]*)"', page)
  assert alts == ["Image: plain, 5%", "Attention of the word: &lt;script&gt;  +0.1, 5%"]
  data = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
  assert [Image.open(io.BytesIO(base64.b64decode(d))).size for d in data] == [(3, 2)] * 2


@pytest.fixture(scope="module")
def tool():
  path = pathlib.Path(__file__).parents[1] / "tools" / "show_alignment.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def flags(tiny_data, tmp_path_factory) -> list[str]:
  """--config and --init of a fresh small TEAM in a converted directory."""
  folder = tmp_path_factory.mktemp("team")
  # Long enough for all captions.
  code = f"""import tiny

def get_config(variant=None):
  long = dict(model__text__context=48, text__length=48)
  return {{"clip": tiny.config, "team": tiny.team}}[variant or "team"]({tiny_data!r}, **long)
"""
  (folder / "small.py").write_text(code)
  config = tiny.team(tiny_data, model__text__context=48, text__length=48)
  built = setup.build(config_lib.resolve(config))
  params = nnx.to_pure_dict(nnx.state(built.init_model(), nnx.Param))
  meta = dict(system="team", source="none", sha256="", config={}, ignored={})
  meta |= dict(converter=meta_lib.VERSION)
  model_files.save_model(folder / "model", params, {}, meta)
  return ["--config", f"{folder}/small.py:team", "--init", f"{folder}/model"]


@pytest.fixture(scope="module")
def model(tool, flags):
  return tool.Model(tool.load_config(flags[1]), flags[3], "relevance")


def text_of(capsys, main, arguments) -> str:
  """What the tool says when it ends with an error."""
  with pytest.raises(SystemExit) as e:
    main(arguments)
  return f"{e.value} {capsys.readouterr().err}"


def test_png_of_an_image_of_a_dataset(tool, flags, tmp_path, capsys):
  out = tmp_path / "a.png"
  tool.main([*flags, "--split", "test", "--index", "2", "--caption_number", "1", "--out", str(out)])
  with Image.open(out) as picture:
    assert picture.format == "PNG" and min(picture.size) > 200
  assert re.search(
    r"words, first stage [+-]0\.\d+, second stage [+-]\d\.\d+$", capsys.readouterr().out
  )


def test_html_of_a_file_shows_every_word_in_order(tool, flags, tmp_path):
  out, source = tmp_path / "a.html", tmp_path / "a.png"
  Image.new("RGB", (30, 20), (9, 200, 9)).save(source)
  arguments = [*flags, "--image", str(source), "--caption", "A  triangle, zyzzyva <i>", "--smooth"]
  tool.main([*arguments, "--out", str(out)])
  titles = re.findall(r"<b>(.*?)  ([+-]\d\.\d{3})</b>", out.read_text())
  assert [t[0] for t in titles] == ["a", "triangle", ",", "zyzzyva", "&lt;", "i", "&gt;"]
  tool.main([*arguments, "--special", "--out", str(out)])
  special = re.findall(r"<b>(.*?)  ([+-]\d\.\d{3})</b>", out.read_text())
  assert special[1:-1] == titles and [special[0][0], special[-1][0]] == ["[CLS]", "[SEP]"]
  assert out.read_text().count("class token ") == 2 * len(special)  # below and as alt text


def test_a_caption_that_is_cut_is_said_to_be(tool, flags, tmp_path, capsys):
  arguments = [*flags, "--split", "test", "--index", "0", "--out", str(tmp_path / "a.html")]
  tool.main([*arguments, "--caption", "red " * 46])
  assert "46 words" in (said := capsys.readouterr().out) and "are cut" not in said
  tool.main([*arguments, "--caption", "red " * 47])
  assert "46 words" in (said := capsys.readouterr().out)
  assert "the caption's 49 tokens are cut to config.text.length = 48" in said


def test_scores_are_those_of_the_system(model):
  """The mean of the tokens' scores is the last block's part of the second stage."""
  pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
  batch = model.batch(pixels, ["a red star", "two shapes: a blue cross and a triangle"])
  out = model(batch)
  np.testing.assert_allclose(out["attention"].sum(-1)[batch["text_mask"]], 1, rtol=1e-5)
  np.testing.assert_allclose(out["relevance"].sum(-1)[batch["text_mask"]], 1, rtol=1e-4)
  np.testing.assert_array_equal(out["weights"], out["relevance"])
  last = [row[m].mean() for row, m in zip(out["agreement"], batch["text_mask"], strict=True)]
  assert model.config.model.matching.depth == 2
  assert (np.abs(out["second"] - last) <= 1).all()  # the first block's part is a cosine
  alone = model(model.batch(pixels[1:], ["two shapes: a blue cross and a triangle"]))
  for key in out:
    np.testing.assert_allclose(out[key][1], alone[key][0], rtol=2e-4, atol=1e-5)


def test_words_name_the_objects_that_the_pixels_show(tool, tiny_data):
  """Which box a word belongs to is derived from the scenes; here from the colours in the box."""
  palette = np.array(list(shapes.COLOURS.values()), np.float32)
  names, checked = list(shapes.COLOURS), 0
  for record in records.open_split(tiny_data, "test"):
    scene = shapes.scenes(0, record.image_id + 1)[-1]
    pixels = np.asarray(image.decode(record.image), np.float32)
    for colour in names:
      target = tool.named(record, scene, colour)
      assert (target is None) == ([item[0] for item in scene].count(colour) != 1)
      if target:
        x1, y1, x2, y2 = record.boxes[target[1]]
        centre = pixels[int((y1 + y2) / 2), int((x1 + x2) / 2)]
        # An object's colour varies by up to 18 in each channel.
        assert np.abs(palette[names.index(colour)] - centre).max() < 30
        checked += 1
  assert checked > 15


def test_measure_counts_every_word_that_names_one_object(tool, flags, tiny_data, capsys):
  tool.main([*flags, "--split", "test", "--measure"])
  lines = capsys.readouterr().out.splitlines()
  said = [re.findall(r"\w+", c) for r in records.open_split(tiny_data, "test") for c in r.captions]
  kinds = {w: (0, w) for w in shapes.COLOURS}
  kinds |= {w: (1, name) for name, all_names in shapes.SHAPES.items() for w in all_names}
  counts = [0, 0]
  for caption in said:
    # Every caption names every object once, so what occurs once fits one object.
    names = [kinds[w] for w in caption if w in kinds]
    for kind, name in set(names):
      counts[kind] += names.count((kind, name)) == 1
  rows = {line.split()[0]: line.split()[1:] for line in lines if line[:6] in ("colour", "shape ")}
  assert [int(rows[k][0]) for k in ("colour", "shape")] == counts
  numbers = np.array([row[1:] for row in rows.values()], float)
  assert numbers.shape == (2, 7) and ((numbers >= 0) & (numbers <= 100)).all()


def test_measured_numbers_of_an_oracle_and_of_a_blind_model(tool):
  """A word that looks at its own object has own 1 and other 0; one at all objects, the same."""
  where = alignment.TokenBoxes(alignment.patch_boxes(3, 3), 1, (3, 3))
  scenes = [where.boxes[[0, 4]], where.boxes[[2, 5, 8]]]
  onto = lambda box: np.append(0.5, 0.5 * (np.arange(9) == box))
  oracle = [(onto(4), scenes[0], 1), (onto(2), scenes[1], 0)]
  got = tool.against_others(oracle, where)
  assert got["hit"].tolist() == [True, True] and got["other_hit"].tolist() == [0, 0]
  np.testing.assert_allclose(got["mass"], 1)
  np.testing.assert_allclose(got["other_mass"], 0)
  # The strongest patch is always the scene's first object: right for one object of each scene.
  blind = [(onto(0), scenes[0], i) for i in range(2)] + [(onto(2), scenes[1], i) for i in range(3)]
  got = tool.against_others(blind, where)
  assert got["hit"].tolist() == [True, False, True, False, False]
  np.testing.assert_allclose(got["other_hit"], [0, 1, 0, 0.5, 0.5])
  assert got["hit"].mean() == pytest.approx(got["other_hit"].mean())
  assert len(tool.table({"colour": got}).splitlines()) == 6


def test_boxes_follow_the_evaluation_transform(tool):
  boxes = np.array([[50, 0, 150, 100], [0, 0, 60, 50]], np.float32)
  shorter = image.Transform(50, 40)
  got = tool.seen_boxes(boxes, (200, 100), shorter)  # to 100 x 50, then 30 and 5 pixels cut off
  np.testing.assert_allclose(got, [[0, 0, 40, 40], [0, 0, 0, 20]])
  exact = image.Transform(50, 50, "exact")
  np.testing.assert_allclose(tool.seen_boxes(boxes, (200, 100), exact)[0], [12.5, 0, 37.5, 50])


ERRORS = {
  "index": (["--split", "test", "--index", "99"], r"--index 99.*images 0 to 11"),
  "negative index": (["--split", "test", "--index", "-1"], "images 0 to 11"),
  "caption number": (
    ["--split", "val", "--index", "0", "--caption_number", "5"],
    "image 0 has 5",
  ),
  "split": (["--split", "dev", "--index", "0"], "invalid choice.*dev"),
  "no index": (["--split", "test"], "needs the --index"),
  "image": (["--image", "none.png", "--caption", "a"], "no file none.png"),
  "not an image": (["--image", __file__, "--caption", "a"], "no known image format"),
  "no caption": (["--image", __file__], "needs a --caption"),
  "no words": (["--split", "test", "--index", "0", "--caption", " "], "has no words"),
  "measure": (["--split", "test", "--measure"], "writes no image"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name, tool, flags, tmp_path, capsys):
  extra, message = ERRORS[name]
  said = text_of(capsys, tool.main, [*flags, *extra, "--out", str(tmp_path / "a.png")])
  assert re.search(message, said), said
  assert not (tmp_path / "a.png").exists()


def test_errors_of_config_and_parameters(tool, flags, tmp_path, capsys):
  pair = ["--split", "test", "--index", "0", "--out", str(tmp_path / "a.html")]
  config, init = flags[1], flags[3]
  cases = [
    ([f"{tmp_path}/none.py", "--init", init], "no config file"),
    ([config.replace(":team", ":other"), "--init", init], "no variant 'other'"),
    ([config.replace(":team", ":clip"), "--init", init], "clip has no attention of caption tokens"),
    ([config, "--init", f"{tmp_path}/none"], "does not exist"),
    ([config, "--workdir", str(tmp_path)], "expected meta.json"),
  ]
  for arguments, message in cases:
    assert message in text_of(capsys, tool.main, ["--config", *arguments, *pair])
  for out, message in (("a.jpg", "png or .html"), ("none/a.png", "no folder")):
    said = text_of(capsys, tool.main, [*flags, *pair[:-1], str(tmp_path / out)])
    assert message in said


def test_a_field_that_an_image_file_lacks_is_named(tool):
  model = object.__new__(tool.Model)
  model.config = config_lib.base()
  model.config.model = {"system": "other"}
  model.params = model.stats = {}

  def relate(params, stats, batch):
    return batch["regions"]

  model.relate = relate
  with pytest.raises(SystemExit, match="other reads 'regions' of an image, and this one has none"):
    model({"image": np.zeros((1, 2, 2, 3))})


def test_other_data_cannot_be_measured(tool, model, monkeypatch):
  scenes = shapes.scenes
  monkeypatch.setattr(shapes, "scenes", lambda seed, count: scenes(1, count))
  with pytest.raises(SystemExit, match="needs the embedded dataset"):
    list(itertools.islice(tool.pairs(model, "test"), 1))
