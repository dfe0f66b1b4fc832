"""Claim: with small batches, a trained network is fine-tuned better with its batch norms frozen.

The practice of detection with backbones trained on ImageNet: He, Zhang, Ren and Sun, "Deep Residual Learning for Image
Recognition", 2015, https://arxiv.org/abs/1512.03385, appendix A; Wu and He, "Group Normalization", 2018,
https://arxiv.org/abs/1803.08494, section 4.2. Here a network trained on digits goes on to mirrored ones, two a step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import data
from ..data import BatchOrder
from ..nn import BatchNorm2d, FrozenBatchNorm2d
from ..report import Page
from ._progress import Progress, Silent
from ._small_runs import Batch, accuracy, page, parts_for_testing, run_trials, train
from ._trials import Trial
from .small_batches import small_network

CLAIM = (
    "With two images a batch, a trained network fine-tuned with frozen statistics reaches a higher test accuracy than "
    "one whose batch norms go on measuring them."
)


@dataclass(frozen=True)
class FineTuningConfig:
    """What runs: both norms with every rate and seed, from the network that the seed's training gave.

    Attributes:
        first_steps: updates of the training on digits, with batches of `first_batch_size` at `first_rate`.
        steps: updates of the fine-tuning.
        batch_size: mirrored digits an update.
        rates: learning rates.
        seeds: runs of each.
        test_images: how many of them are used.
    """

    first_steps: int = 400
    first_batch_size: int = 64
    first_rate: float = 0.1
    steps: int = 3000
    batch_size: int = 2
    rates: tuple[float, ...] = (0.001, 0.005, 0.02)
    seeds: int = 3
    test_images: int = 10_000


@dataclass(frozen=True)
class FineTuning:
    """The runs of `fine_tuning`."""

    config: FineTuningConfig
    trials: list[Trial]


ARMS = {"batch statistics": BatchNorm2d, "frozen statistics": FrozenBatchNorm2d}


def fine_tuning(config: FineTuningConfig | None = None, *, progress: Progress | None = None) -> FineTuning:
    """Train a small convolutional network on digits, then on mirrored ones: see the module's claim."""
    config, digits = config or FineTuningConfig(), data.load("digits")

    @functools.cache
    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = small_network(BatchNorm2d)
        batches = _training(digits, config.first_batch_size, seed, mirrored=False)
        train(model, batches, config.first_steps, config.first_rate)
        return model

    def trial(arm: str, rate: float, seed: int) -> Trial:
        model = small_network(ARMS[arm])
        model.load_state_dict(copy.deepcopy(trained(seed).state_dict()))
        batches = _training(digits, config.batch_size, seed, mirrored=True)
        loss, seconds = train(model, batches, config.steps, rate)
        return Trial(arm, rate, seed, loss, accuracy(model, _test(digits, config.test_images)), seconds)

    return FineTuning(config, run_trials(ARMS, config.rates, config.seeds, trial, progress or Silent()))


def _training(digits: data.ImageSet, size: int, seed: int, *, mirrored: bool) -> Iterator[Batch]:
    for indices in BatchOrder(len(digits.train_images), size, seed):
        yield (_images(digits.train_images[indices], mirrored=mirrored),), digits.train_labels[indices]


def _test(digits: data.ImageSet, count: int) -> Iterable[Batch]:
    for images, labels in parts_for_testing(digits, count):
        yield (_images(images, mirrored=True),), labels


def _images(images: Tensor, *, mirrored: bool) -> Tensor:
    pixels = images.float() / 255
    return pixels.flip(3) if mirrored else pixels


def page_of(result: FineTuning, command: str = "") -> Page:
    """The result as a report."""
    return page("Fine-tuning with two images a batch", CLAIM, result, "batch statistics", command)
