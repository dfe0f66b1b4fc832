"""Adapt a model to another domain by its statistics alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import require, unknown
from ..graph import Forward
from ..moments import Moments
from ._estimate import Estimator, Pooled
from ._layers import statistics_of
from ._measure import Policy, Reading, Statistics
from ._passes import Job, conclude, measure
from ._progress import Progress
from ._ranks import Ranks
from ._result import Recalibration


def adapt(
    model: nn.Module,
    data: Iterable[Any],
    source_weight: float = 16,
    method: str = "pooled",
    *,
    forward: Forward | None = None,
    num_batches: int | None = None,
    skip_nonfinite: bool = False,
    distributed: bool | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool | Progress = False,
) -> Recalibration:
    """Move a trained model's running statistics towards those of unlabelled data of another domain, in place.

        mean = (N · mean_source + n · mean_target) / (N + n)        var = (N · var_source + n · var_target) / (N + n)

    with N = `source_weight`, the source's running statistics, and those of the n target samples. N = 0 takes the
    target's alone, which is AdaBN; the larger N, the less so few samples can do harm. No weight changes, no label is
    needed. The returned report's drift compares source and target before blending.

    While measuring, each layer normalizes with the blend of the source and of the target batches so far: with one
    batch that is the paper's method. With `method="layerwise"` each layer is measured behind layers that have their
    final blend, at the cost that `recalibrate` describes. Which layers are measured, and what happens on failure and
    over several ranks, is as in `recalibrate`; `num_batches_tracked` stays.

    References:
        Schneider, Rusak, Eck, Bringmann, Brendel and Bethge, "Improving robustness against common corruptions by
        covariate shift adaptation", 2020, https://arxiv.org/abs/2006.16971, section 3, equation 1.
        Li, Wang, Shi, Liu and Hou, "Revisiting Batch Normalization For Practical Domain Adaptation", 2016,
        https://arxiv.org/abs/1603.04779 (AdaBN).

    Args:
        model: a trained model.
        data: batches from the target domain, as in `recalibrate`.
        source_weight: N, how many target samples the source statistics are worth; infinity changes nothing. The
            paper's best are 8 to 128 for n of 8 to 64, and 256 and more for n = 1.
        method: "pooled" or "layerwise".
        forward, num_batches, skip_nonfinite, distributed, group, progress: as in `recalibrate`.

    Raises:
        UserError: `source_weight` negative, unknown method, or as in `recalibrate`.
    """
    require(source_weight >= 0, f"source_weight must not be negative, got {source_weight}: 0 means the target alone.")
    if method not in ("pooled", "layerwise"):
        raise unknown("method", method, ("pooled", "layerwise"))
    job = Job(model, data, forward, num_batches, skip_nonfinite, Ranks(distributed, group), progress)

    def new_estimator(layer: _BatchNorm) -> Blend:
        return Blend(layer, source_weight)

    estimators = measure(job, new_estimator, method == "layerwise", _blend_so_far)
    targets = {name: e.target() if isinstance(e, Blend) else None for name, e in estimators.items()}
    blends = {name: estimator.statistics() for name, estimator in estimators.items()}
    return conclude(job, f"adapted, {method}", estimators, targets, blends, dict.fromkeys(estimators))


class Blend(Pooled):
    """The source's statistics and those of the target's values, weighted by samples."""

    def __init__(self, layer: _BatchNorm, source_weight: float) -> None:
        super().__init__(layer)
        self._source = [tensor.to(self.moments.mean.dtype) for tensor in statistics_of(layer)]
        self._source_weight = source_weight

    def target(self) -> Statistics | None:
        """Mean and unbiased variance of the target; the variance of a single value is the source's."""
        if self.samples == 0:
            return None
        var = self.moments.variance(unbiased=True) if int(self.moments.count) > 1 else self._source[1]
        return self.moments.mean + self.moments.mean_error, var

    def statistics(self) -> Statistics | None:
        target = self.target()
        if target is None:
            return None
        share = self.samples / (self._source_weight + self.samples)
        mean, var = (old.lerp(new, share) for old, new in zip(self._source, target, strict=True))
        return mean, var

    def with_also(self, moments: Moments, samples: int) -> Statistics | None:
        """The blend if another batch of these moments came."""
        kept = self.moments, self.samples, self.batches
        try:
            self.add(Reading("", moments, samples))
            return self.statistics()
        finally:
            self.moments, self.samples, self.batches = kept


def _blend_so_far(estimators: Mapping[str, Estimator]) -> Policy:
    def policy(reading: Reading) -> Statistics | None:
        estimator = estimators.get(reading.layer)
        return estimator.with_also(reading.moments, reading.samples) if isinstance(estimator, Blend) else None

    return policy
