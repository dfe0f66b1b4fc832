"""The Inception network of the batch-normalization paper, and the recipes that it was trained by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from ._activation import Activation
from ._conv_norm import ConvNorm, ConvStyle
from ._init import Init, conv2d, output_layer
from ._norm import Norm
from ._registry import create, register
from ._size import LARGEST_SMALL_IMAGE, check_image_size, check_images

_DEPTH_MULTIPLIER = 8
_SMALLEST_IMAGE, _SMALLEST_SMALL_IMAGE = 32, 8


class DoubleInception(nn.Module):
    """1×1, 3×3, two 3×3 in a row and a pooling side by side: the 5×5 filters of GoogLeNet became two of 3×3."""

    def __init__(
        self,
        in_channels: int,
        one: int,
        reduce: int,
        three: int,
        reduce_double: int,
        double: int,
        pool: str,
        projection: int,
        style: ConvStyle,
    ):
        super().__init__()
        self.branch1 = ConvNorm(in_channels, one, 1, style)
        self.branch2 = nn.Sequential(ConvNorm(in_channels, reduce, 1, style), ConvNorm(reduce, three, 3, style))
        self.branch3 = nn.Sequential(
            ConvNorm(in_channels, reduce_double, 1, style),
            ConvNorm(reduce_double, double, 3, style),
            ConvNorm(double, double, 3, style),
        )
        pooling = nn.AvgPool2d(3, 1, padding=1) if pool == "average" else nn.MaxPool2d(3, 1, padding=1)
        self.branch4 = nn.Sequential(pooling, ConvNorm(in_channels, projection, 1, style))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class StridedInception(nn.Module):
    """A module that halves the maps: its convolutions and its pooling, which passes all channels, have stride 2."""

    def __init__(self, in_channels: int, reduce: int, three: int, reduce_double: int, double: int, style: ConvStyle):
        super().__init__()
        self.branch2 = nn.Sequential(
            ConvNorm(in_channels, reduce, 1, style), ConvNorm(reduce, three, 3, style, stride=2)
        )
        self.branch3 = nn.Sequential(
            ConvNorm(in_channels, reduce_double, 1, style),
            ConvNorm(reduce_double, double, 3, style),
            ConvNorm(double, double, 3, style, stride=2),
        )
        self.branch4 = nn.MaxPool2d(3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class BNInception(nn.Module):
    """Ioffe and Szegedy 2015, section 4.2 and figure 5, from images of 224 pixels to maps of 7.

    It differs from GoogLeNet (appendix): 5×5 filters are two 3×3; there are three modules at 28×28 pixels; poolings
    inside the modules are averages or maxima; no pooling stands between modules, but 3c and 4e have stride 2; the
    first convolution is separable, with depth multiplier 8.

    The widths of figure 5 make 11.2 million parameters, where the paper's text says 13.6 million; other
    implementations of the figure agree with the former. `norm="none"` is the paper's baseline, "Inception".

    Images up to 64 pixels a side get a 3×3 convolution of stride 1 and no pooling in place of the first two layers.

    Args:
        norm: See `create`.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, H, W).
        image_size: Side of the input, 8 or more; it chooses the stem. From 65 on one model takes any image of 32
            pixels and more.
        separable_stem: Whether the first convolution is 8 filters a channel and a 1×1 convolution of their outputs.
        lrn: Local response normalization in the stem, which batch norm makes unnecessary (section 4.2.1).
        dropout: Ahead of the output layer; none, as section 4.2.1 has it with batch norm.
        activation: Its name, or a function that makes it; `"sigmoid"` for BN-x5-Sigmoid.
        placement: The norm goes `"before"` or `"after"` the activation.
        init: Of all layers: `"kaiming"` (with the fan of the inputs), `"xavier"`, `"lecun"`, `"torch"`,
            `"small-gaussian"`, or the standard deviation of a Gaussian.

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
        separable_stem: bool = True,
        lrn: bool = False,
        dropout: float = 0.0,
        activation: Activation = "relu",
        placement: str = "before",
        init: Init = "kaiming",
    ):
        super().__init__()
        check_image_size(image_size, _SMALLEST_SMALL_IMAGE, "bn_inception")
        require(0 <= dropout <= 1, f"dropout must be between 0 and 1, got {dropout}: try 0.4.")
        style = ConvStyle(norm, activation, init, placement, fan="in")
        small = image_size <= LARGEST_SMALL_IMAGE
        self.smallest = _SMALLEST_SMALL_IMAGE if small else _SMALLEST_IMAGE
        self.conv1 = _first(in_channels, small, separable_stem, style)
        self.maxpool1 = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.lrn1, self.lrn2 = (nn.LocalResponseNorm(5, k=1) if lrn else nn.Identity() for _ in range(2))
        self.conv2 = ConvNorm(64, 64, 1, style)
        self.conv3 = ConvNorm(64, 192, 3, style)
        self.maxpool2 = nn.MaxPool2d(3, 2, padding=1)
        self.inception3a = DoubleInception(192, 64, 64, 64, 64, 96, "average", 32, style)
        self.inception3b = DoubleInception(256, 64, 64, 96, 64, 96, "average", 64, style)
        self.inception3c = StridedInception(320, 128, 160, 64, 96, style)
        self.inception4a = DoubleInception(576, 224, 64, 96, 96, 128, "average", 128, style)
        self.inception4b = DoubleInception(576, 192, 96, 128, 96, 128, "average", 128, style)
        self.inception4c = DoubleInception(576, 160, 128, 160, 128, 160, "average", 96, style)
        self.inception4d = DoubleInception(576, 96, 128, 192, 160, 192, "average", 96, style)
        self.inception4e = StridedInception(576, 128, 192, 192, 256, style)
        self.inception5a = DoubleInception(1024, 352, 192, 320, 160, 224, "average", 128, style)
        self.inception5b = DoubleInception(1024, 352, 192, 320, 192, 224, "max", 128, style)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = output_layer(1024, num_classes, init)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.smallest, "bn_inception")
        x = self.lrn1(self.maxpool1(self.conv1(x)))
        x = self.maxpool2(self.lrn2(self.conv3(self.conv2(x))))
        x = self.inception3c(self.inception3b(self.inception3a(x)))
        x = self.inception4e(self.inception4d(self.inception4c(self.inception4b(self.inception4a(x)))))
        x = self.inception5b(self.inception5a(x))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


