"""Writes golden sets of other sizes from a golden set, without the original programs.

  python tests/derive_golden.py SOURCE OUT [--seed N] [--systems clip,hat]
  XMODAL_GOLDEN=OUT python -m pytest tests/test_golden_clip_eval.py

SOURCE is a folder of golden sets (a folder per system) or one of them; OUT must not exist. It shows
that the golden tests take sizes, counts and names from the set. What changes:

- evaluation sets: fewer images, captions per image and folds. Captions are repeated, so that scores
  tie, and ties are ranked in the order opposite to ours. Ranks, recalls and shortlists are computed
  anew by plain numpy below;
- images: other sizes, resized by Pillow alone, and fewer of them;
- captions: fewer, in another order, cut to other lengths;
- files: other names of models, optimizer states beside the checkpoint of another one.

Models and what was recorded of their training stay as they are. Arrays that depend on something
that was changed and cannot be computed here are left out, and tests that read them skip. Files that
SOURCE does not have are left out as well. Tolerances stay.
"""

import argparse
import csv
import io
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np
from PIL import Image

RECALL_AT = (1, 5, 10)


class Tree:
  """A copy of the golden set of one system, whose files are read, changed and written back."""

  def __init__(self, source: pathlib.Path, out: pathlib.Path, seed: int):
    shutil.copytree(source, out)
    self.root, self.rng = out, np.random.default_rng(seed)
    self.manifest = self.read_json("manifest.json")

  def has(self, *names: str) -> bool:
    return all((self.root / name).exists() for name in names)

  def read_json(self, name: str):
    return json.loads((self.root / name).read_text(encoding="utf-8"))

  def write_json(self, name: str, value) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1)
    (self.root / name).write_text(text, encoding="utf-8")

  def arrays(self, name: str) -> dict[str, np.ndarray]:
    with np.load(self.root / name) as f:
      return dict(f)

  def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(self.root / name, **arrays)

  def some(self, n: int, size: int) -> np.ndarray:
    """n of range(size), ascending."""
    return np.sort(self.rng.permutation(size)[:n])


# --- evaluation in plain numpy --------------------------------------------------------------------


def order(scores: np.ndarray) -> np.ndarray:
  """Candidates of each row from best to worst; equal ones with the higher position first."""
  flipped = np.argsort(-scores[:, ::-1], axis=1, kind="stable")
  return scores.shape[1] - 1 - flipped


