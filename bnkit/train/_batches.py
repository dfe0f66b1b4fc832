"""Labelled images as normalized batches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..data import Augmentation, BatchOrder, ImageSet, Photographs
from ._config import FitConfig
from ._devices import Devices
from ._normalize import Normalization
from ._photograph_batches import PhotographBatches


class Batches(Protocol):
    """What a run takes from its data."""

    def stream(self, order: BatchOrder) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the training batches in `order`, which moves on with each that is taken."""
        ...

    def calibration(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """This process's share of `count` training images spread over all, not augmented."""
        ...

    def test(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and labels in order."""
        ...


class ResidentBatches:
    """Batches of `data`, which is moved to the device whole, as bytes.

    Args:
        data: The images.
        config: `normalize` and `channels_last`; `augment` changes training images.
        devices: Where, and which share of each training batch.
    """

    def __init__(self, data: ImageSet, config: FitConfig, devices: Devices) -> None:
        self._augment = Augmentation.parse(config.augment)
        self._normalized = Normalization(data, config, devices)
        self._devices = devices
        to = devices.device
        self._train = data.train_images.to(to), data.train_labels.to(to)
        self._test = data.test_images.to(to), data.test_labels.to(to)

    def stream(self, order: BatchOrder) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches`."""
        return map(self.training, order)

    def training(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """This process's share of the training batch at `index`: images (n, C, H, W) and labels (n,)."""
        index = index[self._devices.rank :: self._devices.world].to(self._devices.device)
        images, labels = self._train
        return self._normalized(self._augment(images.index_select(0, index))), labels.index_select(0, index)

    def calibration(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """See `Batches`."""
        images, _ = self._train
        index = torch.arange(0, len(images), max(1, len(images) // count), device=images.device)[:count]
        for part in index[self._devices.rank :: self._devices.world].split(batch_size):
            yield self._normalized(images.index_select(0, part))

    def test(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches`."""
        images, labels = self._test
        for part, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self._normalized(part), targets


def batches_of(data: ImageSet | Photographs, config: FitConfig, devices: Devices) -> Batches:
    """The batches of images in memory, or of photographs in files."""
    kind = PhotographBatches if isinstance(data, Photographs) else ResidentBatches
    return kind(data, config, devices)  # pyright: ignore[reportArgumentType]
