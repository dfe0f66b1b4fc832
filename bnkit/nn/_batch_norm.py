"""BatchNorm1d, 2d and 3d: torch.nn's layers with a residual and an activation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from .._checks import UserError, require, unknown
from ..moments import statistics_dtype
from ..ops import ACTIVATIONS
from ..ops.dispatch import count_batch


def is_recomputation() -> bool:
    """Whether autograd's backward pass is running in this thread.

    A forward pass inside it recomputes, for activation checkpointing of any kind, a batch already seen: its statistics
    have been counted. A compiled function that checkpoints recomputes without side effects. Checkpointing a function
    already compiled does not: that counts twice, as in torch.nn, so compile around the checkpoint.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def undone_if_nonfinite(*statistics: Tensor) -> Iterator[None]:
    """Let the statistics be updated, then put all of them back if a single value is NaN or infinite.

    Decided on the device, without waiting for it.
    """
    before = [statistic.clone() for statistic in statistics]
    yield
    finite = torch.stack([statistic.isfinite().all() for statistic in statistics]).all()
    for statistic, old in zip(statistics, before, strict=True):
        statistic.copy_(torch.where(finite, statistic, old))


def _statistics(layer: _BatchNorm) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """running_mean, running_var and num_batches_tracked.

    Without the detour by `__getattr__`: of a small batch's time, for these and `_affine`'s it takes a twentieth.
    """
    buffers = layer._buffers
    try:
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # parametrized, or in a replica of `torch.nn.DataParallel`
        return layer.running_mean, layer.running_var, getattr(layer, "num_batches_tracked", None)


def _affine(layer: _BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias."""
    parameters = layer._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        return layer.weight, layer.bias


class BatchNorm(_BatchNorm):
    """What the layers of every dimension share; `BatchNorm2d` documents it."""

    can_be_inplace: ClassVar[bool] = True
    """Whether a layer of this class can do without its input in the backward pass."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite: bool = False,
        inplace: bool = False,
    ) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if inplace:
            self._check_inplace(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.skip_nonfinite = skip_nonfinite
        self.inplace = inplace

    def _check_inplace(self, activation: str | None) -> None:
        """Refuse `inplace=True` where it cannot be had; runs ahead of the constructor."""
        functional.check_inplace(activation)
        require(
            self.can_be_inplace,
            f"{type(self).__name__} needs its input for the backward pass, got inplace=True: leave it False.",
        )

    def reset_parameters(self) -> None:
        """Statistics 0 and 1, weight 1, bias 0. That of torch.nn, in PyTorch 2.11, takes a weight to have a bias."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(batch_norm(input) + residual), of the input's shape.

        Args:
            input: the batch to normalize.
            residual: of the same shape; None adds nothing.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._recorded_by_fx(input, residual)
        self._check_input_dim(input)
        mean, var, count = _statistics(self)
        if not self.training:
            return self._normalize(input, residual, mean, var, mean is None and var is None, 0.0)
        if not self.track_running_stats or is_recomputation():
            return self._normalize(input, residual, None, None, True, 0.0)
        if not self.skip_nonfinite:
            return self._normalize_and_track(input, residual, mean, var, count)
        with undone_if_nonfinite(*(statistic for statistic in (mean, var, count) if statistic is not None)):
            return self._normalize_and_track(input, residual, mean, var, count)

    def _check_input_dim(self, input: Tensor) -> None:
        try:
            super()._check_input_dim(input)
        except ValueError as error:  # torch's, which lacks the remedy
            raise UserError(
                f"{error}: reshape it, or take the layer of its dimensions, BatchNorm1d for (N, C) and (N, C, L), "
                "BatchNorm2d for (N, C, H, W), BatchNorm3d for (N, C, D, H, W)."
            ) from None

    def _normalize_and_track(
        self, input: Tensor, residual: Tensor | None, mean: Tensor | None, var: Tensor | None, count: Tensor | None
    ) -> Tensor:
        if self.momentum is not None:
            momentum = self.momentum
        elif mean is None or count is None:
            momentum = 0.0
        else:  # as a tensor: reading the number would wait for the device, and break a compiled graph
            momentum = (count + 1).to(statistics_dtype(mean.dtype)).reciprocal()
        y = self._normalize(input, residual, mean, var, True, momentum)
        if count is not None:
            count_batch(count)
        return y

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
    ) -> Tensor:
        weight, bias = _affine(self)
        return functional.batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            training,
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            inplace=self.inplace,
        )

    def _recorded_by_fx(self, input: Any, residual: Any) -> Any:
        """Record this layer as one call, which torch.fx does of its own accord only for classes in torch.nn."""
        arguments = (input,) if residual is None else (input, residual)
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), arguments, {})

    def extra_repr(self) -> str:
        """torch.nn's, and the options that differ from it."""
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.skip_nonfinite:
            text += ", skip_nonfinite=True"
        return text + ", inplace=True" if self.inplace else text


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L), with a residual and an activation; see `BatchNorm2d`."""


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalization of (N, C, H, W), with a residual and an activation.

        y = activation(weight · (x - mean) / √(var + eps) + bias + residual)

    Takes the place of `torch.nn.BatchNorm2d`: a subclass of it, with the same parameters, buffers and `state_dict`,
    and the same result where neither `activation` nor `residual` is given. In training, mean and var are those of
    each channel over the batch, and running statistics are kept for `eval()`; see `bnkit.functional.batch_norm` for
    types and formulas.

    Where it differs from torch.nn: recomputing a forward pass during the backward pass, as activation checkpointing
    does, leaves the running statistics alone, since they have seen the batch; and with `momentum=None` the count
    of batches stays on the device.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None for the mean over all batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics; without, `eval()` uses the batch's too.
        device, dtype: of parameters and buffers.
        bias: with `affine`, learn the bias.
        activation: None, "relu", "leaky_relu" (slope 0.01), "elu", "silu", "gelu" (exact), "hardswish", "sigmoid" or
            "tanh".
        skip_nonfinite: keep a batch with NaN or infinite statistics, as an overflow in mixed precision makes, out of
            the running statistics and their count. Statistics that are already not finite stay as they are.
        inplace: keep the output for the backward pass instead of the input, with an activation that can be undone
            (None, "leaky_relu", "elu") and no residual: see `bnkit.functional.batch_norm`.

    Raises:
        ValueError: unknown activation, `inplace` with one that cannot be undone, or what
            `bnkit.functional.batch_norm` raises it for.
    """


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W), with a residual and an activation; see `BatchNorm2d`."""
