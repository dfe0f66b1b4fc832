"""Batch normalization as a function: `torch.nn.functional.batch_norm` with a residual and an activation."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import ops
from ._checks import UserError, unknown

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Normalize each channel of a batch, add a residual, apply an activation.

        y = activation(weight · (x - mean) / √(var + eps) + bias + residual)

    In training, mean and (biased) variance are the batch's own, and the running statistics are updated in place,
    running = (1 - momentum) · running + momentum · batch, with the batch's *unbiased* variance. Otherwise mean and
    variance are `running_mean` and `running_var`. Statistics are float32 (float64 for float64) whatever the type of
    x; y has the type of x, promoted with that of the residual. A batch of size zero leaves the running statistics
    alone.

    References:
        Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2.

    Args:
        x: (N, C) or (N, C, *), floating point, dense, with any strides.
        running_mean, running_var: (C,), both or neither; needed unless `training`. No gradient flows to them.
        weight, bias: (C,); 1 and 0 if None.
        training: normalize with the batch's statistics, and update the running ones.
        momentum: weight of the new batch in the running statistics (PyTorch's convention).
        eps: added to the variance; positive (in inference it may be 0).
        activation: None, "relu", "leaky_relu" (slope 0.01), "elu", "silu", "gelu" (exact), "hardswish", "sigmoid" or
            "tanh".
        residual: of the shape of x, added before the activation.
        inplace: keep y for the backward pass instead of x, and rebuild x̂ = (activation⁻¹(y) - bias) / weight from it,
            as In-Place ABN does (Rota Bulò et al., 2018, https://arxiv.org/abs/1712.02616). x is not written to: what
            is saved is that nothing keeps it alive, where the next layer keeps y anyway. For the activations None,
            "leaky_relu" and "elu", without a residual, to be differentiated once. Gradients are those of
            `inplace=False` up to rounding in the type of y, which `bias` large against `weight` magnifies, and "elu"
            where y is close to -1. Where less than half the digits of x̂ would be left, |weight| ≤ √ulp · |bias| in
            any channel (as with a weight of 0), x is kept for that call after all; on a GPU the host waits for that
            answer. Compiled graphs choose themselves what to keep; there it has no effect.

    Raises:
        ValueError: one value a channel in training, eps out of range, unknown activation, only one of running_mean and
            running_var, x or residual of the wrong shape, `inplace` with a residual or with an activation that cannot
            be undone, one running statistic for many batches under `vmap`.
        RuntimeError: running statistics missing in inference, or asked for a gradient, or a per-channel argument of the
            wrong shape.
        NotImplementedError: x is not floating point, or not dense.
    """
    tensors = (x, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            x,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
            inplace=inplace,
        )
    _check(x, running_mean, running_var, weight, bias, training, eps, activation, residual)
    if inplace:
        check_inplace(activation, residual)
    if x.dim() < 2:  # empty, which torch lets pass
        return x.clone()
    return ops.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, inplace
    )


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    # In one function, and nothing looked at twice: of a small batch's time, the checks take a tenth.
    if not x.is_floating_point() or x.layout is not torch.strided:
        _refuse_kind(x)
    size, values = x.shape, x.numel()
    if len(size) < 2 and values > 0:
        raise UserError(f"expected input of shape (N, C) or (N, C, *), got {tuple(size)}; add the missing dimension.")
    if running_mean is None or running_var is None:
        _check_absent(running_mean, running_var, training)
    elif running_mean.requires_grad or running_var.requires_grad:
        _check_constant(running_mean)
    channels = size[1] if len(size) > 1 else 0
    shape = (channels,)
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.shape != shape:
            _refuse_shape(channels, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if residual is not None and residual.shape != size:
        raise UserError(
            f"residual must have the input's shape {tuple(size)}, got {tuple(residual.shape)}; "
            "expand it first if it is meant to broadcast."
        )
    # The first comparison is cheap, and tells all but empty batches apart from this mistake.
    if training and values <= channels and len(size) > 1 and size[0] * math.prod(size[2:]) == 1:
        raise UserError(
            f"Expected more than 1 value per channel when training, got input size {size}: the variance of one "
            "value is 0, so every output would be the bias; use a larger batch, drop_last=True in the DataLoader, "
            "or eval mode for this layer."
        )
    if eps <= 0.0:
        _check_eps(eps, training)
    if activation is not None and activation not in ops.ACTIVATIONS:
        raise unknown("activation", activation, ops.ACTIVATIONS)


def _refuse_kind(x: Tensor) -> NoReturn:
    kind, remedy = (x.layout, "to_dense") if x.is_floating_point() else (x.dtype, "float")
    raise NotImplementedError(f'"batch_norm" not implemented for {kind}; convert the input, as with x.{remedy}().')


def _check_constant(running_mean: Tensor) -> None:
    if torch.is_grad_enabled():
        name = "running_mean" if running_mean.requires_grad else "running_var"
        raise RuntimeError(
            f"batch_norm is not differentiable with respect to argument '{name}', got one with requires_grad=True: "
            f"pass {name}.detach()."
        )


def _check_absent(running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    if training and running_mean is not running_var:
        raise UserError("running_mean and running_var must either both be None or neither be None; pass the other too.")
    if not training:
        name = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{name} must be defined in evaluation mode, got None: pass it, or training=True.")


def _refuse_shape(channels: int, **tensors: Tensor | None) -> NoReturn:
    name, tensor = next((n, t) for n, t in tensors.items() if t is not None and t.shape != (channels,))
    if tensor.numel() == channels:
        raise RuntimeError(
            f"{name} should be of shape ({channels},), got {tuple(tensor.shape)}: pass {name}.flatten()."
        )
    raise RuntimeError(
        f"{name} should contain {channels} elements not {tensor.numel()}, one for each channel (dimension 1) of the "
        f"input: make it of {channels} channels, or move the input's channels to dimension 1."
    )


def _check_eps(eps: float, training: bool) -> None:
    if training:
        raise UserError(f"batch_norm eps must be positive during training, but got {eps}; the usual value is 1e-5.")
    if eps < 0.0:
        raise UserError(f"batch_norm eps must be non-negative, but got {eps}; the usual value is 1e-5.")


def check_inplace(activation: str | None, residual: object = None) -> None:
    """Refuse what `inplace=True` cannot undo."""
    if activation not in ops.INVERTIBLE:
        choices = ", ".join(repr(name) for name in ops.INVERTIBLE)
        raise UserError(f"inplace=True needs an activation that can be undone, one of {choices}; got {activation!r}.")
    if residual is not None:
        raise UserError(
            "inplace=True cannot be combined with a residual, which would have to be kept: use inplace=False."
        )
