"""Claim: with two images a batch, batch renormalization and group normalization train well where batch norm does not.

Started by torchrun with several processes, each has two images a step, batch norm the statistics of these, and
synchronized batch norm those of all.

Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275, section 4.2 (batches of 4 and less); Wu and He,
"Group Normalization", 2018, https://arxiv.org/abs/1803.08494, figure 5 (batches of 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import data
from .._processes import world_size
from ..nn import BatchNorm2d, BatchRenorm, SyncBatchNorm
from ..report import Page
from ..train import Diverged, FitConfig, fit
from ._progress import Progress, Silent
from ._small_runs import run_trials
from ._trials import Outcome, Trial, accuracy_table, best_of, relation

CLAIM = (
    "With two images a batch, batch renormalization (Ioffe 2017) and group normalization (Wu and He 2018) reach a "
    "higher test accuracy than batch normalization."
)


@dataclass(frozen=True)
class SmallBatchesConfig:
    """What runs: every norm with every rate and seed.

    Attributes:
        steps: updates of a run.
        batch_size: images an update, in each process.
        rates: learning rates.
        seeds: runs of each.
        test_images: how many of them are used.
        processes: as many as torchrun started.
    """

    steps: int = 6000
    batch_size: int = 2
    rates: tuple[float, ...] = (0.005, 0.02)
    seeds: int = 3
    test_images: int = 2000
    processes: int = field(default_factory=world_size)


@dataclass(frozen=True)
class SmallBatches:
    """The runs of `small_batches`."""

    config: SmallBatchesConfig
    trials: list[Trial]


def small_batches(config: SmallBatchesConfig | None = None, *, progress: Progress | None = None) -> SmallBatches:
    """Train a small convolutional network on the bundled digits with each norm: see the module's claim."""
    config, digits = config or SmallBatchesConfig(), data.load("digits")
    digits = dataclasses.replace(
        digits,
        test_images=digits.test_images[: config.test_images],
        test_labels=digits.test_labels[: config.test_images],
    )
    norms = _norms(config)

    def trial(arm: str, rate: float, seed: int) -> Trial:
        fit_config = FitConfig(
            config.steps,
            config.batch_size * config.processes,
            rate,
            momentum=0.9,
            seed=seed,
            eval_every=config.steps,
            device="cpu",
            devices=config.processes,
        )
        return train_once(arm, norms[arm], digits, fit_config)

    what = f"runs with batches of {config.batch_size}"
    return SmallBatches(config, run_trials(norms, config.rates, config.seeds, trial, progress or Silent(), what))


def train_once(arm: str, norm: Callable[[int], nn.Module], images: data.ImageSet, config: FitConfig) -> Trial:
    """Train a fresh network; NaN for what a diverged run has not got."""
    torch.manual_seed(config.seed)
    try:
        final = fit(small_network(norm), images, config).final
    except Diverged:
        return Trial(arm, config.lr, config.seed, float("nan"), float("nan"), float("nan"))
    return Trial(arm, config.lr, config.seed, final.train_loss or 0.0, final.test_accuracy, final.seconds)


def small_network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Three convolutions of stride 2 with 16, 32 and 64 channels, each with a norm and ReLU; mean; linear layer."""
    layers: list[nn.Module] = []
    for before, channels in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, channels, 3, 2, 1, bias=False), norm(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _norms(config: SmallBatchesConfig) -> dict[str, Callable[[int], nn.Module]]:
    """The paper's schedule of renorm, 5,000 to 40,000 and 25,000 of some 200,000 steps, scaled to this run's."""
    steps = config.steps
    first, last_r, last_d = max(steps // 40, 1), max(steps // 5, 2), max(steps // 8, 2)

    def renorm(channels: int) -> nn.Module:
        return BatchRenorm(channels, momentum=0.01, r_max=(first, last_r, 3.0), d_max=(first, last_d, 5.0))

    norms: dict[str, Callable[[int], nn.Module]] = {
        "none": lambda channels: nn.Identity(),
        "batch": lambda channels: BatchNorm2d(channels, momentum=0.01),
        "renorm": renorm,
        "group": lambda channels: nn.GroupNorm(8, channels),
    }
    if config.processes > 1:
        norms["sync"] = lambda channels: SyncBatchNorm(channels, momentum=0.01)
    return norms


def page_of(result: SmallBatches, command: str = "") -> Page:
    """The result as a report."""
    config = result.config
    where = "" if config.processes == 1 else f" on each of {config.processes} processes"
    title = (
        f"Test accuracy after {config.steps:,} batches of {config.batch_size}{where}"
        " (mean ± standard deviation over seeds)"
    )
    return Page(
        title="Batches of two images",
        claim=CLAIM,
        summary=summary(result),
        tables=[accuracy_table(result.trials, title)],
        configuration=dataclasses.asdict(config),
        command=command,
    )


_NAMES = {
    "renorm": "Batch renormalization",
    "group": "Group normalization",
    "sync": "Synchronized batch normalization",
    "none": "No normalization",
}


def summary(result: SmallBatches) -> list[str]:
    """The answer in sentences, each norm at its best rate."""
    batch, arms = best_of(result.trials, "batch"), {trial.arm for trial in result.trials}
    sentences = [_verdict(best_of(result.trials, arm), batch) for arm in _NAMES if arm in arms]
    return [f"Batch normalization reaches {batch} (rate {batch.rate:g}).", *sentences]


def _verdict(other: Outcome, batch: Outcome) -> str:
    words = relation(other, batch, "no better or worse than the noise", "better", "worse")
    return f"{_NAMES[other.arm]} reaches {other} (rate {other.rate:g}): {words}."
