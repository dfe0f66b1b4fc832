"""Batch normalization in plain PyTorch: the definition that every other backend is held to.

Any device, any floating-point type, any layout; differentiable to any order, in reverse and in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moments import Moments, statistics_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`functional.batch_norm` on arguments already validated."""
    wide = x.to(statistics_dtype(x.dtype))  # once, else the two parts of dx would each be rounded to x's type
    mean, invstd, mean_error = statistics(wide, running_mean, running_var, training, momentum, eps)
    return normalize(wide, mean, invstd, weight, bias, activation, residual, mean_error, dtype=x.dtype)


def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mean, invstd and mean_error to `normalize` with. In training, the running statistics are updated."""
    if not training:
        assert running_mean is not None
        assert running_var is not None
        dtype = statistics_dtype(x.dtype)
        return running_mean.detach().to(dtype), torch.rsqrt(running_var.detach().to(dtype) + eps), None
    moments = Moments.of(x, (0, *range(2, x.dim())))
    if moments.count and running_mean is not None and running_var is not None:
        update_running_statistics(running_mean, running_var, moments, momentum)
    # No values have no variance; 0 keeps the gradients of weight and bias at 0 rather than NaN.
    var = moments.variance() if moments.count else moments.m2
    return moments.mean, torch.rsqrt(var + eps), moments.mean_error


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    mean_error: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = activation(weight · (x - mean) · invstd + bias + residual), rounded once, to the type of x and residual.

    `mean_error` is what rounding took off the mean, as in `Moments`: against a small deviation it shows. `dtype` is
    the type of x before it was widened.
    """
    channels = (1, -1) + (1,) * (x.dim() - 2)
    y = x.to(mean.dtype) - mean.view(channels)
    if mean_error is not None:
        y = y - mean_error.view(channels)
    scale = invstd if weight is None else invstd * weight.reshape(-1)
    y = y * scale.view(channels)
    if bias is not None:
        y = y + bias.reshape(channels)
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    dtype = dtype or x.dtype
    return y.to(dtype if residual is None else torch.promote_types(dtype, residual.dtype))


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor
) -> None:
    """running = (1 - momentum) · running + momentum · batch, in place, with the batch's unbiased variance."""
    running_mean.copy_((1 - momentum) * running_mean + momentum * moments.mean)
    running_var.copy_((1 - momentum) * running_var + momentum * moments.variance(unbiased=True))
