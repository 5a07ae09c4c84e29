"""With JAX_ENABLE_X64 set, replaces jnp.float32 by float64, also in Flax.

For test programs whose comparison needs less rounding error than float32 has. Import it before any
module that uses jnp.float32. Without the variable it does nothing.
"""

import jax
import jax.numpy as jnp

if jax.config.jax_enable_x64:
  jnp.float32 = jnp.float64

  from xmodal_jax.runtime import setup

  setup.compute_dtype = lambda *_: jnp.dtype("float64")
