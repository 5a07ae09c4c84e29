"""Small parts: sharding rules, FLOP counting, the contrastive loss, layers, logs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from xmodal_jax.distributed import sharding
from xmodal_jax.losses import contrastive
from xmodal_jax.models import layers
from xmodal_jax.models.layers import attention as attention_lib
from xmodal_jax.runtime import flops, logs, metric_writers, setup
from xmodal_jax.runtime import step as step_lib
from xmodal_jax.training import loop

RULES = {"vocab": "model", "heads": "model", "mlp": "model", "embed": "fsdp"}


def test_sharding_rules():
  mesh = sharding.make_mesh((("data", -1), ("fsdp", 2), ("model", 2)))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
  spec = lambda axes, shape, size=1: sharding.partition_spec(axes, shape, mesh, RULES, size)
  assert spec(("embed", "mlp"), (12, 64, 256)) == P(None, "fsdp", "model")  # a layer axis leads
  assert spec(("embed", "mlp"), (63, 256)) == P(None, "model")  # does not divide
  assert spec(("mlp", "heads"), (64, 64)) == P("model", None)  # one mesh axis once
  assert spec(("embed",), (64,), 2**16) == P()  # small
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    sharding.make_mesh((("data", 3),))


def test_flops_count_layers_of_a_scan():
  def f(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  jaxpr = jax.make_jaxpr(f)(jnp.zeros((5, 8, 8)), jnp.zeros((3, 8)))
  assert flops.count(jaxpr) == 5 * 2 * 3 * 8 * 8
  conv = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  jaxpr = jax.make_jaxpr(jax.jit(conv))(jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3, 7)))
  assert flops.count(jaxpr) == 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)
  attention = jax.make_jaxpr(layers.dot_product_attention)(*[jnp.zeros((2, 5, 3, 4))] * 3)
  assert flops.count(attention) == 2 * 2 * (2 * 3 * 5 * 5 * 4)


def test_device_peaks():
  assert flops.device_peak("TPU v5 lite") == 197e12 and flops.device_peak("TPU v5p") == 459e12
  assert flops.device_peak("NVIDIA H100 80GB HBM3") == 989e12
  assert flops.device_peak("cpu") is None


def test_infonce_is_the_mean_of_two_cross_entropies():
  keys = jax.random.split(jax.random.key(0))
  zi, zt = (jax.random.normal(k, (6, 4)) for k in keys)
  zi, zt = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (zi, zt))
  infonce = jax.jit(contrastive.infonce)
  loss, m = infonce(zi, zt, jnp.float32(7.0))
  logits = 7.0 * np.asarray(zi, np.float64) @ np.asarray(zt, np.float64).T
  entropy = lambda s: np.mean(np.log(np.exp(s).sum(1)) - np.diag(s))
  np.testing.assert_allclose(m["loss_i2t"], entropy(logits), rtol=1e-5)
  np.testing.assert_allclose(loss, (entropy(logits) + entropy(logits.T)) / 2, rtol=1e-5)
  np.testing.assert_allclose(m["accuracy_t2i"], (logits.argmax(0) == np.arange(6)).mean())
  np.testing.assert_allclose(m["accuracy_i2t"], (logits.argmax(1) == np.arange(6)).mean())
  same = jnp.ones((6, 4)) / 2
  assert infonce(same, same, jnp.float32(7.0))[1]["accuracy_i2t"] == 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_forms_agree(causal):
  q, k, v = (jax.random.normal(key, (2, 7, 3, 4)) for key in jax.random.split(jax.random.key(1), 3))
  plain = lambda *x: attention_lib._attention_einsum(*x, causal=causal)
  library = lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal)
  chosen = lambda *x: layers.dot_product_attention(*x, causal=causal)

  def value_and_grads(f):
    def loss(x):
      y = f(*x)
      return (y**2).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v))
    return y, grads

  want, want_grads = value_and_grads(plain)
  for f in (library, chosen):
    ours, grads = value_and_grads(f)
    np.testing.assert_allclose(ours, want, atol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)


def test_blocks_are_the_same_scanned_unrolled_and_recomputed():
  from flax import nnx

  blocks = layers.stack(3, 8, 2, mlp_dim=16, act="gelu", rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  want = x
  one = jax.jit(lambda blocks, i, x: jax.tree.map(lambda a: a[i], blocks)(x))
  for i in range(3):
    want = one(blocks, i, want)
  value_and_grad = lambda **options: jax.jit(
    lambda x: (
      layers.scan(blocks, x, **options),
      jax.grad(lambda x: layers.scan(blocks, x, **options).sum())(x),
    )
  )(x)
  plain = value_and_grad()
  np.testing.assert_allclose(plain[0], want, atol=1e-5)
  for options in ({"unroll": 3}, {"remat": "nothing_saveable"}):
    for ours, theirs in zip(value_and_grad(**options), plain, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_metrics_file_drops_what_will_come_again(tmp_path):
  writer = metric_writers.JsonlWriter(tmp_path)
  for step in (1, 2, 3, 4):
    writer.write(step, "train", {"loss": np.float32(step)})
  writer.write(2, "val", {"rsum": 5.0})
  with writer.path.open("a") as f:
    f.write('{"step": 5, "ki')  # killed while writing
  writer.resume(2)
  rows = [json.loads(line) for line in writer.path.read_text().splitlines()]
  assert [(r["step"], r["kind"]) for r in rows] == [(1, "train"), (2, "train"), (2, "val")]
  writer.resume(2, drop="val")
  rows = [json.loads(line) for line in writer.path.read_text().splitlines()]
  assert [(r["step"], r["kind"]) for r in rows] == [(1, "train"), (2, "train")]


def test_progress_line():
  line = logs.progress_line(120, 600, 3.2101, 256, 0.5, 0.41)
  assert line == "step 120/600  loss 3.2101  64.0 examples/s/device  MFU 41.0%  ETA 4m00s"
  assert "ETA" not in logs.progress_line(1, 600, 3.2, 256, None, None)
  line = logs.progress_line(120, 600, 3.2101, 256, 0.5, 0.41, 0.5)
  assert "MFU 41.0% (HFU 50.0%)  ETA 4m00s" in line


class FakeDevice:
  """A clock, and a device that takes `compute` seconds per step.

  queue: True for dispatch that returns at once, False for dispatch that waits for the step.
  """

  def __init__(self, compute: float, load: float, queue: bool):
    self.compute, self.load, self.queue = compute, load, queue
    self.now = self.done = 1000.0

  def step(self, compiling: float = 0.0) -> None:
    self.now += self.load + compiling
    self.done = max(self.done, self.now) + self.compute
    if not self.queue:
      self.wait()

  def wait(self, _=None) -> None:
    self.now = max(self.now, self.done)


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("log_every", [1, 2, 20])
@pytest.mark.parametrize("compute, load", [(1.0, 0.0), (1.0, 0.25), (0.25, 1.0)])
def test_clock_measures_whole_steps(monkeypatch, queue, log_every, compute, load):
  """Every lap after compilation is the time per step, whatever is evaluated or saved in between."""
  device = FakeDevice(compute, load, queue)
  monkeypatch.setattr(logs.time, "monotonic", lambda: device.now)
  monkeypatch.setattr(logs.jax, "block_until_ready", device.wait)
  clock, laps = logs.Clock(), []
  for step in range(1, 61):
    device.step(compiling=100.0 if step <= 2 else 0.0)
    clock.tick(None)
    if step % log_every and step % 7:
      continue
    device.wait()
    if step % log_every == 0:
      laps.append((step, clock.lap()))
    with clock.paused():
      device.now += 30.0 if step % 7 == 0 else 0.01
  # Host and device work at the same time, except in the first step after a wait.
  slower, faster = max(compute, load), min(compute, load)
  for step, seconds in laps:
    if step <= 2:
      assert seconds is None
      continue
    counted = min(log_every, step - 2)
    waits = 1 + sum(s % 7 == 0 for s in range(max(step - log_every, 2) + 1, step))
    each = slower + faster * (1 if not queue else waits / counted)
    assert seconds == pytest.approx(each), step


def test_a_period_of_no_steps_is_the_last_step_alone():
  due = lambda every: [step for step in range(1, 7) if loop._is_due(step, every, 6)]
  assert due(0) == [6] and due(4) == [4, 6]


def test_model_flops_are_those_without_recomputation(monkeypatch):
  """Rematerialization adds to the FLOPs of the step, and nothing to those of the model."""
  config = tiny.config("unused")
  plain = count_both(config)
  config.model.remat, config.accumulate = "nothing_saveable", 2
  again = count_both(config)
  assert plain[0] == plain[1] == again[0] < again[1]
  monkeypatch.setattr(flops, "device_peak", lambda kind: 1e12)
  throughput, (model, computed) = loop._Throughput(config), again
  speed = throughput(0.5, *traced_step(config))
  available = 0.5 * jax.device_count() * 1e12
  assert speed["examples_per_second"] == 32
  assert speed["mfu"] == pytest.approx(model / available)
  assert speed["hfu"] == pytest.approx(computed / available)


def traced_step(config):
  """(train step, state, batch), the last two abstract."""
  built, schedule = setup.build(config), lambda step: 0.1
  tx = built.optimizer(config.optim, schedule)
  step = built.train_step(tx, jax.random.key(0), built.state_shardings(tx), schedule)
  state = jax.eval_shape(lambda: step_lib.init_state(built.init_model, tx))
  batch = dict(
    image=jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.uint8),
    text_ids=jax.ShapeDtypeStruct((16, 24), jnp.int32),
    image_id=jax.ShapeDtypeStruct((16,), jnp.int32),
  )
  return step, state, batch


def count_both(config) -> tuple[int, int]:
  """FLOPs of (the model, its train step)."""
  step, state, batch = traced_step(config)
  return flops.of_model(config, batch), flops.count(step.trace(state, batch).jaxpr)


@pytest.mark.full
def test_resnet_recomputes_to_the_same():
  from flax import nnx

  from xmodal_jax.models.towers import resnet

  def loss_and_stats(remat):
    tower = dict(size=32, width=4, depths=(1, 2, 1, 1), output_dim=8, remat=remat)
    model = resnet.ModifiedResNet(**tower, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def loss(params):
      model = nnx.merge(graphdef, params, stats)
      x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
      out = model.pooled(model(x, jax.random.key(2)))
      return (out**2).sum(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  plain, again = loss_and_stats(""), loss_and_stats("nothing_saveable")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), plain, again)
