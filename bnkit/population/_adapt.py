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
from ._estimate import Estimator, Found, Pooled
from ._measure import Policy, Reading, Statistics
from ._passes import Job, check_start, conclude, measure
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
        UserError: `source_weight` negative, unknown method, source statistics that are not finite (unless they weigh
            nothing), or as in `recalibrate`.
    """
    require(source_weight >= 0, f"source_weight must not be negative, got {source_weight}: 0 means the target alone.")
    if method not in ("pooled", "layerwise"):
        raise unknown("method", method, ("pooled", "layerwise"))
    job = Job(model, data, forward, num_batches, skip_nonfinite, Ranks(distributed, group), progress)
    if source_weight > 0:
        check_start(job, "recalibrate on data of the source first, or pass source_weight=0")

    def new_estimator(layers: Mapping[str, _BatchNorm]) -> Blend:
        return Blend(layers, source_weight)

    found = measure(job, new_estimator, method == "layerwise", _blend_so_far)
    return conclude(job, f"adapted, {method}", found, dict.fromkeys(found))


class Blend(Pooled):
    """The source's statistics and those of the target's values, weighted by samples."""

    def __init__(self, layers: Mapping[str, _BatchNorm], source_weight: float) -> None:
        super().__init__(layers)
        self._source = self._by_layer(*self._own_statistics())
        self._source_weight = source_weight

    def found(self) -> dict[str, Found]:
        targets = {name: self._target(name, moments) for name, moments in self._each().items() if self.samples[name]}
        return {
            name: Found(
                targets.get(name),
                self._blended(name, targets[name], self.samples[name]) if name in targets else None,
                self.batches[name],
                self.samples[name],
            )
            for name in self.layers
        }

    def with_also(self, reading: Reading) -> Statistics | None:
        """A layer's blend if this were added."""
        samples = self.samples[reading.layer] + reading.samples
        if samples == 0:
            return None
        moments = self._each()[reading.layer].merge(reading.moments)
        return self._blended(reading.layer, self._target(reading.layer, moments), samples)

    def _target(self, name: str, moments: Moments) -> Statistics:
        """Mean and unbiased variance of the target; the variance of a single value is the source's."""
        var = moments.variance(unbiased=True) if int(moments.count) > 1 else self._source[name][1]
        return moments.mean + moments.mean_error, var

    def _blended(self, name: str, target: Statistics, samples: int) -> Statistics:
        if self._source_weight == 0:
            return target  # whatever the source's are: NaN, blended with a weight of 0, is NaN
        share = samples / (self._source_weight + samples)
        mean, var = (old.lerp(new, share) for old, new in zip(self._source[name], target, strict=True))
        return mean, var


def _blend_so_far(estimator: Estimator) -> Policy:
    assert isinstance(estimator, Blend)
    return lambda reading: estimator.with_also(reading) if reading.layer in estimator.layers else None
