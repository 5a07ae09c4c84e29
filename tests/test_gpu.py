"""Code paths specific to NVIDIA GPUs; skipped without one (run with JAX_PLATFORMS=cuda,cpu)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmodal_jax.models import layers
from xmodal_jax.models.layers import attention as attention_lib


@pytest.fixture(autouse=True)
def gpu():
  if not attention_lib._has_cudnn():
    pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")


@pytest.mark.parametrize(
  "lengths, causal", [((257, 257), False), ((50, 50), False), ((77, 77), True), ((40, 257), False)]
)
def test_flash_attention_is_as_near_as_the_plain_form(lengths, causal):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = ((4, lengths[i], 12, 64) for i in (0, 1, 1, 0))
  x = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
  half = [x.astype(jnp.bfloat16) for x in x]

  def both(form, q, k, v, d):
    value, pull = jax.vjp(lambda *x: form(*x, causal=causal), q, k, v)
    return value, *pull(d)

  with jax.default_device(jax.devices("cpu")[0]):
    on_host = jax.device_put(x, jax.devices("cpu")[0])
    exact = jax.jit(functools.partial(both, attention_lib._attention_einsum))(*on_host)
  plain = jax.jit(functools.partial(both, attention_lib._attention_einsum))(*half)
  compiled = jax.jit(functools.partial(both, layers.dot_product_attention)).lower(*half).compile()
  assert "__cudnn$fmha" in compiled.as_text()
  flash = compiled(*half)
  for a, b, want in zip(*(jax.device_get(y) for y in (flash, plain, exact)), strict=True):
    off = lambda y, want=want: np.linalg.norm(y.astype(np.float32) - want) / np.linalg.norm(want)
    assert off(a) < max(1.5 * off(b), 1e-3)


def test_float32_is_left_to_the_plain_form():
  x = jnp.ones((2, 5, 3, 64))
  program = jax.jit(layers.dot_product_attention).lower(x, x, x).compile()
  assert "__cudnn$fmha" not in program.as_text()
