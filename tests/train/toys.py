"""A small image set that can be learned, and a net with every kind of state: momentum, running statistics, dropout."""

from __future__ import annotations

import torch
from torch import nn

import bnkit.nn
from bnkit.data import ImageSet


def toy_set(train: int = 300, test: int = 90, classes: int = 3) -> ImageSet:
    """8×8 images in two channels: a pattern of the class, under noise."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, 200, (classes, 2, 8, 8), generator=generator)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % classes
        noise = torch.randint(0, 56, (n, 2, 8, 8), generator=generator)
        return (patterns[labels] + noise).to(torch.uint8), labels

    return ImageSet("toy", *draw(train), *draw(test), classes=tuple("abcdefgh"[:classes]))


def toy_net(dropout: float = 0.3, norm: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        bnkit.nn.BatchNorm2d(4, activation="relu") if norm else nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 3),
    )
