"""Claim: ghost batch normalization closes part of the generalization gap of training with large batches.

Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017, https://arxiv.org/abs/1705.08741, table 1: a large
batch with ghost batch norm (+GBN) against the same with batch norm, and against small batches, for the same number of
epochs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .. import data
from ..nn import BatchNorm2d, GhostBatchNorm
from ..report import Page
from ..train import FitConfig
from ._progress import Progress, Silent
from ._small_runs import run_trials
from ._trials import Outcome, Trial, accuracy_table, best_of, is_better, relation
from .small_batches import train_once

CLAIM = (
    "With large batches, statistics of ghost batches give a higher test accuracy than those of the whole batch, nearer "
    "to that of training with small batches (Hoffer et al. 2017)."
)


@dataclass(frozen=True)
class LargeBatchesConfig:
    """What runs: every arm with every rate and seed, for the same number of epochs.

    Attributes:
        images: training images, the first of the set.
        epochs: passes over them.
        large, small: batch sizes.
        ghosts: sizes of ghosts in the large batch.
        rates: learning rates of the large batch.
        seeds: runs of each.
    """

    images: int = 4096
    epochs: int = 20
    large: int = 1024
    small: int = 32
    ghosts: tuple[int, ...] = (32, 2)
    rates: tuple[float, ...] = (0.1, 0.3)
    seeds: int = 3


@dataclass(frozen=True)
class LargeBatches:
    """The runs of `large_batches`."""

    config: LargeBatchesConfig
    trials: list[Trial]


def large_batches(config: LargeBatchesConfig | None = None, *, progress: Progress | None = None) -> LargeBatches:
    """Train a small convolutional network on a part of the bundled digits in each way: see the module's claim."""
    config, digits = config or LargeBatchesConfig(), data.load("digits")
    part = dataclasses.replace(
        digits, train_images=digits.train_images[: config.images], train_labels=digits.train_labels[: config.images]
    )
    arms = _arms(config)

    def trial(arm: str, rate: float, seed: int) -> Trial:
        norm, batch_size = arms[arm]
        steps = config.epochs * config.images // batch_size
        fit_config = FitConfig(steps, batch_size, rate, momentum=0.9, seed=seed, eval_every=steps, device="cpu")
        return train_once(arm, norm, part, fit_config)

    return LargeBatches(config, run_trials(arms, config.rates, config.seeds, trial, progress or Silent()))


def _arms(config: LargeBatchesConfig) -> dict[str, tuple[Callable[[int], nn.Module], int]]:
    ghosts = {
        _ghosts(size): (functools.partial(GhostBatchNorm, ghost_size=size), config.large) for size in config.ghosts
    }
    return {"large": (BatchNorm2d, config.large), **ghosts, "small": (BatchNorm2d, config.small)}


def _ghosts(size: int) -> str:
    return f"large, ghosts of {size}"


def page_of(result: LargeBatches, command: str = "") -> Page:
    """The result as a report."""
    config = result.config
    title = f"Test accuracy after {config.epochs} epochs of {config.images:,} images (mean ± standard deviation)"
    return Page(
        title="Large batches and ghosts",
        claim=CLAIM,
        summary=summary(result),
        tables=[accuracy_table(result.trials, title)],
        configuration=dataclasses.asdict(config),
        command=command,
    )


def summary(result: LargeBatches) -> list[str]:
    """The answer in sentences, each arm at its best rate."""
    large, small = (best_of(result.trials, arm) for arm in ("large", "small"))
    gap = f"Batches of {result.config.small} reach {small}, batches of {result.config.large} {large}"
    gap += ": a gap." if is_better(small, large) else ": no gap beyond the noise."
    return [gap, *(_verdict(best_of(result.trials, _ghosts(size)), large) for size in result.config.ghosts)]


def _verdict(ghosts: Outcome, large: Outcome) -> str:
    name = ghosts.arm.removeprefix("large, ")
    return f"The large batch in {name} reaches {ghosts} (rate {ghosts.rate:g}): {relation(ghosts, large)}."
