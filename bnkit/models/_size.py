"""Which images a network takes, said before it fails somewhere inside."""

from __future__ import annotations

import torch

from .._checks import require

LARGEST_SMALL_IMAGE = 64
"""Up to this `image_size` a network of ImageNet gets the stem or head that is usual for CIFAR."""


def check_image_size(image_size: int, smallest: int, model: str) -> None:
    """Raise unless the option `image_size` is at least `smallest`."""
    require(
        isinstance(image_size, int) and image_size >= smallest,
        f"{model} needs images of {smallest} pixels a side or more, got image_size={image_size}: "
        "resize them or choose another model.",
    )


def check_images(x: torch.Tensor, smallest: int, model: str) -> None:
    """Raise unless x is (N, C, H, W) with H and W of at least `smallest`; for the start of `forward`."""
    if isinstance(x, torch.fx.Proxy):
        return
    require(x.dim() == 4, f"{model} takes images (N, C, H, W), got shape {tuple(x.shape)}: add or merge dimensions.")
    require(
        min(x.shape[2], x.shape[3]) >= smallest,
        f"this {model} needs images of {smallest} pixels a side or more, got {x.shape[2]}×{x.shape[3]}: "
        "resize them, or create the model for them with image_size=.",
    )
