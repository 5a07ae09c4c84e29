"""The part of derive_golden.py for TEAM's golden set."""

import itertools
import pathlib
import re

import numpy as np
from derived_golden import RECALL_AT, Cut, Tree, a_cut, fewer, keep, order, ranks, recall
from PIL import Image


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


def derive(tree: Tree) -> None:
  for part in (team_matrices, team_evaluation, team_captions, team_preprocess, team_variants):
    part(tree)
