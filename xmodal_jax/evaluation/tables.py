"""Reports as tables in the log."""

from collections.abc import Mapping

from absl import logging


def log_retrieval(name: str, report: Mapping[str, float], metric: str = "rsum") -> None:
  """Logs a table per stage and of the published protocol, then all other numbers on one line.

  A second stage that lowers `metric`, config.eval.metric, is named in the table and by a warning.
  """
  two_stages = "first_rsum" in report
  titles = {"first_": f"{name}, first stage"} if two_stages else {}
  titles[""] = f"{name}, second stage" if two_stages else name
  if "published_rsum" in report:
    titles["published_"] = f"{name}, published protocol"
  rows = [row for prefix, title in titles.items() for row in _retrieval(title, report, prefix)]
  in_tables = ("first_", *(f"{p}{key}" for p in titles for key in ("i2t_", "t2i_", "rsum")))
  rest = [f"{k} {_number(k, v)}" for k, v in report.items() if not k.startswith(in_tables)]
  first, second = report.get(f"first_{metric}"), report.get(metric)
  lower = first is not None and second is not None and second < first
  if lower:
    rows.append(f"the second stage lowers {metric} by {_number(metric, first - second)}")
  logging.info("%s", "\n".join(rows + (["  ".join(rest)] if rest else [])))
  if lower:
    text = "%s: the second stage lowers %s from %s to %s; config.eval.stage_mixes chooses the "
    text += "weight on the validation split, and top_k_text=0 with top_k_image=0 leaves it out"
    logging.warning(text, name, metric, _number(metric, first), _number(metric, second))


def log_accuracy(name: str, report: Mapping[str, float]) -> None:
  """Logs a report of `metrics.accuracy`."""
  head = f"{'':14s} {'top-1':>7s} {'top-5':>7s} {'mean of classes':>15s}"
  row = f"{'accuracy':14s} {report['top1']:7.2f} {report['top5']:7.2f}"
  logging.info("%s\n%s\n%s", name, head, f"{row} {report['mean_per_class']:15.2f}")


def _retrieval(title: str, report: Mapping[str, float], prefix: str) -> list[str]:
  """The lines of a table of the numbers whose names start with `prefix`."""
  start = f"{prefix}i2t_ndcg_"
  methods = [key.removeprefix(start) for key in report if key.startswith(start)]
  head = f"{'':14s} {'R@1':>7s} {'R@5':>7s} {'R@10':>7s} {'median':>7s} {'mean':>8s}"
  rows = [title, head + "".join(f" {'NDCG ' + m:>11s}" for m in methods)]
  for label, direction in (("image to text", "i2t"), ("text to image", "t2i")):
    values = {
      k.removeprefix(f"{prefix}{direction}_"): v
      for k, v in report.items()
      if k.startswith(f"{prefix}{direction}_")
    }
    recalls = " ".join(f"{values[k]:7.2f}" for k in ("r1", "r5", "r10", "medr"))
    gains = "".join(f" {values[f'ndcg_{m}']:11.4f}" for m in methods)
    rows.append(f"{label:14s} {recalls} {values['meanr']:8.2f}{gains}")
  return [*rows, f"RSUM {report[f'{prefix}rsum']:.2f}"]


def _number(key: str, value: float) -> str:
  return f"{value:.4f}" if "ndcg_" in key else f"{value:.2f}"
