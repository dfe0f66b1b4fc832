"""SyncBatchNorm: statistics of the batches of all ranks together."""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import require
from ._any_dimension import AnyDimension, Options
from ._sync_batch_norm import sync_batch_norm
from ._sync_exchange import Exchange


class SyncBatchNorm(AnyDimension):
    r"""Batch normalization with the statistics of the batches of all ranks together.

        y = activation(weight · (x - mean) / √(var + eps) + bias + residual)

    In training, mean and var are those of each channel over the batches of all ranks of `process_group`, which is
    what `BatchNorm2d` would give for these batches in one: output, running statistics, and the gradient of x. Each
    rank's gradients of weight and bias are those of its own part of the loss, as DistributedDataParallel expects, which
    averages them. Batches may differ in size and in everything behind the channels, and be empty.

    Works with every backend and device that `torch.distributed` has, gloo on CPUs included. There is one collective
    in the forward pass (each rank's count, mean and sum of squared deviations, float64, gathered) and one in the
    backward pass (two sums a channel). Where `torch.distributed` is not initialized, or the group has one rank, and
    in `eval()`, this is batch normalization without communication.

    All ranks have to call the layer equally often, and in the same order where there are several: with an empty batch
    if need be. If one does not, the others raise `SyncError`, which names it, once `timeout` is over. On accelerators
    only if a `timeout` is given, since it takes waiting for the device in each call; otherwise the process group's
    own timeout holds there, as in graphs from `torch.compile`.

    Not a subclass of `torch.nn.SyncBatchNorm`, because DistributedDataParallel refuses those on CPUs.

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        Peng et al., "MegDet: A large mini-batch object detector", 2017, https://arxiv.org/abs/1711.07240, section 3.3.

    Args:
        num_features: C of (N, C) or (N, C, *).
        eps, momentum, affine, track_running_stats: as in `BatchNorm2d`.
        process_group: the ranks that share statistics; None for all of them. This process has to be one of them. A copy
            of the layer shares it, a pickle cannot hold it.
        device, dtype, bias, activation, skip_nonfinite: as in `BatchNorm2d`.
        timeout: seconds to wait for the other ranks in each pass; None for the process group's own.

    Raises:
        ValueError: `inplace=True`, one value a channel on all ranks together (on accelerators the running statistics
            stay as they are), a process outside the group, or what `bnkit.functional.batch_norm` raises it for.
        SyncError: a rank left out a call, was in another layer, or died.
    """

    can_be_inplace = False
    process_group: dist.ProcessGroup | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        require(
            timeout is None or (isinstance(timeout, Real) and timeout > 0),
            f"timeout must be positive, got {timeout!r}: 300 means five minutes.",
        )
        require(
            process_group is None or _is_group(process_group),
            f"process_group must be a process group, or None for all ranks, got {process_group!r}: "
            "make one by torch.distributed.new_group(ranks).",
        )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group
        self.timeout = timeout

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
    ) -> Tensor:
        group = self._group() if training and self.training else None
        if group is None:
            return super()._normalize(input, residual, mean, var, training, momentum)
        exchange = Exchange.of(self, group, f"{type(self).__name__}({self.num_features})", self.timeout)
        return sync_batch_norm(
            input, mean, var, self.weight, self.bias, momentum, self.eps, self.activation, residual, exchange
        )

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks to share statistics with, if there are any."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        size = dist.get_world_size(group)
        require(size > 0, "this process has to be in the layer's process_group: give each rank a group that it is in.")
        return group if size > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        twin = self.__class__.__new__(self.__class__)
        memo |= {id(self): twin, id(self.process_group): self.process_group}
        twin.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return twin

    def extra_repr(self) -> str:
        """That of batch normalization, and the timeout."""
        return super().extra_repr() + ("" if self.timeout is None else f", timeout={self.timeout:g}")


def _is_group(group: Any) -> bool:
    """What `new_group` returns, on ranks outside of the group too."""
    if not dist.is_available():
        return False
    return isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
