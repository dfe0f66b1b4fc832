"""MaskedBatchNorm: padding does not count."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .._checks import UserError
from ..moments import statistics_dtype
from ..ops import dispatch, reference
from ._any_dimension import AnyDimension
from ._batch_norm import is_recomputation, undone_if_nonfinite


class MaskedBatchNorm(AnyDimension):
    r"""Batch normalization of padded batches: statistics of the positions that a mask marks as data.

        n    = Σ mask          mean = Σ mask · x / n          var = Σ mask · (x - mean)² / n
        y    = mask · activation(weight · (x - mean) / √(var + eps) + bias + residual)

    with sums over samples and positions of each channel. Running statistics take the mean, and the variance with n - 1.
    In eval mode mean and var are the running ones. Without a mask it is batch normalization.

    What lies at padded positions, NaN included, has no influence on anything: the output is 0 there, and so are the
    gradients of input and residual. (Keras' `BatchNormalization` takes the same statistics, but puts out normalized
    padding.) A batch with fewer than two positions of data has no variance: its output is activation(bias + residual),
    the gradients of input and weight are 0, and it is neither in the running statistics nor counted. No value is read
    from the device to find out, so it is not an error.

    Plain PyTorch operations, without a kernel of its own.

    References:
        Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, algorithm 1, on the positions
        of data. The mask's meaning is that of Keras' `BatchNormalization`.

    Args:
        num_features: C of (N, C) or (N, C, *).
        eps, momentum, affine, track_running_stats, device, dtype, bias, activation, skip_nonfinite: as in
            `BatchNorm2d`.

    Raises:
        ValueError: `inplace=True`, a mask of the wrong type or shape, or what `bnkit.functional.batch_norm` raises it
            for.
    """

    can_be_inplace = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The normalized positions of data, 0 elsewhere; of the input's shape.

        Args:
            input: the batch to normalize.
            mask: True where there is data, False at padding; boolean, (N, *) or (N, 1, *), where a dimension of `*` may
                be 1. `torch.nn.MultiheadAttention` means the opposite by `key_padding_mask`: pass `~key_padding_mask`.
            residual: of the input's shape; None adds nothing.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._recorded(input, mask, residual)
        if mask is None:
            return super().forward(input, residual)
        self._check_input_dim(input)
        mask = _expanded(mask, input)
        # Masked on the way in too: a gradient of 0 times an infinity would be NaN.
        data = torch.where(mask, input, 0)
        residual = None if residual is None else torch.where(mask, residual, 0)
        mean, var = self.running_mean, self.running_var
        if self.training or (mean is None and var is None):
            y = self._normalize_masked(data, mask, residual)
        else:
            y = self._normalize(data, residual, mean, var, False, 0.0)
        return torch.where(mask, y, 0)

    def _normalize_masked(self, input: Tensor, mask: Tensor, residual: Tensor | None) -> Tensor:
        wide = input.to(statistics_dtype(input.dtype))
        count, mean, mean_error, m2 = _masked_moments(wide, mask)
        var = m2 / count.clamp(min=1)
        if self.training and self.track_running_stats and not is_recomputation():
            inputs = (input, mask, residual, self.weight, self.bias)
            dispatch.check_vmap(inputs, (self.running_mean, self.running_var), True)
            self._track(count, mean, m2)
        invstd = torch.where(count > 1, torch.rsqrt(var + self.eps), 0)
        return reference.normalize(
            wide, mean, invstd, self.weight, self.bias, self.activation, residual, mean_error, dtype=input.dtype
        )

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        seen = self.num_batches_tracked
        if self.running_mean is None or self.running_var is None or seen is None:
            return
        statistics = (self.running_mean, self.running_var, seen)
        counts = count > 1
        new = seen + counts
        momentum = self.momentum if self.momentum is not None else 1 / new.clamp(min=1).to(mean.dtype)
        with undone_if_nonfinite(*statistics) if self.skip_nonfinite else contextlib.nullcontext():
            for running, batch in ((self.running_mean, mean), (self.running_var, m2 / (count - 1).clamp(min=1))):
                running.copy_(torch.where(counts, (1 - momentum) * running + momentum * batch, running))
            seen.copy_(new)


def _masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count (a tensor), mean, what rounding took off the mean, and m2, as `Moments.of` has them."""
    dims = (0, *range(2, x.dim()))
    count = mask.sum().to(x.dtype)
    size = count.clamp(min=1)
    mean = x.sum(dims, keepdim=True) / size
    deviation = torch.where(mask, x - mean, 0)
    error = deviation.sum(dims, keepdim=True) / size
    m2 = torch.where(mask, deviation - error, 0).square().sum(dims)
    return count, mean.squeeze(dims), error.squeeze(dims), m2


def _expanded(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as (N, 1, *), as long as the input in every dimension but the channels."""
    if mask.dtype != torch.bool:
        raise UserError(f"a mask is boolean, True where there is data, got {mask.dtype}: pass mask.bool().")
    wanted = (input.shape[0], 1, *input.shape[2:])
    shaped = mask.unsqueeze(1) if mask.dim() == input.dim() - 1 else mask
    fits = shaped.dim() == input.dim() and all(a in (1, b) for a, b in zip(shaped.shape, wanted, strict=True))
    if not fits or shaped.shape[0] != wanted[0]:
        raise UserError(
            f"the mask of an input of shape {tuple(input.shape)} has shape {(wanted[0], *wanted[2:])} or {wanted}, "
            f"got {tuple(mask.shape)}: it marks positions, not channels."
        )
    return shaped.expand(wanted)
