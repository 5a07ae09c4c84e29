"""Converts a PyTorch checkpoint to a converted directory, and back.

  python tools/convert.py --system clip --checkpoint ViT-B-32.pt --out clip_vit_b32
  python tools/convert.py --system zerovl --variant 100m --checkpoint zerovl_100m.pth --out zerovl
  python tools/convert.py --system clip --to torch --checkpoint clip_vit_b32 --out vit_b32.pth
  python tools/convert.py --system clip --checkpoint laion_b32.bin --out laion_b32 --act gelu

With --to torch, --checkpoint may also be a workdir: its best checkpoint is written in float32.
Values keep their dtypes and bits. --allow-missing REGEX accepts a file without matching torch keys.

--checkpoint takes files of torch.save and safetensors, an index of shards (*.index.json), or a
folder with one of these. The weights may be inside of an entry ("state_dict", "model", "module",
"model_ema", ...) and their names behind prefixes that all of them share ("module.", "_orig_mod.",
"model.", ...). --key and --prefix say which, where a file has several.

Keys and shapes do not say which activation, heads, pooling, mask and pixel statistics a model has.
They are read from an open_clip_config.json or config.json beside the file, or given by --act,
--heads, --pool, --causal, --mean and --std; a line says which are assumed.
"""

import argparse
import copy
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only shapes are traced

from flax import nnx

from xmodal_jax import config as config_lib
from xmodal_jax import errors
from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.checkpoints import facts as facts_lib
from xmodal_jax.interop import beside, conversion, tables, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import registry
from xmodal_jax.runtime import cli


def abstract(module, config) -> tuple[dict, set[str]]:
  """{path: ShapeDtypeStruct} of a model, and the paths of running statistics."""
  model = nnx.eval_shape(lambda: module.build(config, rngs=nnx.Rngs(0)))
  params, stats, _ = nnx.state(model, nnx.Param, nnx.BatchStat, ...)
  stats = restore.flat(nnx.to_pure_dict(stats))
  return restore.flat(nnx.to_pure_dict(params)) | stats, set(stats)


def without(config: dict, keys: Sequence[str], parent: str = "") -> dict:
  """A nested config without some dotted keys."""
  return {
    k: without(v, keys, f"{parent}{k}.") if isinstance(v, dict) else v
    for k, v in config.items()
    if f"{parent}{k}" not in keys
  }


def variant_of(
  module, config: dict, free: Sequence[str], named: str | None, source: pathlib.Path
) -> tuple[str, dict]:
  """(name of the preset whose sizes a file has, or "", and the config of its model).

  Values that no file has (pixel statistics) are the preset's. free: keys in which a file may differ
  from a preset. named: --variant, which chooses between presets that differ only in values that no
  file has. Exits with a message if none or several fit.
  """
  sizes = without(config, free)
  fit = [
    name
    for name, p in module.PRESETS.items()
    if without(p, free) == without({**p, **sizes}, free) and sizes.keys() <= p.keys()
  ]
  if named is None and len(fit) > 1:
    beside = sorted(set.union(*(set(module.PRESETS[n]) for n in fit)) - config.keys())
    raise SystemExit(
      f"{source} can be {' or '.join(fit)}, which differ in values that are not in the file "
      f"({', '.join(beside)}): choose one with --variant"
    )
  if named is not None and named not in fit:
    fits = f"it fits {' or '.join(fit)}" if fit else "its size is that of no preset"
    raise SystemExit(f"{source} is not of variant {named!r}: {fits}")
  name = named or (fit[0] if fit else "")
  return name, copy.deepcopy(module.PRESETS[name] | config if name else config)


class Choices(NamedTuple):
  """What the keys of a file do not say. assumed: keys that nothing else says either. facts: of a
  json beside the file, beyond the model. lines: for the user."""

  assumed: list[str]
  facts: dict[str, Any]
  lines: list[str]


