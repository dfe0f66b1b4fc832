"""The contract of a fast implementation of batch norm.

Throughout, n is the number of values a channel, x̂ is (x - mean) · invstd, z is weight · x̂ + bias + residual, and y is
activation(z). The activations are `reference.ACTIVATIONS` without `COMPOSED`: leaky_relu's slope is 0.01, gelu is the
exact one (erf).

- Statistics (mean, variance, invstd and every sum over a channel) are float32 for float32, bfloat16 and float16 data,
  float64 for float64, or wider; all arithmetic between reading x and writing y or dx is of that type too.
- The variance is formed from centred values (Welford, Chan or two passes), never as E[x²] - E[x]².
- Each result's largest error against float64 stays below twice that of PyTorch's eager operators.
- Nothing is kept between calls, and no argument is written to but the running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

COMPOSED = frozenset({"elu"})
"""Activations that no backend fuses: they follow as an operation of their own."""

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
        for_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return (y, mean, invstd, kept).

        y is a new dense tensor of x's shape, type and suggested memory format. mean and invstd = 1/√(var + eps) are
        new tensors of shape (C,), of the statistics' type or a wider one, never views of the running statistics.

        kept is what `backward` wants of the residual, None where there is none or no activation. It is the residual
        itself, or for relu, and only with `for_backward` (a backward pass follows, and may be given one), a mask: a
        new tensor of the type uint8 that tells in a form of the backend's own where z ≤ 0 does not hold.

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
        kept: Tensor | None,
        needs: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        """Return (dx, dresidual, dweight, dbias), each that `needs` asks for, in this order; else None.

            g       = dy · activation'(z), z recomputed from what the forward pass read, if there is no mask
            dbias   = Σ g                        dweight = Σ g · x̂
            dx      = weight · invstd · (g - dbias/n - x̂ · dweight/n)      (without `training`: weight · invstd · g)
            dresidual = g

        dy has the shape and type of y and any strides, 0 included. kept is what `forward` returned. dx and dresidual
        have x's type and suggested memory format, dweight and dbias the type of weight and bias. Without an activation
        dresidual may be dy itself.
        """
        ...
