"""VGG networks, with torchvision's `state_dict` keys."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require
from ._activation import Activation, activation_layer
from ._init import Init, conv2d, linear
from ._norm import Norm, norm_layers
from ._registry import register
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

_CONFIGURATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "B": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "D": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "E": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
_SMALLEST_IMAGE, _SMALLEST_SMALL_IMAGE = 32, 17


class VGG(nn.Module):
    """3×3 convolutions in five stages, each closed by a pooling, and three linear layers.

    Simonyan and Zisserman 2015, table 1; the norm goes between a convolution and its ReLU. Keys and shapes of the
    `state_dict` are torchvision's: those of `vggN` for `norm="none"`, of `vggN_bn` for `norm="batch"`.

    Images up to 64 pixels a side get a small head: the last maps are averaged to one value a channel and the two
    hidden linear layers have 512 units instead of 4096, as is usual for CIFAR; poolings round up, so that 28 pixels
    survive five of them.

    Args:
        configuration: `"A"`, `"B"`, `"D"` or `"E"`, which make 11, 13, 16 and 19 layers.
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input; it chooses the head. From 65 on one model takes any image of 32 pixels and more.
        dropout: Probability of zeroing a unit of the two hidden linear layers.
        activation: Its name, or a function that makes it.
        placement: The norm goes `"before"` or `"after"` the activation.
        conv_bias: Whether convolutions have a bias. Ahead of a norm it changes nothing, but torchvision's weights
            have it.
        init: Of the convolutions and linear layers: `"kaiming"` (torchvision's for convolutions), `"xavier"`,
            `"lecun"`, `"small-gaussian"`, or the standard deviation of a Gaussian (the paper's is 0.1).

    Raises:
        UserError: an unknown name, images that are too small, or a dropout outside [0, 1].
    """

    def __init__(
        self,
        *,
        configuration: str,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 224,
        dropout: float = 0.5,
        activation: Activation = "relu",
        placement: str = "before",
        conv_bias: bool = True,
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, _SMALLEST_SMALL_IMAGE, "vgg")
        require(0 <= dropout <= 1, f"dropout must be between 0 and 1, got {dropout}: try 0.5.")
        require(conv_bias or norm != "none", "conv_bias=False needs a norm, whose β replaces it: leave it out.")
        small = image_size <= LARGEST_SMALL_IMAGE
        self.smallest = _SMALLEST_SMALL_IMAGE if small else _SMALLEST_IMAGE
        pooled, units = (1, 512) if small else (7, 4096)
        layers: list[nn.Module] = []
        for stage in _CONFIGURATIONS[configuration]:
            for channels in stage:
                layers.append(conv2d(in_channels, channels, 3, padding=1, bias=conv_bias, init=init))
                layers += norm_layers(norm, channels, activation=activation, placement=placement)
                in_channels = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=small))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = nn.Sequential(
            linear(in_channels * pooled**2, units, bias=True, init=init),
            activation_layer(activation),
            nn.Dropout(dropout),
            linear(units, units, bias=True, init=init),
            activation_layer(activation),
            nn.Dropout(dropout),
            linear(units, num_classes, bias=True, init=init),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.smallest, "vgg")
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


register("vgg11", VGG, configuration="A")
register("vgg13", VGG, configuration="B")
register("vgg16", VGG, configuration="D")
register("vgg19", VGG, configuration="E")
