"""Squeeze-and-excitation networks, with timm's `state_dict` keys."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require
from ._activation import Activation
from ._init import Init, output_layer
from ._norm import Norm, norm_layers
from ._registry import register
from ._residual import BasicBlock, Bottleneck, Style, stages
from ._size import LARGEST_SMALL_IMAGE, check_image_size
from ._squeeze_excite import reduction_of
from .resnet import ResNet


class SENet154(nn.Module):
    """The winner of ILSVRC 2017: excited bottlenecks of 64 groups (Hu et al. 2018, appendix).

    Against `seresnet152` the first 1×1 convolution of a block is half as wide, projections that halve the maps are
    3×3, three 3×3 convolutions make the stem, and dropout precedes the output layer.

    Images up to 64 pixels a side get a stem that leaves their size alone.

    Args:
        depths: Blocks of each stage.
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 8 or more; it chooses the stem.
        width: Half the channels of the stem, and a quarter of those that leave the first stage; a multiple of 32.
        groups: Of the 3×3 convolutions, each with `width` / 16 channels a group in the first stage.
        se: The reduction of the excitations (True for 16), or False for none.
        dropout: Probability of zeroing one of the features that the output layer sees.
        activation: Its name, or a function that makes it.
        init: Of all convolutions and the output layer, see `ResNet`.

    Raises:
        UserError: an unknown name, images that are too small, a width or a dropout that it can't have.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        depths: tuple[int, int, int, int] = (3, 8, 36, 3),
        image_size: int = 224,
        width: int = 64,
        groups: int = 64,
        se: bool | int = True,
        dropout: float = 0.2,
        activation: Activation = "relu",
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, 8, "senet154")
        require(width > 0 and width % 32 == 0, f"width must be a multiple of 32, got {width}: the paper's is 64.")
        require(0 <= dropout <= 1, f"dropout must be between 0 and 1, got {dropout}: try 0.2.")
        style = Style(
            norm, activation, init, "B", reduction_of(se), groups=groups, base_width=4, narrow=2, down_kernel=3
        )
        small = image_size <= LARGEST_SMALL_IMAGE
        self.conv1 = nn.Sequential(
            style.conv(in_channels, width, 3, 1 if small else 2),
            *norm_layers(norm, width, activation=activation),
            style.conv(width, width, 3),
            *norm_layers(norm, width, activation=activation),
            style.conv(width, 2 * width, 3),
        )
        self.bn1, self.act1 = style.norm_and_activation(2 * width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(Bottleneck, 2 * width, width, depths, style)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = output_layer(width * 8 * Bottleneck.expansion, num_classes, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


_EXCITED: dict[str, object] = {"se": True}
register("seresnet18", ResNet, block=BasicBlock, depths=(2, 2, 2, 2), defaults=_EXCITED)
register("seresnet34", ResNet, block=BasicBlock, depths=(3, 4, 6, 3), defaults=_EXCITED)
register("seresnet50", ResNet, block=Bottleneck, depths=(3, 4, 6, 3), defaults=_EXCITED)
register("seresnet101", ResNet, block=Bottleneck, depths=(3, 4, 23, 3), defaults=_EXCITED)
register("seresnet152", ResNet, block=Bottleneck, depths=(3, 8, 36, 3), defaults=_EXCITED)
register("senet154", SENet154)
