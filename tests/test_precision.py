"""bfloat16 configs: parameters, sums, norms, softmaxes and losses are float32, matmuls are not.

Programs are traced, not compiled. Every equation of the jaxpr is checked, including those in loops,
branches, rematerialized and shard_map parts; exceptions are listed by the function they come from.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core
from test_accumulate import SYSTEMS, batch

from xmodal_jax.distributed import sharding
from xmodal_jax.errors import ConfigError
from xmodal_jax.models import layers
from xmodal_jax.models.layers import attention as attention_lib
from xmodal_jax.optim import schedules
from xmodal_jax.runtime import setup
from xmodal_jax.runtime import step as step_lib

PACKAGE = pathlib.Path(step_lib.__file__).parents[1]
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
EXACT = (jax.lax.Precision.HIGHEST,) * 2  # of both operands

RESNET = dict(kind="resnet", size=32, width=8, depths=(1, 2, 1, 1))
VIT = dict(kind="clip", size=16, patch=8, width=24, depth=2, heads=2)
SWIN = dict(kind="swin", size=32, window=4, embed=8, depths=(1, 2), heads=(1, 2), drop_path=0.1)
MIXUP = {"mixup": dict(beta=0.1, block=0)}
CASES = {name: (name, MIXUP if name == "zerovl" else {}) for name in SYSTEMS} | {
  "clip resnet": ("clip", {"image": RESNET}),
  "clip sigmoid": ("clip", {"loss": "sigmoid"}),
}
# Variants whose scores are computed by other products.
SCORED = {
  "hat both": ("hat", {"direction": "both", "first_levels": (0,)}),
  "tgdt local": ("tgdt", {"first_stage": "local"}),
  "tgdt scan": ("tgdt", {"first_stage": "local", "mode": "scan-sentences"}),
}
ENCODERS = {
  "team swin": ("team", {"image": SWIN}),
  "hat vit": ("hat", {"image": VIT, "levels": ((1, 1), (0, 0))}),
}

# Functions where matmuls have two float32 operands: scores of pairs of float32 embeddings.
# "file:function" within the package; a final * matches any rest.
SCORES = ("clip.py:CLIP", "zerovl.py:ZeroVL", "team.py:TEAM")
FLOAT32_MATMULS = ("losses/*", *(f"models/{system}.score" for system in SCORES))
# Functions with bfloat16 sums of few terms: pooling of pixels, copies of a text for its negatives.
SHORT_SUMS = ("models/towers/resnet.py:avg_pool", "models/team.py:TEAM.match*")
SUMS = {"reduce_sum", "reduce_prod", "cumsum", "cumprod", "reduce_window_sum"}
# The derivative of GELU has an elementwise exponential.
ALONE = ("jax/gelu",)
CURVED = {"exp", "exp2", "log", "log1p", "expm1", "rsqrt", "sqrt", "pow"}


def equations(jaxpr, called_at=None):
  """(equation, the equation whose source counts, see `places`) of a jaxpr, inner jaxprs included.

  jit caches traced jaxprs together with the source of their first call; equations inside of jit are
  therefore attributed to the function that calls it.
  """
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    source = called_at or eqn
    yield eqn, source
    for inner in core.jaxprs_in_params(eqn.params):
      yield from equations(inner, source if eqn.primitive.name == "jit" else called_at)


@functools.cache
def file_in_package(name: str) -> str | None:
  path = pathlib.Path(name)
  return str(path.relative_to(PACKAGE)) if PACKAGE in path.parents else None


def places(eqn) -> list[str]:
  """Functions of the package, "models/towers/vit.py:ViT.embed", innermost first, and "jax/gelu"."""
  frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else []
  out = []
  for frame in frames:
    name = frame.function_name.replace("<locals>.", "")
    if file := file_in_package(frame.file_name):
      out.append(f"{file}:{name}")
    elif name == "gelu":
      out.append("jax/gelu")
  return out


def matches(source, allowed) -> bool:
  at = lambda place, a: place.startswith(a[:-1]) if a.endswith("*") else place == a
  return any(at(place, a) for place in places(source) for a in allowed)


def wrong(jaxpr) -> list[str]:
  """Equations of a bfloat16 program in the wrong precision, a line each."""
  out = []

  def report(problem: str) -> None:
    operands = [str(v.aval) for v in eqn.invars]
    out.append(f"{problem}: {eqn.primitive.name} {operands} in {places(source)[:3]}")

  for eqn, source in equations(jaxpr):
    name = eqn.primitive.name
    kinds = [v.aval.dtype for v in eqn.invars if hasattr(v.aval, "dtype")]
    if name in ("dot_general", "conv_general_dilated"):
      if kinds[:2] == [F32, F32] and not matches(source, FLOAT32_MATMULS):
        report("float32 matmul")
      elif kinds[:2] == [F32, F32] and eqn.params["precision"] != EXACT:
        report("float32 matmul below highest precision")
      rounded = BF16 in kinds[:2] and eqn.outvars[0].aval.dtype != F32
      if rounded and matches(source, ("losses/*",)):
        report("scores in bfloat16")
    elif BF16 in kinds[:1]:
      many = name in SUMS and eqn.invars[0].aval.size > eqn.outvars[0].aval.size
      if many and not matches(source, SHORT_SUMS):
        report("sum in bfloat16")
      if name in CURVED and not matches(source, ALONE):
        report("norm, softmax or loss in bfloat16")
  return out


@functools.cache
def built(case: str):
  name, changes = (CASES | ENCODERS | SCORED)[case]
  config = SYSTEMS[name]("unused", dtype="bfloat16")
  with config.unlocked():
    for key, value in changes.items():
      config.model[key] = value
  config.mesh = (("data", -1),)
  return config, setup.build(config, jax.devices()[:1])


def shapes(config):
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  return {k: like(v) for k, v in batch(config, config.batch_size).items()}


def floats(tree) -> set:
  kinds = {jnp.dtype(x.dtype) for x in jax.tree.leaves(tree)}
  return {k for k in kinds if jnp.issubdtype(k, jnp.floating)}


@pytest.mark.parametrize(
  "case", [c if c in SYSTEMS else pytest.param(c, marks=pytest.mark.full) for c in CASES]
)
def test_train_step(case):
  config, b = built(case)
  schedule = schedules.make_schedule(config.optim, schedules.RunLength(48, 16, config.total))
  seen = []

  def look(grads, state, params=None, **extra):
    seen.append((floats(grads), floats(params)))
    return inner.update(grads, state, params, **extra)

  config.optim.ema = 0.9
  inner = b.optimizer(config.optim, schedule)
  tx = optax.GradientTransformationExtraArgs(inner.init, look)
  shardings = b.state_shardings(inner)
  state = jax.eval_shape(lambda: step_lib.init_state(b.init_model, tx))
  step = step_lib.make_train_step(b.graphdef, tx, jax.random.key(0), shardings, schedule)
  traced = step.trace(state, shapes(config))
  assert not wrong(traced.jaxpr)
  new, metrics = traced.out_info
  assert seen[0] == ({F32}, {F32})  # gradients and parameters
  assert floats(state) == floats(new) == floats(metrics) == {F32}
  dots = [e for e, _ in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
  half = [e for e in dots if {v.aval.dtype for v in e.invars} == {BF16}]
  assert len(half) > 20  # it does compute in bfloat16


@pytest.mark.parametrize("case", CASES | ENCODERS | SCORED)
def test_embed_and_score(case):
  config, b = built(case)

  def run(params, stats, batch):
    model = nnx.merge(b.graphdef, params, stats)
    images, texts = model.encode_image(batch), model.encode_text(batch)
    second = []
    if model.second_stage:
      each = lambda x: x[:, None]
      second = [model.rerank(images, jax.tree.map(each, texts))]
    return images, texts, model.score(images, texts), second

  pure = [nnx.to_pure_dict(s) for s in (b.params, b.stats)]
  traced = jax.jit(run).trace(*pure, shapes(config))
  assert not wrong(traced.jaxpr)
  images, texts, scores, second = traced.out_info
  assert floats((scores, second)) == {F32}
  for side in (images, texts):
    first = {k: v for k, v in side.items() if k not in b.system.second_stage}
    assert first and floats(first) <= {F32}


def precisions(b, config) -> set:
  """Of the float32 matmuls of the image tower, as traced now."""

  def encode(params, stats, batch):
    return nnx.merge(b.graphdef, params, stats).encode_image(batch)

  pure = [nnx.to_pure_dict(s) for s in (b.params, b.stats)]
  traced = jax.jit(encode).trace(*pure, shapes(config))
  found = {
    eqn.params["precision"]
    for eqn, _ in equations(traced.jaxpr)
    if eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype == F32
  }
  assert found
  return found


def test_precision_is_of_the_model_and_not_of_the_process():
  """Programs are traced long after they were built, with other models built in between."""
  high, plain = (SYSTEMS["clip"]("unused", precision=p) for p in ("high", "default"))
  process = jax.config.jax_default_matmul_precision
  built = setup.build(high), setup.build(plain)
  assert jax.config.jax_default_matmul_precision == process
  assert precisions(built[0], high) == {(jax.lax.Precision.HIGH,) * 2}
  assert precisions(built[1], plain) == {None}
  with jax.default_matmul_precision("highest"):
    assert precisions(setup.build(plain), plain) == {EXACT}
    assert precisions(setup.build(high), high) == {(jax.lax.Precision.HIGH,) * 2}
  with pytest.raises(ConfigError, match=r"config\.precision is 'hgh': expected default, high"):
    setup.build(SYSTEMS["clip"]("unused", precision="hgh"))


def test_every_system_is_here():
  from xmodal_jax.models import registry

  assert {name for name, _ in CASES.values()} == registry.SYSTEMS.keys()


def attention(q, k, v, logits=F32, weights=F32):
  s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=logits)
  p = jax.nn.softmax(s.astype(weights), axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", p, v)


@pytest.mark.parametrize("within", ["jit", "scan", "cond", "checkpoint", "custom_vjp", "shard_map"])
def test_what_is_wrong_is_found(within):
  """The check itself finds mistakes inside of every kind of nested jaxpr."""
  x = jnp.ones((8, 3, 2, 4), BF16)
  mesh = sharding.make_mesh((("data", 8),))

  def wrap(f):
    if within == "scan":
      return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]
    if within == "cond":
      return lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x)
    if within == "custom_vjp":
      g = jax.custom_vjp(f)
      g.defvjp(lambda x: (f(x), x), lambda x, d: (f(x) * d,))
      return g
    if within == "shard_map":
      spec = jax.sharding.PartitionSpec("data")
      return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.checkpoint(f) if within == "checkpoint" else jax.jit(f)

  def found(f):
    program = wrap(lambda x: f(x).astype(BF16))
    loss = lambda x: program(x).astype(F32).sum()
    return wrong(jax.make_jaxpr(program)(x)), wrong(jax.make_jaxpr(jax.grad(loss))(x))

  assert found(lambda x: attention(x, x, x)) == ([], [])
  wide = lambda x: x.astype(F32)
  for plain in found(lambda x: attention(wide(x), wide(x), x)):
    assert plain and all("float32 matmul" in line for line in plain)
  for plain in found(lambda x: attention(x, x, x, BF16, BF16)):
    assert any("softmax" in line for line in plain)


def test_a_system_with_a_mistake_is_found(monkeypatch):
  """bfloat16 logits in the attention of the towers."""
  config, b = built("clip")
  half = lambda q, k, v, mask=None, *, causal=False, **_: attention(q, k, v, BF16, BF16)
  monkeypatch.setattr(attention_lib, "_attention_einsum", half)

  def encode(params, stats, batch):
    return nnx.merge(b.graphdef, params, stats).encode_image(batch)

  pure = [nnx.to_pure_dict(s) for s in (b.params, b.stats)]
  lines = wrong(jax.jit(encode).trace(*pure, shapes(config)).jaxpr)
  assert lines and all("softmax" in line for line in lines)


def test_gradients_of_a_word_add_up_in_float32():
  """A word that occurs 1000 times: a bfloat16 sum of ones stops at 256."""
  table, ids = jnp.zeros((5, 2)), jnp.full((100, 10), 3)
  loss = lambda table: layers.lookup(table, ids, BF16).astype(F32).sum()
  np.testing.assert_array_equal(jax.grad(loss)(table)[3], [1000, 1000])
