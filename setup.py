"""Packaging. Lower bounds are versions that the tests passed with; see requirements-lock.txt."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "xmodal_jax/__init__.py").read_text())[1]
JAX = "0.10.2"

setuptools.setup(
  name="xmodal_jax",
  version=VERSION,
  description="Image-text retrieval in JAX: CLIP, ZeroVL, TEAM, TGDT and HAT",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["xmodal_jax", "xmodal_jax.*"]),
  package_data={"xmodal_jax": ["vocab/*"]},
  install_requires=[
    "absl-py>=2.5",
    "clu>=0.0.12",
    "einops>=0.8.2",
    "etils[epath]>=1.15",
    "flax>=0.12.8",
    "ftfy>=6.3.1",
    "google-crc32c>=1.9",
    f"jax>={JAX}",
    "jaxtyping>=0.3.11",
    "ml_collections>=1.1",
    "ml_dtypes>=0.5",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=12.3",
    "regex>=2026.11",
    "tensorboard>=2.21",  # imported by clu; TensorFlow no longer depends on it
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
    "tensorflow-text>=2.21",
  ],
  extras_require={
    "tpu": [f"jax[tpu]>={JAX}"],
    "cuda12": [f"jax[cuda12]>={JAX}"],
    "cuda13": [f"jax[cuda13]>={JAX}"],
    "beam": ["apache-beam>=2.77"],
    # Ahead-of-time compilation for TPUs that are not present (tools/compile_check.py), with the
    # libtpu that this jax was released with. Use a separate environment: without a TPU, libtpu
    # makes JAX slow to start and noisy.
    "compile": [f"jax[tpu]>={JAX}"],
    "test": [
      "beartype>=0.23.1",
      "eccv_caption>=0.1.0",
      "import-linter>=2.17",
      "matplotlib>=3.9",
      "pytest>=9.1,<9.2",  # 9.2 ignores the groups that pytest-xdist 3.8 puts into node ids
      "pytest-xdist>=3.8",
      "ruff>=0.17",
      "safetensors>=0.8",
      "tokenizers>=0.23.3",
    ],
  },
)