def choose(
  table, source: pathlib.Path, inferred: dict, config: dict, given: Mapping[str, Any], named: bool
) -> Choices:
  """Sets the keys of the table's ASSUMED in `config`: as given, as in a json beside the file, or as
  they are. named: --variant says what is in its preset alone."""
  sizes = config_lib.flatten({"model": inferred})
  found = beside.describe(source, getattr(table, "parse_beside", None), sizes)
  told = {k.removeprefix("model."): v for k, v in found.facts.items() if k.startswith("model.")}
  for key, value in (told | dict(given)).items():
    *parents, last = key.split(".")
    node = functools.reduce(lambda d, name: d[name], parents, config)
    node[last] = value
  flat = config_lib.flatten(config)
  assumed = {
    k: flat[k]
    for k in getattr(table, "ASSUMED", ())
    if k in flat.keys() - told.keys() - given.keys() and not (named and f"model.{k}" not in sizes)
  }
  lines = []
  if told:
    lines.append(f"{found.name}: {', '.join(f'{k}={v}' for k, v in told.items())}")
  for k in given:
    if told.get(k, given[k]) != given[k]:
      lines.append(f"{k}={given[k]} as given, although {found.name} says {told[k]}")
  if assumed:
    hints = getattr(table, "ASSUMED_HINTS", {})
    lines.append(beside.assumption(source.name, assumed, found, hints, flag="--"))
  rest = {k: v for k, v in found.facts.items() if not k.startswith("model.")}
  return Choices(list(assumed), rest, lines)


def to_jax(
  system: str,
  source: pathlib.Path,
  out: pathlib.Path,
  allow_missing: str | None,
  variant: str | None = None,
  key: str | None = None,
  prefix: str | None = None,
  given: Mapping[str, Any] | None = None,
) -> str:
  """Writes the converted directory `out`, which must not exist yet; returns lines about it.

  given: values of the table's ASSUMED, by their keys.
  """
  if out.exists():
    raise SystemExit(f"{out} exists already")
  module = registry.system_module(system)
  state, info = torch_files.state_dict(source, verify=True, key=key, prefix=prefix)
  for note in info["notes"]:  # before an error, which they may explain
    print(f"{source.name}: {note}")
  table = tables.rule_table(system)
  inferred = table.infer_config({k: v.shape for k, v in state.items()}, info["scalars"])
  free = (*getattr(table, "ASSUMED", ()), "loss")
  name, config = variant_of(module, inferred, free, variant, source)
  choices = choose(table, source, inferred, config, given or {}, bool(variant))
  want, stats = abstract(module, config)
  flat, report = conversion.to_jax(state, table.RULES, want, allow_missing=allow_missing)
  meta = meta_lib.meta(
    system=system,
    variant=name,
    config=config,
    source=source.name,
    sha256=torch_files.sha256(source),
    info=info,
    report=report,
    assumed=choices.assumed,
    facts=choices.facts,
  )
  if meta["beside"]:
    out.mkdir(parents=True)
    torch_files.write(out / meta_lib.BESIDE, {k: report.kept[k] for k in meta["beside"]})
  parts = [{k: v for k, v in flat.items() if (k in stats) == s} for s in (False, True)]
  model_files.save_model(out, *(restore.nested(p) for p in parts), meta)
  filled = f", {len(report.filled)} not in the file: {', '.join(report.filled)}"
  kept = f"{len(report.kept)} buffers kept, {len(report.dropped)} dropped"
  if report.missing:
    missing = ", ".join(report.missing)
    choices.lines.append(
      f"{out} lacks {missing}: --to torch reads it, config.init only with config.init_missing"
    )
  return "\n".join(
    (
      f"{source.name} ({info['format']}{''.join(', in ' + w for w in info['wrapper'])}) is "
      f"{system} {name or 'of its own size'}: {report.parameters:,} values in {len(flat)} arrays, "
      f"{kept}, {len(report.missing)} missing"
      f"{filled if report.filled else ''}",
      *choices.lines,
    )
  )


