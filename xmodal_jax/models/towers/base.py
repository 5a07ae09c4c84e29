"""The interface of image towers: all that a system uses of one."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray


class ImageTower(nnx.Module):
  """Base of image towers. Subclasses define `states`; the other methods have defaults.

  Constructors take the sizes of a config's `model.image` by keyword, and `remat`, `unroll`, `dtype`
  and `rngs`. Images are normalised pixels [B, S, S, 3]; a key means training (stochastic depth,
  statistics of the batch). Outputs have the compute dtype.

  widths: D of each entry of `states`.
  projects: class attribute, true for a tower whose constructor takes `output_dim` and which then
    projects its pooled vector itself, by `project`. Systems add a projection to the other towers.

  Example, a system's image side:

    tower = registry.build_image_tower(dict(kind="deit", size=224, ...), output_dim=512, rngs=rngs)
    x = tower(images, key)                           # [B, P, D]
    embedding = tower.project(tower.pooled(x))       # [B, 512]
    tokens = tower.tokens(x)                         # [B, P, D]
  """

  widths: tuple[int, ...]
  projects: bool = False

  def states(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> Sequence[Float[Array, "b p d"]] | Float[Array, "n b p d"]:
    """Tokens after every stage or block; under jit, entries that are not used cost nothing."""
    raise NotImplementedError(f"{type(self).__name__} defines no states")

  def __call__(
    self, images: Float[Array, "b s s 3"], key: PRNGKeyArray | None = None
  ) -> Float[Array, "b p d"]:
    """The last entry of `states`, the input of `tokens` and `pooled`."""
    return self.states(images, key)[-1]

  def tokens(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
    """Tokens for token-level matching: the tower's output as is, or through its final norm."""
    return x

  def pooled(self, x: Float[Array, "b p d"]) -> Float[Array, "b v"]:
    """One vector per image, before any projection; here the mean over tokens."""
    return x.mean(1)

  def project(self, pooled: Float[Array, "b v"]) -> Float[Array, "b e"]:
    """`pooled` vectors -> [B, output_dim]."""
    raise NotImplementedError(f"{type(self).__name__} has no projection")
