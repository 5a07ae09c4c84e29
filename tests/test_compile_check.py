"""tools/compile_check.py: what it counts, how it estimates, and toy programs of every system."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import types

import compile_check
import compile_table
import jax
import jax.numpy as jnp
import pytest
import tiny
from compiling import cost as cost_lib
from compiling import fit, hlo, topologies
from compiling import programs as compile_programs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xmodal_jax import config as config_lib
from xmodal_jax.runtime import flops as flops_lib

ROOT = pathlib.Path(__file__).parents[1]

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu to compile for TPUs: an environment of its own, '.[compile]' (.ci/run)",
)
SYSTEMS = {f.__name__: f for f in (tiny.config, tiny.zerovl, tiny.team, tiny.tgdt, tiny.hat)}


# --- counting -----------------------------------------------------------------------------------


def layers(unroll):
  """Gradient of six dense layers, in a loop or written out."""

  def loss(weights, x):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return (jax.lax.scan(body, x, weights, unroll=unroll)[0] ** 2).sum()

  return jax.grad(loss), (jnp.zeros((6, 128, 128)), jnp.zeros((64, 128)))


def cost(f, *args):
  topology = topologies.get("cpu:8")
  return cost_lib.of(jax.jit(f).lower(*args).compile().as_text(), topology, topology.devices)


def test_loop_counts_as_its_unrolled_twin():
  (f, args), (g, _) = layers(unroll=1), layers(unroll=True)
  looped, unrolled = cost(f, *args), cost(g, *args)
  # Forward, and both gradients: but none of x, which nothing asks for.
  expected = 6 * 2 * 64 * 128 * 128 * 3 - 2 * 64 * 128 * 128
  assert unrolled.flops == expected
  # In the loop the gradient of its input comes with the others.
  assert looped.flops == expected + 2 * 64 * 128 * 128 == flops_lib.count(jax.make_jaxpr(f)(*args))
  assert not looped.unknown
  # The loop also writes and reads back what it keeps for the gradient; an operation cut out of a
  # stack counts that cut alone, or it would be six times as much.
  assert unrolled.bytes <= looped.bytes < 2.5 * unrolled.bytes


def test_loop_of_unknown_length_is_reported():
  f = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ x, x)
  found = cost(f, jnp.eye(8))
  assert len(found.unknown) == 1 and found.flops == 2 * 8**3


@pytest.mark.parametrize(
  "window, sizes, pairs",
  [
    ("", (), 1),  # a matmul
    ("size=3 pad=1_1", (4, 4), 3 * 4 - 2),  # the ends meet padding
    ("size=2 stride=2", (8, 4), 8),
    # A batched matmul as XLA writes it for TPU: of every place in the window one is not a gap.
    ("size=16 stride=15 lhs_dilate=16", (16, 16), 16),
  ],
)
def test_window_of_convolutions(window, sizes, pairs):
  spatial = "0" if sizes else ""
  dims = lambda n: f",{n}" if sizes else ""
  size = window.split()[0].removeprefix("size=") if window else ""
  line = (
    f"  %c = f32[5,7{dims(sizes and sizes[1])}] convolution(%a, %b), window={{{window}}}, "
    f"dim_labels=bf{spatial}_io{spatial}->bf{spatial}"
  )
  text = "\n".join(
    [
      "ENTRY %main (a: f32[]) -> f32[] {",
      f"  %a = f32[5,3{dims(sizes and sizes[0])}] parameter(0)",
      f"  %b = f32[3,7{dims(size)}] parameter(1)",
      line,
      "}",
    ]
  )
  entry = (module := hlo.Module(text)).computations["main"]
  assert module.flops(entry.by_name["c"], entry) == 2 * 5 * 7 * 3 * pairs


def test_products_in_library_calls():
  config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
  call = f'custom_call_target="__cublas$gemm", backend_config={config}'
  text = [
    "ENTRY %main (a: f32[]) -> f32[] {",
    "  %a = f32[5,3] parameter(0)",
    "  %b = f32[3,7] parameter(1)",
    f"  %c = (f32[5,7], s8[64]) custom-call(%a, %b), {call}",
    "}",
  ]
  entry = (module := hlo.Module("\n".join(text))).computations["main"]
  assert module.flops(entry.by_name["c"], entry) == 2 * 5 * 7 * 3


@pytest.mark.parametrize("name, products", [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_products_in_fused_attention(name, products):
  config = (
    '{"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16",'
    '"dimensions":["2","3","5","7"],"tuple_shapes":[]},"bmm1_dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["3"]}}}'
  )
  call = f'custom_call_target="__cudnn$fmha{name}", backend_config={config}'
  text = [
    "ENTRY %main (a: f32[]) -> f32[] {",
    "  %q = bf16[2,5,3,64] parameter(0)",
    "  %k = bf16[2,7,3,64] parameter(1)",
    f"  %c = (bf16[2,5,3,64], u8[64]) custom-call(%q, %k, %k), {call}",
    "}",
  ]
  entry = (module := hlo.Module("\n".join(text))).computations["main"]
  assert module.flops(entry.by_name["c"], entry) == products * 2 * (2 * 3 * 5 * 7) * 64


def test_collectives_of_a_loop():
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def local(x):  # [32, 128] of [64, 512] on each device
    def body(x, _):
      x = jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)])
      return x + jax.lax.psum(x, "b"), None

    x, _ = jax.lax.scan(body, x, length=5)
    return jax.lax.all_gather(x, "a", axis=1, tiled=True)

  f = jax.shard_map(local, mesh=mesh, in_specs=P("b", "a"), out_specs=P("b"), check_vma=False)
  x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=NamedSharding(mesh, P("b", "a")))
  found = {k: (t.count, t.bytes) for k, t in cost(f, x).traffic.items()}
  part = 4 * 32 * 128
  assert found == {
    "collective-permute": (5, 5 * part),
    "all-reduce": (5, 5 * part),
    "all-gather": (1, 4 * part),
  }


@pytest.mark.parametrize(
  "text, group",
  [
    ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", [0, 2]),
    ("replica_groups={}, to_apply=%add", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
    ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", [0, 2, 4, 6]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", [0, 1, 2, 3]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x=1", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
  ],
)
def test_groups_as_the_compiler_writes_them(text, group):
  assert cost_lib.first_group(text, 8) == group


def test_group_in_another_form_is_an_error():
  with pytest.raises(ValueError, match="form that is not known"):
    cost_lib.first_group("replica_groups=every(2), x=1", 8)


# --- estimating ---------------------------------------------------------------------------------

CHIP = topologies.Chip(peak=1e12, bandwidth=1e9, hbm=10**9, link=1e8, wraps=4, clock=1e6)


def slice_of(*shape):
  """A slice of TPUs that nobody makes, at round speeds."""
  places = [(x, y) for x in range(shape[0]) for y in range(shape[1])]
  device = lambda place: types.SimpleNamespace(platform="tpu", coords=(*place, 0))
  return topologies.Topology("toy", tuple(map(device, places)), CHIP, shape)


def played(body, shape=(4, 2)):
  """The cost of a program of these lines, f32[250000] parameters p and q (1 MB each) before."""
  lines = [f"  %{n} = f32[250000] parameter({i})" for i, n in enumerate("pq")]
  text = ["ENTRY %main (p: f32[]) -> f32[] {", *lines, *(f"  {line}" for line in body), "}"]
  topology = slice_of(*shape)
  return cost_lib.of("\n".join(text), topology, topology.devices)


@pytest.mark.parametrize(
  "kind, groups, seconds",
  [
    # 1 MB at 0.1 GB/s each way takes 10 ms; a ring of four goes both ways, hops are 1 us each.
    ("all-reduce", "{{0,2,4,6}}", 2 * (0.010 * 3 / 4 / 2 + 2e-6)),
    ("all-gather", "{{0,2,4,6}}", 4 * 0.010 * 3 / 4 / 2 + 2e-6),
    ("reduce-scatter", "{{0,2,4,6}}", 0.010 * 3 / 4 / 2 + 2e-6),
    ("all-to-all", "{{0,2,4,6}}", 0.010 * 4 / 8 + 2e-6),
    ("all-reduce", "{{0,1}}", 2 * (0.010 / 2 + 1e-6)),  # a line
    ("all-reduce", "{}", 2 * (0.010 * 7 / 8 / 3 + 3e-6)),  # ring and line at once
    ("all-reduce", "{{0}}", 0.0),
  ],
)
def test_seconds_on_links(kind, groups, seconds):
  line = f"%r = f32[250000] {kind}(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
  found = played([line])
  assert found.waiting == pytest.approx(seconds) == pytest.approx(found.busy)


def test_permutation_goes_as_far_as_its_devices_are_apart():
  pairs = "{{0,2},{2,4},{4,6},{6,0},{1,5}}"  # neighbours in the ring, and one two links away
  found = played([f"%r = f32[250000] collective-permute(%p), source_target_pairs={pairs}"])
  assert found.waiting == pytest.approx(0.010 * 6 / 5 + 2e-6)


def test_operations_go_on_beside_asynchronous_collectives():
  start = "%s = f32[250000] all-reduce-start(%p), channel_id=1, replica_groups={}, to_apply=%add"
  add = "%x = f32[250000] add(%p, %q)"  # 3 MB at 1 GB/s: 3 ms
  done = "%r = f32[250000] all-reduce-done(%s)"
  busy = 2 * (0.010 * 7 / 8 / 3 + 3e-6)
  assert played([start, add, done]).seconds == pytest.approx(busy)
  assert played([start, add, done]).waiting == pytest.approx(busy - 0.003)
  assert played([start, done, add]).seconds == pytest.approx(busy + 0.003)


def test_compiler_cycles_count_where_they_are_more():
  cycles = ', backend_config={"window_config":{"estimated_cycles":"5000"}}'
  found = played(["%x = f32[250000] add(%p, %q)" + cycles])
  assert found.seconds == pytest.approx(0.005) and found.roofline == pytest.approx(0.003)
  on_chip = "%x = f32[250000]{0:T(1024)S(1)} add(%p, %q)"  # its result stays off the HBM
  assert played([on_chip]).bytes == 2e6


def test_slices_that_gpus_copy_beside_operations():
  text = """
