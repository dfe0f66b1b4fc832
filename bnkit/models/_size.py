"""Which images a network takes, said before it fails somewhere inside."""

from __future__ import annotations

import math

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
    _check_form(x, model)
    require(
        min(x.shape[2], x.shape[3]) >= smallest,
        f"this {model} needs images of {smallest} pixels a side or more, got {x.shape[2]}×{x.shape[3]}: "
        "resize them, or create the model for them with image_size=.",
    )


def check_side(x: torch.Tensor, side: int, model: str) -> None:
    """Raise unless x is (N, C, side, side); for the start of `forward`."""
    if isinstance(x, torch.fx.Proxy):
        return
    _check_form(x, model)
    require(
        x.shape[2] == x.shape[3] == side,
        f"this {model} takes images of {side}×{side}, got {x.shape[2]}×{x.shape[3]}: "
        "resize them, or create the model for them with image_size=.",
    )


def check_values(x: torch.Tensor, shape: tuple[int, int, int], model: str) -> None:
    """Raise unless x is (N, ...) with as many values an image as `shape` has; for the start of `forward`."""
    if isinstance(x, torch.fx.Proxy):
        return
    require(
        math.prod(x.shape[1:]) == math.prod(shape),
        f"this {model} takes images {shape}, each with {math.prod(shape)} values, got input of shape {tuple(x.shape)}: "
        "resize them, or create the model for them with image_size= and in_channels=.",
    )


def _check_form(x: torch.Tensor, model: str) -> None:
    require(x.dim() == 4, f"{model} takes images (N, C, H, W), got shape {tuple(x.shape)}: add or merge dimensions.")
