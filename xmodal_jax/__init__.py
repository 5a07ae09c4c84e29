"""Image-text retrieval in JAX: CLIP, ZeroVL, TEAM, TGDT and HAT over shared towers and losses."""

__version__ = "0.1.0"
