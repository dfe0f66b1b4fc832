"""From readings to the statistics of a population, those of all layers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..moments import Moments, merged, packed
from ._layers import statistics_of, tracked
from ._measure import Reading, Statistics
from ._ranks import gathered


@dataclasses.dataclass(frozen=True)
class Found:
    """What came out for a layer.

    Attributes:
        measured: mean and unbiased variance of the data; None if too little was read.
        after: what the running statistics are to be; None to leave them.
        batches: calls of the layer that went into it.
        samples: their samples.
    """

    measured: Statistics | None
    after: Statistics | None
    batches: int
    samples: int


class Estimator:
    """Takes in readings of some layers.

    The layers' channels lie one after another in its tensors, so that a few operations a forward pass do for all
    layers: on a small network, the same operations a layer took as long as its batch norms.
    """

    least = 2
    """Values a channel that a batch must have to count."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.layers = layers
        self.batches, self.samples, self.values = (dict.fromkeys(layers, 0) for _ in range(3))
        means = [statistics_of(layer)[0] for layer in layers.values()]
        like = means[0] if means else torch.empty(0)
        self._device = like.device
        self._dtype = like.dtype if like.device.type == "mps" else torch.float64
        self._sizes = [mean.numel() for mean in means]

    def add(self, readings: Sequence[Reading]) -> None:
        """Take in the readings of one forward pass, those of other layers excepted."""
        for calls in _rounds(reading for reading in readings if reading.layer in self.layers):
            for name, reading in calls.items():
                self.samples[name] += reading.samples
                self.values[name] += int(reading.moments.count)
                self.batches[name] += int(reading.moments.count >= self.least)
            self._take_in(self._side_by_side({name: reading.moments for name, reading in calls.items()}))

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Take in what the other ranks have, by one collective; every rank calls it."""
        raise NotImplementedError

    def found(self) -> dict[str, Found]:
        """What came out, by layer."""
        raise NotImplementedError

    def _take_in(self, moments: Moments) -> None:
        """Take in a call of each layer: moments of all channels, with a count for each; 0 of a layer not called."""
        raise NotImplementedError

    def _side_by_side(self, calls: Mapping[str, Moments]) -> Moments:
        parts = [calls.get(name) or Moments.empty(n) for name, n in zip(self.layers, self._sizes, strict=True)]
        count = self._spread([part.count for part in parts])
        fields = ([part.mean for part in parts], [part.m2 for part in parts], [part.mean_error for part in parts])
        return Moments(count, *(self._cat(tensors) for tensors in fields))

    def _counts(self, moments: Moments) -> Tensor:
        """Which channels have enough values, (C,)."""
        return torch.as_tensor(moments.count, device=self._device) >= self.least

    def _cat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.to(self._device, self._dtype) for tensor in tensors]) if tensors else self._spread([])

    def _spread(self, numbers: Sequence[float | Tensor]) -> Tensor:
        """For each channel its layer's number."""
        of_layers = torch.tensor(numbers, dtype=self._dtype, device="cpu")
        sizes = torch.tensor(self._sizes, dtype=torch.long, device="cpu")
        return of_layers.repeat_interleave(sizes).to(self._device)

    def _own_statistics(self) -> Tensor:
        """Running means and variances of all channels, (2, C)."""
        both = zip(*(statistics_of(layer) for layer in self.layers.values()), strict=True)
        return torch.stack([self._cat(tensors) for tensors in both]) if self.layers else torch.empty(2, 0)

    def _by_layer(self, mean: Tensor, var: Tensor) -> dict[str, Statistics]:
        return dict(zip(self.layers, zip(mean.split(self._sizes), var.split(self._sizes), strict=True), strict=True))

    def _all(self, statistics: Mapping[str, Statistics | None]) -> dict[str, Found]:
        """What came out, where that of the data is what the running statistics are to be."""
        return {name: Found(s, s, self.batches[name], self.samples[name]) for name, s in statistics.items()}


def _rounds(readings: Iterator[Reading]) -> Iterator[dict[str, Reading]]:
    """The first call of each layer, the second of those that have one, and so on."""
    waiting = list(readings)
    while waiting:
        calls: dict[str, Reading] = {}
        later = []
        for reading in waiting:
            if calls.setdefault(reading.layer, reading) is not reading:
                later.append(reading)
        yield calls
        waiting = later


