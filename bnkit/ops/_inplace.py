"""Batch norm that keeps its output for the backward pass, instead of its input.

Where activation and scaling can be undone, x̂ = (activation⁻¹(y) - bias) / weight, and the layer that follows keeps y
anyway, as its input; so x, of the same size, can go.

References:
    Rota Bulò, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018,
    https://arxiv.org/abs/1712.02616, section 3. There weight is |weight| + eps; here it is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import UserError
from . import reference
from ._backend import COMPOSED, Backend, Gradients
from ._transforms import is_stored, transforms_active

_SLOPE = 0.01
_aten = torch.ops.aten


def _inverse_elu(y: Tensor) -> Tensor:
    """z for y = elu(z). Where y was rounded to -1, the smallest z that would not be."""
    return torch.where(y > 0, y, y.clamp(min=-1 + torch.finfo(y.dtype).eps / 2, max=0).log1p())


# For each activation: z from y, and dz from dy and y.
INVERTIBLE: dict[str | None, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    None: (lambda y: y, lambda dy, y: dy),
    "leaky_relu": (
        lambda y: F.leaky_relu(y, 1 / _SLOPE),
        lambda dy, y: _aten.leaky_relu_backward(dy, y, _SLOPE, True),
    ),
    "elu": (_inverse_elu, lambda dy, y: _aten.elu_backward(dy, 1.0, 1.0, 1.0, True, y)),
}


def is_possible(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a gradient will be asked for, and x̂ can be had from y, which costs a look at the parameters.

    y = weight · x̂ + bias holds half the digits of x̂ or more while |weight| > √ulp · |bias|; none of a weight of 0.
    False while a CUDA graph is captured, which allows no look.
    """
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    if weight is None:
        return True
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    info = torch.finfo(x.dtype)
    least = weight.detach().new_tensor(math.sqrt(info.tiny))
    if bias is not None:
        least = torch.maximum(least, bias.detach().abs() * math.sqrt(info.eps))
    return bool((weight.detach().abs() > least).all())


def check_not_repeated() -> None:
    """Refuse to keep the input where activation checkpointing repeats, in a backward pass, what has kept the output."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise UserError(
            "batch_norm(inplace=True) cannot be repeated by activation checkpointing within a torch.func transform of "
            "the backward pass: use inplace=False."
        )


class _InplaceBatchNorm(torch.autograd.Function):
    """Keeps y and invstd."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        backend, running_mean, running_var, training, momentum, eps, activation = call
        later = activation in COMPOSED
        arguments = (x, running_mean, running_var, weight, bias, training, momentum, eps, None if later else activation)
        y, _, invstd, _ = backend.forward(*arguments, None, True)
        if later:
            y = F.elu(y, inplace=True)
        ctx.save_for_backward(y, invstd, weight, bias)
        ctx.backend, ctx.training, ctx.activation = backend, training, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise UserError("batch_norm(inplace=True) keeps no input for second derivatives; use inplace=False.")
        y, invstd, weight, bias = ctx.saved_tensors
        inverse, gradient = INVERTIBLE[ctx.activation]
        g, centred = gradient(dy, y), _centred(inverse(y), invstd, weight, bias)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        zero = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
        arguments = (g, centred, zero, invstd, weight, bias, ctx.training, None, None)
        backend = _Formulas if transforms_active() or not is_stored(g) else ctx.backend
        dx, _, dweight, dbias = backend.backward(*arguments, (needs_x, False, needs_weight, needs_bias))
        return dx, dweight, dbias, None


def _centred(z: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x - mean. Without the mean, since that might round the deviation away."""
    channels = (1, -1) + (1,) * (z.dim() - 2)
    invstd = invstd.to(torch.promote_types(z.dtype, torch.float32))
    scale = (invstd if weight is None else invstd * weight).reciprocal().view(channels)
    shifted = z if bias is None else z - bias.view(channels)
    return (shifted * scale).to(z.dtype)


class _Formulas:
    """In place of a backend where there is none, or none that takes the cotangent."""

    @staticmethod
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
        residual: None,
        for_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        mean, invstd, mean_error = reference.statistics(x, running_mean, running_var, training, momentum, eps)
        return reference.normalize(x, mean, invstd, weight, bias, activation, None, mean_error), mean, invstd, None

    @staticmethod
    def backward(
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        activation: None,
        kept: None,
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        dims, channels = (0, *range(2, x.dim())), (1, -1) + (1,) * (x.dim() - 2)
        xhat = (x - mean.to(invstd.dtype).view(channels)) * invstd.view(channels)
        dbias, dweight = dy.sum(dims, dtype=invstd.dtype), (dy * xhat).sum(dims)
        dx = dy - (dbias.view(channels) + xhat * dweight.view(channels)) * (x.shape[1] / x.numel()) if training else dy
        scale = invstd if weight is None else invstd * weight
        dx = (dx * scale.view(channels)).to(x.dtype)
        dweight = None if weight is None else dweight.to(weight.dtype)
        return dx, None, dweight, None if bias is None else dbias.to(bias.dtype)


def batch_norm(
    backend: Backend | None,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    """activation(batch_norm(x)), in autograd's graph with what `is_possible` promises."""
    call = (backend or _Formulas, running_mean, running_var, training, momentum, eps, activation)
    return _InplaceBatchNorm.apply(x, weight, bias, call)
