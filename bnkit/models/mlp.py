"""A multilayer perceptron for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .._checks import require
from ._init import Init, linear
from ._norm import Norm, norm_layers
from ._registry import register
from ._size import check_values


class MLP(nn.Module):
    """Fully connected hidden layers, each linear → norm → activation, and a linear output.

    The defaults are the network of the batch-normalization paper (Ioffe and Szegedy 2015, section 4.1): three hidden
    layers of 100 sigmoid units on 28×28 images, with small Gaussian weights. With a norm the hidden layers have no
    bias; the norm's β takes its place. For one seed the initial weights are the same whatever the norm.

    Args:
        norm: See `create`; `"instance"` is not possible here.
        num_classes: Length of the output.
        in_channels: Channels of the input (N, in_channels, image_size, image_size).
        hidden: Units of each hidden layer.
        activation: `"sigmoid"`, `"relu"`, `"tanh"`, `"leaky_relu"`, `"silu"`, `"gelu"` or `"hardswish"`.
        init: `"small-gaussian"`, `"xavier"`, `"kaiming"`, `"lecun"`, or the standard deviation of a Gaussian.
        image_size: Side of the input.

    Raises:
        UserError: an unknown name, or a size that is not positive.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        num_classes: int,
        in_channels: int,
        hidden: Sequence[int] = (100, 100, 100),
        activation: str = "sigmoid",
        init: Init = "small-gaussian",
        image_size: int = 28,
    ):
        super().__init__()
        require(image_size > 0, f"image_size must be positive, got {image_size}: pass the side of the images.")
        require(
            all(isinstance(units, int) and units > 0 for units in hidden),
            f"hidden must be positive integers, got {hidden!r}: pass one number of units a layer, such as (100, 100).",
        )
        self.image_shape = (in_channels, image_size, image_size)
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_channels * image_size**2
        for units in hidden:
            layers.append(linear(width, units, bias=norm == "none", init=init))
            layers += norm_layers(norm, units, dims=1, activation=activation)
            width = units
        self.features = nn.Sequential(*layers)
        self.classifier = linear(width, num_classes, bias=True, init=init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_values(x, self.image_shape, "mlp")
        return self.classifier(self.features(x))


register("mlp", MLP)
