"""Images made worse on purpose: four corruptions at five strengths, by formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from .._checks import require, unknown

STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),
}
"""Standard deviation of the noise, that of the blur in pixels, factor of the contrast, and what is added, for values
from 0 to 1: those of CIFAR-10-C (Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261)."""


def corrupted(images: Tensor, corruption: str, strength: int, seed: int = 0) -> Tensor:
    """Images made worse; values stay between 0 and 1.

    - noise: x + σ·z with z standard normal, independent everywhere;
    - blur: Gaussian, over 9 pixels;
    - contrast: (x - m)·c + m with m the mean of the image's channel;
    - brightness: x + b in every channel. (CIFAR-10-C adds to the value of HSV, which is the largest channel.)

    Args:
        images: (N, C, H, W), values from 0 to 1.
        corruption: a key of `STRENGTHS`; with strength 0 also "none".
        strength: 1 to 5; 0 leaves the images as they are.
        seed: of the noise.

    Raises:
        UserError: an unknown corruption or strength.
    """
    require(0 <= strength <= 5, f"a corruption's strength is 0 to 5, got {strength}: 3 is the middle.")
    if strength == 0 and corruption in (*STRENGTHS, "none"):
        return images
    if corruption not in STRENGTHS:
        raise unknown("corruption", corruption, STRENGTHS)
    value = STRENGTHS[corruption][strength - 1]
    if corruption == "noise":
        generator = torch.Generator().manual_seed(seed)
        images = images + value * torch.randn(images.shape, generator=generator)
    elif corruption == "blur":
        images = gaussian_blur(images, [9, 9], [value, value])
    elif corruption == "contrast":
        mean = images.mean((2, 3), keepdim=True)
        images = (images - mean) * value + mean
    else:
        images = images + value
    return images.clamp(0, 1)
