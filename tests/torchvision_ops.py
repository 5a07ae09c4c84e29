"""What open_clip and timm need beside a torch that torchvision was not built for (CPU wheels)."""

import contextlib

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> None:
  """Declares the operators for which torchvision registers kernels while it is imported."""
  for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # they exist
      _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
