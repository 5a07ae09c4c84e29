"""Converts a PyTorch checkpoint to a converted directory, and back.

  python tools/convert.py --system clip --checkpoint ViT-B-32.pt --out clip_vit_b32
  python tools/convert.py --system zerovl --variant 100m --checkpoint zerovl_100m.pth --out zerovl
  python tools/convert.py --system clip --to torch --checkpoint clip_vit_b32 --out vit_b32.pth

With --to torch, --checkpoint may also be a workdir: its best checkpoint is written in float32.
Values keep their dtypes and bits. --allow-missing REGEX accepts a file without matching torch keys.

--checkpoint takes files of torch.save and safetensors, an index of shards (*.index.json), or a
folder with one of these. The weights may be inside of an entry ("state_dict", "model", "module",
"model_ema", ...) and their names behind prefixes that all of them share ("module.", "_orig_mod.",
"model.", ...). --key and --prefix say which, where a file has several.
"""

import argparse
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only shapes are traced

from flax import nnx

from xmodal_jax import errors
from xmodal_jax.checkpoints import checkpointer, model_files, restore
from xmodal_jax.interop import conversion, tables, torch_files
from xmodal_jax.interop import meta as meta_lib
from xmodal_jax.models import registry
from xmodal_jax.runtime import cli


def abstract(module, config) -> tuple[dict, set[str]]:
  """{path: ShapeDtypeStruct} of a model, and the paths of running statistics."""
  model = nnx.eval_shape(lambda: module.build(config, rngs=nnx.Rngs(0)))
  params, stats, _ = nnx.state(model, nnx.Param, nnx.BatchStat, ...)
  stats = restore.flat(nnx.to_pure_dict(stats))
  return restore.flat(nnx.to_pure_dict(params)) | stats, set(stats)


def variant_of(module, config: dict, named: str | None, source: pathlib.Path) -> tuple[str, dict]:
  """(name of the preset that a file fits, or "", and the config of its model).

  Values that no file has (pixel statistics) are the preset's. named: --variant, which chooses
  between presets that differ only in those. Exits with a message if none or several fit.
  """
  fit = [
    name for name, p in module.PRESETS.items() if p == {**p, **config} and config.keys() <= p.keys()
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
  return name, module.PRESETS[name] if name else config


def to_jax(
  system: str,
  source: pathlib.Path,
  out: pathlib.Path,
  allow_missing: str | None,
  variant: str | None = None,
  key: str | None = None,
  prefix: str | None = None,
) -> str:
  """Writes the converted directory `out`, which must not exist yet; returns lines about it."""
  if out.exists():
    raise SystemExit(f"{out} exists already")
  module = registry.system_module(system)
  state, info = torch_files.state_dict(source, verify=True, key=key, prefix=prefix)
  table = tables.rule_table(system)
  config = table.infer_config({k: v.shape for k, v in state.items()}, info["scalars"])
  variant, config = variant_of(module, config, variant, source)
  want, stats = abstract(module, config)
  flat, report = conversion.to_jax(state, table.RULES, want, allow_missing=allow_missing)
  meta = meta_lib.meta(
    system=system,
    variant=variant,
    config=config,
    source=source.name,
    sha256=torch_files.sha256(source),
    info=info,
    report=report,
  )
  if meta["beside"]:
    out.mkdir(parents=True)
    torch_files.write(out / meta_lib.BESIDE, {k: report.kept[k] for k in meta["beside"]})
  parts = [{k: v for k, v in flat.items() if (k in stats) == s} for s in (False, True)]
  model_files.save_model(out, *(restore.nested(p) for p in parts), meta)
  filled = f", {len(report.filled)} not in the file: {', '.join(report.filled)}"
  notes = "".join(f"{source.name}: {note}\n" for note in info["notes"])
  return (
    f"{notes}{source.name} ({info['format']}{''.join(', in ' + w for w in info['wrapper'])}) is "
    f"{system} {variant or 'of its own size'}: {report.parameters:,} values in {len(flat)} arrays, "
    f"{len(report.kept)} buffers kept, {len(report.dropped)} dropped, {len(report.missing)} missing"
    f"{filled if report.filled else ''}"
  )


def to_torch(system: str, source: pathlib.Path, out: pathlib.Path) -> str:
  """Writes the file `out` from a converted directory or a workdir; returns a line about it."""
  meta = dict(system=system, ignored={}, beside=[], keys=[], wrapper=[])
  if (source / "checkpoints").is_dir():
    checkpoints = checkpointer.Checkpoints(source, keep=1, metric="", read_only=True)
    if (found := checkpoints.restore_best()) is None:
      raise SystemExit(f"{source}/checkpoints is empty")
    meta["system"], tree = found[1]["system"], found[2]
  else:
    meta, tree = meta_lib.read_meta(source), model_files.load_model(source)
  if meta["system"] != system:
    raise SystemExit(f"{source} holds a {meta['system']} model, not {system}")
  flat = restore.flat(tree["params"]) | restore.flat(tree.get("stats") or {})
  kept = {name: meta_lib.unpack(v) for name, v in meta["ignored"].items()}
  if meta.get("beside"):
    large, _ = torch_files.state_dict(source / meta_lib.BESIDE)
    kept |= {name: large[name].read() for name in meta["beside"]}
  rules = tables.rule_table(system).RULES
  state = conversion.to_torch(flat, rules, kept=kept, order=meta["keys"])
  torch_files.write(out, meta_lib.wrap(state, meta["wrapper"]))
  return f"{out.name}: {len(state)} tensors, {out.stat().st_size:,} bytes"


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
  args = parser.parse_args(argv)
  with errors.naming(args.checkpoint):
    if args.to == "jax":
      names = (args.variant, args.key, args.prefix)
      print(to_jax(args.system, args.checkpoint, args.out, args.allow_missing, *names))
    else:
      print(to_torch(args.system, args.checkpoint, args.out))


if __name__ == "__main__":
  main()
