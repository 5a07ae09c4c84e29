"""The toy system's PyTorch files: `nn.Linear` and `nn.Embedding`."""

from xmodal_jax.interop import towers
from xmodal_jax.interop.rules import Rule

RULES = [*towers.dense("image.proj", "image"), Rule("word.weight", "word")]


def infer_config(shapes, scalars=None):
  """The model section of a config from the shapes of a state dict."""
  del scalars
  vocab, embed = shapes["word.weight"]
  return dict(system="toy", embed=embed, image=dict(size=16), text=dict(vocab=vocab))


def resize(path, value, shape):
  """Nothing depends on the resolution."""
  del path, shape
  return value
