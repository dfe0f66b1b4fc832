"""An image set on the device, cut into normalized batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import require
from ..data import Augmentation, ImageSet
from ._config import FitConfig
from ._devices import Devices

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Batches:
    """Batches of `data`, which is moved to the device whole, as bytes.

    Args:
        data: The images.
        config: `normalize` is `"unit"` for x / 255, or `"channel"` for (x / 255 - mean) / std by the training images'
            channels, where a constant channel is left at zero, or `"imagenet"` by ImageNet's; `augment` changes
            training images; `channels_last`.
        devices: Where, and which share of each training batch.
    """

    def __init__(self, data: ImageSet, config: FitConfig, devices: Devices) -> None:
        self._augment = Augmentation.parse(config.augment)
        self._format = torch.channels_last if config.channels_last else torch.contiguous_format
        self._devices = devices
        to = devices.device
        self._train = data.train_images.to(to), data.train_labels.to(to)
        self._test = data.test_images.to(to), data.test_labels.to(to)
        self._scale: Tensor | float = 1 / 255
        self._shift: Tensor | None = None
        if config.normalize != "unit":
            mean, std = (moment.double().view(1, -1, 1, 1) for moment in _moments(data, config.normalize))
            std = torch.where(std > 0, std, 1.0)
            self._scale = (1 / (255 * std)).to(devices.dtype).to(to)
            self._shift = (mean / std).to(devices.dtype).to(to)

    def training(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """This process's share of the training batch at `index`: images (n, C, H, W) and labels (n,)."""
        index = index[self._devices.rank :: self._devices.world].to(self._devices.device)
        images, labels = self._train
        return self._normalized(self._augment(images.index_select(0, index))), labels.index_select(0, index)

    def calibration(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """This process's share of `count` training images spread over all, not augmented."""
        images, _ = self._train
        index = torch.arange(0, len(images), max(1, len(images) // count), device=images.device)[:count]
        for part in index[self._devices.rank :: self._devices.world].split(batch_size):
            yield self._normalized(images.index_select(0, part))

    def test(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and labels in order."""
        images, labels = self._test
        for part, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self._normalized(part), targets

    def _normalized(self, images: Tensor) -> Tensor:
        values = images.to(self._devices.dtype, memory_format=self._format).mul_(self._scale)
        return values if self._shift is None else values.sub_(self._shift)


def _moments(data: ImageSet, normalize: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, of values from 0 to 1."""
    if normalize == "channel":
        return data.mean, data.std
    require(data.shape[0] == 3, f"normalize='imagenet' is for 3 channels, got {data.shape[0]}: choose 'channel'.")
    return torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
