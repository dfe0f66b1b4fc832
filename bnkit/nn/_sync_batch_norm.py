"""Batch normalization over the batches of several ranks, as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import UserError, require
from ..moments import Moments, merged, packed, statistics_dtype
from ..ops import reference
from ._sync_exchange import Exchange


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    exchange: Exchange,
) -> Tensor:
    """`functional.batch_norm` in training, with the moments of the batches of all ranks of an `Exchange`."""
    _check(x, eps, residual)
    dtype = statistics_dtype(x.dtype)
    wide = x.to(dtype)
    mine = Moments.of(wide, (0, *range(2, x.dim())))
    count, mean, m2 = _MergedMoments.apply(mine.count, mine.mean.double() + mine.mean_error, mine.m2.double(), exchange)
    _check_count(count, x)
    if running_mean is not None and running_var is not None:
        _update(running_mean, running_var, count, mean, m2, momentum)
    rounded = mean.to(dtype)
    invstd = torch.rsqrt(m2 / count.clamp(min=1) + eps).to(dtype)
    error = (mean - rounded).to(dtype)
    return reference.normalize(wide, rounded, invstd, weight, bias, activation, residual, error, dtype=x.dtype)


def _check(x: Tensor, eps: float, residual: Tensor | None) -> None:
    """What can be known before ranks depend on each other."""
    if not x.is_floating_point():
        raise NotImplementedError(f'"batch_norm" not implemented for {x.dtype}; convert the input, as with x.float().')
    require(
        x.dim() >= 2, f"expected input of shape (N, C) or (N, C, *), got {tuple(x.shape)}; add the missing dimension."
    )
    require(eps > 0.0, f"batch_norm eps must be positive during training, but got {eps}; the usual value is 1e-5.")
    if residual is not None and residual.shape != x.shape:
        raise UserError(
            f"residual must have the input's shape {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it first if it is meant to broadcast."
        )


def _check_count(count: Tensor, x: Tensor) -> None:
    """On all ranks alike. Where the number is on another device, reading it would wait for that."""
    if count.is_cpu and not torch.compiler.is_compiling() and count == 1:
        raise UserError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} and no more on all "
            "ranks together: the variance of one value is 0, so every output would be the bias; use a larger batch, "
            "drop_last=True in the DataLoader, or eval mode for this layer."
        )


@torch.no_grad()
def _update(
    running_mean: Tensor, running_var: Tensor, count: Tensor, mean: Tensor, m2: Tensor, momentum: float | Tensor
) -> None:
    """As `reference.update_running_statistics`, decided on the device: fewer than two values leave all as it was."""
    known = count > 1
    for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
        # The old value by itself where nothing is known: 0 · NaN would be NaN.
        running.copy_(torch.where(known, (1 - momentum) * running + momentum * batch, running))


class _MergedMoments(torch.autograd.Function):
    """Count, mean and m2 over all ranks, from those of each. All float64; the same bits on all ranks.

    With n, mean and m2 the merged ones and ∂ the gradients of what all ranks' losses add up to,

        ∂m2ᵣ = ∂m2        ∂meanᵣ = nᵣ/n · ∂mean + 2 nᵣ (meanᵣ - mean) · ∂m2
    """

    @staticmethod
    def forward(ctx: Any, count: int, mean: Tensor, m2: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor, Tensor]:
        total, all_mean, all_m2 = merged(exchange.gather(packed(count, mean, m2)))
        ctx.save_for_backward(mean, total, all_mean)
        ctx.count, ctx.exchange = count, exchange
        ctx.mark_non_differentiable(total)
        return total, all_mean, all_m2

    @staticmethod
    def backward(ctx: Any, _: Tensor, dmean: Tensor, dm2: Tensor) -> tuple[None, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mean, total, all_mean = ctx.saved_tensors
        dmean, dm2 = _Sum.apply(torch.cat([dmean, dm2]), ctx.exchange).chunk(2)
        share = ctx.count / total.clamp(min=1)
        return None, share * dmean + 2 * ctx.count * (mean - all_mean) * dm2, dm2, None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' vectors; its gradient is again the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum(vector)

    @staticmethod
    def backward(ctx: Any, dvector: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(dvector, ctx.exchange), None
