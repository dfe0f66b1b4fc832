"""What measuring statistics returns: how far each layer's moved, and what was left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ._layers import Domain, buffers_of
from ._measure import Statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Drift:
    """One layer's statistics before and after, and how far apart they lie.

    Attributes:
        before: running mean and (unbiased) variance as they were; copies.
        after: as they are now; copies.
        measured: those of the data; `after`, except where `adapt` blends them with `before`.
        batches: calls of the layer that went into it.
        samples: their samples, counted by the first dimension of the layer's input; those that are all padding, not.
    """

    before: Statistics
    after: Statistics
    measured: Statistics
    batches: int
    samples: int

    @property
    def mean_shift(self) -> float:
        """Median over channels of |mean measured - mean before| / σ before."""
        return (self._difference().abs() / _deviation(self.before)).median().item()

    @property
    def var_ratio(self) -> float:
        """Median over channels of variance measured / variance before."""
        return (self.measured[1].double() / _deviation(self.before).square()).median().item()

    @property
    def distance(self) -> float:
        """Mean over channels of the 2-Wasserstein distance of two normal distributions, in units of σ before.

        W₂² = (mean measured - mean before)² + (σ measured - σ before)²
        """
        spread = _deviation(self.measured) - _deviation(self.before)
        distance = (self._difference().square() + spread.square()).sqrt()
        return (distance / _deviation(self.before)).mean().item()

    def _difference(self) -> Tensor:
        return self.measured[0].double() - self.before[0].double()


def _deviation(statistics: Statistics) -> Tensor:
    return statistics[1].double().clamp(min=torch.finfo(torch.float32).tiny).sqrt()


@dataclasses.dataclass(eq=False, repr=False)
class Recalibration:
    """The outcome of `recalibrate` or `adapt`; its repr is the report.

    Attributes:
        method: how the statistics were measured.
        batches: how many batches of data were read (by all ranks together).
        num_batches: how many were asked for (of each rank); None for all there are.
        passes: how often the data were gone through.
        layers: how far each measured layer's statistics moved, by name.
        skipped: why each layer not measured was left alone, by name.
        not_run: layers that no forward pass called; their statistics are as they were.
        nonfinite: positions of the batches left out because of NaN or infinity (this rank's).
        ranks: how many processes measured together.
    """

    method: str
    batches: int
    num_batches: int | None
    passes: int
    layers: dict[str, Drift]
    skipped: dict[str, str]
    not_run: list[str]
    nonfinite: list[int]
    ranks: int = 1
    _targets: dict[str, tuple[_BatchNorm, Domain, int]] = dataclasses.field(default_factory=dict)

    @property
    def short(self) -> bool:
        """Whether the data ended before `num_batches`, on any rank."""
        return self.num_batches is not None and self.batches < self.num_batches * self.ranks

    def undo(self) -> None:
        """Give all layers the statistics they had before."""
        targets = self._targets.items()
        write([(buffers_of(layer, domain), self.layers[name].before, n) for name, (layer, domain, n) in targets])

    def __repr__(self) -> str:
        data = f"{_counted(self.batches, 'batch', 'batches')}, {self.method}"
        if self.passes > 1:
            data += f", {self.passes} passes"
        lines = [f"Recalibration: {_counted(len(self.layers), 'layer', 'layers')} from {data}"]
        if self.short:
            each = f" of each of {self.ranks} ranks" if self.ranks > 1 else ""
            lines.append(f"  short: {self.num_batches} batches were asked for{each}, the data had {self.batches}")
        if self.nonfinite:
            lines.append(f"  left out, not finite: {_counted(len(self.nonfinite), 'batch', 'batches')}")
        lines += _table(self.layers)
        lines += _list("not run, unchanged", [(name, "") for name in self.not_run])
        lines += _list("skipped", list(self.skipped.items()))
        return "\n".join(lines)


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _table(layers: dict[str, Drift]) -> list[str]:
    if not layers:
        return []
    rows = [("layer", "channels", "mean shift/σ", "var ratio", "W₂/σ")]
    for name, drift in layers.items():
        shift, ratio, distance = drift.mean_shift, drift.var_ratio, drift.distance
        channels = str(drift.before[0].numel())
        rows.append((name or "(the model)", channels, f"{shift:.3g}", f"{ratio:.3g}", f"{distance:.3g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [f"  {row[0]:{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 5)) for row in rows]


def _list(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {title}"] * bool(rows) + [
        f"    {name or '(the model)':{width}}  {text}".rstrip() for name, text in rows
    ]


Update = tuple[tuple[Tensor, Tensor, Tensor | None], Statistics, int | None]
"""A layer's buffers, and what they are to be: mean and variance, and count of batches (None to leave it)."""


def write(updates: Sequence[Update]) -> None:
    """Write all new statistics in place, or none of them: an interruption takes back what was written."""
    before = {tensor: tensor.clone() for buffers, *_ in updates for tensor in buffers if tensor is not None}
    try:
        with torch.no_grad():
            for (mean, var, tracked), statistics, count in updates:
                mean.copy_(statistics[0])
                var.copy_(statistics[1])
                if tracked is not None and count is not None:
                    tracked.fill_(count)
    except BaseException:
        with torch.no_grad():
            for tensor, old in before.items():
                tensor.copy_(old)
        raise
