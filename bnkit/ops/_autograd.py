"""Derivatives of a batch norm served by a backend: the first ones are the backend's own, the second the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import Backend, Gradients


class _BatchNorm(torch.autograd.Function):
    """Keeps x, mean, invstd and, under an activation, the residual: tensors that mostly exist anyway."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        backend, running_mean, running_var, training, momentum, eps, activation = ctx.call = call
        y, mean, invstd = backend.forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
        ctx.save_for_backward(x, mean, invstd, weight, bias, None if activation is None else residual)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, dy, needs), None
        x, mean, invstd, weight, bias, residual = ctx.saved_tensors
        backend, _, _, training, _, _, activation = ctx.call
        return *backend.backward(dy, x, mean, invstd, weight, bias, training, activation, residual, needs), None


# Function.apply looks for torch.func transforms, in each argument; who calls this has looked.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _BatchNorm).apply  # pyright: ignore


def differentiable(
    backend: Backend,
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
) -> Tensor:
    """`backend.forward`'s y, in autograd's graph. Not within a transform of `torch.func`."""
    # One argument for all that has no gradient, since autograd handles each one by itself.
    call = (backend, running_mean, running_var, training, momentum, eps, activation)
    return _apply(x, residual, weight, bias, call)


def _differentiable_gradients(ctx: Any, dy: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    """The gradients as functions of dy and of the inputs that autograd can follow: those of the reference."""
    x, mean, invstd, *others = ctx.saved_tensors
    _, _, _, training, _, eps, activation = ctx.call
    # Views, so that an input computed from another (a weight made from x, say) counts as an input of its own.
    x = x.view_as(x)
    weight, bias, residual = (None if t is None else t.view_as(t) for t in others)
    if training:
        y = reference.batch_norm(x, None, None, weight, bias, True, 0.0, eps, activation, residual)
    else:
        y = reference.normalize(x, mean, invstd, weight, bias, activation, residual)
    inputs = enumerate((x, residual, weight, bias))
    wanted = {i: tensor for i, tensor in inputs if needs[i] and tensor is not None}
    found = dict(zip(wanted, torch.autograd.grad(y, tuple(wanted.values()), dy, create_graph=True), strict=True))
    if needs[1] and residual is None:
        found[1] = dy
    return found.get(0), found.get(1), found.get(2), found.get(3)
