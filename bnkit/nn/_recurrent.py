"""RecurrentBatchNorm: statistics for each time step."""

from __future__ import annotations

import contextlib
from typing import Unpack

import torch
from torch import Tensor, nn

from .. import functional
from .._checks import require
from ..moments import statistics_dtype
from ._any_dimension import AnyDimension, Options
from ._batch_norm import is_recomputation, undone_if_nonfinite


class RecurrentBatchNorm(AnyDimension):
    r"""Batch normalization inside a recurrent network: statistics of their own for each time step, one weight and bias.

        y_t = activation(weight · (x_t - mean_t) / √(var_t + eps) + bias + residual_t)

    In training mean_t and var_t are those of the batch at step t, and update the running ones of that step; in eval
    mode they are the running ones. Step `max_length - 1` and all later ones share their running statistics, so that a
    sequence may be longer than those trained on.

    The weight starts at 0.1: with 1 the values saturate the tanh and sigmoid functions that follow, and gradients
    vanish over time (section 4 of the paper).

    The buffers `running_mean` and `running_var` are (max_length, C) and `num_batches_tracked` is (max_length,). A step
    at which all samples agree, such as the first after a zero state, gets a variance of 0, and in eval mode whatever
    differs from it is amplified by 1/√eps.

    References:
        Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch Normalization", 2016,
        https://arxiv.org/abs/1603.09025.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in `BatchNorm2d`.
        max_length: steps with statistics of their own.
        gamma: initial weight.
        bias, activation, skip_nonfinite, inplace: as in `BatchNorm2d`.

    Raises:
        ValueError: `max_length` below 1, a negative step, or what `bnkit.functional.batch_norm` raises it for.
    """

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
        max_length: int,
        gamma: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        require(
            max_length >= 1, f"max_length must be at least 1, got {max_length}: use the longest training sequence's."
        )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.max_length = max_length
        self.gamma = gamma
        if track_running_stats:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                one = getattr(self, name)
                self.register_buffer(name, one.expand(max_length, *one.shape).clone())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Statistics 0 and 1, weight `gamma`, bias 0."""
        super().reset_parameters()
        if self.weight is not None and "gamma" in self.__dict__:
            nn.init.constant_(self.weight, self.gamma)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, step: int | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """activation(batch_norm(input) + residual), of the input's shape.

        Args:
            input: (N, C) or (N, C, *), one time step; or without `step` (N, T, C), all steps from the first.
            step: the time step, counted from 0.
            residual: of the input's shape; None adds nothing.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._recorded(input, step, residual)
        if step is not None:
            require(step >= 0, f"time steps count from 0, got {step}: pass the step since the sequence began.")
            self._check_input_dim(input)
            step = min(step, self.max_length - 1)
            return self._normalize_steps(input, residual, slice(step, step + 1))
        require(
            input.dim() == 3 and input.shape[2] == self.num_features,
            f"expected a sequence of shape (N, T, {self.num_features}) without a step, got {tuple(input.shape)}: "
            "pass step= for a single step.",
        )
        require(
            residual is None or residual.shape == input.shape,
            f"residual must have the input's shape {tuple(input.shape)}, "
            f"got {None if residual is None else tuple(residual.shape)}; expand or transpose it first.",
        )
        return self._normalize_sequence(input, residual)

    def _normalize_sequence(self, input: Tensor, residual: Tensor | None) -> Tensor:
        length = input.shape[1]
        if self.training and length and (self.momentum is None or length > self.max_length):
            steps = enumerate(
                zip(input.unbind(1), [None] * length if residual is None else residual.unbind(1), strict=True)
            )
            return torch.stack([self(x, step, r) for step, (x, r) in steps], 1)
        flat = None if residual is None else residual.flatten(1)
        rows = torch.arange(length, device=input.device).clamp(max=self.max_length - 1)
        return self._normalize_steps(input.flatten(1), flat, slice(0, length) if self.training else rows).view_as(input)

    def _normalize_steps(self, input: Tensor, residual: Tensor | None, steps: slice | Tensor) -> Tensor:
        """Normalize (N, k · C, *), the channels of k steps side by side."""
        statistics = (self.running_mean, self.running_var, self.num_batches_tracked)
        mean, var, count = (None if statistic is None else statistic[steps].flatten() for statistic in statistics)
        if not self.training:
            return self._normalize(input, residual, mean, var, mean is None and var is None, 0.0)
        if mean is None or var is None or count is None or not self.track_running_stats or is_recomputation():
            return self._normalize(input, residual, None, None, True, 0.0)
        with undone_if_nonfinite(mean, var, count) if self.skip_nonfinite else contextlib.nullcontext():
            momentum = self.momentum
            if momentum is None:
                momentum = (count + 1).squeeze(0).to(statistics_dtype(mean.dtype)).reciprocal()
            y = self._normalize(input, residual, mean, var, True, momentum)
            count.add_(1)
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
        steps = input.shape[1] // self.num_features
        return functional.batch_norm(
            input,
            mean,
            var,
            None if self.weight is None else self.weight.repeat(steps),
            None if self.bias is None else self.bias.repeat(steps),
            training,
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """torch.nn's, and the options that differ from it."""
        return super().extra_repr() + f", max_length={self.max_length}"
