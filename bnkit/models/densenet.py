"""Densely connected networks, with torchvision's `state_dict` keys."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .._checks import require
from ._activation import Activation
from ._init import Init, output_layer
from ._norm import Norm
from ._registry import register
from ._residual import Style
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

_PUBLISHED_KEY = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..+)")


class DenseNet(nn.Module):
    """Blocks in which each layer sees the maps of all layers before it (Huang et al. 2017, table 1).

    A layer is norm → activation → 1×1 convolution → norm → activation → 3×3 convolution, and adds `growth_rate` maps
    to those it was given. Between blocks, a transition compresses the maps and halves their sides. Keys and shapes of
    the `state_dict` are torchvision's; its published files, which have older keys, load as well.

    Images up to 64 pixels a side get the stem that the paper has for CIFAR: a 3×3 convolution of stride 1, no pooling.

    Args:
        blocks: Layers of each block.
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input; it chooses the stem. The smallest is 29, or with the small stem 2^(blocks - 1).
        growth_rate: Maps that each layer adds: k in the paper.
        num_init_features: Maps that leave the stem.
        bn_size: Width of the 1×1 convolution, in growth rates; 0 leaves it out, with the norm behind it.
        compression: Maps that leave a transition for each that enters it: θ in the paper.
        drop_rate: Probability of zeroing a value that a layer adds; the paper's for data without augmentation is 0.2.
        memory_efficient: Keep no concatenated or normalized maps for the backward pass, which makes them again (Pleiss
            et al. 2017). The layers of `bnkit.nn` count each batch once all the same; those of torch.nn count it twice.
        activation: Its name, or a function that makes it.
        init: Of all convolutions and the output layer, see `ResNet`.

    Raises:
        UserError: an unknown name, images that are too small, or a number that makes no network.
    """

    def __init__(
        self,
        *,
        blocks: tuple[int, ...],
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 224,
        growth_rate: int = 32,
        num_init_features: int = 64,
        bn_size: int = 4,
        compression: float = 0.5,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        activation: Activation = "relu",
        init: Init = "kaiming",
    ):
        super().__init__()
        small = image_size <= LARGEST_SMALL_IMAGE
        # Each transition's pooling needs two pixels. The large stem divides by four, rounding up.
        last = 2 ** (len(blocks) - 1)
        self.smallest = last if small else 4 * last - 3
        self.name = f"densely connected network of {len(blocks)} blocks"
        check_image_size(image_size, self.smallest, f"a {self.name}")
        _check_numbers(growth_rate, num_init_features, bn_size, compression, drop_rate)
        style = Style(norm, activation, init)
        self.features = _stem(in_channels, num_init_features, small, style)
        channels = num_init_features
        for i, depth in enumerate(blocks, 1):
            layers = [
                DenseLayer(channels + j * growth_rate, growth_rate, bn_size, drop_rate, memory_efficient, style)
                for j in range(depth)
            ]
            self.features.add_module(f"denseblock{i}", DenseBlock(layers))
            channels += depth * growth_rate
            if i < len(blocks):
                transition = _transition(channels, int(channels * compression), style)
                self.features.add_module(f"transition{i}", transition)
                channels = int(channels * compression)
        norm5, relu5 = style.norm_and_activation(channels)
        self.features.add_module("norm5", norm5)
        self.features.add_module("relu5", relu5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = output_layer(channels, num_classes, init)
        self.register_load_state_dict_pre_hook(_rename_published)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.smallest, self.name)
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class CifarDenseNet(DenseNet):
    """The networks of the paper's CIFAR experiments: three equal blocks (Huang et al. 2017, section 4.2 and table 2).

    Args:
        depth: Layers of the whole network, 3n + 4; with `bc`, 6n + 4.
        bc: Bottlenecks in each layer, and transitions that halve the number of maps.
        growth_rate: Maps that each layer adds.
        image_size: Side of the input, 4 or more; from 65 on the stem is that of photographs.
        norm, num_classes, in_channels, drop_rate, memory_efficient, activation, init: As in `DenseNet`.

    Raises:
        UserError: what `DenseNet` raises it for.
    """

    def __init__(
        self,
        *,
        depth: int,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 32,
        growth_rate: int = 12,
        bc: bool = False,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        activation: Activation = "relu",
        init: Init = "kaiming",
    ):
        layers = (depth - 4) // (6 if bc else 3)
        super().__init__(
            blocks=(layers,) * 3,
            norm=norm,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            growth_rate=growth_rate,
            num_init_features=2 * growth_rate if bc else 16,
            bn_size=4 if bc else 0,
            compression=0.5 if bc else 1.0,
            drop_rate=drop_rate,
            memory_efficient=memory_efficient,
            activation=activation,
            init=init,
        )


class DenseLayer(nn.Module):
    """The maps that one layer adds to `features`, a list of all maps made so far."""

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool,
        style: Style,
    ):
        super().__init__()
        self.norm1, self.relu1 = style.norm_and_activation(in_channels)
        if bn_size:
            self.conv1 = style.conv(in_channels, bn_size * growth_rate, 1)
            self.norm2, self.relu2 = style.norm_and_activation(bn_size * growth_rate)
            self.conv2 = style.conv(bn_size * growth_rate, growth_rate, 3)
        else:
            self.conv1 = style.conv(in_channels, growth_rate, 3)
        self.bottleneck = bn_size > 0
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        if self.memory_efficient and torch.is_grad_enabled() and not isinstance(features[0], torch.fx.Proxy):
            y = checkpoint(self._concatenated, *features, use_reentrant=False)
        else:
            y = self._concatenated(*features)
        if self.bottleneck:
            y = self.conv2(self.relu2(self.norm2(y)))
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate else y

    def _concatenated(self, *features: torch.Tensor) -> torch.Tensor:
        """The part whose memory grows with the square of the depth."""
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))


class DenseBlock(nn.Module):
    """All maps of its input and of its layers, each of which is given those before it."""

    def __init__(self, layers: list[DenseLayer]):
        super().__init__()
        for i, layer in enumerate(layers, 1):
            self.add_module(f"denselayer{i}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)


def _stem(in_channels: int, channels: int, small: bool, style: Style) -> nn.Sequential:
    conv = style.conv(in_channels, channels, 3) if small else style.conv(in_channels, channels, 7, 2)
    if small:  # pre-activation alone, as the paper's networks for CIFAR begin
        return nn.Sequential(OrderedDict(conv0=conv))
    norm0, relu0 = style.norm_and_activation(channels)
    pool0 = nn.MaxPool2d(3, 2, padding=1)
    return nn.Sequential(OrderedDict(conv0=conv, norm0=norm0, relu0=relu0, pool0=pool0))


def _transition(in_channels: int, out_channels: int, style: Style) -> nn.Sequential:
    norm, relu = style.norm_and_activation(in_channels)
    conv = style.conv(in_channels, out_channels, 1)
    return nn.Sequential(OrderedDict(norm=norm, relu=relu, conv=conv, pool=nn.AvgPool2d(2)))


def _rename_published(model: DenseNet, state: dict[str, Any], *_: Any) -> None:
    """The files that torchvision published call a layer `norm.1`, where its modules, and ours, call it `norm1`."""
    for key in list(state):
        if found := _PUBLISHED_KEY.fullmatch(key):
            state["".join(found.groups())] = state.pop(key)


def _check_numbers(growth: int, features: int, bn_size: int, compression: float, drop_rate: float) -> None:
    for name, value, least in (
        ("growth_rate", growth, 1),
        ("num_init_features", features, 1),
        ("bn_size", bn_size, 0),
    ):
        require(value >= least, f"{name} must be at least {least}, got {value}: see the model's defaults.")
    require(0 < compression <= 1, f"compression must be in (0, 1], got {compression}: the paper's is 0.5.")
    require(0 <= drop_rate < 1, f"drop_rate must be in [0, 1), got {drop_rate}: the paper's is 0 or 0.2.")


register("densenet121", DenseNet, blocks=(6, 12, 24, 16))
register("densenet161", DenseNet, blocks=(6, 12, 36, 24), defaults={"growth_rate": 48, "num_init_features": 96})
register("densenet169", DenseNet, blocks=(6, 12, 32, 32))
register("densenet201", DenseNet, blocks=(6, 12, 48, 32))
register("densenet264", DenseNet, blocks=(6, 12, 64, 48))
register("densenet40", CifarDenseNet, depth=40)
register("densenet100", CifarDenseNet, depth=100)
register("densenet_bc100", CifarDenseNet, depth=100, bc=True)
register("densenet_bc190", CifarDenseNet, depth=190, bc=True, defaults={"growth_rate": 40})
register("densenet_bc250", CifarDenseNet, depth=250, bc=True, defaults={"growth_rate": 24})
