"""The COCO protocol on a [5000, 25000] float32 matrix, by our metrics and by eccv_caption."""

import argparse
import gzip
import json
import pathlib
import time

import numpy as np
from benchmarks.runner import Form, Workload


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--data", required=True, help="folder with coco_splits/")


def coco(folder: str) -> tuple[np.ndarray, list[int], list[int], np.ndarray, pathlib.Path]:
  """Arguments of `coco_protocol`: scores of a random model of rank 64, and the test ids."""
  path = pathlib.Path(folder) / "coco_splits"
  packed = (path / "dataset_coco_karpathy_test5k.json.gz").read_bytes()
  images = json.loads(gzip.decompress(packed))["images"]
  caption_image = np.repeat(np.arange(len(images)), 5)
  rng = np.random.default_rng(0)
  image = rng.standard_normal((len(images), 64), np.float32)
  caption = rng.standard_normal((len(caption_image), 64), np.float32)
  caption += 0.4 * image[caption_image]
  image_ids = [image["cocoid"] for image in images]
  caption_ids = [sentid for image in images for sentid in image["sentids"]]
  return image @ caption.T, image_ids, caption_ids, caption_image, path / "eccv_caption"


def ours(args: argparse.Namespace) -> Form:
  from xmodal_jax.evaluation import coco as coco_lib
  from xmodal_jax.evaluation import metrics

  inputs, info = coco(args.data), {}

  def run():
    folds = metrics.folds(inputs[0], inputs[3], coco_lib.FOLDS)
    info["metrics"] = coco_lib.coco_protocol(*inputs)
    info["metrics"] |= {f"coco_1k_{k}": v for k, v in folds.items()}

  return run, info


def package(args: argparse.Namespace) -> Form:
  """eccv_caption reads for each query the sorted list of all candidates; making it counts."""
  import eccv_caption

  (scores, image_ids, caption_ids, _, _), info = coco(args.data), {}

  def ranked(rows, query_ids, item_ids):
    # item_ids' own int objects go into all lists: a new one per entry would take 8 GB.
    order = (np.argsort(-row, kind="stable").tolist() for row in rows)
    return {q: [item_ids[k] for k in o] for q, o in zip(query_ids, order, strict=True)}

  def run():
    start = time.perf_counter()
    i2t = ranked(scores, image_ids, caption_ids)
    t2i = ranked(np.ascontiguousarray(scores.T), caption_ids, image_ids)
    info["lists_s"] = time.perf_counter() - start
    names = ("coco_1k_recalls", "coco_5k_recalls", "cxc_recalls", "eccv_map_at_r")
    evaluator = eccv_caption.Metrics()
    out = evaluator.compute_all_metrics(i2t, t2i, target_metrics=names)
    out |= evaluator.eccv_metrics({"i2t": i2t, "t2i": t2i}, "all")
    info["metrics"] = {our_key(k, d): 100 * v for k, both in out.items() for d, v in both.items()}
    info["package_s"] = time.perf_counter() - start - info["lists_s"]

  return run, info


def our_key(name: str, direction: str) -> str:
  """("coco_1k_r5", "i2t") -> "coco_1k_i2t_r5"."""
  at = name.index("_", name.index("_") + 1) if name.startswith("coco") else name.index("_")
  return f"{name[:at]}_{direction}{name[at:]}"


RANKS = Workload(
  help="COCO 5K, 1K, CxC and ECCV Caption",
  arguments=arguments,
  ours=lambda args: {"coco_protocol": lambda: ours(args)},
  against={"eccv_caption": lambda args: {"compute_all_metrics": lambda: package(args)}},
  single=True,
)