def ranks(scores: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
  """0-based rank of the first positive of each image and each caption. scores [I, T]."""
  out = {"i2t": [], "t2i": []}
  for i, row in enumerate(order(scores)):
    out["i2t"].append(min(np.flatnonzero(owner[row] == i)))
  for t, row in enumerate(order(scores.T)):
    out["t2i"].append(list(row).index(owner[t]))
  return {side: np.array(values) for side, values in out.items()}


def recall(found: np.ndarray, k: int) -> float:
  return 100 * float(np.mean(found < k))


class Cut:
  """Which images and captions of an evaluation set are kept, and which captions are repeated.

  images: kept positions, ascending. captions: positions of the kept captions. source: for each kept
  caption the position of the caption that replaces it. owner: the new image of each kept caption.
  """

  def __init__(self, owner: np.ndarray, images: np.ndarray, per_image: int, repeats: list):
    self.images = np.asarray(images)
    kept = [np.flatnonzero(owner == i)[:per_image] for i in self.images]
    self.captions = np.concatenate(kept)
    self.owner = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    self.source = self.captions.copy()
    for to, of in repeats:
      self.source[to] = self.captions[of]

  def scores(self, scores: np.ndarray) -> np.ndarray:
    return scores[np.ix_(self.images, self.source)]


def a_cut(tree: Tree, owner: np.ndarray, n_images: int, per_image: int, repeat: int = 2) -> Cut:
  """Keeps n_images; captions of some images become copies of a caption of another image."""
  images = tree.some(n_images, owner.max() + 1)
  cut = Cut(owner, images, per_image, [])
  firsts = [np.flatnonzero(cut.owner == i)[0] for i in tree.rng.permutation(n_images)]
  repeats = list(zip(firsts[:repeat], firsts[repeat : 2 * repeat], strict=True))
  return Cut(owner, images, per_image, repeats)


def even_owner(scores: np.ndarray) -> np.ndarray:
  return np.arange(scores.shape[1]) // (scores.shape[1] // len(scores))


def fewer(n: int, share: float = 0.75) -> int:
  """A smaller size, at least 2."""
  return max(2, int(n * share))


def keep(arrays: dict, wanted: Callable[[str], bool]) -> dict:
  return {k: v for k, v in arrays.items() if wanted(k)}


# --- images by Pillow -----------------------------------------------------------------------------


def resize_and_crop(pixels: np.ndarray, resize: int, crop: int, how: Image.Resampling):
  """uint8 [crop, crop, 3]: the short side becomes `resize`, then the centre is cut out."""
  image = Image.fromarray(pixels).convert("RGB")
  w, h = image.size
  size = (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)
  image = image.resize(size, how)
  left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
  return np.asarray(image.crop((left, top, left + crop, top + crop)))


# --- CLIP -----------------------------------------------------------------------------------------


def clip_metrics(scores: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
  out, found = {}, ranks(scores.astype(np.float64), owner)
  for side, r in found.items():
    out[f"{side}_min_rank"] = r + 1.0
    out |= {f"{side}_R@{k}": recall(r, k) for k in RECALL_AT}
  out["mean_R1"] = (out["i2t_R@1"] + out["t2i_R@1"]) / 2
  out["rsum"] = sum(out[f"{side}_R@{k}"] for side in found for k in RECALL_AT)
  return out


def clip_eval(tree: Tree) -> None:
  """Three folds of other size and fewer captions per image, with tied scores."""
  if not tree.has("eval/inputs.npz", "eval/outputs.npz"):
    return
  inputs, outputs, n_folds = {}, {}, 3
  for name, scores in tree.arrays("eval/inputs.npz").items():
    owner = even_owner(scores)
    per_image = fewer(scores.shape[1] // len(scores), 0.8)
    n_images = max(1, fewer(len(scores)) // n_folds) * n_folds
    cut = a_cut(tree, owner, n_images, per_image, repeat=min(4, n_images // 2))
    inputs[name] = cut.scores(scores)
    found = clip_metrics(inputs[name], cut.owner)
    outputs |= {f"{name}/{k}": v for k, v in found.items()}
    if name == "plain":
      size, parts = n_images // n_folds, []
      for k in range(n_folds):
        captions = np.flatnonzero(cut.owner // size == k)
        block = inputs[name][k * size : (k + 1) * size, captions]
        parts.append(clip_metrics(block, cut.owner[captions] - k * size))
        outputs |= {f"fold{k}/{key}": v for key, v in parts[-1].items()}
      for key, value in parts[0].items():
        if np.ndim(value) == 0:
          outputs[f"fivefold_mean/{key}"] = np.mean([p[key] for p in parts])
  tree.write_arrays("eval/inputs.npz", inputs)
  tree.write_arrays("eval/outputs.npz", outputs)
  tree.manifest["eval"]["note"] = "equal scores: higher index first"


def clip_tokenizer(tree: Tree) -> None:
  if not tree.has("tokenizer/captions.json", "tokenizer/ids.npz"):
    return
  rows = tree.read_json("tokenizer/captions.json")
  chosen = tree.rng.permutation(len(rows))[: fewer(len(rows), 0.4)]
  rows = [rows[i] for i in chosen]
  out = {}
  for width in (11, 40):
    ids = np.zeros((len(rows), width), np.int32)
    for row, caption in zip(ids, rows, strict=True):
      short = caption["ids"][:width]
      row[: len(short)] = short
      if len(caption["ids"]) > width:
        row[-1] = caption["ids"][-1]  # the end comes last
    out[f"ids{width}_truncate"] = ids
  tree.write_json("tokenizer/captions.json", rows)
  tree.write_arrays("tokenizer/ids.npz", out)


def clip_preprocess(tree: Tree) -> None:
  """Fewer of the recorded sizes, and one more made by Pillow."""
  if not tree.has("preprocess/inputs.npz", "preprocess/outputs.npz"):
    return
  inputs, outputs = (tree.arrays(f"preprocess/{x}.npz") for x in ("inputs", "outputs"))
  images = tree.manifest["preprocess"]["images"]
  for name in tree.rng.permutation(sorted(images))[:2]:
    del images[str(name)]
  for name, info in images.items():
    gone = info["n_px"].pop(0)
    outputs = keep(outputs, lambda k, p=f"{name}/{gone}/": not k.startswith(p))
    if info["mode"] == "RGB":
      n = gone // 2 + 7
      pixels = resize_and_crop(inputs[name], n, n, Image.Resampling.BICUBIC)
      outputs[f"{name}/{n}/uint8"] = pixels
      info["n_px"].append(n)
  present = lambda k: k.split("/")[0].removesuffix("_palette") in images
  tree.write_arrays("preprocess/inputs.npz", keep(inputs, present))
  tree.write_arrays("preprocess/outputs.npz", keep(outputs, present))


def clip_models(tree: Tree) -> None:
  """Smaller batches where outputs are those of each row, and smaller evaluation sets."""
  for name, info in tree.manifest["models"].items():
    files = [f"{name}/{x}.npz" for x in ("inputs", "outputs")]
    if not tree.has(*files):
      continue
    inputs, outputs = map(tree.arrays, files)
    rows = tree.rng.permutation(len(inputs["images"]))[: fewer(len(inputs["images"]))]
    rows = np.concatenate([[0], rows[rows != 0]])  # activations are those of the first row
    for key in ("images", "tokens"):
      inputs[key] = inputs[key][rows]
    for key, value in outputs.items():
      if re.search(r"(^|/)logits_per_\w+$", key) and not key.startswith("train"):
        outputs[key] = value[np.ix_(rows, rows)]
      elif re.fullmatch(r"((half|itm)/)?(image|text)_(features|embeds)", key):
        outputs[key] = value[rows]
    n_images, per_image = inputs["eval_tokens"].shape[:2]
    owner = np.repeat(np.arange(n_images), per_image)
    cut = a_cut(tree, owner, fewer(n_images), fewer(per_image), repeat=1)
    tokens = inputs["eval_tokens"].reshape(n_images * per_image, -1)[cut.source]
    inputs["eval_images"] = inputs["eval_images"][cut.images]
    inputs["eval_tokens"] = tokens.reshape(len(cut.images), -1, tokens.shape[1])
    clip_evaluations(outputs, cut)
    for file, arrays in zip(files, (inputs, outputs), strict=True):
      tree.write_arrays(file, arrays)
    info["arrays"] = {}  # not read, and no longer right


def clip_evaluations(outputs: dict, cut: Cut) -> None:
  """Cuts every recorded evaluation of a model and computes its ranks and recalls again."""
  for key in [k for k in outputs if k.endswith("/sim_matrix")]:
    prefix = key.removesuffix("sim_matrix")
    outputs[key] = cut.scores(outputs[key])
    found = clip_metrics(outputs[key], cut.owner)
    outputs |= {prefix + k: v for k, v in found.items() if prefix + k in outputs}


def clip_mini_coco(tree: Tree) -> None:
  """A smaller test split, in which a caption is repeated for another image."""
  names = [f"mini_coco/{x}" for x in ("inputs.npz", "outputs.npz", "captions_val2014.json")]
  if not tree.has(*names):
    return
  inputs, outputs, file = tree.arrays(names[0]), tree.arrays(names[1]), tree.read_json(names[2])
  ids = inputs["ids/coco_test_ids"]
  caption = {a["id"]: a for a in file["annotations"]}
  images = [caption[i]["image_id"] for i in ids]
  owner = np.array([list(dict.fromkeys(images)).index(i) for i in images])
  cut = Cut(owner, np.arange(fewer(owner.max() + 1, 0.85)), 4, [])
  other = int(np.flatnonzero(cut.owner == cut.owner[-1])[0])
  cut = Cut(owner, cut.images, 4, [(other, 0)])
  source = {int(ids[i]): caption[int(ids[j])]["caption"]
            for i, j in zip(cut.captions, cut.source, strict=True)}  # fmt: skip
  for a in file["annotations"]:
    a["caption"] = source.get(a["id"], a["caption"])
  inputs["ids/coco_test_ids"] = ids[cut.captions]
  outputs["test_tokens"] = outputs["test_tokens"][cut.source]
  clip_evaluations(outputs, cut)
  tree.write_arrays(names[0], inputs)
  tree.write_arrays(names[1], outputs)
  tree.write_json(names[2], file)
  tree.manifest["mini_coco"] |= {"test_images": len(cut.images), "arrays": {}, "eval_batch_size": 5}


def clip(tree: Tree) -> None:
  for part in (clip_eval, clip_tokenizer, clip_preprocess, clip_models, clip_mini_coco):
    part(tree)


# --- HAT ------------------------------------------------------------------------------------------

HAT_AT = (1, 5, 10, 20, 50, 70, 100)


def hat_row(found: np.ndarray) -> np.ndarray:
  return np.array(
    [*(recall(found, k) for k in HAT_AT), np.median(found) // 1 + 1, found.mean() + 1]
  )


def hat_matrices(x: dict, tree: Tree) -> None:
  for n_folds, key in enumerate([k for k in x if k.endswith("/sims")], 2):
    name, scores = key.removesuffix("/sims"), x[key]
    owner = even_owner(scores)
    n_images = fewer(len(scores)) // n_folds * n_folds
    cut = a_cut(tree, owner, n_images, 3, repeat=n_images // 3)
    x[key] = scores = cut.scores(scores)
    for side, found in ranks(scores, cut.owner).items():
      x[f"{name}/{side}_ranks"], x[f"{name}/{side}_metrics"] = found.astype(float), hat_row(found)
      x[f"{name}/{side}_top1"] = order(scores if side == "i2t" else scores.T)[:, 0].astype(float)
    size, rows = n_images // n_folds, {"i2t": [], "t2i": []}
    for k in range(n_folds):
      captions = np.flatnonzero(cut.owner // size == k)
      block = scores[k * size : (k + 1) * size, captions]
      for side, found in ranks(block, cut.owner[captions] - k * size).items():
        rows[side].append(hat_row(found))
    for side, values in rows.items():
      x[f"{name}/fold_{side}_metrics"] = np.array(values)


def hat_end_to_end(x: dict, tree: Tree) -> None:
  """Fewer images in the test split; a caption is repeated for another image."""
  names = ("data/dataset_flickr30k.json", "data/expected_items.json", "e2e_inputs.npz")
  if not tree.has(*names):
    return
  source, expected, inputs = *map(tree.read_json, names[:2]), tree.arrays(names[2])
  tests = [n for n, item in enumerate(source["images"]) if item["split"] == "test"]
  owner = np.repeat(np.arange(len(tests)), [len(source["images"][n]["sentences"]) for n in tests])
  counts = np.bincount(owner)
  kept = np.arange(fewer(len(tests), 0.85))
  first = np.cumsum([0, *counts])
  cut = Cut(owner, kept, counts.max(), [(first[1], first[2])])
  sentences = [s for n in tests for s in source["images"][n]["sentences"]]
  raw = [sentences[j]["raw"] for j in cut.source]
  for j, text in zip(cut.captions, raw, strict=True):
    sentences[j]["raw"] = text
  gone = [tests[i] for i in range(len(tests)) if i not in set(kept)]
  position = {}
  for n in range(len(source["images"])):
    if n not in gone:
      position[n] = len(position)
  source["images"] = [item for n, item in enumerate(source["images"]) if n not in gone]
  items = expected["flickr"]["test"]
  ids = [items[j]["text_ids"] for j in cut.source]
  items = [items[j] | {"text_ids": row} for j, row in zip(cut.captions, ids, strict=True)]
  expected["flickr"]["test"] = items
  for rows in expected["flickr"].values():
    for item in rows:
      item["image_position_in_json"] = position[item["image_position_in_json"]]
  lengths = x["e2e/lengths"] = x["e2e/lengths"][cut.source]
  case = expected["collate_example"]
  first_rows = lengths[: len(case["input_lengths"]) - 1]
  by_length = np.argsort(-first_rows, kind="stable")
  case["input_lengths"] = first_rows.tolist()
  case["ids_after_sort"], case["lengths_after_sort"] = (
    by_length.tolist(), first_rows[by_length].tolist(),
  )  # fmt: skip
  for key in ("test_text_ids", "test_text_masks"):
    inputs[key] = inputs[key][cut.source]
  inputs = keep(
    inputs, lambda k: k not in {f"test_image_{n}" for n in range(len(kept), len(tests))}
  )
  for key in [k for k in x if re.fullmatch(r"e2e/\w+_(top|level\d|sum)", k)]:
    x[key] = cut.scores(x[key])
  for direction in ("i2t", "t2i"):
    found = ranks(x[f"e2e/{direction}_sum"], cut.owner)
    for side, r in found.items():
      x[f"e2e/{direction}_{side}_ranks"] = r.astype(float)
      x[f"e2e/{direction}_{side}_metrics"] = hat_row(r)
    both = [recall(found[side], k) for side in ("i2t", "t2i") for k in HAT_AT]
    x[f"e2e/{direction}_returned"] = np.array(both)
  tree.write_json(names[0], source)
  tree.write_json(names[1], expected)
  tree.write_arrays(names[2], inputs)


def hat_scoring(tree: Tree) -> None:
  """Fewer images and captions of the given features."""
  if not tree.has("scoring.npz"):
    return
  x = tree.arrays("scoring.npz")
  images = tree.some(fewer(len(x["images"])), len(x["images"]))
  captions = tree.some(fewer(len(x["captions"])), len(x["captions"]))
  for key, value in x.items():
    if key == "images":
      x[key] = value[images]
    elif key in ("captions", "lengths"):
      x[key] = value[captions]
    elif key.startswith("scores"):
      x[key] = value[np.ix_(images, captions)]
  x = keep(x, lambda k: not k.startswith(("attended_", "weights_")))
  tree.write_arrays("scoring.npz", x)


def hat_preprocess(tree: Tree) -> None:
  """The evaluation transform at another size, by Pillow; fewer of the recorded draws."""
  if not tree.has("preprocess.npz"):
    return
  x, words = tree.arrays("preprocess.npz"), tree.manifest["arrays"]["preprocess.npz"]
  resize, crop = 90, 78
  for key in [k for k in x if k.startswith("raw_")]:
    name = key.replace("raw_", "eval_uint8_")
    x[name] = resize_and_crop(x[key], resize, crop, Image.Resampling.BILINEAR)
    words[name]["meaning"] = f"after Resize({resize}) on the short side and CenterCrop({crop})"
  drawn = len(x["train_flip"]) - 1
  x = keep(x, lambda k: k != f"train_uint8_{drawn}" and not k.startswith("eval_float_"))
  for key in ("train_flip", "train_crop_params"):
    x[key] = x[key][:drawn]
  tree.write_arrays("preprocess.npz", x)


def hat(tree: Tree) -> None:
  if tree.has("evaluation.npz"):
    x = tree.arrays("evaluation.npz")
    hat_matrices(x, tree)
    hat_end_to_end(x, tree)
    tree.write_arrays("evaluation.npz", x)
  hat_scoring(tree)
  hat_preprocess(tree)
  if tree.has("captions.json"):
    file = tree.read_json("captions.json")
    rows = file["captions"]
    file["captions"] = [rows[i] for i in tree.rng.permutation(len(rows))[: fewer(len(rows))]]
    tree.write_json("captions.json", file)


# --- TEAM -----------------------------------------------------------------------------------------


def team_metrics(i2t: np.ndarray, t2i: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """Of scores [I, T] and [T, I]."""
  out = {}
  for name, found in (("txt", ranks(i2t, owner)["i2t"]), ("img", ranks(t2i.T, owner)["t2i"])):
    out |= {f"{name}_r{k}": recall(found, k) for k in RECALL_AT}
    out[f"{name}_r_mean"] = float(np.mean([out[f"{name}_r{k}"] for k in RECALL_AT]))
  return out | {"r_mean": (out["txt_r_mean"] + out["img_r_mean"]) / 2}


def team_matrices(tree: Tree) -> None:
  files = ("metrics/itm_eval.npz", "metrics/itm_eval.json")
  if not tree.has(*files):
    return
  x, reports = tree.arrays(files[0]), tree.read_json(files[1])
  for case in reports:
    owner = x[f"{case}/txt2img"]
    cut = a_cut(tree, owner, fewer(owner.max() + 1), 3, repeat=3)
    i2t, t2i = x[f"{case}/score_i2t"], x[f"{case}/score_t2i"]
    i2t, t2i = cut.scores(i2t), cut.scores(t2i.T).T
    x[f"{case}/score_i2t"], x[f"{case}/score_t2i"], x[f"{case}/txt2img"] = i2t, t2i, cut.owner
    x[f"{case}/rank_i2t"] = ranks(i2t, cut.owner)["i2t"]
    x[f"{case}/rank_t2i"] = ranks(t2i.T, cut.owner)["t2i"]
    reports[case] = team_metrics(i2t, t2i, cut.owner)
  tree.write_arrays(files[0], x)
  tree.write_json(files[1], reports)


def team_evaluation(tree: Tree) -> None:
  """Fewer images, another length of the shortlists, a caption repeated for another image."""
  files = ("eval_data/annotations.json", "eval_data/images.npz")
  if not tree.has(*files):
    return
  annotations, images = tree.read_json(files[0]), tree.arrays(files[1])
  owner = np.repeat(np.arange(len(annotations)), [len(a["caption"]) for a in annotations])
  first = np.cumsum([0, *np.bincount(owner)])
  cut = Cut(owner, np.arange(fewer(len(annotations), 0.85)), len(owner), [(first[1], first[2])])
  texts = [c for a in annotations for c in a["caption"]]
  annotations = annotations[: len(cut.images)]
  for i, a in enumerate(annotations):
    a["caption"] = [texts[j] for j in cut.source[cut.owner == i]]
  names = {pathlib.PurePath(a["image"]).stem for a in annotations}
  tree.write_json(files[0], annotations)
  tree.write_arrays(files[1], keep(images, lambda k: k in names))
  for name in tree.manifest["variants"]:
    file = f"{name}/eval_outputs.npz"
    if tree.has(file, f"{name}/eval_metrics.json"):
      x, reports = team_two_stages(tree.arrays(file), cut)
      tree.write_arrays(file, x)
      tree.write_json(f"{name}/eval_metrics.json", reports)


def team_two_stages(x: dict, cut: Cut, outside: float = -1000.0) -> tuple[dict, dict]:
  k = x["topk_text_per_image"].shape[1] - 3
  for key in ("text_ids", "text_mask", "text_embeds"):
    x[key] = x[key][cut.source]
  x["image_embeds"], x["txt2img"] = x["image_embeds"][cut.images], cut.owner
  x["images_preprocessed"] = x["images_preprocessed"][:3]
  first = {"i2t": cut.scores(x["stage1/score_i2t"]), "t2i": cut.scores(x["stage1/score_t2i"].T).T}
  every = x["team_score_all_pairs"] = cut.scores(x["team_score_all_pairs"])
  second = {}
  for side, key in (("i2t", "topk_text_per_image"), ("t2i", "topk_image_per_text")):
    pairs = every if side == "i2t" else every.T
    x[key] = order(first[side])[:, :k]
    second[side] = np.full(pairs.shape, outside, np.float32)
    np.put_along_axis(second[side], x[key], np.take_along_axis(pairs, x[key], 1), 1)
    x[f"stage1/score_{side}"], x[f"stage2/score_{side}"] = first[side], second[side]
  reports = {
    stage: team_metrics(s["i2t"], s["t2i"], cut.owner)
    for stage, s in (("stage1", first), ("stage2", second))
  }
  return x, reports | {"n_images": len(cut.images), "n_texts": len(cut.owner)}


def team_captions(tree: Tree) -> None:
  if tree.has("text/captions.json"):
    rows = tree.read_json("text/captions.json")
    rows = [rows[i] for i in tree.rng.permutation(len(rows))[: fewer(len(rows))]]
    tree.write_json("text/captions.json", rows)
  files = [f"chinese_large/{x}" for x in ("inputs.npz", "outputs.npz")]
  if tree.has(*files):
    inputs, outputs = map(tree.arrays, files)
    n = len(inputs["images"]) - 1
    inputs = {k: v if k.startswith("raw_") else v[:n] for k, v in inputs.items()}
    cut = {k: v[:n, :n] if k == "score_image_by_text" else v[:n] for k, v in outputs.items()}
    tree.write_arrays(files[0], keep(inputs, lambda k: k != f"raw_image_{n}"))
    tree.write_arrays(files[1], cut)


def team_preprocess(tree: Tree) -> None:
  file = "preprocess/eval_transform.npz"
  if tree.has(file):
    x = tree.arrays(file)
    sources = {k: v for k, v in x.items() if "out" not in k}
    size = 31
    mean, std = (
      np.array([0.48145466, 0.4578275, 0.40821073]),
      np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    for key, pixels in list(sources.items())[1:]:
      image = Image.fromarray(pixels).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
      value = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)
      name = f"gray_out_{size}" if key == "gray" else f"out_{size}_{key.removeprefix('image_')}"
      sources[name] = value
    tree.write_arrays(file, sources)
  file = "preprocess/randaugment_ops.npz"
  if tree.has(file):
    x = tree.arrays(file)
    gone = next(iter(x))
    tree.write_arrays(file, keep(x, lambda k: k.split("/")[0] != gone))
  file = "preprocess/pos_embed_interpolation.npz"
  if tree.has(file):
    x = tree.arrays(file)
    gone = re.search(r"_\d+_\d+$", next(iter(x)))[0]
    tree.write_arrays(file, keep(x, lambda k: not k.endswith(gone)))


def team_variants(tree: Tree) -> None:
  """Other names, shorter runs of the schedule, an optimizer state beside the last checkpoint."""
  renamed = {}
  for name, info in list(tree.manifest["variants"].items()):
    new = f"other_{name}"
    if tree.has(name):
      (tree.root / name).rename(tree.root / new)
    renamed[new] = info
    file = f"{new}/outputs.npz"
    if tree.has(file):
      x = tree.arrays(file)
      key = "schedule/lr_per_epoch_per_group"
      x[key] = x[key][: fewer(len(x[key]), 0.7)]
      tree.write_arrays(file, x)
  tree.manifest["variants"] = renamed
  old = tuple(name.removeprefix("other_") + "/" for name in renamed)
  arrays = tree.manifest["arrays"].items()
  arrays = {f"other_{k}" if k.startswith(old) else k: v for k, v in arrays}
  tree.manifest["arrays"] = arrays
  holders = [n for n in renamed if tree.has(f"{n}/epoch0_params.pth", f"{n}/outputs.npz")]
  if holders:
    for name in renamed:
      (tree.root / name / "epoch0_opt.pth").unlink(missing_ok=True)
    team_optimizer_file(tree, holders[-1])


def team_optimizer_file(tree: Tree, name: str) -> None:
  """Random moments in the layout of the original, beside the checkpoint of a variant."""
  from xmodal_jax.interop import torch_files

  file = f"{name}/outputs.npz"
  x = tree.arrays(file)
  names = [str(n).removeprefix("module.") for n in x["param_names_in_order"]]
  sizes = x["schedule/group_sizes"].tolist()
  if len(sizes) > 1:  # the image tower comes last
    names = sorted(names, key=lambda n: n.startswith("image_model."))
  state, _ = torch_files.state_dict(tree.root / name / "epoch0_params.pth")
  moment = lambda n: np.asarray(tree.rng.random(state[n].shape), np.float32)
  saved = {i: dict(exp_avg=moment(n), exp_avg_sq=moment(n)) for i, n in enumerate(names)}
  ends = np.cumsum([0, *sizes]).tolist()
  options = dict(lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
  options |= dict(grad_averaging=True, max_grad_norm=1.0, step=7)
  groups = [options | dict(params=list(range(a, b))) for a, b in itertools.pairwise(ends)]
  torch_files.write(tree.root / name / "epoch0_opt.pth", dict(state=saved, param_groups=groups))
  for other in tree.manifest["variants"]:  # recorded with moments that are no longer there
    if tree.has(f"{other}/outputs.npz"):
      x = tree.arrays(f"{other}/outputs.npz")
      tree.write_arrays(
        f"{other}/outputs.npz", keep(x, lambda k: not k.startswith("traj_resumed/"))
      )


def team(tree: Tree) -> None:
  for part in (team_matrices, team_evaluation, team_captions, team_preprocess, team_variants):
    part(tree)


# --- TGDT -----------------------------------------------------------------------------------------


def tgdt_matrix(tree: Tree, inputs: dict, outputs: dict, goldens: dict) -> None:
  scores = inputs["scorematrix"]
  cut = a_cut(tree, even_owner(scores), fewer(len(scores)), 4, repeat=5)
  inputs["scorematrix"] = cut.scores(scores)
  report = {"note_t2i": goldens["scorematrix"].get("note_t2i", "")}
  for side, found in ranks(inputs["scorematrix"], cut.owner).items():
    outputs[f"scorematrix_{side}_ranks"] = found
    row = [*(recall(found, k) for k in RECALL_AT), np.median(found) // 1 + 1, found.mean() + 1]
    if side == "i2t":
      report["i2t"] = row
    else:
      names = ("r1", "r5", "r10", "medr", "meanr")
      report |= {f"t2i_{k}": v for k, v in zip(names, row, strict=True)}
  goldens["scorematrix"] = report


def tgdt(tree: Tree) -> None:
  if not tree.has("inputs.npz", "outputs.npz", "goldens.json"):
    return
  inputs, outputs = tree.arrays("inputs.npz"), tree.arrays("outputs.npz")
  goldens = tree.read_json("goldens.json")
  tgdt_matrix(tree, inputs, outputs, goldens)
  key = next(k for k in outputs if k.startswith("syneval_local_scores_first"))
  first = outputs.pop(key)
  n = fewer(len(first))
  outputs[f"syneval_local_scores_first{n}"] = first[:n]
  cases = goldens["tokenizer_cases"]
  cases = [cases[i] for i in tree.rng.permutation(len(cases))[: fewer(len(cases))]]
  goldens["tokenizer_cases"] = cases
  tree.write_arrays("inputs.npz", inputs)
  tree.write_arrays("outputs.npz", outputs)
  tree.write_json("goldens.json", goldens)
  if tree.has("bottom_up.tsv.txt"):
    file = tree.root / "bottom_up.tsv.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:][::-1]))


# --- ZeroVL ---------------------------------------------------------------------------------------


def zerovl_metrics(scores: np.ndarray, owner: np.ndarray) -> np.ndarray:
  found = ranks(scores, owner)
  values = [recall(found[side], k) for side in ("i2t", "t2i") for k in RECALL_AT]
  return np.array([*values, sum(values)])


def zerovl_retrieval(tree: Tree, inputs: dict, outputs: dict) -> None:
  scores = inputs["retrieval/scores"]
  cut = a_cut(tree, even_owner(scores), fewer(len(scores)), 4, repeat=6)
  inputs["retrieval/scores"] = scores = cut.scores(scores)
  outputs["retrieval/metrics"] = zerovl_metrics(scores, cut.owner)
  for side, found in ranks(scores, cut.owner).items():
    outputs[f"retrieval/{side}_ranks"] = found
  prefix = "retrieval_rows/"
  ids = inputs[prefix + "image_id"]
  rows = np.flatnonzero(ids < ids.max() - 2)
  for key in ("image_id", "image_embeddings", "text_embeddings"):
    inputs[prefix + key] = inputs[prefix + key][rows]
  ids, texts = inputs[prefix + "image_id"], inputs[prefix + "text_embeddings"]
  same = np.flatnonzero(ids == ids[1])[0], np.flatnonzero(ids == ids[2])[0]
  texts[same[0]] = texts[same[1]]  # a caption of two images
  for least, hook in ((0, "distributed"), (1, "single_eval")):
    kept = ids >= least
    _, first, owner = np.unique(ids[kept], return_index=True, return_inverse=True)
    scores = inputs[prefix + "image_embeddings"][kept][first] @ texts[kept].T
    outputs[f"{prefix}metrics_{hook}_hook"] = zerovl_metrics(scores, owner)


def zerovl_disk(tree: Tree, inputs: dict, outputs: dict) -> None:
  """Fewer rows of the csv; a caption is repeated for another image."""
  name = "disk_eval_valid_anno.csv.txt"
  if not tree.has(name):
    return
  text = (tree.root / name).read_bytes().decode()
  rows = list(csv.DictReader(io.StringIO(text, newline="")))
  images = list(dict.fromkeys(row["image"] for row in rows))
  kept = images[: fewer(len(images), 0.8)]
  source = [j for j, row in enumerate(rows) if row["image"] in kept]
  rows = [rows[j] for j in source]
  to, of = (next(j for j, r in enumerate(rows) if r["image"] == kept[i]) for i in (1, 3))
  own = list(source)
  source[to], rows[to]["caption"] = source[of], rows[of]["caption"]
  out = io.StringIO(newline="")
  writer = csv.DictWriter(out, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  (tree.root / name).write_bytes(out.getvalue().encode())
  for key in ("input_ids", "attention_mask"):
    outputs[f"disk_eval/{key}"] = outputs[f"disk_eval/{key}"][source]
  ids = np.array([int(row["image_id"]) for row in rows])
  _, first, owner = np.unique(ids, return_index=True, return_inverse=True)
  for norm in {k.split("/")[1] for k in outputs if re.match(r"disk_eval/\w+_norm/", k)}:
    prefix = f"disk_eval/{norm}/"
    image = outputs[prefix + "image_embeddings"][own]
    text_rows = outputs[prefix + "text_embeddings"][source]
    outputs[prefix + "image_embeddings"], outputs[prefix + "text_embeddings"] = image, text_rows
    outputs[prefix + "metrics"] = zerovl_metrics(image[first] @ text_rows.T, owner)
    key = next(k for k in outputs if k.startswith(prefix + "pixels_first"))
    pixels = outputs.pop(key)
    outputs[f"{prefix}pixels_first{len(pixels) - 1}"] = pixels[:-1]
  gone = range(len(kept), len(images))
  for n in gone:
    inputs.pop(f"disk_eval/image_{int(images[n].split('.')[0]):02d}", None)


def zerovl_images(tree: Tree, outputs: dict) -> dict:
  """Fewer policies, crops, erasures and levels of each operation."""
  crops = outputs["augment/random_resized_crop/params"]
  outputs["augment/random_resized_crop/params"] = crops[:-1]
  gone = {f"augment/random_resized_crop/{len(crops) - 1}"}
  policies = sorted(k for k in outputs if re.fullmatch(r"augment/policy/\d+", k))
  gone |= set(policies[-3:])
  gone |= {k for k in outputs if re.match(r"augment/op/\w+/5/", k)}
  outputs = keep(outputs, lambda k: k not in gone)
  for key in [k for k in outputs if k.startswith("transform/")]:
    outputs[key] = outputs[key][:1]
  for key in [k for k in outputs if k.startswith("schedule/")]:
    outputs[key] = outputs[key][:-4]
  for key in ("rng/mixup_draws", "rng/debias_choice"):
    outputs[key] = outputs[key][:-7]
  return outputs


def zerovl(tree: Tree) -> None:
  if tree.has("inputs.npz", "outputs.npz"):
    inputs, outputs = tree.arrays("inputs.npz"), tree.arrays("outputs.npz")
    zerovl_retrieval(tree, inputs, outputs)
    zerovl_disk(tree, inputs, outputs)
    outputs = zerovl_images(tree, outputs)
    tree.write_arrays("inputs.npz", inputs)
    tree.write_arrays("outputs.npz", outputs)
  if tree.has("text.json"):
    file = tree.read_json("text.json")
    for key, rows in file.items():
      chosen = tree.rng.permutation(len(rows))[: fewer(len(rows))]
      file[key] = [rows[i] for i in chosen]
    tree.write_json("text.json", file)
  for path in sorted(tree.root.glob("ckpt_*_step*.pth")):
    new = path.name.replace("step", "step00")
    path.rename(tree.root / new)
    tree.manifest["files"][new] = tree.manifest["files"].pop(path.name)


SYSTEMS = {"clip": clip, "hat": hat, "team": team, "tgdt": tgdt, "zerovl": zerovl}


def derive(source: pathlib.Path, out: pathlib.Path, seed: int = 0, systems=tuple(SYSTEMS)) -> None:
  """Writes the derived sets of `systems` that `source` holds; raises where there is none."""
  single = (source / "manifest.json").exists()
  folders = [source] if single else [source / name for name in systems]
  folders = [f for f in folders if (f / "manifest.json").exists()]
  if not folders:
    raise FileNotFoundError(f"{source}: no manifest.json in it or in {', '.join(systems)} below it")
  for folder in folders:
    system = json.loads((folder / "manifest.json").read_text())["system"].lower()
    tree = Tree(folder, out / system, seed)
    SYSTEMS[system](tree)
    tree.write_json("manifest.json", tree.manifest)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", type=pathlib.Path, help="golden sets, or one of them")
  parser.add_argument("out", type=pathlib.Path, help="folder to write; must not exist")
  parser.add_argument("--seed", type=int, default=0, help="of what is kept")
  parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas")
  a = parser.parse_args()
  if a.out.exists():
    parser.error(f"{a.out} exists: name a folder that does not")
  derive(a.source, a.out, a.seed, a.systems.split(","))


if __name__ == "__main__":
  main()
