"""Going through the data, as often as a method needs, and writing what came of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import UserError, require
from ..graph import Forward
from ._estimate import Estimator, Found
from ._layers import buffers_of, domain_of, measurable, statistics_of, tracked, unwrapped
from ._measure import Policy, Probe, batch_statistics, check_finite
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
            self.num_batches is None or (isinstance(self.num_batches, Integral) and self.num_batches >= 0),
            f"num_batches must not be negative, nor a fraction, got {self.num_batches}: pass None for all.",
        )
        self.model = unwrapped(self.model)
        self.layers, self.skipped = measurable(self.model)
        self.domains = {name: domain_of(layer) for name, layer in self.layers.items()}
        self.data = [self.data] if isinstance(self.data, (Tensor, Mapping)) else self.data
        self.batches, self.passes = 0, 0
        self.nonfinite: list[int] = []

    def total(self) -> int | None:
        """Batches of one pass, if that is known."""
        try:
            length = len(self.data)  # pyright: ignore[reportArgumentType]
        except TypeError:  # a DataLoader has the method, also where its data set lacks it
            length = None
        known = [n for n in (length, self.num_batches) if n is not None]
        return min(known, default=None)


def check_start(job: Job, remedy: str) -> None:
    """Raise on all ranks if the statistics to go on from, of a layer on one of them, are not finite."""
    mine = [n for n, layer in job.layers.items() if not torch.stack(statistics_of(layer)).isfinite().all()]
    for name in itertools.chain.from_iterable(job.ranks.agree(mine)):
        raise UserError(
            f"statistics to go on from must be finite, got NaN or infinity in those of {name or 'the model'}: {remedy}."
        )


def measure(
    job: Job,
    new_estimator: Callable[[Mapping[str, _BatchNorm]], Estimator],
    layerwise: bool,
    policy: Callable[[Estimator], Policy] = lambda _: batch_statistics,
) -> dict[str, Found]:
    """Go through the data as often as needed; what came out for each layer, over all ranks, in order of execution.

    Args:
        job: what to measure.
        new_estimator: makes an estimator of some layers.
        layerwise: measure each layer behind settled ones.
        policy: from an estimator so far, what unsettled layers normalize with.
    """
    kept: list[Any] | None = [] if layerwise and isinstance(job.data, Iterator) else None
    if kept is not None:  # it can be gone through only once
        job.data = _keeping(job.data, kept)
    probe = Probe(job.model, job.layers, job.forward)
    with probe.attached(), shown(job.progress, job.total(), len(job.layers) if layerwise else 1) as step:
        estimator = new_estimator(job.layers)
        order = _one_pass(job, probe, estimator, policy(estimator), None, step)
        found = estimator.found()
        if kept is not None:
            job.data = kept
        if layerwise:
            settled = {name: found[name] for name in order[:1]}
            for name in order[1:]:
                estimator = new_estimator({name: job.layers[name]})
                _one_pass(job, probe, estimator, _behind(settled, policy(estimator)), name, step)
                settled |= estimator.found()
            found |= settled
    return {name: found[name] for name in (*order, *(name for name in found if name not in order))}


def _keeping(data: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    for batch in data:
        kept.append(batch)
        yield batch


def _behind(settled: Mapping[str, Found], policy: Policy) -> Policy:
    """Settled layers normalize with their statistics, the others as `policy` says."""
    after = {name: found.after for name, found in settled.items()}
    return lambda reading: after[reading.layer] if reading.layer in after else policy(reading)


def _one_pass(
    job: Job,
    probe: Probe,
    estimator: Estimator,
    policy: Policy,
    until: str | None,
    step: Callable[[], None],
) -> list[str]:
    """Take one pass over the data into the estimator, then over the ranks; the layers in order of execution."""
    order: dict[str, None] = {}
    done, error = 0, None
    try:
        for position, batch in enumerate(itertools.islice(job.data, job.num_batches)):
            readings = probe.read(batch, policy, until)
            order.update(dict.fromkeys(reading.layer for reading in readings))
            done = position + 1
            if check_finite(readings, job.skip_nonfinite):
                estimator.add(readings)
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
        estimator.all_reduce(job.ranks.group)
    return list(dict.fromkeys(itertools.chain.from_iterable(names for names, _ in reports)))


def _may_agree(error: BaseException | None) -> bool:
    """An interrupted process is on its way out, and talks to no one."""
    return error is None or isinstance(error, Exception)


def conclude(job: Job, method: str, found: Mapping[str, Found], counts: Mapping[str, int | None]) -> Recalibration:
    """Write what came out, with the `counts` of batches, and report."""
    not_run = [name for name, layer in found.items() if layer.samples == 0]
    skipped = dict(job.skipped)
    drifts, updates, targets = {}, [], {}
    for name, new in found.items():
        layer, domain = job.layers[name], job.domains[name]
        if new.measured is None or new.after is None:
            if name not in not_run:
                skipped[name] = "one value a channel in all its batches has no variance"
            continue
        mean, var, _ = buffers = buffers_of(layer, domain)
        before, after = (mean.clone(), var.clone()), (new.after[0].to(mean), new.after[1].to(var))
        drifts[name] = Drift(before, after, new.measured, new.batches, new.samples)
        updates.append((buffers, after, counts[name]))
        targets[name] = (layer, domain, tracked(layer, domain))
    write(updates)
    return Recalibration(
        method,
        job.batches,
        job.num_batches,
        job.passes,
        drifts,
        skipped,
        not_run,
        sorted(job.nonfinite),
        job.ranks.size,
        targets,
    )
