"""Darknet-53, the backbone of YOLOv3."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ._activation import Activation
from ._conv_norm import ConvNorm, ConvStyle
from ._init import Init, output_layer
from ._norm import Norm
from ._registry import register
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

_BLOCKS = (1, 2, 8, 8, 4)
_SMALLEST_IMAGE, _SMALLEST_SMALL_IMAGE = 32, 8

LeakyReLU = partial(nn.LeakyReLU, 0.1)
"""The leaky ReLU of Darknet's own configuration files; the slope is not in the paper."""


class DarknetBlock(nn.Module):
    """A 1×1 convolution to half the channels and a 3×3 back, added to the block's input behind its activation."""

    def __init__(self, channels: int, style: ConvStyle):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels // 2, 1, style)
        self.conv2 = ConvNorm(channels // 2, channels, 3, style)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Darknet53(nn.Module):
    """52 convolutions in five stages, each opened by one of stride 2, and a linear layer.

    Redmon and Farhadi 2018, section 2.4 and table 1. A norm follows each convolution and takes the place of its bias.

    Images up to 64 pixels a side pass the first two stages at their own size: stride 1 in place of 2.

    Args:
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 8 or more; it chooses the strides. From 65 on one model takes any image of 32
            pixels and more.
        activation: Its name, or a function that makes it. The default is a leaky ReLU of slope 0.1; batch norm
            computes `"leaky_relu"`, of slope 0.01, in one pass with itself.
        placement: The norm goes `"before"` or `"after"` the activation.
        init: Of all layers: `"kaiming"`, `"xavier"`, `"lecun"`, `"torch"`, `"small-gaussian"`, or the standard
            deviation of a Gaussian.

    Raises:
        UserError: an unknown name, or images that are too small.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 256,
        activation: Activation = LeakyReLU,
        placement: str = "before",
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, _SMALLEST_SMALL_IMAGE, "darknet53")
        style = ConvStyle(norm, activation, init, placement)
        small = image_size <= LARGEST_SMALL_IMAGE
        self.smallest = _SMALLEST_SMALL_IMAGE if small else _SMALLEST_IMAGE
        self.stem = ConvNorm(in_channels, 32, 3, style)
        stages, channels = [], 32
        for number, blocks in enumerate(_BLOCKS):
            first = ConvNorm(channels, 2 * channels, 3, style, stride=1 if small and number < 2 else 2)
            channels *= 2
            stages.append(nn.Sequential(first, *(DarknetBlock(channels, style) for _ in range(blocks))))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = output_layer(channels, num_classes, init)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.smallest, "darknet53")
        return self.fc(torch.flatten(self.avgpool(self.stages(self.stem(x))), 1))


register("darknet53", Darknet53)
