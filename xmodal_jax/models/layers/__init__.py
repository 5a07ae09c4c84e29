"""Attention, dense layers and Transformer blocks that the towers are made of.

Every parameter carries its logical axes ("embed", "heads", "mlp", "vocab") as metadata `axes`; the
sharding rules of a config turn them into mesh axes. Leading axes without a name are layers. Where
an axis consists of parts that may not be cut, their number is metadata under the axis's name.
"""

from xmodal_jax.models.layers.attention import MultiHeadAttention, dot_product_attention
from xmodal_jax.models.layers.blocks import Block
from xmodal_jax.models.layers.dense import (
  ACTIVATIONS,
  Linear,
  add,
  dropout,
  flatten_leading,
  layer_norm,
  linear,
  lookup,
  normal,
  quick_gelu,
  uniform,
  zeros,
)
from xmodal_jax.models.layers.partitioning import constrain_batch
from xmodal_jax.models.layers.scanning import depth_of, rematerialize, scan, stack
