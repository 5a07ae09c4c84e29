"""The part of derive_golden.py for HAT's golden set."""

import re

import numpy as np
from derived_golden import (
  Cut,
  Tree,
  a_cut,
  even_owner,
  fewer,
  keep,
  order,
  ranks,
  recall,
  resize_and_crop,
)
from PIL import Image

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


def derive(tree: Tree) -> None:
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
