"""The part of derive_golden.py for CLIP's golden set."""

import re

import numpy as np
from derived_golden import (
  RECALL_AT,
  Cut,
  Tree,
  a_cut,
  even_owner,
  fewer,
  keep,
  ranks,
  recall,
  resize_and_crop,
)
from PIL import Image


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


def derive(tree: Tree) -> None:
  for part in (clip_eval, clip_tokenizer, clip_preprocess, clip_models, clip_mini_coco):
    part(tree)
