"""GhostBatchNorm: statistics of virtual batches, each a part of the real one."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Unpack

import torch
from torch import Tensor

from .. import functional
from .._checks import require
from ..moments import statistics_dtype
from ._any_dimension import AnyDimension, Options


class GhostBatchNorm(AnyDimension):
    r"""Batch normalization with the statistics of virtual ("ghost") batches, for training with large batches.

    The batch is split in order, as by `x.split(ghost_size)`, into ghosts X¹ … Xᵏ, and each is normalized by itself:

        yⁱ = activation(weight · (xⁱ - meanⁱ) / √(varⁱ + eps) + bias + residualⁱ)

    Running statistics are updated as if the ghosts had come one after the other, for i = 1 … k:

        running = (1 - momentum) · running + momentum · ghostⁱ

    and `num_batches_tracked` counts real batches. With `momentum=None` they are the mean over all batches of the mean
    over a batch's ghosts. `eval()` is that of batch normalization. A batch of at most `ghost_size` is one ghost.

    A last ghost that is smaller has its own statistics too, and the same weight in the running ones. If it had one
    value a channel, which has no variance, it joins the ghost before it.

    All whole ghosts go through one call of the kernel, side by side as further channels. That costs a copy of input and
    output.

    References:
        Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in large batch
        training of neural networks", 2017, https://arxiv.org/abs/1705.08741, algorithm 1.

    Args:
        num_features: C of (N, C) or (N, C, *).
        eps, momentum, affine, track_running_stats, device, dtype: as in `BatchNorm2d`.
        ghost_size: samples in a ghost.
        bias, activation, skip_nonfinite: as in `BatchNorm2d`. One ghost that is not finite keeps the whole batch out of
            the running statistics.

    Raises:
        ValueError: `inplace=True`, a `ghost_size` that is no integer or below 1, ghosts of one value a channel in
            training, or what `bnkit.functional.batch_norm` raises it for.
    """

    can_be_inplace = False

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
        ghost_size: int = 32,
        **options: Unpack[Options],
    ) -> None:
        require(
            isinstance(ghost_size, Integral) and ghost_size >= 1,
            f"ghost_size must be an integer of at least 1, got {ghost_size!r}: the paper's is 128, the default 32.",
        )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.ghost_size = ghost_size

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
    ) -> Tensor:
        fits = residual is None or residual.shape == input.shape  # if not, the base class refuses it
        splits = training and input.dim() > 1 and input.numel() > 0 and fits
        ghosts, rest = self._partition(input) if splits else (0, 0)
        if ghosts + (rest > 0) < 2:
            return super()._normalize(input, residual, mean, var, training, momentum)
        whole = input.shape[0] - rest
        parts = [self._ghosts(input[:whole], None if residual is None else residual[:whole], ghosts, mean)]
        if rest:
            parts.append(self._ghosts(input[whole:], None if residual is None else residual[whole:], 1, mean))
        outputs, statistics = zip(*parts, strict=True)
        for index, running in enumerate((mean, var)):
            if running is not None:
                self._update(running, torch.cat([own[index] for own in statistics]), momentum)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _partition(self, input: Tensor) -> tuple[int, int]:
        """The number of whole ghosts, and the size of the last one if that has another size, else 0."""
        positions = math.prod(input.shape[2:])
        require(
            self.ghost_size * positions != 1 or input.shape[0] <= 1,
            "a ghost batch needs more than 1 value per channel when training, got ghost_size=1 "
            f"with input size {tuple(input.shape)}: use a ghost_size of at least 2.",
        )
        ghosts, rest = input.shape[0] // self.ghost_size, input.shape[0] % self.ghost_size  # dynamo has no divmod
        if rest * positions == 1 and ghosts:
            return ghosts - 1, self.ghost_size + 1
        return ghosts, rest

    def _ghosts(
        self, input: Tensor, residual: Tensor | None, ghosts: int, running: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output of `ghosts` ghosts of equal size; their means and unbiased variances, (ghosts, C), if tracked."""
        folded, dtype = _fold(input, ghosts), statistics_dtype(input.dtype)
        # Made from the running ones: mapped over by `vmap` where those are, and refused where those would be.
        statistics = [] if running is None else [running.new_zeros(folded.shape[1], dtype=dtype) for _ in range(2)]
        mean, var = statistics or (None, None)
        y = functional.batch_norm(
            folded,
            mean,
            var,
            None if self.weight is None else self.weight.repeat(ghosts),
            None if self.bias is None else self.bias.repeat(ghosts),
            True,
            1.0,  # leaves the statistics of the ghosts in `mean` and `var`
            self.eps,
            activation=self.activation,
            residual=None if residual is None else _fold(residual, ghosts),
        )
        return _unfold(y, ghosts), [values.view(ghosts, -1) for values in statistics]

    @torch.no_grad()
    def _update(self, running: Tensor, ghosts: Tensor, momentum: float | Tensor) -> None:
        if self.momentum is None:
            running.copy_((1 - momentum) * running + momentum * ghosts.mean(0))
            return
        later = torch.arange(len(ghosts) - 1, -1, -1, device=ghosts.device, dtype=ghosts.dtype).unsqueeze(1)
        batch = (momentum * (1 - momentum) ** later * ghosts).sum(0)  # no matrix product, which autocast would round
        running.copy_((1 - momentum) ** len(ghosts) * running + batch)

    def extra_repr(self) -> str:
        """torch.nn's, and the options that differ from it."""
        return super().extra_repr() + f", ghost_size={self.ghost_size}"


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _fold(x: Tensor, ghosts: int) -> Tensor:
    """(ghosts · n, C, *) as (n, ghosts · C, *), in the same memory format. Moves whole rows of memory."""
    if ghosts == 1:
        return x
    if _is_channels_last(x):
        rows = x.movedim(1, -1).unflatten(0, (ghosts, -1))
        return rows.movedim(0, -2).flatten(-2).movedim(-1, 1)
    return x.unflatten(0, (ghosts, -1)).transpose(0, 1).flatten(1, 2)


def _unfold(x: Tensor, ghosts: int) -> Tensor:
    """The inverse of `_fold`."""
    if ghosts == 1:
        return x
    if _is_channels_last(x):
        rows = x.movedim(1, -1).unflatten(-1, (ghosts, -1))
        return rows.movedim(-2, 0).flatten(0, 1).movedim(-1, 1)
    return x.unflatten(1, (ghosts, -1)).transpose(0, 1).flatten(0, 1)
