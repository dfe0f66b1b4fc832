"""Train any networks with the ordinary loop, taking turns from one evaluation to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from .. import models
from ..data import ImageSet
from ..train import Diverged, Evaluation, FitConfig, iterate
from ._last_hidden import LastHidden
from ._lockstep import PERCENTILE_IMAGES
from ._record import NetRecord


class _Run:
    """One network of one seed, until it is done or diverges."""

    def __init__(self, model: nn.Module, data: ImageSet, config: FitConfig) -> None:
        self.model = model
        self.evaluations: Iterator[Evaluation] = iterate(model, data, config)
        self.seconds = 0.0
        self.diverged: int | None = None

    def next(self) -> tuple[float, float]:
        """Accuracy and loss at the next evaluation; NaN once it has diverged."""
        if self.diverged is not None:
            return math.nan, math.nan
        try:
            evaluation = next(self.evaluations)
        except Diverged as error:
            # Its first step is number 0, a report's is 1.
            self.diverged = error.step + 1
            return math.nan, math.nan
        self.seconds = evaluation.seconds
        return evaluation.test_accuracy, evaluation.test_loss


def train_separately(
    model: str, records: Sequence[NetRecord], data: ImageSet, config: FitConfig, evaluations: Sequence[int]
) -> Iterator[int]:
    """Train `model` as each record says, filling the records; yield the steps done after each evaluation.

    Args:
        config: for all; learning rate and seed are the records'.
        evaluations: the steps at which `config` evaluates.
    """
    runs = [_start(model, record, data, config) for record in records]
    images = data.test_images[:PERCENTILE_IMAGES]
    probes = [LastHidden.of(of_record[0].model, data, config.normalize) for of_record in runs]
    for step in evaluations:
        for record, of_record, probe in zip(records, runs, probes, strict=True):
            accuracy, loss = zip(*(run.next() for run in of_record), strict=True)
            percentiles = probe.percentiles(images) if probe and of_record[0].diverged is None else None
            record.add(step, float(np.mean([run.seconds for run in of_record])), accuracy, loss, percentiles)
            record.diverged |= {
                seed: run.diverged for seed, run in zip(record.seeds, of_record, strict=True) if run.diverged
            }
        yield step


def _start(model: str, record: NetRecord, data: ImageSet, config: FitConfig) -> list[_Run]:
    channels, height, _ = data.shape
    settings = record.configuration
    init = {} if settings.init_std is None else {"init": settings.init_std}
    runs = []
    for seed in record.seeds:
        torch.manual_seed(seed)
        net = models.create(
            model,
            norm=settings.norm,
            num_classes=data.num_classes,
            in_channels=channels,
            image_size=height,
            **init,
        )
        of_seed = FitConfig(**{**config.to_dict(), "lr": settings.learning_rate, "seed": seed})
        runs.append(_Run(net, data, of_seed))
    return runs
