"""Convolution, norm and activation, as most networks after 2015 repeat it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ._activation import Activation, activation_layer
from ._init import Init, conv2d
from ._norm import Norm, check_placement, has_bias, norm_and_activation, norm_layer, norm_layers


@dataclass(frozen=True)
class ConvStyle:
    """What all convolutions of a network have in common.

    `eps` is for norms by name that keep running statistics. `fan="in"` makes `"kaiming"` count the inputs of a
    convolution: where 1×1 convolutions reduce the channels by as much as 10, counting the outputs would blow up what
    passes.
    """

    norm: Norm
    activation: Activation = "relu"
    init: Init = "kaiming"
    placement: str = "before"
    eps: float = 1e-5
    fan: str = "out"

    def __post_init__(self) -> None:
        check_placement(self.placement)
        activation_layer(self.activation)

    @property
    def bias(self) -> bool:
        """Whether a convolution needs its own."""
        return has_bias(self.norm, self.placement)

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int | None = None
    ) -> nn.Conv2d:
        """A convolution; without `padding` one of stride 1 and odd size keeps the size of the maps."""
        padding = kernel_size // 2 if padding is None else padding
        init = self.init_of(in_channels * kernel_size**2)
        return conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=self.bias, init=init)

    def init_of(self, fan_in: int) -> Init:
        """What draws the weights of a convolution with so many inputs to each output."""
        return (2 / fan_in) ** 0.5 if (self.init, self.fan) == ("kaiming", "in") else self.init

    def follow(self, channels: int) -> list[nn.Module]:
        """What follows a convolution: the norm and the activation, or the activation alone."""
        return norm_layers(self.norm, channels, activation=self.activation, placement=self.placement)


class ConvNorm(nn.Module):
    """Convolution → norm → activation; `placement="after"` swaps the last two.

    Its names are those of torchvision's `BasicConv2d`: `conv` and `bn`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style: ConvStyle,
        *,
        stride: int = 1,
        padding: int | None = None,
    ):
        super().__init__()
        self.conv = style.conv(in_channels, out_channels, kernel_size, stride, padding)
        self.norm_is_last = style.placement == "after"
        if self.norm_is_last:
            self.bn, self.act = norm_layer(style.norm, out_channels), activation_layer(style.activation)
        else:
            self.bn, self.act = norm_and_activation(style.norm, out_channels, activation=style.activation)
        if isinstance(style.norm, str) and isinstance(self.bn, _NormBase):
            self.bn.eps = style.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.bn(self.act(x)) if self.norm_is_last else self.act(self.bn(x))
