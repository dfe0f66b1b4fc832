"""Batch normalization by Triton kernels, on NVIDIA GPUs: a backend of `dispatch`. Triton is imported on first use.

A tensor is taken as it lies: contiguous, or any layout in which the channel is innermost (channels_last, (N, C));
anything else is first copied to one of these. The kernels are in `_triton_forward` and `_triton_backward`.

`mean` is float64 and `invstd` float32, whatever the type of x.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ._layout import laid_out
from ._transforms import is_stored

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)
"""The oldest devices that Triton serves."""


def available(device: int = 0) -> bool:
    """Whether the kernels run on this GPU: NVIDIA's, of compute capability 8.0 (Ampere) or later, and with Triton."""
    return _capable(device)


def supports(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> bool:
    """Whether the kernels take the call: see `dispatch.Backend`. Parameters may be of any type, next to each other."""
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and x.layout is torch.strided
        and is_stored(x)
        and (residual is None or (residual.device == x.device and residual.dtype is x.dtype))
        and (residual is None or (residual.layout is torch.strided and is_stored(residual)))
        and all(p is None or (p.device == x.device and p.is_contiguous() and not p.is_neg()) for p in parameters)
        and _capable(x.get_device())
    )


def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, the mean and invstd it was normalized with, and what is kept, never a mask: see `dispatch.Backend`."""
    from ._triton_forward import batch_norm_forward, batch_norm_inference

    x, shape = laid_out(x)
    kept = None if activation is None else residual
    residual = None if residual is None else _like(residual, x)
    with torch.cuda.device_of(x):
        if training:
            results = batch_norm_forward(
                x, residual, weight, bias, running_mean, running_var, momentum, eps, activation, shape
            )
        else:
            assert running_mean is not None
            assert running_var is not None
            results = batch_norm_inference(x, residual, weight, bias, running_mean, running_var, eps, activation, shape)
    return *results, kept


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str | None,
    kept: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight, dbias, as far as needed: see `dispatch.Backend`."""
    from ._triton_backward import batch_norm_backward

    x, shape = laid_out(x)
    dy = _like(dy, x)
    residual = None if kept is None else _like(kept, x)
    with torch.cuda.device_of(x):
        return batch_norm_backward(dy, x, residual, weight, bias, mean, invstd, training, activation, needs, shape)


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor with the strides of x."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


@cache
def _capable(device: int) -> bool:
    # A compiler's fake tensors may be on a GPU where there is none.
    if torch.version.cuda is None or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY
