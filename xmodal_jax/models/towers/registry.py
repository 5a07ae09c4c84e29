"""Image towers by name. A new one is a file in this package and a line in KINDS."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from xmodal_jax.errors import ConfigError, check_choice
from xmodal_jax.models.towers import resnet, swin, vit
from xmodal_jax.models.towers.base import ImageTower


class Kind(NamedTuple):
  """The class of a tower, and its arguments where a config does not set them."""

  tower: type[ImageTower]
  options: Mapping[str, Any] = {}


_TIMM = dict(act="gelu", eps=1e-6, norm_tokens=True)

KINDS: dict[str, Kind] = {
  "clip": Kind(vit.ViT, dict(act="quick_gelu", eps=1e-5, ln_pre=True, patch_bias=False)),
  "timm": Kind(vit.ViT, _TIMM),
  "deit": Kind(vit.ViT, _TIMM),
  "swin": Kind(swin.Swin),
  "resnet": Kind(resnet.ModifiedResNet),
}


def build_image_tower(
  config: Mapping[str, Any],
  *,
  output_dim: int | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ImageTower:
  """The tower of a config's `model.image`: its `kind`, a name of KINDS, and the tower's arguments.

  output_dim: width of the tower's projection, for towers that have one (`ImageTower.projects`).
  Raises ConfigError for an unknown kind or argument.
  """
  config = dict(config)
  name = config.pop("kind")
  check_choice("model.image.kind", name, KINDS)
  kind = KINDS[name]
  known = inspect.signature(kind.tower.__init__).parameters
  if unknown := sorted(config.keys() - known.keys()):
    raise ConfigError(f"model.image.{unknown[0]} is no argument of kind={name!r}")
  if kind.tower.projects:
    config["output_dim"] = output_dim
  return kind.tower(**(dict(kind.options) | config), dtype=dtype, rngs=rngs)
