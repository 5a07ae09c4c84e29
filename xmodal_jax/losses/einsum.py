"""Products of tokens for scores."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array


def exact_einsum(formula: str, a: ArrayLike, b: ArrayLike) -> Array:
  """einsum to float32 at full precision.

  By default TPUs and GPUs round float32 operands to bfloat16 or TF32, an error of up to 4e-3 in
  every product of unit vectors.

      scores = exact_einsum("ird,twd->itrw", regions, words)  # [I, R, D], [T, W, D] -> [I, T, R, W]
  """
  return jnp.einsum(formula, a, b, precision="highest", preferred_element_type=jnp.float32)