%slice (a: f32[8,250000], b: s32[]) -> f32[1,250000] {
  %a = f32[8,250000] parameter(0)
  %b = s32[] parameter(1)
  ROOT %s = f32[1,250000] dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,250000}
}
ENTRY %main (x: f32[8,250000], i: s32[], p: f32[250000]) -> f32[1,250000] {
  %x = f32[8,250000] parameter(0)
  %i = s32[] parameter(1)
  %p = f32[250000] parameter(2)
  %c = ((f32[8,250000], s32[]), f32[1,250000], u32[]) fusion-start(%x, %i), calls=%slice
  %add = f32[250000] add(%p, %p)
  ROOT %d = f32[1,250000] fusion-done(%c)
}"""
  topology = slice_of(4, 2)
  found = cost_lib.of(text, topology, topology.devices)
  # 1 MB read and written, beside 3 MB of the addition: of one memory of 1 GB/s.
  assert found.bytes == pytest.approx(5e6) and found.seconds == pytest.approx(0.005)
  assert found.roofline == pytest.approx(0.003)


def test_rings_of_slices():
  wraps = lambda kind, *shape: topologies.Topology("", (), topologies.CHIPS[kind], shape).wraps
  assert wraps("v5e", 4, 4) == (False, False) and wraps("v5e", 16, 16) == (True, True)
  assert wraps("v5e", 8, 16) == (False, True)
  assert wraps("v5p", 2, 4, 4) == (False,) * 3 and wraps("v5p", 4, 4, 8) == (True,) * 3


# --- the tool -----------------------------------------------------------------------------------


def toy(make=tiny.config, **changes):
  return config_lib.resolve(make("nowhere", **changes))


@pytest.mark.full
def test_what_does_not_fit_gets_a_change_that_does():
  config, topology = toy(batch_size=128), topologies.get("cpu:8")
  programs = compile_programs.Programs(config, topology.devices)
  report = fit.compile_one("train", programs, None, compile_check.examiner(topology))
  assert report.fits and report.cost.flops > 0
  assert "train: fits" in compile_check.describe(report, topology, config, 0)
  report.hbm = int(report.needed) - 1
  assert not report.fits
  assert "train: DOES NOT FIT" in compile_check.describe(report, topology, config, 0)
  # No stack of the toy has a policy, so the first change is parts.
  change, better, new = fit.suggest(config, report, topology, compile_check.examiner(topology))
  assert list(change) == ["accumulate"] and new.accumulate == change["accumulate"] > 1
  assert better.fits and better.needed <= report.hbm
  assert (report.accumulate, better.accumulate) == (1, new.accumulate)


def test_the_fit_check_does_not_need_the_estimate(monkeypatch, capsys):
  """XLA may change the text that the estimate of time reads; memory is still reported."""
  monkeypatch.setattr(cost_lib, "of", lambda *args: {}["a new kind of line"])
  config, topology = toy(), topologies.get("cpu:8")
  [report], _, fits = compile_check.check(config, topology, ["score"], None, False)
  out = capsys.readouterr().out
  assert fits and report.cost is None and report.needed > 0 and report.to_json()["cost"] is None
  assert "no estimate of the time of score: KeyError" in out and "temporaries" in out


@pytest.mark.full
def test_measured_stands_beside_the_estimate():
  config, topology = toy(), topologies.get("cpu:8")
  [report], flops, _ = compile_check.check(config, topology, ["train"], None, False, steps=2)
  assert report.measured.seconds > 0
  # Noise matches its captions as well as any: the loss of a guess among 16.
  assert report.measured.loss == pytest.approx(math.log(config.batch_size), rel=0.2)
  assert f"measured {report.measured.seconds * 1e3:,.2f} ms: " in compile_check.describe(
    report, topology, config, flops
  )
  # What a GPU says of its memory.
  report.measured = dataclasses.replace(report.measured, memory=int(report.needed / 1.05))
  assert "+5.0% off" in compile_check.describe(report, topology, config, flops)


def test_changes_go_from_cheap_to_dear():
  config = config_lib.resolve(config_lib.load(ROOT / "configs/team_pretrain.py:clip_l14"))
  report = fit.Report("train", needed=2e9, hbm=10**9, accumulate=1, arguments=10**8)
  order = [fit.as_flags(c) for c in fit.changes(config, report, 8)]
  keeps = "dots_with_no_batch_dims_saveable"
  assert order[0] == f"--config.model.matching.remat={keeps} --config.model.text.remat={keeps}"
  assert order[1] == order[0].replace(keeps, "nothing_saveable")
  assert order[2] == "--config.accumulate=2" and order[3] == f"{order[1]} --config.accumulate=2"
  fsdp = "--config.mesh=\"(('data', -1), ('fsdp', 4), ('model', 1))\""
  assert fsdp in order
  # A state that is nearly all of the memory is cut first.
  report.arguments = 9 * 10**8
  again = [fit.as_flags(c) for c in fit.changes(config, report, 8)]
  assert again[0] == fsdp and sorted(again) == sorted(order)


def test_model_flops_leave_out_what_is_computed_again():
  config = toy(accumulate=2)
  with config.unlocked():
    config.model.remat = "nothing_saveable"
  assert compile_programs.model_flops(config) == compile_programs.model_flops(toy())


@pytest.mark.parametrize("name, wrong", [("v5e:4", "no topology"), ("h100", "no topology")])
def test_unknown_topology(name, wrong):
  with pytest.raises(ValueError, match=wrong):
    topologies.get(name)


def run(*args):
  command = [sys.executable, "tools/compile_check.py", *args]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu_it_says_what_to_install():
  done = run("--config", "configs/shapes.py:clip", "--topology", "v5e:2x2")
  assert done.returncode == 1 and "'.[compile]'" in done.stderr + done.stdout


# --- TPUs: skipped without libtpu ---------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize("system", SYSTEMS)
def test_toy_of_every_system_compiles_for_a_slice(system):
  topology = topologies.get("v5e:2x2")
  config = toy(SYSTEMS[system])
  reports, model_flops, fits = compile_check.check(config, topology, [], topology.chip.hbm, False)
  assert fits and {r.program for r in reports} >= {"train", "image", "text", "score"}
  assert ("rerank" in {r.program for r in reports}) == (system in ("team", "tgdt"))
  train = reports[0]
  # ZeroVL draws from a beta distribution, by rejection.
  assert all("beta" in loop for loop in train.cost.unknown)
  assert train.cost.seconds > train.cost.roofline > 0
  # Of every chip the work of its rows, or more where each does what all rows need.
  assert train.cost.flops >= 0.9 * model_flops / 4
  # Gradients are summed over the chips, none of the loss's pairs are left out.
  parameters = sum(x.size for x in jax.tree.leaves(state_params(config)))
  assert train.cost.traffic["all-reduce"].bytes >= 2 * parameters


def state_params(config):
  return compile_programs.Programs(config, topologies.get("v5e:2x2").devices).state.params


@needs_libtpu
def test_bfloat16_is_for_the_target():
  config = toy()
  lowered = compile_programs.Programs(config, topologies.get("v5e:2x2").devices).lower["image"]()
  assert "bf16" in lowered.as_text()
  host = compile_programs.Programs(config, jax.devices("cpu")[:4]).lower["image"]()
  assert "bf16" not in host.as_text()


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v4:4x8x8", "v5p:4x8x8"])
def test_chips_of_every_kind(name):
  topology = topologies.get(name)
  one = jax.sharding.SingleDeviceSharding(topology.devices[0])
  half_a_terabyte = jax.ShapeDtypeStruct((2**17, 2**20), jnp.float32, sharding=one)
  lowered = jax.jit(lambda x: x + x).lower(half_a_terabyte)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as e:
    lowered.compile()
  # What the compiler says that there is, is what the table says.
  assert f"{topology.chip.hbm / 2**30:.2f}G" in str(e.value)


@needs_libtpu
def test_too_large_for_the_chip_ends_with_status_1(tmp_path):
  out = tmp_path / "out.json"
  small = ["--config", "configs/shapes.py:clip", "--topology", "v5e:2x2", "--programs", "image"]
  done = run(*small, "--hbm", "0.0001", "--nosuggest", "--json", str(out))
  assert done.returncode == 1 and "DOES NOT FIT" in done.stdout, done.stderr[-2000:]
  assert "50 GB/s per link and direction" in done.stdout
  entry = json.loads(out.read_text())[0]
  assert not entry["fits"] and entry["cost"]["seconds"] > 0
  # A batch that the chips cannot share is told as well.
  done = run(*small, "--config.eval.batch_size=250")
  assert done.returncode == 1 and "not a multiple of 4 devices" in done.stdout


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", compile_table.SLICES)
@pytest.mark.parametrize("config", compile_table.CONFIGS)
def test_full_size_fits_or_a_change_is_found_that_does(config, topology):
  rows = [row for row in compile_table.rows() if row[:2] == (config, topology)]
  assert rows
  for row in rows:
    entry = compile_table.compile_row(row)[-1]
    assert entry["fits"]
    # Of every chip the work of its rows.
    assert entry["cost"]["flops"] >= 0.9 * entry["model_flops"] / entry["devices"]
