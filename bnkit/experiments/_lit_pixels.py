"""Binary images as lists of their lit pixels.

A product with such images is a sum of a matrix's rows at the lit pixels. A bundled digit lights 104 of 784, so that
the sums take 0.3 to 0.5 times as long as the dense product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The public `torch.embedding_bag` also notes for the gradient which list each row is in, and takes three times as long.
_embedding_bag = torch.ops.aten._embedding_bag_forward_only

# Above this share of lit pixels the lists, which have to be made, gain nothing on the dense product.
MOST_LIT = 0.25


@dataclass(frozen=True)
class Lists:
    """Lists of rows, one behind the other: list i is `rows[starts[i] : starts[i + 1]]`."""

    rows: Tensor
    starts: Tensor

    def sums(self, matrix: Tensor) -> Tensor:
        """(rows, W) → (lists, W), the sum of each list's rows."""
        return _embedding_bag(matrix, self.rows, self.starts)[0]


class LitPixels(NamedTuple):
    """A batch x (B, F) of images of F pixels, 0 or 1.

    Args:
        by_image: of each image the lit pixels, so that `by_image.sums(weight)` is x @ weight.
        by_pixel: of each pixel the images that light it, so that `by_pixel.sums(delta)` is xᵀ @ delta.
    """

    by_image: Lists
    by_pixel: Lists

    @classmethod
    def of(cls, batches: np.ndarray) -> list[LitPixels]:
        """For each batch of `batches`, (M, B, F) bool."""
        return [cls(*lists) for lists in zip(lists_of(batches), lists_of(batches.swapaxes(1, 2)), strict=True)]


def lists_of(masks: np.ndarray) -> list[Lists]:
    """For each matrix of `masks`, (M, rows, columns) bool, the columns that are set in each of its rows."""
    count, height, width = masks.shape
    places = np.flatnonzero(masks)
    rows = places // width
    columns = torch.from_numpy((places - rows * width).astype(np.int32))
    starts = np.zeros(count * height + 1, dtype=np.int32)
    np.cumsum(np.bincount(rows, minlength=count * height), out=starts[1:])
    lists = []
    for first in range(0, count * height, height):
        low, high = starts[first], starts[first + height]
        lists.append(Lists(columns[low:high], torch.from_numpy(starts[first : first + height] - low)))
    return lists


def mostly_dark(*parts: Tensor) -> bool:
    """Whether uint8 images have one value besides 0, in so few pixels that lists are faster."""
    top = max(images.max().item() for images in parts)
    lit = sum(int(images.count_nonzero()) for images in parts)
    binary = all(bool(((images == 0) | (images == top)).all()) for images in parts)
    return binary and lit <= MOST_LIT * sum(images.numel() for images in parts)
