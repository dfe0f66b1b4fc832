"""From readings to the statistics of a population: one estimator a layer and method."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..moments import Moments
from ._layers import statistics_of, tracked
from ._measure import Reading, Statistics


class Estimator(Protocol):
    """Takes in one layer's readings; `batches` and `samples` count them."""

    @property
    def batches(self) -> int: ...
    @property
    def samples(self) -> int: ...

    def add(self, reading: Reading) -> None:
        """Take in one call of the layer."""
        ...

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Take in what the other ranks have; every rank calls it."""
        ...

    def statistics(self) -> Statistics | None:
        """Mean and unbiased variance; None if too little was read."""
        ...


class Pooled:
    """The exact moments of all values read, whatever batch they came in."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.batches, self.samples = 0, 0
        mean, _ = statistics_of(layer)
        self.moments = Moments.empty(mean.numel(), dtype=_wide(mean), device=mean.device)

    def add(self, reading: Reading) -> None:
        self.batches, self.samples = self.batches + (reading.samples > 0), self.samples + reading.samples
        self.moments = self.moments.merge(reading.moments)

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        self.moments = self.moments.all_reduce(group)
        self.batches, self.samples = (int(n) for n in _summed([self.batches, self.samples], self.moments.mean, group))

    def statistics(self) -> Statistics | None:
        if int(self.moments.count) < 2:
            return None
        return self.moments.mean + self.moments.mean_error, self.moments.variance(unbiased=True)


class MeanOfBatches:
    """The mean over batches of their means, and that of their unbiased variances."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.batches, self.samples = 0, 0
        mean, _ = statistics_of(layer)
        self._sums = torch.zeros(2, mean.numel(), dtype=_wide(mean), device=mean.device)

    def add(self, reading: Reading) -> None:
        self.samples += reading.samples
        if reading.moments.count > 1:
            self.batches += 1
            self._sums += torch.stack([reading.moments.mean, reading.moments.variance(unbiased=True)])

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        self.batches, self.samples = (int(n) for n in _summed([self.batches, self.samples], self._sums, group))
        dist.all_reduce(self._sums, group=group)

    def statistics(self) -> Statistics | None:
        if self.batches == 0:
            return None
        mean, var = self._sums / self.batches
        return mean, var


class Moving:
    """The running statistics as training would go on with them: by the layer's momentum, from what they are."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.batches, self.samples = 0, 0
        mean, var = statistics_of(layer)
        self._values = torch.stack([mean, var]).to(_wide(mean))
        self._momentum = layer.momentum
        self._before = tracked(layer)

    def add(self, reading: Reading) -> None:
        self.samples += reading.samples
        if reading.moments.count > 1:
            self.batches += 1
            new = torch.stack([reading.moments.mean, reading.moments.variance(unbiased=True)])
            momentum = 1 / (self._before + self.batches) if self._momentum is None else self._momentum
            self._values = self._values.lerp(new, momentum)

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        raise AssertionError("the order of batches over ranks is not defined")

    def statistics(self) -> Statistics | None:
        mean, var = self._values
        return (mean, var) if self.batches else None


def _wide(statistic: Tensor) -> torch.dtype:
    return statistic.dtype if statistic.device.type == "mps" else torch.float64


def _summed(numbers: list[int], like: Tensor, group: dist.ProcessGroup | None) -> list[float]:
    total = torch.tensor(numbers, dtype=torch.float64, device=like.device)
    dist.all_reduce(total, group=group)
    return total.tolist()