def _first(in_channels: int, small: bool, separable: bool, style: ConvStyle) -> nn.Module:
    kernel_size, stride = (3, 1) if small else (7, 2)
    if not separable:
        return ConvNorm(in_channels, 64, kernel_size, style, stride=stride)
    depthwise = conv2d(
        in_channels,
        in_channels * _DEPTH_MULTIPLIER,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=in_channels,
        bias=False,
        init=style.init_of(kernel_size**2),
    )
    return nn.Sequential(depthwise, ConvNorm(in_channels * _DEPTH_MULTIPLIER, 64, 1, style))


@dataclass(frozen=True)
class Recipe:
    """How one network of figure 2 and 3 was built and trained (Ioffe and Szegedy 2015, sections 4.2.1 and 4.2.2).

    Factors are relative to the training of the original Inception. Where the paper gives no number (weight decay,
    decay of the learning rate, strength of the distortions), that is all there is.

    Attributes:
        norm, activation, dropout, lrn: Of the model; see `BNInception`.
        learning_rate: The initial one. All used mini-batches of 32 images and momentum.
        weight_decay_factor: Times the original's L2 penalty.
        decay_speedup: How many times faster than the original's the learning rate decays.
        shuffle_within_shards: So that the same images do not always share a mini-batch.
        fewer_distortions: Photometric distortions of images are reduced.
        steps_to_72: Published steps to 72.2% top-1 accuracy (figure 3), Inception's best.
        best_top1: Published best top-1 accuracy in percent (figure 3), one crop.
    """

    norm: str
    activation: str
    dropout: float
    lrn: bool
    learning_rate: float
    weight_decay_factor: float
    decay_speedup: float
    shuffle_within_shards: bool
    fewer_distortions: bool
    steps_to_72: float | None
    best_top1: float

    def create(self, num_classes: int = 1000, in_channels: int = 3, **options: Any) -> nn.Module:
        """The model, with its own options over those of the recipe."""
        own: dict[str, Any] = {"activation": self.activation, "dropout": self.dropout, "lrn": self.lrn}
        return create("bn_inception", self.norm, num_classes, in_channels, **own | options)


def _accelerated(times: float, steps: float | None, best: float, activation: str = "relu") -> Recipe:
    """All the changes of section 4.2.1, with `times` Inception's learning rate."""
    return Recipe("batch", activation, 0.0, False, 0.0015 * times, 1 / 5, 6, True, True, steps, best)


BN_INCEPTION_RECIPES: dict[str, Recipe] = {
    "Inception": Recipe("none", "relu", 0.4, True, 0.0015, 1, 1, False, False, 31.0e6, 72.2),
    "BN-Baseline": Recipe("batch", "relu", 0.4, True, 0.0015, 1, 1, False, False, 13.3e6, 72.7),
    "BN-x5": _accelerated(5, 2.1e6, 73.0),
    "BN-x30": _accelerated(30, 2.7e6, 74.8),
    "BN-x5-Sigmoid": _accelerated(5, None, 69.8, "sigmoid"),
}

register("bn_inception", BNInception)