class Pooled(Estimator):
    """The exact moments of all values read, whatever batch they came in."""

    least = 1

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        super().__init__(layers)
        self.moments = Moments.empty(sum(self._sizes), dtype=self._dtype, device=self._device)

    def _take_in(self, moments: Moments) -> None:
        self.moments = self.moments.merge(moments)

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        if not self.layers:
            return
        mine = torch.cat([self._row(name, moments) for name, moments in self._each().items()])
        parts = gathered(mine, group).split([3 + 2 * size for size in self._sizes], dim=1)
        for name, part in zip(self.layers, parts, strict=True):
            self.batches[name], self.samples[name], self.values[name] = (int(n) for n in part[:, :3].sum(0))
        of_all = [merged(part[:, 2:]) for part in parts]
        count = self._spread(list(self.values.values()))
        self.moments = Moments(count, self._cat([mean for _, mean, _ in of_all]), self._cat([m2 for *_, m2 in of_all]))

    def found(self) -> dict[str, Found]:
        mean, var = _statistics(self.moments)
        pooled = self._by_layer(mean, var)
        return self._all({name: s if self.values[name] > 1 else None for name, s in pooled.items()})

    def _each(self) -> dict[str, Moments]:
        """The moments of each layer."""
        fields = (self.moments.mean, self.moments.m2, self.moments.mean_error)
        parts = zip(*(field.split(self._sizes) for field in fields), strict=True)
        return {name: Moments(self.values[name], *part) for name, part in zip(self.layers, parts, strict=True)}

    def _row(self, name: str, moments: Moments) -> Tensor:
        """What a rank sends of a layer: batches, samples, and moments as `merged` takes them."""
        calls = torch.tensor([self.batches[name], self.samples[name]], dtype=torch.float64, device=self._device)
        return torch.cat([calls, packed(moments.count, moments.mean.double() + moments.mean_error, moments.m2)])


class MeanOfBatches(Estimator):
    """The mean over batches of their means, and that of their unbiased variances."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        super().__init__(layers)
        self._sums = torch.zeros(2, sum(self._sizes), dtype=self._dtype, device=self._device)

    def _take_in(self, moments: Moments) -> None:
        self._sums += _statistics(moments).where(self._counts(moments), 0)

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        numbers = [n for name in self.layers for n in (self.batches[name], self.samples[name])]
        total = torch.cat([torch.tensor(numbers, dtype=self._dtype, device=self._device), self._sums.flatten()])
        dist.all_reduce(total, group=group)
        for name, (batches, samples) in zip(self.layers, total[: len(numbers)].view(-1, 2).tolist(), strict=True):
            self.batches[name], self.samples[name] = int(batches), int(samples)
        self._sums = total[len(numbers) :].view(2, -1)

    def found(self) -> dict[str, Found]:
        means = self._sums / self._spread(list(self.batches.values()))
        return self._all({name: s if self.batches[name] else None for name, s in self._by_layer(*means).items()})


class Moving(Estimator):
    """The running statistics as training would go on with them: by the layer's momentum, from what they are."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        super().__init__(layers)
        self._values = self._own_statistics()
        self._before = {name: tracked(layer) for name, layer in layers.items()}

    def _take_in(self, moments: Moments) -> None:
        momentum = self._spread([self._momentum(name) for name in self.layers])
        new = self._values.lerp(_statistics(moments), momentum)
        self._values = new.where(self._counts(moments), self._values)

    def _momentum(self, name: str) -> float:
        momentum = self.layers[name].momentum
        return 1 / max(self._before[name] + self.batches[name], 1) if momentum is None else momentum

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        raise AssertionError("the order of batches over ranks is not defined")

    def found(self) -> dict[str, Found]:
        values = self._by_layer(*self._values)
        return self._all({name: s if self.batches[name] else None for name, s in values.items()})


def _statistics(moments: Moments) -> Tensor:
    """Mean and unbiased variance, (2, C)."""
    return torch.stack([moments.mean + moments.mean_error, moments.variance(unbiased=True)])