def to_torch(system: str, source: pathlib.Path, out: pathlib.Path) -> str:
  """Writes the file `out` from a converted directory or a workdir; returns lines about it."""
  meta = dict(system=system, ignored={}, beside=[], keys=[], wrapper=[])
  config = source / "config.json"
  if (source / "checkpoints").is_dir():
    checkpoints = checkpointer.Checkpoints(source, keep=1, metric="", read_only=True)
    if (found := checkpoints.restore_best()) is None:
      raise SystemExit(f"{source}/checkpoints is empty")
    meta["system"], tree = found[1]["system"], found[2]
    facts = facts_lib.of(json.loads(config.read_text())["config"]) if config.exists() else {}
  else:
    meta, tree = meta_lib.read_meta(source), model_files.load_model(source)
    facts, _ = facts_lib.of_converted(meta)
  if meta["system"] != system:
    raise SystemExit(f"{source} holds a {meta['system']} model, not {system}")
  flat = restore.flat(tree["params"]) | restore.flat(tree.get("stats") or {})
  kept = {name: meta_lib.unpack(v) for name, v in meta["ignored"].items()}
  if meta.get("beside"):
    large, _ = torch_files.state_dict(source / meta_lib.BESIDE)
    kept |= {name: large[name].read() for name in meta["beside"]}
  table = tables.rule_table(system)
  state = conversion.to_torch(
    flat, table.RULES, kept=kept, order=meta["keys"], scalars=meta.get("reshaped")
  )
  torch_files.write(out, meta_lib.wrap(state, meta["wrapper"]))
  lines = [f"{out.name}: {len(state)} tensors, {out.stat().st_size:,} bytes"]
  return "\n".join(
    lines + unrecorded(table, out.name, facts, {k: v.shape for k, v in state.items()})
  )


def unrecorded(table, name: str, facts: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[str]:
  """Lines about what a model computes and a file of it does not say.

  facts: of the model. shapes: of the file, by which its readers choose the rest.
  """
  assume = config_lib.flatten({"model": table.infer_config(shapes)})
  keys = [f"model.{key}" for key in getattr(table, "ASSUMED", ()) if f"model.{key}" in assume]
  return [
    f"warning: {name} cannot say that {key} is {facts[key]}; its readers assume {assume[key]} and "
    "compute another model unless they are told"
    for key in keys
    if key in facts and facts[key] != assume[key]
  ] + [
    f"warning: it is not known whether {key} is {assume[key]}, which readers of {name} assume"
    for key in keys
    if key not in facts
  ]


def add_choices(parser: argparse.ArgumentParser) -> None:
  numbers = lambda kind: lambda text: tuple(kind(x) for x in text.split(","))
  group = parser.add_argument_group("what keys and shapes of a file do not say")
  group.add_argument("--act", help="activation: quick_gelu, gelu, gelu_tanh")
  group.add_argument("--heads", type=numbers(int), metavar="IMAGE[,TEXT]")
  group.add_argument("--pool", help="of the image tower: cls, mean")
  group.add_argument("--causal", choices=("true", "false"), help="mask of the text tower")
  group.add_argument("--mean", type=numbers(float), metavar="R,G,B", help="of pixels in [0, 1]")
  group.add_argument("--std", type=numbers(float), metavar="R,G,B")


def given_choices(args: argparse.Namespace) -> dict[str, Any]:
  """The choices on the command line by their keys in config.model."""
  image, text = (*(args.heads or ()), None, None)[:2]
  causal = None if args.causal is None else args.causal == "true"
  values = {
    "act": args.act, "image.heads": image, "text.heads": text, "image.pool": args.pool,
    "text.causal": causal, "mean": args.mean, "std": args.std,
  }  # fmt: skip
  given = {k: v for k, v in values.items() if v is not None}
  known = getattr(tables.rule_table(args.system), "ASSUMED", ())
  if unknown := [k for k in given if k not in known]:
    raise errors.UserError(f"a file of {args.system} leaves no choice of {', '.join(unknown)}")
  return given


@cli.program
def main(argv: list[str] | None = None) -> None:
  parser = cli.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--system", required=True, choices=sorted(registry.SYSTEMS))
  parser.add_argument("--to", default="jax", choices=("jax", "torch"))
  parser.add_argument("--checkpoint", required=True, type=pathlib.Path)
  parser.add_argument("--out", required=True, type=pathlib.Path)
  parser.add_argument("--allow-missing", metavar="REGEX")
  parser.add_argument("--variant", help="the preset, if a file fits several")
  parser.add_argument("--key", help="the entry that holds the weights; a/b: entry b of entry a")
  parser.add_argument("--prefix", help="take the names that begin with it, and strip it")
  add_choices(parser)
  args = parser.parse_args(argv)
  given = given_choices(args)
  with errors.naming(args.checkpoint):
    if args.to == "jax":
      names = (args.variant, args.key, args.prefix)
      print(to_jax(args.system, args.checkpoint, args.out, args.allow_missing, *names, given))
    else:
      print(to_torch(args.system, args.checkpoint, args.out))


if __name__ == "__main__":
  main()
