"""A labelled image set, whole in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Training and test images with their labels.

    Attributes:
        name: what `load` was asked for; the folder's name where that was a path.
        train_images: uint8, (N, C, H, W), 0..255.
        train_labels: int64, (N,), indices into `classes`.
        test_images: as `train_images`, with the same C, H and W.
        test_labels: as `train_labels`.
        classes: the classes' names.
        skipped: image files left out because they can't be read.
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert images.ndim == 4
            assert labels.shape == images.shape[:1]
        assert self.train_images.shape[1:] == self.test_images.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def mean(self) -> Tensor:
        """Mean of each channel over the training images scaled to [0, 1]; float32, (C,)."""
        return self._moments[0].clone()

    @property
    def std(self) -> Tensor:
        """Biased standard deviation of each channel over the training images scaled to [0, 1]; float32, (C,).

        A constant channel's is 0.
        """
        return self._moments[1].clone()

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        pairs = [_exact_moments(self.train_images[:, channel]) for channel in range(self.shape[0])]
        mean, variance = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        return mean.float(), variance.sqrt().float()


def _exact_moments(values: Tensor) -> tuple[float, float]:
    """Mean and biased variance of uint8 `values` / 255.

    A byte has 256 values, so a histogram holds all of it, and integers and fractions do the rest without rounding.
    """
    counts = torch.bincount(values.reshape(-1), minlength=256).tolist()
    total = sum(counts)
    mean = Fraction(sum(value * count for value, count in enumerate(counts)), 255 * total)
    square = Fraction(sum(value * value * count for value, count in enumerate(counts)), 255**2 * total)
    return float(mean), float(square - mean**2)
