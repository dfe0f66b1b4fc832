"""Initial weights, and layers that draw nothing else from the random number generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from .._checks import UserError, require, unknown

Init = str | float
Initializer = Callable[[torch.Tensor], torch.Tensor]
_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
_Size = int | tuple[int, int]


def _gaussian(std: float) -> Initializer:
    return lambda weight: nn.init.normal_(weight, 0.0, std)


def _kaiming(weight: torch.Tensor) -> torch.Tensor:
    mode = "fan_out" if weight.dim() > 2 else "fan_in"
    return nn.init.kaiming_normal_(weight, mode=mode, nonlinearity="relu")


def _lecun(weight: torch.Tensor) -> torch.Tensor:
    bound = 2.4 / weight[0].numel()
    return nn.init.uniform_(weight, -bound, bound)


def _torch(weight: torch.Tensor) -> torch.Tensor:
    bound = weight[0].numel() ** -0.5
    return nn.init.uniform_(weight, -bound, bound)


_INITS: dict[str, Initializer] = {
    "small-gaussian": _gaussian(0.01),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": _kaiming,
    "lecun": _lecun,
    "torch": _torch,
}


def initializer(init: Init) -> Initializer:
    """What fills a weight in place.

    Args:
        init: A name, or the standard deviation of a Gaussian around zero.

            - `"small-gaussian"`: N(0, 0.01²); the "small random Gaussian values" of the batch-normalization paper
              (Ioffe and Szegedy 2015, section 4.1), which gives no number.
            - `"xavier"`: U(-b, b), b² = 6 / (fan_in + fan_out) (Glorot and Bengio 2010, equation 16).
            - `"kaiming"`: N(0, 2 / fan) (He et al. 2015, section 2.2), with the fan of the outputs in
              convolutions and of the inputs in linear layers.
            - `"lecun"`: U(-b, b), b = 2.4 / fan_in (LeCun et al. 1998, appendix A).
            - `"torch"`: U(-b, b), b = 1 / √fan_in, as the layers of torch.nn draw their weights.

    Raises:
        UserError: an unknown name, or a scale that is not a positive number.
    """
    if isinstance(init, str):
        if init not in _INITS:
            raise unknown("init", init, _INITS)
        return _INITS[init]
    if isinstance(init, bool) or not isinstance(init, (int, float)):
        raise UserError(f"init must be a name or a number, got {init!r}: choose one of {', '.join(sorted(_INITS))}.")
    require(
        math.isfinite(init) and init > 0,
        f"the scale of the initial weights must be positive, got init={init}: try 0.01.",
    )
    return _gaussian(float(init))


def linear(in_features: int, out_features: int, *, bias: bool, init: Init) -> nn.Linear:
    """A linear layer with weights drawn by `init` and zero biases.

    It draws its weights and nothing else, so networks that differ only in their normalization (and hence in their
    biases) start from the same weights for the same seed.
    """
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta")
    return _filled(layer, init)


def output_layer(in_features: int, num_classes: int, init: Init) -> nn.Linear:
    """The linear layer that gives the logits.

    `"kaiming"` presumes a ReLU behind the layer, which this one lacks: it then draws as `"torch"` does, which is also
    what torchvision's networks do here.
    """
    return linear(in_features, num_classes, bias=True, init="torch" if init == "kaiming" else init)


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: _Size,
    *,
    stride: _Size = 1,
    padding: _Size = 0,
    dilation: _Size = 1,
    groups: int = 1,
    bias: bool,
    init: Init,
) -> nn.Conv2d:
    """A 2-d convolution with weights drawn by `init` and zero biases; see `linear`."""
    layer = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias, device="meta"
    )
    return _filled(layer, init)


def conv_transpose2d(
    in_channels: int, out_channels: int, kernel_size: _Size, *, stride: _Size = 1, bias: bool, init: Init
) -> nn.ConvTranspose2d:
    """A 2-d transposed convolution with weights drawn by `init` and zero biases; see `linear`."""
    layer = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, stride, bias=bias, device="meta")
    return _filled(layer, init)


def _filled(layer: _Layer, init: Init) -> _Layer:
    # Made on the meta device, the layer has drawn no weights of its own. Not `to_empty`, which would do the same: its
    # first call imports PyTorch's decompositions, and that takes longer than to create most networks.
    for name, parameter in layer.named_parameters():
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
    initializer(init)(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
