"""SqueezeNet, with torchvision's `state_dict` keys."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require
from ._activation import Activation, activation_layer
from ._conv_norm import ConvStyle
from ._init import Init, conv2d
from ._norm import Norm
from ._registry import register
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

# Maps of the squeeze convolution and of each expansion, for each fire module; None is a pooling.
_Modules = tuple[tuple[int, int] | None, ...]
_MODULES: dict[str, _Modules] = {
    "1_0": (None, (16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256), None, (64, 256)),
    "1_1": (None, (16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192), (64, 256), (64, 256)),
}
_STEMS = {"1_0": (96, 7), "1_1": (64, 3)}
_SMALLEST_IMAGE = {"1_0": 21, "1_1": 17}
_SMALLEST_SMALL_IMAGE = 8


class Fire(nn.Module):
    """A 1×1 convolution that squeezes the channels, then 1×1 and 3×3 side by side that expand them (section 3.2)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int, style: ConvStyle):
        super().__init__()
        self.squeeze = style.conv(in_channels, squeezed, 1)
        self.squeeze_norm = nn.Sequential(*style.follow(squeezed))
        self.expand1x1 = style.conv(squeezed, expanded, 1)
        self.expand1x1_norm = nn.Sequential(*style.follow(expanded))
        self.expand3x3 = style.conv(squeezed, expanded, 3)
        self.expand3x3_norm = nn.Sequential(*style.follow(expanded))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze_norm(self.squeeze(x))
        return torch.cat([self.expand1x1_norm(self.expand1x1(x)), self.expand3x3_norm(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """A convolution, eight fire modules, and a convolution whose averaged maps are the logits.

    Iandola et al. 2016, table 1; version 1.1 is its authors' later form with 2.4 times fewer multiply-adds. For
    `norm="none"` keys and shapes of the `state_dict` are torchvision's. A norm follows each convolution but the last
    and takes the place of its bias.

    Images up to 64 pixels a side get a 3×3 convolution of stride 1 at the start.

    Args:
        version: `"1_0"` or `"1_1"`.
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 8 or more; it chooses the stem. From 65 on one model takes any image of 21
            pixels and more (17 in version 1.1).
        dropout: Probability of zeroing a value ahead of the last convolution.
        activation: Its name, or a function that makes it.
        placement: The norm goes `"before"` or `"after"` the activation.
        init: Of the convolutions: `"kaiming"` (with the fan of the inputs, and N(0, 0.01²) in the last one, as in
            torchvision), `"xavier"`, `"lecun"`, `"torch"`, `"small-gaussian"`, or the standard deviation of a Gaussian.

    Raises:
        UserError: an unknown name, images that are too small, or a dropout outside [0, 1].
    """

    def __init__(
        self,
        *,
        version: str,
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
        check_image_size(image_size, _SMALLEST_SMALL_IMAGE, "squeezenet")
        require(0 <= dropout <= 1, f"dropout must be between 0 and 1, got {dropout}: try 0.5.")
        style = ConvStyle(norm, activation, init, placement, fan="in")
        small = image_size <= LARGEST_SMALL_IMAGE
        self.smallest = _SMALLEST_SMALL_IMAGE if small else _SMALLEST_IMAGE[version]
        channels, kernel_size = _STEMS[version]
        stem = style.conv(in_channels, channels, 3) if small else style.conv(in_channels, channels, kernel_size, 2, 0)
        layers: list[nn.Module] = [stem, *style.follow(channels)]
        for module in _MODULES[version]:
            if module is None:
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            else:
                layers.append(Fire(channels, *module, style))
                channels = 2 * module[1]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            conv2d(channels, num_classes, 1, bias=True, init=0.01 if init == "kaiming" else init),
            activation_layer(activation),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.smallest, "squeezenet")
        return torch.flatten(self.classifier(self.features(x)), 1)


register("squeezenet1_0", SqueezeNet, version="1_0")
register("squeezenet1_1", SqueezeNet, version="1_1")
