"""The train state."""

from typing import Any

import flax.struct
import jax
import optax

Array = jax.Array


@flax.struct.dataclass
class TrainState:
  """Everything that training changes, as plain arrays: no module, no key, no iterator."""

  step: Array  # int32 []
  params: dict[str, Any]  # float32, nested by attribute name
  stats: dict[str, Any]  # running statistics; {} where a system has none
  opt_state: optax.OptState
