"""Batch norm as operators of `torch.ops.bnkit`, which `torch.compile` and dispatch modes see.

`batch_norm` is what a compiled graph calls. It is resolved while the graph is made, into plain PyTorch where no
backend takes the call, and else into `batch_norm_forward` and `batch_norm_backward`, a backend's two passes. These two
have the arguments of `Backend`; they return no input, and of the gradients only those that are needed. They keep the
residual, never a mask, whose bits are in the order of x: a compiler may lay x out differently in the two passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .._checks import UserError
from . import dispatch
from ._backend import Backend, Gradients
from ._layout import is_rows
from ._transforms import transforms_active

_INPUTS = """(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias,
    bool training, float momentum, float eps, str? activation, Tensor? residual)"""
_GRADIENT_INPUTS = """(Tensor dy, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,
    bool training, str? activation, Tensor? residual, bool[4] needs)"""
_INVSTD = {"cpu": torch.float64, "cuda": torch.float32}
"""The type of a backend's invstd; its mean is float64."""
_PLAIN = dispatch.PLAIN | {FakeTensor, FunctionalTensor}

_library = torch.library.Library("bnkit", "DEF")
# The results lie in memory as x does, whatever that is, so the compiler may choose its layout.
_FOLLOWS_ITS_INPUT = (torch.Tag.flexible_layout,)
_library.define(f"batch_norm{_INPUTS} -> Tensor")
_library.define(f"batch_norm_forward{_INPUTS} -> (Tensor y, Tensor mean, Tensor invstd)", tags=_FOLLOWS_ITS_INPUT)
_library.define(f"batch_norm_backward{_GRADIENT_INPUTS} -> Tensor[]", tags=_FOLLOWS_ITS_INPUT)


def _batch_norm(
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
    if transforms_active() or dispatch.is_recorded():
        return dispatch.by_reference(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
    tensors = (x, running_mean, running_var, weight, bias, residual)
    plain = {type(t) for t in tensors} <= _PLAIN
    backend = dispatch.first_to_support(x, tensors[1:5], residual) if plain else None
    if backend is None:
        return dispatch.serve(
            None, x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )

    def normalize(mean: Tensor | None, var: Tensor | None) -> Tensor:
        return dispatch.serve(_Operators, x, mean, var, weight, bias, training, 1.0, eps, activation, residual)

    # Under activation checkpointing the pass is repeated, which may not read what a graph's end has updated.
    return dispatch.through_own_statistics(normalize, x, running_mean, running_var, training, momentum)


def _batch_norm_forward(
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
    backend = _backend_for(x, (running_mean, running_var, weight, bias), residual)
    _check_channels(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_shapes(x, residual=residual)
    _check_statistics(running_mean, running_var, training)
    x = _laid_out(x)
    y, mean, invstd, _ = backend.forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, False
    )
    dispatch.count_version(training, running_mean, running_var)
    return y, mean, invstd


def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str | None,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    backend = _backend_for(x, (mean, invstd, weight, bias), residual)
    _check_channels(x, mean=mean, invstd=invstd, weight=weight, bias=bias)
    _check_shapes(x, dy=dy, residual=residual)
    needed = (needs[0], needs[1], needs[2], needs[3])
    dy, x = dy.to(x), _laid_out(x)
    found = backend.backward(dy, x, mean, invstd, weight, bias, training, activation, residual, needed)
    return [gradient for gradient in found if gradient is not None]


def _fake_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty_strided(x.shape, _strides(x))
    mean = x.new_empty(x.shape[1], dtype=torch.float64)
    return y, mean, torch.empty_like(mean, dtype=_INVSTD[x.device.type])


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str | None,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    slabs = [x.new_empty_strided(x.shape, _strides(x)) for needed in needs[:2] if needed]
    parameters = zip((weight, bias), needs[2:], strict=True)
    return slabs + [torch.empty_like(p) for p, needed in parameters if needed and p is not None]


_library.impl("batch_norm", _batch_norm, "CompositeImplicitAutograd")
_library.impl("batch_norm", _batch_norm, "FuncTorchBatchedDecomposition")
_library.impl("batch_norm_forward", _batch_norm_forward, "CompositeExplicitAutograd")
_library.impl("batch_norm_backward", _batch_norm_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bnkit::batch_norm_forward", _fake_forward, lib=_library)
torch.library.register_fake("bnkit::batch_norm_backward", _fake_backward, lib=_library)


def _backend_for(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> Backend:
    backend = dispatch.first_to_support(x, parameters, residual)
    if backend is None:
        raise NotImplementedError(
            f"no kernel of bnkit takes a {x.dtype} tensor on {x.device} with these arguments: "
            "call bnkit.functional.batch_norm, which falls back to PyTorch's operators."
        )
    return backend


def _check_channels(x: Tensor, **parameters: Tensor | None) -> None:
    """Kernels take pointers: past the end of a shorter tensor they would read, or write."""
    for name, tensor in parameters.items():
        if tensor is not None and tensor.numel() != x.shape[1]:
            raise UserError(
                f"{name} must have a value for each of the {x.shape[1]} channels of x, got {tensor.numel()}: "
                f"pass one of the shape ({x.shape[1]},)."
            )


def _check_shapes(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != x.shape:
            raise UserError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}: expand it.")


def _check_statistics(running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    if not training and (running_mean is None or running_var is None):
        raise UserError("inference must have running_mean and running_var, got None: pass both, or training=True.")


def _laid_out(x: Tensor) -> Tensor:
    """x with the strides that all results have, copied if need be."""
    strides = _strides(x)
    if x.stride() == strides:
        return x
    if x.is_contiguous() or is_rows(x):  # but for dimensions of size 1
        return x.as_strided(x.shape, strides)
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _strides(x: Tensor) -> tuple[int, ...]:
    """The channel innermost if it is in x, else contiguous.

    Spelled out, since eager and fake tensors differ in what `empty_like` makes of strides of dimensions of size 1.
    """
    rows, contiguous = _strides_of(x.shape, innermost=1), _strides_of(x.shape, innermost=x.dim() - 1)
    if x.stride() == rows:
        return rows
    return contiguous if x.is_contiguous() or x.stride(1) != 1 else rows


def _strides_of(shape: Sequence[int], innermost: int) -> tuple[int, ...]:
    """Those of a dense tensor with one dimension innermost, and the others in their order."""
    order = [*(d for d in range(len(shape)) if d != innermost), innermost]
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step = step * max(shape[dimension], 1)
    return tuple(strides)


class _Operators:
    """The operators, as a backend."""

    @staticmethod
    def supports(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None) -> bool:
        return dispatch.first_to_support(x, parameters, residual) is not None

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
        residual: Tensor | None,
        for_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        results = torch.ops.bnkit.batch_norm_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
        return *results, None if activation is None else residual

    @staticmethod
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
    ) -> Gradients:
        passed_on = needs[1] and activation is None
        asked = [needs[0], needs[1] and not passed_on, needs[2], needs[3]]
        found = iter(
            torch.ops.bnkit.batch_norm_backward(dy, x, mean, invstd, weight, bias, training, activation, kept, asked)
        )
        dx, dresidual, dweight, dbias = (next(found) if needed else None for needed in asked)
        return dx, dy if passed_on else dresidual, dweight, dbias
