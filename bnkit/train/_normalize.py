"""From bytes to the values that a network sees."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require
from ..data import IMAGENET_MEAN, IMAGENET_STD, ImageSet, Photographs
from ._config import FitConfig
from ._devices import Devices


class Normalization:
    """Images (N, C, H, W) of 0 to 255 on the device, normalized, in the layout and type that `config` asks for.

    `normalize` is `"unit"` for x / 255, or `"channel"` for (x / 255 - mean) / std by the training images' channels,
    where a constant channel is left at zero, or `"imagenet"` by ImageNet's.
    """

    def __init__(self, data: ImageSet | Photographs, config: FitConfig, devices: Devices) -> None:
        self._format = torch.channels_last if config.channels_last else torch.contiguous_format
        self._dtype = devices.dtype
        self._scale: Tensor | float = 1 / 255
        self._shift: Tensor | None = None
        if config.normalize != "unit":
            mean, std = (moment.double().view(1, -1, 1, 1) for moment in _moments(data, config.normalize))
            std = torch.where(std > 0, std, 1.0)
            self._scale = (1 / (255 * std)).to(devices.dtype).to(devices.device)
            self._shift = (mean / std).to(devices.dtype).to(devices.device)

    def __call__(self, images: Tensor) -> Tensor:
        values = images.to(self._dtype, memory_format=self._format).mul_(self._scale)
        return values if self._shift is None else values.sub_(self._shift)


def _moments(data: ImageSet | Photographs, normalize: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, of values from 0 to 1."""
    if normalize == "channel":
        return data.mean, data.std
    require(data.shape[0] == 3, f"normalize='imagenet' is for 3 channels, got {data.shape[0]}: choose 'channel'.")
    return torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
