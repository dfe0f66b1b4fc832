"""GoogLeNet (Inception v1), as published and as in torchvision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import require
from ._activation import Activation, activation_layer
from ._conv_norm import ConvNorm, ConvStyle
from ._init import Init, linear, output_layer
from ._norm import Norm
from ._registry import register
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

# Szegedy et al. 2015, table 1: maps of 1×1, 3×3 reduce, 3×3, 5×5 reduce, 5×5 and pool projection.
Widths = tuple[int, int, int, int, int, int]
_MODULES: tuple[Widths, ...] = (
    (64, 96, 128, 16, 32, 32),  # 3a
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),  # 4a
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),  # 5a
    (384, 192, 384, 48, 128, 128),
)
_EPS = 1e-3  # torchvision's
_SMALLEST_IMAGE, _SMALLEST_SMALL_IMAGE = 15, 4


class GoogLeNetOutputs(NamedTuple):
    """What training with auxiliary heads gives; names and order are torchvision's.

    The paper adds the losses of the two auxiliary heads with weight 0.3 each (section 5).
    """

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class Inception(nn.Module):
    """1×1, 3×3 and 5×5 convolutions and a max pooling side by side, joined along the channels (figure 2b).

    1×1 convolutions reduce the channels ahead of the larger filters and behind the pooling.
    """

    def __init__(self, in_channels: int, widths: Widths, style: ConvStyle, large: int = 5):
        super().__init__()
        one, reduce3, three, reduce5, five, projection = widths
        self.out_channels = one + three + five + projection
        self.branch1 = ConvNorm(in_channels, one, 1, style)
        self.branch2 = nn.Sequential(ConvNorm(in_channels, reduce3, 1, style), ConvNorm(reduce3, three, 3, style))
        self.branch3 = nn.Sequential(ConvNorm(in_channels, reduce5, 1, style), ConvNorm(reduce5, five, large, style))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), ConvNorm(in_channels, projection, 1, style))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class NaiveInception(nn.Module):
    """The module without reductions (figure 2a): each one puts out all the channels it got, and its own."""

    def __init__(self, in_channels: int, widths: Widths, style: ConvStyle, large: int = 5):
        super().__init__()
        one, _, three, _, five, _ = widths
        self.out_channels = one + three + five + in_channels
        self.branch1 = ConvNorm(in_channels, one, 1, style)
        self.branch2 = ConvNorm(in_channels, three, 3, style)
        self.branch3 = ConvNorm(in_channels, five, large, style)
        self.branch4 = nn.MaxPool2d(3, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class AuxiliaryHead(nn.Module):
    """A classifier on maps in the middle of the network: 4×4 averages, 1×1 convolution, two layers (section 5)."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float, style: ConvStyle):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        self.conv = ConvNorm(in_channels, 128, 1, style)
        self.fc1 = linear(128 * 16, 1024, bias=True, init=style.init)
        self.act = activation_layer(style.activation)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = output_layer(1024, num_classes, style.init)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.conv(self.avgpool(x)), 1)
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class GoogLeNet(nn.Module):
    """A stem of three convolutions, nine inception modules, an average and a linear layer (Szegedy et al. 2015).

    By default keys, shapes and, for `norm="batch"`, outputs are torchvision's, whose filters of the third branch are
    3×3 where the paper's are 5×5, and which has batch norm (eps 0.001) instead of response normalization.
    `inception_v1` is the paper's network. A norm follows each convolution and takes the place of its bias.

    Images up to 64 pixels a side get a 3×3 convolution of stride 1 and no pooling in place of the first two layers.

    Args:
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 4 or more; it chooses the stem. From 65 on one model takes any image of 15
            pixels and more.
        aux_logits: Whether to have the two auxiliary heads. With them the network gives `GoogLeNetOutputs` while
            training. Without, it still loads a `state_dict` that has them.
        large_kernel: Side of the largest filters: 3 as in torchvision, or 5 as in the paper.
        naive: Modules without dimension reduction (figure 2a). Their channels grow from module to module.
        lrn: Local response normalization in the stem, as in the paper; where there is no other norm.
        dropout, dropout_aux: Ahead of the output layers, of the network and of the auxiliary heads.
        transform_input: Take images normalized by ImageNet's mean and deviation, as torchvision's weights do, which
            were trained on images normalized to [-1, 1].
        activation: Its name, or a function that makes it.
        placement: The norm goes `"before"` or `"after"` the activation.
        init: Of all layers: `"kaiming"` (with the fan of the inputs), `"xavier"`, `"lecun"`, `"torch"`,
            `"small-gaussian"` (nearly torchvision's), or the standard deviation of a Gaussian.

    Raises:
        UserError: an unknown name, images that are too small, an even kernel, a dropout outside [0, 1], or
            `transform_input` without three channels.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        image_size: int = 224,
        aux_logits: bool = False,
        large_kernel: int = 3,
        naive: bool = False,
        lrn: bool = False,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        transform_input: bool = False,
        activation: Activation = "relu",
        placement: str = "before",
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, _SMALLEST_SMALL_IMAGE, "googlenet")
        require(large_kernel % 2 == 1, f"large_kernel must be odd, got {large_kernel}: 3 or 5.")
        for rate in (dropout, dropout_aux):
            require(0 <= rate <= 1, f"dropout must be between 0 and 1, got {rate}: try 0.2.")
        require(in_channels == 3 or not transform_input, "transform_input is for images of 3 channels: leave it out.")
        style = ConvStyle(norm, activation, init, placement, _EPS, fan="in")
        self.transform_input = transform_input
        small = image_size <= LARGEST_SMALL_IMAGE
        self.smallest = _SMALLEST_SMALL_IMAGE if small else _SMALLEST_IMAGE
        self.conv1 = ConvNorm(in_channels, 64, 3 if small else 7, style, stride=1 if small else 2)
        self.maxpool1 = nn.Identity() if small else nn.MaxPool2d(3, 2, ceil_mode=True)
        self.lrn1, self.lrn2 = (_response_normalization(lrn and norm == "none") for _ in range(2))
        self.conv2 = ConvNorm(64, 64, 1, style)
        self.conv3 = ConvNorm(64, 192, 3, style)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        modules = _modules(NaiveInception if naive else Inception, style, large_kernel)
        self.inception3a, self.inception3b, *rest = modules
        self.inception4a, self.inception4b, self.inception4c, self.inception4d, self.inception4e, *rest = rest
        self.inception5a, self.inception5b = rest
        self.aux1 = self.aux2 = None
        if aux_logits:
            self.aux1 = AuxiliaryHead(self.inception4a.out_channels, num_classes, dropout_aux, style)
            self.aux2 = AuxiliaryHead(self.inception4d.out_channels, num_classes, dropout_aux, style)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = output_layer(self.inception5b.out_channels, num_classes, init)
        self.register_load_state_dict_pre_hook(_leave_out_absent_heads)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        check_images(x, self.smallest, "googlenet")
        x = self.stem(_between_minus_one_and_one(x) if self.transform_input else x)
        x = self.inception4a(self.maxpool3(self.inception3b(self.inception3a(x))))
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.inception5b(self.inception5a(self.maxpool4(self.inception4e(x))))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits if aux1 is None or aux2 is None else GoogLeNetOutputs(logits, aux2, aux1)

    def stem(self, x: Tensor) -> Tensor:
        """The layers ahead of the first inception module."""
        x = self.lrn1(self.maxpool1(self.conv1(x)))
        return self.maxpool2(self.lrn2(self.conv3(self.conv2(x))))


def _modules(kind: type[Inception | NaiveInception], style: ConvStyle, large: int) -> list[Inception | NaiveInception]:
    modules, channels = [], 192
    for widths in _MODULES:
        modules.append(kind(channels, widths, style, large))
        channels = modules[-1].out_channels
    return modules


def _response_normalization(wanted: bool) -> nn.Module:
    # Krizhevsky et al. 2012, section 3.3, with the constants of the GoogLeNet that came with Caffe.
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1) if wanted else nn.Identity()


def _between_minus_one_and_one(x: Tensor) -> Tensor:
    """Undo ImageNet's normalization, and map [0, 1] to [-1, 1]."""
    statistics = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    scaled = [x[:, i : i + 1] * (std / 0.5) + (mean - 0.5) / 0.5 for i, (mean, std) in enumerate(statistics)]
    return torch.cat(scaled, 1)


def _leave_out_absent_heads(model: GoogLeNet, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if model.aux1 is None:
        for key in [key for key in state if key.startswith((f"{prefix}aux1.", f"{prefix}aux2."))]:
            del state[key]


register("googlenet", GoogLeNet)
register("inception_v1", GoogLeNet, large_kernel=5, defaults={"lrn": True, "dropout": 0.4})
