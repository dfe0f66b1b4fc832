"""LeNet-5."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require, unknown
from ._init import Init, conv2d, linear
from ._norm import Norm, norm_layers
from ._registry import register

_POOLS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class LeNet5(nn.Module):
    """Two convolutions and three linear layers (LeCun et al. 1998, section II-B), as it is read today.

    ReLU and max pooling stand for the scaled tanh and the trainable subsampling of the original, C3 sees all maps of
    S2, and a linear layer stands for the radial-basis output. `activation="tanh", pool="average", init="lecun"` comes
    closer to the original. A norm goes before each activation and takes the place of the bias.

    Args:
        norm: See `create`; `"instance"` is not possible here, for the linear layers.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, image_size, image_size).
        activation: `"relu"`, `"tanh"`, `"sigmoid"`, `"leaky_relu"`, `"silu"`, `"gelu"` or `"hardswish"`.
        pool: `"max"` or `"average"`.
        init: `"kaiming"`, `"lecun"`, `"xavier"`, `"small-gaussian"`, or the standard deviation of a Gaussian.
        image_size: 32, as in the paper, or 28, padded to it by the first convolution.

    Raises:
        UserError: an unknown name, or another image size.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        activation: str = "relu",
        pool: str = "max",
        init: Init = "kaiming",
        image_size: int = 28,
    ):
        super().__init__()
        require(
            image_size in (28, 32),
            f"lenet5 takes images of 28 or 32 pixels a side, got image_size={image_size}: "
            "resize them or choose another model.",
        )
        if pool not in _POOLS:
            raise unknown("pool", pool, _POOLS)
        bias = norm == "none"
        self.features = nn.Sequential(
            conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2, bias=bias, init=init),
            *norm_layers(norm, 6, dims=2, activation=activation),
            _POOLS[pool](2),
            conv2d(6, 16, 5, padding=0, bias=bias, init=init),
            *norm_layers(norm, 16, dims=2, activation=activation),
            _POOLS[pool](2),
        )
        self.classifier = nn.Sequential(
            linear(16 * 5 * 5, 120, bias=bias, init=init),
            *norm_layers(norm, 120, dims=1, activation=activation),
            linear(120, 84, bias=bias, init=init),
            *norm_layers(norm, 84, dims=1, activation=activation),
            linear(84, num_classes, bias=True, init=init),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


register("lenet5", LeNet5)
