"""BatchRenorm: batch statistics, corrected towards the running ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from .. import functional
from .._checks import require
from ..moments import Moments, statistics_dtype
from ._any_dimension import AnyDimension, Options

Schedule = float | tuple[int, int, float] | Callable[[Tensor], Tensor | float]
"""A bound: a number, a ramp (first step, last step, final value), or a function of the count of batches (a tensor)."""

_REMEMBERED = 8
"""How many forward passes before a backward pass activation checkpointing may recompute."""


class BatchRenorm(AnyDimension):
    r"""Batch renormalization: training normalizes nearly as inference will. For small or dependent batches.

        r  = clip(σ_B / σ, 1/r_max, r_max)       d = clip((μ_B - μ) / σ, -d_max, d_max)
        x̂  = (x - μ_B) / σ_B · r + d
        y  = activation(weight · x̂ + bias + residual)

    with the batch's μ_B and σ_B = √(var_B + eps) and the running μ = running_mean and σ = √(running_var + eps) as they
    were before this batch. r and d are constants to the backward pass. Unclipped, x̂ is (x - μ) / σ; with r_max = 1 and
    d_max = 0 it is batch normalization. `eval()` is that of batch normalization.

    The paper averages σ_B, the biased standard deviation with eps inside. This layer averages the unbiased variance,
    as all batch norms in PyTorch do, so that its `state_dict` is theirs. The square root of a mean is not the mean of
    square roots: with batches of two the running σ is larger here, and is a better estimate of the population's.

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017,
        https://arxiv.org/abs/1702.03275, algorithm 1 and section 4.

    Args:
        num_features: C of (N, C) or (N, C, *).
        eps, affine, device, dtype: as in `BatchNorm2d`.
        momentum: as in `BatchNorm2d`. The paper's is 0.01: statistics that normalize the training should be steady.
        track_running_stats: must be True.
        r_max: bound of r, at least 1: a number, a tuple (first, last, final) for a straight line from 1 at
            `num_batches_tracked` = first to final at last, or a function of `num_batches_tracked`, a tensor.
            Default, the paper's: (5000, 40000, 3.0).
        d_max: bound of d, at least 0, likewise, a tuple's line starting at 0. Default, the paper's: (5000, 25000, 5.0).
        bias, activation, skip_nonfinite, inplace: as in `BatchNorm2d`.

    Raises:
        ValueError: `track_running_stats=False`, a bound out of range, or what `bnkit.functional.batch_norm` raises it
            for.
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
        r_max: Schedule = (5_000, 40_000, 3.0),
        d_max: Schedule = (5_000, 25_000, 5.0),
        **options: Unpack[Options],
    ) -> None:
        require(
            track_running_stats,
            "batch renormalization corrects towards its running statistics, got track_running_stats=False: "
            "leave it True.",
        )
        _check_schedule("r_max", r_max, 1.0)
        _check_schedule("d_max", d_max, 0.0)
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)
        self.r_max = r_max
        self.d_max = d_max
        self._corrections: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
    ) -> Tensor:
        if not training or input.numel() == 0 or input.dim() < 2:
            return super()._normalize(input, residual, mean, var, training, momentum)
        r, d = self._correction(input, recomputing=mean is None)
        weight = r if self.weight is None else self.weight * r
        bias = d if self.weight is None else self.weight * d
        return functional.batch_norm(
            input,
            mean,
            var,
            weight,
            bias if self.bias is None else bias + self.bias,
            True,
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            inplace=self.inplace,
        )

    @torch.no_grad()
    def _correction(self, input: Tensor, *, recomputing: bool) -> tuple[Tensor, Tensor]:
        batch = Moments.of(input, (0, *range(2, input.dim())))
        if recomputing:
            for mean, r, d in reversed(self._corrections):
                if torch.equal(mean, batch.mean):
                    return r, d
        r, d = self._correction_of(batch)
        if not torch.compiler.is_compiling():
            self._corrections.append((batch.mean, r, d))
        return r, d

    def _correction_of(self, batch: Moments) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        dtype = statistics_dtype(batch.mean.dtype)
        sigma = torch.sqrt(self.running_var.to(dtype) + self.eps)
        r_max = torch.as_tensor(_bound(self.r_max, 1.0, self.num_batches_tracked), dtype=dtype, device=sigma.device)
        d_max = torch.as_tensor(_bound(self.d_max, 0.0, self.num_batches_tracked), dtype=dtype, device=sigma.device)
        r = (torch.sqrt(batch.variance() + self.eps) / sigma).clamp(1 / r_max, r_max)
        d = ((batch.mean - self.running_mean) / sigma).clamp(-d_max, d_max)
        return r, d

    def extra_repr(self) -> str:
        """torch.nn's, and the options that differ from it."""
        return super().extra_repr() + f", r_max={self.r_max}, d_max={self.d_max}"


def _check_schedule(name: str, schedule: Schedule, least: float) -> None:
    if callable(schedule):
        return
    ramp = schedule if isinstance(schedule, tuple) else (0, 1, schedule)
    require(
        len(ramp) == 3 and ramp[0] < ramp[1] and ramp[2] >= least,
        f"{name} must be a number of at least {least:g}, a tuple (first step, last step, final value) with "
        f"first < last, or a function, got {schedule!r}: see BatchRenorm.",
    )


def _bound(schedule: Schedule, start: float, count: Tensor) -> Tensor | float:
    if callable(schedule):
        return schedule(count)
    if not isinstance(schedule, tuple):
        return schedule
    first, last, final = schedule
    return start + (final - start) * ((count - first) / (last - first)).clamp(0, 1)
