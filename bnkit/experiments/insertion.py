"""Claim: batch norm inserted into a network trained without it lets the network be fine-tuned at higher rates.

Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 3.3, have the higher rates
for networks trained with batch norm from the start. Whether a finished network of type VGG (Simonyan and Zisserman
2014, configuration A) can get them later was asked at https://github.com/pytorch/vision/issues/152.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import data as image_sets
from ..data import ImageSet
from ..surgery import insert
from ..train import Diverged, Evaluation, FitConfig, fit
from ._insertion_page import page_of
from ._insertion_record import INSERTED, ORIGINAL, WITHOUT, Insertion, InsertionConfig, Run
from ._progress import Progress, Silent
from ._small_runs import run_trials
from ._trials import best_of

__all__ = ["Insertion", "InsertionConfig", "Run", "fine_tune", "insertion", "page_of"]


def insertion(
    data: str | os.PathLike[str], config: InsertionConfig | None = None, *, progress: Progress | None = None
) -> Insertion:
    """Train a VGG without norms, then fine-tune it with and without inserted batch norms: see the module's claim.

    Args:
        data: CIFAR-10 or other images of 32 × 32 pixels, as `bnkit.data.load` takes them.
        config: what runs.
        progress: told after each run.

    Raises:
        UserError: no such data.
    """
    return fine_tune(image_sets.load(data, size=32), config, progress=progress)


def fine_tune(
    images: ImageSet, config: InsertionConfig | None = None, *, progress: Progress | None = None
) -> Insertion:
    """What `insertion` does, on images that are loaded."""
    config, progress = config or InsertionConfig(), progress or Silent()
    chosen = _some(len(images.test_images), config.test_images)
    images = dataclasses.replace(images, test_images=images.test_images[chosen], test_labels=images.test_labels[chosen])
    networks: dict[tuple[float, int], nn.Sequential] = {}

    def train(arm: str, rate: float, seed: int) -> Run:
        torch.manual_seed(seed)
        network = networks[rate, seed] = vgg11(images, config.width)
        return _trial(arm, network, images, _settings(config, rate, seed, config.steps, config.steps))

    trainings = run_trials([ORIGINAL], config.rates, config.seeds, train, progress, "trainings")
    best = best_of(trainings, ORIGINAL).rate
    originals = [networks[best, seed] for seed in range(config.seeds)]
    inserted = [insert(network, _calibration(images, config)) for network in originals]
    starts = {WITHOUT: originals, INSERTED: [surgery.model for surgery in inserted]}

    def tune(arm: str, rate: float, seed: int) -> Run:
        settings = _settings(config, rate, seed, config.fine_tuning_steps, config.eval_every)
        return _trial(arm, copy.deepcopy(starts[arm][seed]), images, settings)

    rates = [factor * best for factor in config.factors]
    runs = run_trials(starts, rates, config.seeds, tune, progress, "fine-tunings")
    return Insertion(config, trainings, runs, max(surgery.max_error or 0.0 for surgery in inserted))


def vgg11(images: ImageSet, width: int) -> nn.Sequential:
    """Configuration A, with `width` channels in the first stage (the paper: 64) and no dropout."""
    channels, side = images.shape[0], images.shape[1]
    layers: list[nn.Module] = []
    for stage in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for multiple in stage:
            conv = nn.Conv2d(channels, multiple * width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
            layers += [conv, nn.ReLU()]
            channels = multiple * width
        layers.append(nn.MaxPool2d(2))
    features = channels * (side // 32) ** 2
    classifier = [nn.Linear(features, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *classifier, nn.Linear(channels, images.num_classes))


def _settings(config: InsertionConfig, rate: float, seed: int, steps: int, eval_every: int) -> FitConfig:
    return FitConfig(
        steps,
        config.batch_size,
        rate,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        seed=seed,
        eval_every=eval_every,
        device="cpu",
    )


def _trial(arm: str, network: nn.Module, images: ImageSet, settings: FitConfig) -> Run:
    """Train in place, and evaluate before the first step and on the way, up to a divergence."""
    evaluations: list[Evaluation] = []
    diverged = False
    try:
        fit(network, images, settings, on_evaluation=evaluations.append)
    except Diverged:
        diverged = True
    last = evaluations[-1]
    return Run(
        arm,
        settings.lr,
        settings.seed,
        math.nan if diverged or last.train_loss is None else last.train_loss,
        math.nan if diverged else last.test_accuracy,
        last.seconds,
        [evaluation.test_accuracy for evaluation in evaluations],
    )


def _calibration(images: ImageSet, config: InsertionConfig) -> Iterator[Tensor]:
    """Training images as `fit` shows them to the network."""
    mean, std = images.mean.view(1, -1, 1, 1), images.std.view(1, -1, 1, 1)
    chosen = _some(len(images.train_images), config.calibration_images)
    for batch in images.train_images[chosen].split(250):
        yield (batch.float() / 255 - mean) / std


def _some(total: int, count: int) -> Tensor:
    """Indices drawn without replacement, always the same: image sets may be ordered by class."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]
