"""What `insertion` is told and what it finds."""

from __future__ import annotations

from dataclasses import dataclass

from ._trials import Trial

ORIGINAL = "trained without batch norm"
WITHOUT, INSERTED = "without batch norm", "batch norm inserted"


@dataclass(frozen=True)
class InsertionConfig:
    """What runs: trainings at every rate, and from those at the best of them fine-tunings with each factor and arm.

    Attributes:
        width: channels of the VGG-11's first stage; the paper's has 64.
        steps: updates of each training without norms, with cosine decay of the rate.
        rates: its learning rates, of which the one with the highest mean test accuracy is the best.
        fine_tuning_steps: updates of each fine-tuning, with cosine decay from the multiple of the best rate.
        factors: multiples of the best rate.
        batch_size: images an update.
        calibration_images: training images from which `insert` measures.
        test_images: images of each evaluation, drawn once.
        eval_every: updates of a fine-tuning between evaluations.
        seeds: runs of each, from other weights and in another order.
    """

    width: int = 8
    steps: int = 1500
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    fine_tuning_steps: int = 500
    factors: tuple[float, ...] = (1.0, 5.0, 10.0)
    batch_size: int = 64
    calibration_images: int = 2000
    test_images: int = 2000
    eval_every: int = 50
    seeds: int = 3


@dataclass(frozen=True)
class Run(Trial):
    """A training or fine-tuning.

    Attributes:
        accuracies: on the test images, before the first update and at each evaluation up to a divergence.
    """

    accuracies: list[float]


@dataclass(frozen=True)
class Insertion:
    """The runs of `insertion`.

    Attributes:
        config: what ran.
        trainings: without norms, at each rate.
        runs: the fine-tunings of those at the best rate.
        max_error: how far insertion changed a network's outputs at most, relative to the largest of them.
    """

    config: InsertionConfig
    trainings: list[Run]
    runs: list[Run]
    max_error: float
