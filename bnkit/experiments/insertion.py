"""Claim: batch norm inserted into a network trained without it lets the network be fine-tuned at higher rates.

Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 3.3, have the higher rates
for networks trained with batch norm from the start. Whether a finished network of type VGG (Simonyan and Zisserman
2014, configuration A) can get them later was asked at https://github.com/pytorch/vision/issues/152.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import data as image_sets
from ..data import ImageSet
from ..surgery import insert
from ..train import Diverged, Evaluation, FitConfig, fit
from ._insertion_page import page_of
from ._insertion_record import FineTuning, Insertion, InsertionConfig, Training
from ._progress import Progress, Silent

__all__ = ["FineTuning", "Insertion", "InsertionConfig", "Training", "fine_tune", "insertion", "page_of"]


def insertion(
    data: str | os.PathLike[str], config: InsertionConfig | None = None, *, progress: Progress | None = None
) -> Insertion:
    """Train a VGG without norms, then fine-tune it with and without inserted batch norms: see the module's claim.

    Args:
        data: CIFAR-10 or other images of 32 × 32 pixels, as `bnkit.data.load` takes them.
        config: what runs.
        progress: told after each evaluation.

    Raises:
        UserError: no such data.
    """
    return fine_tune(image_sets.load(data, size=32), config, progress=progress)


def fine_tune(
    images: ImageSet, config: InsertionConfig | None = None, *, progress: Progress | None = None
) -> Insertion:
    """What `insertion` does, on images that are loaded."""
    config, progress = config or InsertionConfig(), progress or Silent()
    chosen = _some(len(images.test_images), config.test_images, config.seed)
    images = dataclasses.replace(images, test_images=images.test_images[chosen], test_labels=images.test_labels[chosen])
    trained = [_train(rate, images, config, progress) for rate in config.rates]
    best, network = max(trained, key=lambda pair: pair[0].accuracy)
    inserted = insert(network, _calibration(images, config))
    starts = {"without": network, "with": inserted.model}
    runs = []
    for factor in config.factors:
        for arm, start in starts.items():
            runs.append(_fine_tune(arm, start, factor, best.rate, images, config, progress))
    return Insertion(config, [training for training, _ in trained], runs, inserted.max_error or 0.0)


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


def _train(
    rate: float, images: ImageSet, config: InsertionConfig, progress: Progress
) -> tuple[Training, nn.Sequential]:
    torch.manual_seed(config.seed)
    network = vgg11(images, config.width)
    progress.phase(f"Training without norms at rate {rate:g}", config.steps)
    settings = _settings(config, rate, config.steps, eval_every=config.steps)
    _, *rest = _fitted(network, images, settings, "without", progress)
    return Training(rate, rest[-1] if rest else 0.0), network


def _fine_tune(
    arm: str,
    start: nn.Module,
    factor: float,
    rate: float,
    images: ImageSet,
    config: InsertionConfig,
    progress: Progress,
) -> FineTuning:
    progress.phase(f"Fine-tuning {arm} batch norm at {factor:g} × the best rate", config.fine_tuning_steps)
    settings = _settings(config, factor * rate, config.fine_tuning_steps, config.eval_every)
    accuracies = _fitted(copy.deepcopy(start), images, settings, arm, progress)
    evaluations = 1 + -(-config.fine_tuning_steps // config.eval_every)
    return FineTuning(arm, factor, factor * rate, accuracies, diverged=len(accuracies) < evaluations)


def _settings(config: InsertionConfig, rate: float, steps: int, eval_every: int) -> FitConfig:
    return FitConfig(
        steps,
        config.batch_size,
        rate,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        seed=config.seed,
        eval_every=eval_every,
        device="cpu",
    )


def _fitted(network: nn.Module, images: ImageSet, settings: FitConfig, name: str, progress: Progress) -> list[float]:
    """Train in place; the test accuracies before the first step and at each evaluation, up to a divergence."""
    accuracies: list[float] = []

    def note(evaluation: Evaluation) -> None:
        accuracies.append(evaluation.test_accuracy)
        progress.update(evaluation.step, {name: evaluation.test_accuracy})

    with contextlib.suppress(Diverged):
        fit(network, images, settings, on_evaluation=note)
    return accuracies


def _calibration(images: ImageSet, config: InsertionConfig) -> Iterator[Tensor]:
    """Training images as `fit` shows them to the network."""
    mean, std = images.mean.view(1, -1, 1, 1), images.std.view(1, -1, 1, 1)
    chosen = _some(len(images.train_images), config.calibration_images, config.seed)
    for batch in images.train_images[chosen].split(250):
        yield (batch.float() / 255 - mean) / std


def _some(total: int, count: int, seed: int) -> Tensor:
    """Indices drawn without replacement: image sets may be ordered by class."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
