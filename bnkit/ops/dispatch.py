"""Picks the backend of a batch norm, and wires the ones without derivatives of their own into autograd.

The reference serves every call that no backend of `BACKENDS` takes: other devices and types, empty batches, tensor
subclasses, compilation, `torch.func` transforms and forward-mode differentiation. It also serves the second
derivatives of all backends.

A backend is a module with the three functions of `Backend`. Throughout, n is the number of values a channel, x̂ is
(x - mean) · invstd, z is weight · x̂ + bias + residual, and y is activation(z). The activations are
`reference.ACTIVATIONS`: leaky_relu's slope is 0.01, gelu is the exact one (erf).

- Statistics (mean, variance, invstd and every sum over a channel) are float32 for float32, bfloat16 and float16 data,
  float64 for float64, or wider; all arithmetic between reading x and writing y or dx is of that type too.
- The variance is formed from centred values (Welford, Chan or two passes), never as E[x²] - E[x]².
- Each result's largest error against float64 stays below twice that of PyTorch's eager operators.
- Nothing is kept between calls, and no argument is written to but the running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, reference

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, residual, weight and bias, in this order; None for each one not needed."""


class Backend(Protocol):
    """The contract of a fast implementation. See the module's text for the formulas and their precision."""

    def supports(self, x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> bool:
        """Whether this backend takes the call. Called first, on each call: it has to be quick.

        x is a plain tensor of (N, C, *) with at least one value; `parameters` are running_mean, running_var, weight
        and bias, each None or of C values; residual is None or has the shape of x. Devices, types, strides: anything.
        A backend declines here what it does not do (device, a residual or parameter of another type, a layout).
        """
        ...

    def forward(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (y, mean, invstd).

        y is a new dense tensor of x's shape, type and suggested memory format. mean and invstd = 1/√(var + eps) are
        new tensors of shape (C,), of the statistics' type or a wider one, never views of the running statistics.

        With `training`, n > 1, mean and var (m2/n) are the batch's, and running_mean and running_var, unless both are
        None, are updated in place: new = (1 - momentum) · old + momentum · batch, with the variance m2/(n - 1).
        Without, mean and var are running_mean and running_var, which stay as they are.
        """
        ...

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        activation: str | None,
        residual: Tensor | None,
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        """Return (dx, dresidual, dweight, dbias), each that `needs` asks for, in this order; else None.

            g       = dy · activation'(z), z recomputed from what the forward pass read
            dbias   = Σ g                        dweight = Σ g · x̂
            dx      = weight · invstd · (g - dbias/n - x̂ · dweight/n)      (without `training`: weight · invstd · g)
            dresidual = g

        dy has the shape and type of y and any strides, 0 included. residual is the one given to `forward`, or None
        where it is not needed to recompute z, since there is no activation. dx and dresidual have x's type and
        suggested memory format, dweight and dbias the type of weight and bias. Without an activation dresidual may be
        dy itself.
        """
        ...


BACKENDS: tuple[Backend, ...] = (cpu,)


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
    """`functional.batch_norm` of arguments already validated."""
    backend = _backend_for(x, (running_mean, running_var, weight, bias), residual)
    if backend is None:
        return reference.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
    arguments = (x, running_mean, running_var, weight, bias, training, float(momentum), eps, activation, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        y = _BatchNorm.apply(backend, *arguments)
    else:
        y = backend.forward(*arguments)[0]
    if training and running_mean is not None and running_var is not None:
        # Backends write through pointers, which autograd can't see.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return y


def _backend_for(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> Backend | None:
    if not BACKENDS or torch.compiler.is_compiling() or x.numel() == 0 or _is_transformed(x, *parameters, residual):
        return None
    return next((backend for backend in BACKENDS if backend.supports(x, parameters, residual)), None)


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether any tensor stands for something else: a subclass's data, a batch under `vmap`, a dual number."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return any(type(t) not in (Tensor, torch.nn.Parameter, type(None)) for t in tensors)


class _BatchNorm(torch.autograd.Function):
    """Keeps x, mean, invstd and, under an activation, the residual: tensors that mostly exist anyway."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, *arguments: Any) -> Tensor:
        x, _, _, weight, bias, training, _, eps, activation, residual = arguments
        y, mean, invstd = backend.forward(*arguments)
        ctx.save_for_backward(x, mean, invstd, weight, bias, None if activation is None else residual)
        ctx.backend, ctx.training, ctx.eps, ctx.activation = backend, training, eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, x, _, _, weight, bias, _, _, _, _, residual = ctx.needs_input_grad
        needs = (x, residual, weight, bias)
        if torch.is_grad_enabled():
            dx, dresidual, dweight, dbias = _differentiable_gradients(ctx, dy, needs)
        else:
            x, mean, invstd, weight, bias, residual = ctx.saved_tensors
            dx, dresidual, dweight, dbias = ctx.backend.backward(
                dy, x, mean, invstd, weight, bias, ctx.training, ctx.activation, residual, needs
            )
        return None, dx, None, None, dweight, dbias, None, None, None, None, dresidual


def _differentiable_gradients(ctx: Any, dy: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    """The gradients as functions of dy and of the inputs that autograd can follow: those of the reference."""
    x, mean, invstd, *others = ctx.saved_tensors
    # Views, so that an input computed from another (a weight made from x, say) counts as an input of its own.
    x = x.view_as(x)
    weight, bias, residual = (None if t is None else t.view_as(t) for t in others)
    if ctx.training:
        y = reference.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps, ctx.activation, residual)
    else:
        y = reference.normalize(x, mean, invstd, weight, bias, ctx.activation, residual)
    inputs = enumerate((x, residual, weight, bias))
    wanted = {i: tensor for i, tensor in inputs if needs[i] and tensor is not None}
    found = dict(zip(wanted, torch.autograd.grad(y, tuple(wanted.values()), dy, create_graph=True), strict=True))
    if needs[1] and residual is None:
        found[1] = dy
    return found.get(0), found.get(1), found.get(2), found.get(3)
