"""Squeeze and excitation: weigh the channels by what all of them saw."""

from __future__ import annotations

import torch
from torch import nn

from .._checks import require
from ._init import Init, conv2d

_REDUCTION = 16
_MULTIPLE = 8


class SqueezeExcite(nn.Module):
    """y = x · σ(W₂ relu(W₁ mean(x) + b₁) + b₂), the mean and the weights being per channel.

    Squeeze: the mean of each map describes its channel. Excite: two 1×1 convolutions, the first of which reduces the
    number of channels, and a sigmoid turn the descriptor into a weight between 0 and 1 a channel (Hu et al. 2018,
    section 3). The keys of its `state_dict` are timm's.

    Args:
        channels: C of x (N, C, H, W).
        reduction: How many times fewer channels the bottleneck has; it is rounded to a multiple of 8, at least 8.
        init: Of both convolutions.
    """

    def __init__(self, channels: int, *, reduction: int = _REDUCTION, init: Init = "kaiming"):
        super().__init__()
        hidden = _rounded(channels / reduction)
        self.fc1 = conv2d(channels, hidden, 1, bias=True, init=init)
        self.act = nn.ReLU()
        self.fc2 = conv2d(hidden, channels, 1, bias=True, init=init)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        descriptor = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(descriptor))))


def reduction_of(se: bool | int) -> int | None:
    """What the option `se` of a family means: the reduction of its squeeze-and-excitation blocks, None for no blocks.

    Raises:
        UserError: a negative reduction.
    """
    require(se >= 0, f"se must be True, False or a positive reduction of the channels, got {se}: try se=16.")
    if not se:
        return None
    return _REDUCTION if se is True else se


def _rounded(channels: float) -> int:
    return max(_MULTIPLE, int(channels + _MULTIPLE / 2) // _MULTIPLE * _MULTIPLE)
