"""The part of derive_golden.py for TGDT's golden set."""

import numpy as np
from derived_golden import RECALL_AT, Tree, a_cut, even_owner, fewer, ranks, recall


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


def derive(tree: Tree) -> None:
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
