"""Memory of the losses over all pairs, value and gradient: plain, and in a ring of tiles.

  python tools/loss_memory.py [--only infonce,sampling]
  python tools/loss_memory.py --topology v5e:4x4     # compiled for TPUs that need not be there

Bytes of temporaries per device by the compiler's memory analysis; nothing runs, and no array of
these sizes exists. Devices are 16 host devices, or those of a topology, for which libtpu has to be
installed (`pip install -e .[compile]`).
"""

import os
import re
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import contrastive, cross_attention, hard_negatives, local, triplet
from xmodal_jax.losses.pairwise.ring import Ring
from xmodal_jax.runtime import cli

DEVICES = 16
SCALE = 10.0
OUT_OF_MEMORY = r"HLO temporaries \(([\d.]+)([KMGT])\)"  # what a compiler says of too much


def infonce(x, how):
  return contrastive.infonce(x["v"], x["t"], SCALE, x["id"], "exclude", how)[0]


def sigmoid(x, how):
  return contrastive.sigmoid(x["v"], x["t"], SCALE, -10.0, how)[0]


def nce(x, how):
  kw = dict(mix=0.7, smoothing=0.1, ring=how)
  return sum(loss for loss, _ in contrastive.bidirectional_nce(x["v"], x["t"], 1 / SCALE, **kw))


def hinges(x, how):
  return triplet.triplet_loss(triplet.dot, x["v"], x["t"], ring=how)[0]


def intra(x, how):
  return triplet.intra_modal_consistency(triplet.dot, x["v"], x["t"], ring=how)


def sampling(x, how):
  keys = jax.random.split(jax.random.key(0))
  return hard_negatives.sample_both(x["v"], x["t"], jnp.float32(SCALE), x["id"], 1, keys, how)


def _of_tokens(score: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  def loss(x, how):
    texts = {"t": x["t"], "mask": x["mask"]}
    if how is None:  # as the systems do: images stay sharded
      whole = NamedSharding(x["rows"].mesh, P())
      texts = jax.lax.with_sharding_constraint(texts, whole)
    return triplet.triplet_loss(score, x["v"], texts, ring=how)[0]

  return loss


def _local(v, t):
  count = jnp.ones(v.shape[:2], bool)
  return local.local_scores(v, count, t["t"], t["mask"])


def _attended(batch_sharding: NamedSharding) -> Callable[..., jax.Array]:
  return _of_tokens(
    lambda v, t: cross_attention.attended_scores(
      v, t["t"], t["mask"], batch_sharding=batch_sharding
    )
  )


def cases(
  batch_sharding: NamedSharding,
) -> dict[str, tuple[Callable[..., Any], dict, list[tuple[int, int]]]]:
  """Name -> (loss, shapes of a row, sizes: (pairs, rows of a tile))."""
  vectors = lambda width: dict(v=(width,), t=(width,))
  words = lambda regions, words, width: dict(v=(regions, width), t=(words, width))
  both = [(32768, 1024), (1048576, 1024)]
  return {
    "infonce": (infonce, vectors(512), both),
    "sigmoid": (sigmoid, vectors(512), both),
    "nce": (nce, vectors(512), both),
    "hinges": (hinges, vectors(1024), both),
    "intra": (intra, vectors(1024), both),
    "sampling": (sampling, vectors(768), both),
    "local": (_of_tokens(_local), words(36, 40, 1024), [(1024, 32), (4096, 32)]),
    "attended": (_attended(batch_sharding), words(784, 32, 768), [(256, 16), (512, 16)]),
  }


def temporaries(loss, shapes: dict[str, tuple[int, ...]], pairs: int, chunk: int, rows) -> str:
  """MB per device of value and gradient; chunk 0: the plain form."""
  of = lambda shape, dtype: jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=rows)
  floats = {name: of(shape, jnp.float32) for name, shape in shapes.items()}
  rest = {"id": of((), jnp.int32), "mask": of(shapes["t"][:1], jnp.bool_)}
  how = Ring(chunk, rows) if chunk else None
  value = lambda floats, rest: loss(floats | rest | {"rows": rows}, how)
  whole, out = NamedSharding(rows.mesh, P()), None
  if loss is sampling:
    f, out = value, rows
  else:
    f, out = jax.value_and_grad(value), (whole, rows)
  lowered = jax.jit(f, out_shardings=out).lower(floats, rest)
  try:
    used = lowered.compile().memory_analysis().temp_size_in_bytes
  except jax.errors.JaxRuntimeError as e:
    found = re.search(OUT_OF_MEMORY, str(e))
    if not found:
      raise
    used = float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))
    return f"{used / 1e6:,.1f} (does not fit)"
  return f"{used / 1e6:,.1f}"


@cli.program
def main(argv: list[str] | None = None) -> None:
  parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="", help="e.g. v5e:4x4; host devices without it")
  parser.add_argument("--only", default="", help="losses, with commas between them")
  args = parser.parse_args(argv)
  if args.topology:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
  else:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    devices = jax.devices()
  rows = sharding.batch_sharding(sharding.make_mesh((("data", -1),), devices))
  every = cases(rows)
  chosen = args.only.split(",") if args.only else list(every)
  if unknown := set(chosen) - every.keys():
    raise SystemExit(f"loss_memory: --only {min(unknown)}; there are {', '.join(every)}")
  print(f"MB of temporaries per device, {len(devices)} x {devices[0].device_kind}")
  print("| loss | of a pair | pairs | plain | ring | loss_chunk |")
  print("| --- | --- | --- | --- | --- | --- |")
  for name in chosen:
    loss, shapes, sizes = every[name]
    what = " and ".join(" x ".join(map(str, shape)) for shape in shapes.values())
    for pairs, chunk in sizes:
      plain, ring = (temporaries(loss, shapes, pairs, n, rows) for n in (0, chunk))
      print(f"| {name} | {what} | {pairs:,} | {plain} | {ring} | {chunk} |", flush=True)


if __name__ == "__main__":
  main()
