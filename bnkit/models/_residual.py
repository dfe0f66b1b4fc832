"""Residual blocks, and the shortcuts beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .._checks import UserError, unknown
from ._activation import Activation, activation_layer
from ._init import Init, conv2d
from ._norm import Norm, has_bias, norm_add, norm_and_activation, norm_layer
from ._squeeze_excite import SqueezeExcite

_SHORTCUTS = ("A", "B", "C", "none")


@dataclass(frozen=True)
class Style:
    """What all blocks of one network have in common.

    `shortcut` is one of He et al. 2015, section 4.1: `"A"` pads with zero channels where the shape changes, `"B"`
    projects there, `"C"` projects everywhere; `"none"` leaves plain layers. `se` is the reduction of a
    squeeze-and-excitation at the end of each branch, or None for none. `groups`, `base_width` and `narrow` shape the
    3×3 convolution of a bottleneck and the 1×1 before it, `down_kernel` the projections that halve the maps.
    """

    norm: Norm
    activation: Activation
    init: Init
    shortcut: str = "B"
    se: int | None = None
    zero_init_residual: bool = False
    groups: int = 1
    base_width: int = 64
    narrow: int = 1
    down_kernel: int = 1

    def __post_init__(self) -> None:
        if self.shortcut not in _SHORTCUTS:
            raise unknown("shortcut", self.shortcut, _SHORTCUTS)

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        """A convolution that keeps the size of the maps, or divides it by `stride`."""
        return conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=has_bias(self.norm),
            init=self.init,
        )

    def last_conv(self, in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
        """The convolution at the end of a branch that no norm follows."""
        layer = self.conv(in_channels, out_channels, kernel)
        if self.zero_init_residual:
            nn.init.zeros_(layer.weight)
        return layer

    def norm_and_activation(self, channels: int) -> tuple[nn.Module, nn.Module]:
        """The pair inside a branch."""
        return norm_and_activation(self.norm, channels, activation=self.activation)

    def joining_norm_and_activation(self, channels: int) -> tuple[nn.Module, nn.Module]:
        """The pair at the end of a branch, between which come the excitation and the addition."""
        if self.se is None:
            pair = self.norm_and_activation(channels)
        else:
            pair = norm_layer(self.norm, channels), activation_layer(self.activation)
        if self.zero_init_residual:
            _zero(pair[0])
        return pair

    def squeeze_excite(self, channels: int) -> nn.Module | None:
        """The block at the end of a branch, if it has one."""
        return None if self.se is None else SqueezeExcite(channels, reduction=self.se, init=self.init)

    def reshapes(self, in_channels: int, out_channels: int, stride: int) -> bool:
        """Whether the shortcut has to do something to the maps."""
        return self.shortcut == "C" or stride != 1 or in_channels != out_channels

    def shortcut_layer(self, in_channels: int, out_channels: int, stride: int, *, normalized: bool) -> nn.Module | None:
        """What the input passes on its way around the branch; None if there is no way around."""
        if self.shortcut == "none":
            return None
        if not self.reshapes(in_channels, out_channels, stride):
            return nn.Identity()
        if self.shortcut == "A":
            return PaddedShortcut(out_channels - in_channels, stride)
        projection = self.conv(in_channels, out_channels, 1 if stride == 1 else self.down_kernel, stride)
        if not normalized:
            return projection
        return nn.Sequential(projection, norm_layer(self.norm, out_channels))


def _zero(norm: nn.Module) -> None:
    if not isinstance(weight := getattr(norm, "weight", None), torch.Tensor):
        raise UserError(
            f"zero_init_residual needs a norm with a weight, got {type(norm).__name__}: use norm='batch', or don't."
        )
    nn.init.zeros_(weight)


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel, with `channels` channels of zeros around the given ones (He et al. 2015, option A)."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.before, self.after = channels // 2, channels - channels // 2
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Pooling windows of one pixel: a slice's gradient would be contiguous, also where x is channels_last.
        picked = F.avg_pool2d(x, 1, self.stride)
        return F.pad(picked, (0, 0, 0, 0, self.before, self.after))


class _Block(nn.Module):
    """y = activation(branch(x) + shortcut(x)), the branch ending with a norm and perhaps an excitation."""

    se: nn.Module | None
    downsample: nn.Module | None

    def _join(self, norm: nn.Module, activation: nn.Module, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        around = None if self.downsample is None else self.downsample(x)
        if self.se is None:
            return norm_add(norm, activation, y, around)
        y = self.se(norm(y))
        return activation(y if around is None else y + around)


class BasicBlock(_Block):
    """Two 3×3 convolutions beside a shortcut (He et al. 2015, figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, style: Style):
        super().__init__()
        self.conv1 = style.conv(in_channels, planes, 3, stride)
        self.bn1, self.act1 = style.norm_and_activation(planes)
        self.conv2 = style.conv(planes, planes, 3)
        self.bn2, self.act2 = style.joining_norm_and_activation(planes)
        self.se = style.squeeze_excite(planes)
        self.downsample = style.shortcut_layer(in_channels, planes, stride, normalized=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self._join(self.bn2, self.act2, self.conv2(y), x)


class Bottleneck(_Block):
    """A 3×3 convolution between two 1×1 that narrow and widen, beside a shortcut (He et al. 2015, figure 5 right).

    The 3×3 convolution has the stride, as in torchvision; in the paper it is the first 1×1.
    """

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, style: Style):
        super().__init__()
        width = planes * style.base_width // 64 * style.groups
        out_channels = planes * self.expansion
        self.conv1 = style.conv(in_channels, width // style.narrow, 1)
        self.bn1, self.act1 = style.norm_and_activation(width // style.narrow)
        self.conv2 = style.conv(width // style.narrow, width, 3, stride, style.groups)
        self.bn2, self.act2 = style.norm_and_activation(width)
        self.conv3 = style.conv(width, out_channels, 1)
        self.bn3, self.act3 = style.joining_norm_and_activation(out_channels)
        self.se = style.squeeze_excite(out_channels)
        self.downsample = style.shortcut_layer(in_channels, out_channels, stride, normalized=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return self._join(self.bn3, self.act3, self.conv3(y), x)


class PreactBasicBlock(nn.Module):
    """Norm and activation ahead of each convolution, an untouched sum behind (He et al. 2016, figure 1b).

    Where the shape changes, norm and activation come before the shortcut as well, as in the authors' code.
    """

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, style: Style):
        super().__init__()
        self.bn1, self.act1 = style.norm_and_activation(in_channels)
        self.conv1 = style.conv(in_channels, planes, 3, stride)
        self.bn2, self.act2 = style.norm_and_activation(planes)
        self.conv2 = style.last_conv(planes, planes, 3)
        self.se = style.squeeze_excite(planes)
        self.reshapes = style.reshapes(in_channels, planes, stride)
        self.downsample = style.shortcut_layer(in_channels, planes, stride, normalized=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.act1(self.bn1(x))
        y = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        return _sum(self, y, activated if self.reshapes else x)


class PreactBottleneck(nn.Module):
    """The bottleneck with norm and activation ahead of each convolution; see `PreactBasicBlock`."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, style: Style):
        super().__init__()
        out_channels = planes * self.expansion
        self.bn1, self.act1 = style.norm_and_activation(in_channels)
        self.conv1 = style.conv(in_channels, planes, 1)
        self.bn2, self.act2 = style.norm_and_activation(planes)
        self.conv2 = style.conv(planes, planes, 3, stride)
        self.bn3, self.act3 = style.norm_and_activation(planes)
        self.conv3 = style.last_conv(planes, out_channels, 1)
        self.se = style.squeeze_excite(out_channels)
        self.reshapes = style.reshapes(in_channels, out_channels, stride)
        self.downsample = style.shortcut_layer(in_channels, out_channels, stride, normalized=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.act1(self.bn1(x))
        y = self.conv1(activated)
        y = self.conv2(self.act2(self.bn2(y)))
        y = self.conv3(self.act3(self.bn3(y)))
        return _sum(self, y, activated if self.reshapes else x)


def _sum(block: PreactBasicBlock | PreactBottleneck, y: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
    y = y if block.se is None else block.se(y)
    return y if block.downsample is None else y + block.downsample(around)


Block = type[BasicBlock] | type[Bottleneck] | type[PreactBasicBlock] | type[PreactBottleneck]


def stages(block: Block, in_channels: int, width: int, depths: tuple[int, ...], style: Style) -> list[nn.Sequential]:
    """Stages of `depths[i]` blocks, each but the first of which halves the maps and doubles the width."""
    made = []
    for i, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(block(in_channels, width * 2**i, stride, style))
            in_channels = width * 2**i * block.expansion
        made.append(nn.Sequential(*blocks))
    return made
