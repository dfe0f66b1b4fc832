"""What `insertion` is told and what it finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InsertionConfig:
    """What runs: a training at every rate, and from the best of them a fine-tuning with each factor and arm.

    Attributes:
        width: channels of the VGG-11's first stage; the paper's has 64.
        steps: updates of each training without norms, with cosine decay of the rate.
        rates: its learning rates, of which the one with the highest test accuracy is the best.
        fine_tuning_steps: updates of each fine-tuning, with cosine decay from the multiple of the best rate.
        factors: multiples of the best rate.
        batch_size: images an update.
        calibration_images: training images from which `insert` measures.
        test_images: images of each evaluation, drawn once.
        eval_every: updates of a fine-tuning between evaluations.
        seed: of weights and order.
    """

    width: int = 8
    steps: int = 800
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    fine_tuning_steps: int = 300
    factors: tuple[float, ...] = (1.0, 5.0, 10.0)
    batch_size: int = 64
    calibration_images: int = 2000
    test_images: int = 1000
    eval_every: int = 30
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """A training without norms: its rate and the accuracy at its end, 0 if it diverged."""

    rate: float
    accuracy: float


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning.

    Attributes:
        arm: "with" inserted batch norms or "without".
        factor, rate: the learning rate as a multiple of the original's best, and as it is.
        accuracies: on the test images, before the first update and at each evaluation up to a divergence.
        diverged: whether the loss stopped being finite.
    """

    arm: str
    factor: float
    rate: float
    accuracies: list[float]
    diverged: bool

    @property
    def final(self) -> float:
        """Accuracy at the end; 0 if it diverged."""
        return 0.0 if self.diverged else self.accuracies[-1]


@dataclass(frozen=True)
class Insertion:
    """The runs of `insertion`.

    Attributes:
        config: what ran.
        trainings: without norms, at each rate.
        runs: the fine-tunings of the best of them.
        max_error: how far insertion changed the network's outputs, relative to the largest.
    """

    config: InsertionConfig
    trainings: list[Training]
    runs: list[FineTuning]
    max_error: float
