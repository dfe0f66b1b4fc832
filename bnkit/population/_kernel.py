"""Moments by the CPU's kernel, and with them the normalized batch, for one reading of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..moments import Moments
from ..nn import BatchNorm2d
from ..ops import COMPOSED, cpu

_TINY = 1e-30
_KNOWN = (_BatchNorm.forward, BatchNorm2d.forward)


def moments_of(x: Tensor) -> Moments:
    """Moments of each channel of x, (N, C) or (N, C, *): float64 where the device has it."""
    if x.numel() == 0:
        return Moments.empty(x.shape[1], dtype=torch.float64 if x.device.type != "mps" else x.dtype, device=x.device)
    if not cpu.supports(x, (), None):
        found = Moments.of(x, (0, *range(2, x.dim())))
        if x.device.type == "mps":
            return found
        return Moments(found.count, found.mean.double() + found.mean_error, found.m2.double())
    # The kernel's y is not wanted, but its statistics are exact to float64, in a fraction of the time of any operator.
    _, mean, invstd, _ = cpu.forward(x, None, None, None, None, True, 0.0, _TINY, None, None, False)
    return _moments(x, mean, invstd, _TINY)


def does_as_known(layer: _BatchNorm) -> bool:
    """Whether the layer's forward pass is that of torch.nn or of this package, with nothing of its own."""
    return type(layer).forward in _KNOWN and "forward" not in vars(layer)


def normalized(layer: _BatchNorm, input: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Moments] | None:
    """What such a layer makes of a batch with the batch's own statistics, and the batch's moments.

    None where this has to be left to the layer: no kernel, one value a channel, or arguments that it would refuse.
    """
    activation = getattr(layer, "activation", None)
    parameters = layer.weight, layer.bias
    fits = input.dim() >= 2 and input.shape[1] == layer.num_features and input.numel() > input.shape[1]
    alike = residual is None or residual.shape == input.shape
    known = type(input) is Tensor and activation not in COMPOSED and layer.eps > 0
    if not (fits and alike and known and cpu.supports(input, parameters, residual)):
        return None
    layer._check_input_dim(input)
    arguments = (input, None, None, *parameters, True, 0.0, layer.eps, activation, residual)
    y, mean, invstd, _ = cpu.forward(*arguments, for_backward=False)
    return y, _moments(input, mean, invstd, layer.eps)


def _moments(x: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Moments:
    count = x.numel() // x.shape[1]
    m2 = invstd.pow(-2).sub_(eps).clamp_(min=0).mul_(count)
    return Moments(count, mean, m2, _zeros(len(mean)))


@functools.cache
def _zeros(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64, device="cpu")
