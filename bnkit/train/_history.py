"""What a training run measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._config import FitConfig


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a model while it trains.

    Attributes:
        step: Updates made so far.
        seconds: Time spent on them: training only, without evaluations, checkpoints, or what the caller did between.
        learning_rate: Of the last update; at step 0 of the first one.
        train_loss: Mean cross-entropy of the training batches since the last evaluation; None at step 0.
        test_loss: Mean cross-entropy over the test images, in evaluation mode.
        test_accuracy: Fraction of the test images whose highest logit is their label's.
    """

    step: int
    seconds: float
    learning_rate: float
    train_loss: float | None
    test_loss: float
    test_accuracy: float


@dataclass
class History:
    """The evaluations of a run, in order, and the configuration that led to them."""

    config: FitConfig
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def final(self) -> Evaluation:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def best(self) -> Evaluation:
        """The evaluation with the highest test accuracy, the first of them."""
        return max(self.evaluations, key=lambda evaluation: evaluation.test_accuracy)

    def reached(self, accuracy: float) -> Evaluation | None:
        """The first evaluation with at least this test accuracy, or None."""
        return next((e for e in self.evaluations if e.test_accuracy >= accuracy), None)
