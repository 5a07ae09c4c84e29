"""Attention, dense layers and Transformer blocks that towers consist of.

Every parameter has its logical axes ("embed", "heads", "mlp", "vocab") as metadata `axes`, which
the sharding rules of a config map to mesh axes. Unnamed leading axes are those of stacked layers.
Metadata under an axis's name (`heads`) is the number of units of the axis that a shard may not cut.
"""

from xmodal_jax.models.layers.attention import MultiHeadAttention, dot_product_attention
from xmodal_jax.models.layers.blocks import Block
from xmodal_jax.models.layers.dense import (
  ACTIVATIONS,
  Linear,
  add,
  apply_dense,
  dropout,
  flatten_leading,
  layer_norm,
  linear,
  lookup,
  merge_heads,
  normal,
  quick_gelu,
  split_heads,
  uniform,
  zeros,
)
from xmodal_jax.models.layers.partitioning import constrain_batch
from xmodal_jax.models.layers.patches import PatchEmbed
from xmodal_jax.models.layers.scanning import depth_of, rematerialize, scan, stack
