"""Residual networks, with torchvision's `state_dict` keys, their pre-activation form, and plain nets to compare."""

from __future__ import annotations

import torch
from torch import nn

from ._activation import Activation
from ._init import Init, output_layer
from ._norm import Norm
from ._registry import register
from ._residual import BasicBlock, Block, Bottleneck, PreactBasicBlock, PreactBottleneck, Style, stages
from ._size import LARGEST_SMALL_IMAGE, check_image_size
from ._squeeze_excite import reduction_of

_SMALLEST_IMAGE = 8
_SMALLEST_CIFAR_IMAGE = 4


class ResNet(nn.Module):
    """Four stages of residual blocks for photographs (He et al. 2015, table 1).

    Keys and shapes of the `state_dict` are torchvision's; with `se` they are timm's. The norm follows each
    convolution and takes the place of its bias; the last of a branch also adds the shortcut.

    Images up to 64 pixels a side get the stem that is usual for CIFAR: a 3×3 convolution of stride 1 and no pooling.

    Args:
        block: The block of all stages.
        depths: Blocks of each stage.
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 8 or more; it chooses the stem. Either takes images of other sizes too.
        width: Channels of the first stage, ahead of the blocks' expansion; each stage has twice those of the last.
        shortcut: Where the shape changes, `"A"` pads with zeros and `"B"` projects; `"C"` projects everywhere;
            `"none"` leaves a plain net (He et al. 2015, section 4.1).
        se: Squeeze-and-excitation at the end of each branch (Hu et al. 2018): True, or the reduction instead of 16.
        zero_init_residual: Start with branches that give zero, each norm before an addition having weight 0
            (Goyal et al. 2017, section 5.1).
        groups, base_width: Of the 3×3 convolutions in bottlenecks (Xie et al. 2017).
        activation: Its name, or a function that makes it.
        init: Of all convolutions and the output layer: `"kaiming"` (He et al. 2015b, as in the paper), `"xavier"`,
            `"lecun"`, `"torch"`, `"small-gaussian"`, or the standard deviation of a Gaussian.

    Raises:
        UserError: an unknown name, images that are too small, or `zero_init_residual` with a norm that has no weight.
    """

    def __init__(
        self,
        *,
        block: Block,
        depths: tuple[int, int, int, int],
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 224,
        width: int = 64,
        shortcut: str = "B",
        se: bool | int = False,
        zero_init_residual: bool = False,
        groups: int = 1,
        base_width: int = 64,
        activation: Activation = "relu",
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, _SMALLEST_IMAGE, "a residual network of four stages")
        style = Style(
            norm, activation, init, shortcut, reduction_of(se), zero_init_residual, groups=groups, base_width=base_width
        )
        self.conv1, self.maxpool = stem(in_channels, width, image_size, style)
        self.bn1, self.act1 = style.norm_and_activation(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(block, width, width, depths, style)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = output_layer(width * 8 * block.expansion, num_classes, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(nn.Module):
    """Three stages of basic blocks for small images: 6n + 2 layers (He et al. 2015, section 4.2).

    Keys and shapes of the `state_dict` are those of https://github.com/akamaster/pytorch_resnet_cifar10, which
    reproduces the paper's errors; see `bnkit.models.load_weights`.

    Args:
        depth: Layers, 6n + 2.
        shortcut: `"A"`, the paper's for CIFAR, or another; see `ResNet`.
        image_size: Side of the input, 4 or more; the network is the same for all.
        width: Channels of the first stage.
        norm, num_classes, in_channels, se, zero_init_residual, activation, init: As in `ResNet`.

    Raises:
        UserError: what `ResNet` raises it for.
    """

    def __init__(
        self,
        *,
        depth: int,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 32,
        width: int = 16,
        shortcut: str = "A",
        se: bool | int = False,
        zero_init_residual: bool = False,
        activation: Activation = "relu",
        init: Init = "kaiming",
    ):
        super().__init__()
        assert depth % 6 == 2, depth
        check_image_size(image_size, _SMALLEST_CIFAR_IMAGE, "a residual network of three stages")
        style = Style(norm, activation, init, shortcut, reduction_of(se), zero_init_residual)
        self.conv1 = style.conv(in_channels, width, 3)
        self.bn1, self.act1 = style.norm_and_activation(width)
        self.layer1, self.layer2, self.layer3 = stages(BasicBlock, width, width, (depth // 6,) * 3, style)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = output_layer(width * 4, num_classes, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class PreactResNet(nn.Module):
    """Residual blocks that normalize and activate ahead of each convolution (He et al. 2016).

    The sums from block to block are left alone, and a norm and an activation follow the last of them.

    Args:
        block: The block of all stages.
        depths: Blocks of each stage: four of them for photographs, three for small images.
        image_size: Side of the input, 8 or more (4 with three stages). With four stages it chooses the stem, as in
            `ResNet`; three stages have that for small images.
        width: Channels of the first stage, ahead of the blocks' expansion.
        shortcut: `"A"`, `"B"`, `"C"` or `"none"`, see `ResNet`. A projection is a convolution alone.
        zero_init_residual: Start with branches that give zero: the last convolution of each has weight 0.
        norm, num_classes, in_channels, se, activation, init: As in `ResNet`.

    Raises:
        UserError: an unknown name, or images that are too small.
    """

    def __init__(
        self,
        *,
        block: Block,
        depths: tuple[int, ...],
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 224,
        width: int = 64,
        shortcut: str = "B",
        se: bool | int = False,
        zero_init_residual: bool = False,
        activation: Activation = "relu",
        init: Init = "kaiming",
    ):
        super().__init__()
        style = Style(norm, activation, init, shortcut, reduction_of(se), zero_init_residual)
        check_image_size(image_size, 2 ** (len(depths) - 1), f"a residual network of {len(depths)} stages")
        self.conv1, self.maxpool = stem(in_channels, width, image_size if len(depths) == 4 else 0, style)
        self.layers = nn.Sequential(*stages(block, width, width, depths, style))
        features = width * 2 ** (len(depths) - 1) * block.expansion
        self.bn, self.act = style.norm_and_activation(features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = output_layer(features, num_classes, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.maxpool(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.act(self.bn(x))), 1))


def stem(in_channels: int, width: int, image_size: int, style: Style) -> tuple[nn.Module, nn.Module]:
    """The first convolution and what pools after it, for images of `image_size` pixels a side."""
    if image_size <= LARGEST_SMALL_IMAGE:
        return style.conv(in_channels, width, 3), nn.Identity()
    return style.conv(in_channels, width, 7, 2), nn.MaxPool2d(3, 2, padding=1)


register("resnet18", ResNet, block=BasicBlock, depths=(2, 2, 2, 2))
register("resnet34", ResNet, block=BasicBlock, depths=(3, 4, 6, 3))
register("resnet50", ResNet, block=Bottleneck, depths=(3, 4, 6, 3))
register("resnet101", ResNet, block=Bottleneck, depths=(3, 4, 23, 3))
register("resnet152", ResNet, block=Bottleneck, depths=(3, 8, 36, 3))
register("plain18", ResNet, block=BasicBlock, depths=(2, 2, 2, 2), shortcut="none")
register("plain34", ResNet, block=BasicBlock, depths=(3, 4, 6, 3), shortcut="none")

register("resnet20", CifarResNet, depth=20)
register("resnet32", CifarResNet, depth=32)
register("resnet44", CifarResNet, depth=44)
register("resnet56", CifarResNet, depth=56)
register("resnet110", CifarResNet, depth=110)
register("plain20", CifarResNet, depth=20, shortcut="none")
register("plain32", CifarResNet, depth=32, shortcut="none")
register("plain44", CifarResNet, depth=44, shortcut="none")
register("plain56", CifarResNet, depth=56, shortcut="none")
register("plain110", CifarResNet, depth=110, shortcut="none")

register("preact_resnet18", PreactResNet, block=PreactBasicBlock, depths=(2, 2, 2, 2))
register("preact_resnet34", PreactResNet, block=PreactBasicBlock, depths=(3, 4, 6, 3))
register("preact_resnet50", PreactResNet, block=PreactBottleneck, depths=(3, 4, 6, 3))
register("preact_resnet101", PreactResNet, block=PreactBottleneck, depths=(3, 4, 23, 3))
register("preact_resnet152", PreactResNet, block=PreactBottleneck, depths=(3, 8, 36, 3))
register("preact_resnet200", PreactResNet, block=PreactBottleneck, depths=(3, 24, 36, 3))

_CIFAR: dict[str, object] = {"image_size": 32, "width": 16}
register("preact_resnet20", PreactResNet, block=PreactBasicBlock, depths=(3,) * 3, defaults=_CIFAR)
register("preact_resnet32", PreactResNet, block=PreactBasicBlock, depths=(5,) * 3, defaults=_CIFAR)
register("preact_resnet44", PreactResNet, block=PreactBasicBlock, depths=(7,) * 3, defaults=_CIFAR)
register("preact_resnet56", PreactResNet, block=PreactBasicBlock, depths=(9,) * 3, defaults=_CIFAR)
register("preact_resnet110", PreactResNet, block=PreactBasicBlock, depths=(18,) * 3, defaults=_CIFAR)
register("preact_resnet164", PreactResNet, block=PreactBottleneck, depths=(18,) * 3, defaults=_CIFAR)
register("preact_resnet1001", PreactResNet, block=PreactBottleneck, depths=(111,) * 3, defaults=_CIFAR)
