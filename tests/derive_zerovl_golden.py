"""The part of derive_golden.py for ZeroVL's golden set."""

import csv
import io
import re

import numpy as np
from derived_golden import RECALL_AT, Tree, a_cut, even_owner, fewer, keep, ranks, recall


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


def derive(tree: Tree) -> None:
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
