"""Picks the backend of a batch norm.

The reference serves every call that no backend of `BACKENDS` takes: other devices and types, empty batches, tensor
subclasses, `torch.func` transforms and forward-mode differentiation, and what is recorded to run without this package
(`torch.export`, `torch.jit.trace`). It also serves the second derivatives of all backends.

Called directly, a backend costs least. Where others look at the operators that are called, the compiler or a dispatch
mode, they see those of `operators`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..moments import statistics_dtype
from . import _inplace, cpu, cuda, reference
from ._autograd import differentiable
from ._backend import COMPOSED, Backend
from ._transforms import are_transformed, check_vmap, is_stored, transforms_active

__all__ = [
    "BACKENDS",
    "PLAIN",
    "Backend",
    "batch_norm",
    "by_reference",
    "count_batch",
    "count_version",
    "first_to_support",
    "is_recorded",
    "serve",
    "through_own_statistics",
]

BACKENDS: tuple[Backend, ...] = (cpu, cuda)

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
"""Types of the arguments that a backend takes. A subclass stands for something else than its data."""

_int64_at = ctypes.c_int64.from_address


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
    inplace: bool = False,
) -> Tensor:
    """`functional.batch_norm` of arguments already validated."""
    if transforms_active() or is_recorded():
        tensors = (x, running_mean, running_var, weight, bias, residual, momentum)
        if is_recorded() or are_transformed(tensors):
            if inplace:
                _inplace.check_not_repeated()
            return by_reference(
                x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
            )
        if torch._C._are_functorch_transforms_active():  # in some of which even new tensors are wrapped
            with temporarily_clear_interpreter_stack():
                return batch_norm(
                    x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, inplace
                )
    if isinstance(momentum, Tensor):  # backends take a number, for which the host would wait
        # Not a function within this one, which would be slower to get at its variables on every call.
        normalize = partial(
            batch_norm,
            x,
            weight=weight,
            bias=bias,
            training=training,
            momentum=1.0,
            eps=eps,
            activation=activation,
            residual=residual,
            inplace=inplace,
        )
        return through_own_statistics(normalize, x, running_mean, running_var, training, momentum)
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return torch.ops.bnkit.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
    plain = {type(x), type(running_mean), type(running_var), type(weight), type(bias), type(residual)} <= PLAIN
    backend = first_to_support(x, (running_mean, running_var, weight, bias), residual) if plain else None
    if inplace and plain and x.numel() and _inplace.is_possible(x, weight, bias):
        y = _inplace.batch_norm(
            backend, x, running_mean, running_var, weight, bias, training, momentum, eps, activation
        )
    else:
        y = serve(backend, x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual)
    if backend is not None:
        count_version(training, running_mean, running_var)
    return y


def by_reference(
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
    """`batch_norm` in operators that transforms can follow, and that run without this package."""
    check_vmap((x, residual, weight, bias), (running_mean, running_var), training)
    return reference.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
    )


def first_to_support(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> Backend | None:
    """The backend that takes the call; None if the reference has to."""
    if x.numel():
        for backend in BACKENDS:
            if backend.supports(x, parameters, residual):
                return backend
    return None


def serve(
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
    residual: Tensor | None,
) -> Tensor:
    """y by this backend, or by the reference if None, in autograd's graph where a gradient is asked for."""
    if backend is None:
        return reference.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
    if activation in COMPOSED:
        z = serve(backend, x, running_mean, running_var, weight, bias, training, momentum, eps, None, residual)
        return reference.ACTIVATIONS[activation](z)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        call = (backend, running_mean, running_var, training, momentum, eps, activation)
        return differentiable(x, residual, weight, bias, call)
    return backend.forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, False
    )[0]


def count_version(training: bool, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Tell autograd that the running statistics were written to: backends write through pointers."""
    if training and running_mean is not None and running_var is not None:
        torch._C._increment_version((running_mean, running_var))


def count_batch(count: Tensor) -> None:
    """`count.add_(1)`, which takes a twentieth of a small batch's time: a plain number is written to where it lies."""
    if (
        torch.compiler.is_compiling()
        or is_recorded()
        or transforms_active()
        or _len_torch_dispatch_stack()
        or type(count) is not Tensor
        or not count.is_cpu
        or count.dtype is not torch.int64
        or count.dim() > 0
        or not is_stored(count)
    ):
        count.add_(1)
        return
    _int64_at(count.data_ptr()).value += 1
    torch._C._increment_version((count,))


def is_recorded() -> bool:
    """Whether calls are recorded for use without this package."""
    # Under `torch.compile` the function `torch.compiler.is_exporting` is true in PyTorch 2.11, which exports nothing.
    return torch._C._get_tracing_state() is not None or torch.compiler._is_exporting_flag


def through_own_statistics(
    normalize: Callable[[Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
) -> Tensor:
    """`normalize(running_mean, running_var)`, in training in two steps.

    With a momentum of 1 it leaves the batch's own statistics in the tensors it is given; PyTorch's operators then
    update the running ones.
    """
    if not training or running_mean is None or running_var is None or x.numel() == 0:
        return normalize(running_mean, running_var)
    # Made from x: made from the running statistics, these would be kept for a pass that is repeated.
    mean, var = (x.new_zeros(x.shape[1], dtype=statistics_dtype(x.dtype)) for _ in range(2))
    y = normalize(mean, var)
    with torch.no_grad():
        for running, batch in ((running_mean, mean), (running_var, var)):
            running.copy_((1 - momentum) * running + momentum * batch.view_as(running))
    return y
