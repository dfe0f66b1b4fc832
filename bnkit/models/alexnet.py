"""AlexNet in one column, with torchvision's `state_dict` keys."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require
from ._activation import Activation, activation_layer
from ._conv_norm import ConvStyle
from ._init import Init, linear, output_layer
from ._norm import Norm
from ._registry import register
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

_SMALLEST_IMAGE, _SMALLEST_SMALL_IMAGE = 63, 15


class AlexNet(nn.Module):
    """Five convolutions with overlapping poolings, and three linear layers with dropout.

    Krizhevsky et al. 2012, section 3, in the form for one GPU: "One weird trick for parallelizing convolutional
    neural networks" (Krizhevsky 2014), with 64, 192, 384, 256 and 256 maps and without response normalization. For
    `norm="none"` keys and shapes of the `state_dict` are torchvision's. A norm follows each convolution and takes
    the place of its bias.

    Images up to 64 pixels a side get a 3×3 convolution of stride 1 for the 11×11 of stride 4, and the small head of
    `VGG`: maps averaged to one value a channel, and hidden linear layers of 512 units.

    Args:
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 15 or more; it chooses stem and head. From 65 on one model takes any image of
            63 pixels and more.
        dropout: Probability of zeroing a unit ahead of each hidden linear layer.
        activation: Its name, or a function that makes it.
        placement: The norm goes `"before"` or `"after"` the activation.
        init: Of all layers: `"kaiming"`, `"xavier"`, `"lecun"`, `"torch"`, `"small-gaussian"` (the paper's, section
            5), or the standard deviation of a Gaussian. Biases start at zero; the paper sets some of them to one.

    Raises:
        UserError: an unknown name, images that are too small, or a dropout outside [0, 1].
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 224,
        dropout: float = 0.5,
        activation: Activation = "relu",
        placement: str = "before",
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, _SMALLEST_SMALL_IMAGE, "alexnet")
        require(0 <= dropout <= 1, f"dropout must be between 0 and 1, got {dropout}: try 0.5.")
        style = ConvStyle(norm, activation, init, placement)
        small = image_size <= LARGEST_SMALL_IMAGE
        self.smallest = _SMALLEST_SMALL_IMAGE if small else _SMALLEST_IMAGE
        self.features = nn.Sequential(
            style.conv(in_channels, 64, 3) if small else style.conv(in_channels, 64, 11, 4, 2),
            *style.follow(64),
            nn.MaxPool2d(3, 2),
            style.conv(64, 192, 5),
            *style.follow(192),
            nn.MaxPool2d(3, 2),
            style.conv(192, 384, 3),
            *style.follow(384),
            style.conv(384, 256, 3),
            *style.follow(256),
            style.conv(256, 256, 3),
            *style.follow(256),
            nn.MaxPool2d(3, 2),
        )
        pooled, units = (1, 512) if small else (6, 4096)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            linear(256 * pooled**2, units, bias=True, init=init),
            activation_layer(activation),
            nn.Dropout(dropout),
            linear(units, units, bias=True, init=init),
            activation_layer(activation),
            output_layer(units, num_classes, init),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.smallest, "alexnet")
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


register("alexnet", AlexNet)
