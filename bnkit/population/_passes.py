"""Going through the data, as often as a method needs, and writing what came of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import require
from ..graph import Forward
from ._estimate import Estimator
from ._layers import measurable, statistics_of, tracked, unwrapped
from ._measure import Policy, Probe, Statistics, batch_statistics, check_finite
from ._progress import Progress, shown
from ._ranks import Ranks
from ._result import Drift, Recalibration, write


@dataclasses.dataclass
class Job:
    """The arguments of a measurement, and what is known of it so far."""

    model: nn.Module
    data: Iterable[Any]
    forward: Forward | None
    num_batches: int | None
    skip_nonfinite: bool
    ranks: Ranks
    progress: bool | Progress

    def __post_init__(self) -> None:
        require(
            self.num_batches is None or self.num_batches >= 0,
            f"num_batches must not be negative, got {self.num_batches}: pass None for all.",
        )
        self.model = unwrapped(self.model)
        self.layers, self.skipped = measurable(self.model)
        self.data = [self.data] if isinstance(self.data, (Tensor, Mapping)) else self.data
        self.batches, self.passes = 0, 0
        self.nonfinite: list[int] = []

    def total(self) -> int | None:
        """Batches of one pass, if that is known."""
        length = len(self.data) if hasattr(self.data, "__len__") else None  # pyright: ignore[reportArgumentType]
        known = [n for n in (length, self.num_batches) if n is not None]
        return min(known, default=None)


def measure(
    job: Job,
    new_estimator: Callable[[_BatchNorm], Estimator],
    layerwise: bool,
    policy: Callable[[Mapping[str, Estimator]], Policy] = lambda _: batch_statistics,
) -> dict[str, Estimator]:
    """Go through the data as often as needed; an estimator of each layer, over all ranks, in order of execution.

    Args:
        job: what to measure.
        new_estimator: makes a layer's estimator.
        layerwise: measure each layer behind settled ones.
        policy: from the estimators so far, what unsettled layers normalize with.
    """
    if layerwise and iter(job.data) is job.data:
        job.data = list(itertools.islice(job.data, job.num_batches))  # it can be gone through only once
    probe = Probe(job.model, job.layers, job.forward)
    with probe.attached(), shown(job.progress, job.total(), len(job.layers) if layerwise else 1) as step:
        estimators = {name: new_estimator(layer) for name, layer in job.layers.items()}
        order = _one_pass(job, probe, estimators, policy(estimators), None, step)
        if layerwise:
            settled = {name: estimators[name] for name in order[:1]}
            for name in order[1:]:
                fresh = {name: new_estimator(job.layers[name])}
                _one_pass(job, probe, fresh, _behind(settled, policy(fresh)), name, step)
                settled.update(fresh)
            estimators |= settled
    return {name: estimators[name] for name in (*order, *(name for name in estimators if name not in order))}


def _behind(settled: Mapping[str, Estimator], policy: Policy) -> Policy:
    """Settled layers normalize with their statistics, the others as `policy` says."""
    found = {name: estimator.statistics() for name, estimator in settled.items()}
    return lambda reading: found[reading.layer] if reading.layer in found else policy(reading)


def _one_pass(
    job: Job,
    probe: Probe,
    estimators: Mapping[str, Estimator],
    policy: Policy,
    until: str | None,
    step: Callable[[], None],
) -> list[str]:
    """Take one pass over the data into the estimators, then over the ranks; the layers in order of execution."""
    order: dict[str, None] = {}
    done, error = 0, None
    try:
        for position, batch in enumerate(itertools.islice(job.data, job.num_batches)):
            readings = probe.read(batch, policy, until)
            order.update(dict.fromkeys(reading.layer for reading in readings))
            done = position + 1
            if check_finite(readings, job.skip_nonfinite):
                for reading in readings:
                    if reading.layer in estimators:
                        estimators[reading.layer].add(reading)
            elif position not in job.nonfinite:
                job.nonfinite.append(position)
            step()
    except BaseException as raised:
        error = raised
        raise
    finally:
        reports = job.ranks.agree((list(order), done), error) if _may_agree(error) else []
    job.passes += 1
    if job.passes == 1:
        job.batches = sum(batches for _, batches in reports)
    if job.ranks.several:
        for name in estimators:
            estimators[name].all_reduce(job.ranks.group)
    return list(dict.fromkeys(itertools.chain.from_iterable(names for names, _ in reports)))


def _may_agree(error: BaseException | None) -> bool:
    """An interrupted process is on its way out, and talks to no one."""
    return error is None or isinstance(error, Exception)


def conclude(
    job: Job,
    method: str,
    estimators: Mapping[str, Estimator],
    measured: Mapping[str, Statistics | None],
    after: Mapping[str, Statistics | None],
    counts: Mapping[str, int | None],
) -> Recalibration:
    """Write the statistics `after` and their `counts`, where there are any, and report."""
    not_run = [name for name, estimator in estimators.items() if estimator.samples == 0]
    skipped = dict(job.skipped)
    drifts, update, targets = {}, {}, {}
    for name, estimator in estimators.items():
        layer, found, new = job.layers[name], measured[name], after[name]
        if found is None or new is None:
            if name not in not_run:
                skipped[name] = "one value a channel in all its batches has no variance"
            continue
        mean, var = statistics_of(layer)
        before, new = (mean.clone(), var.clone()), (new[0].to(mean), new[1].to(var))
        drifts[name] = Drift(before, new, found, estimator.batches, estimator.samples)
        update[layer] = (new, counts[name])
        targets[name] = (layer, tracked(layer))
    write(update)
    return Recalibration(
        method, job.batches, job.num_batches, job.passes, drifts, skipped, not_run, sorted(job.nonfinite), targets
    )
