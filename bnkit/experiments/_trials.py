"""Small comparisons: every arm with every learning rate and seed, and what came out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Table


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        arm: what was compared, such as the norm.
        rate: learning rate.
        seed: of weights and order.
        train_loss: over the last part of the training; NaN if it diverged.
        accuracy: on the test images, in eval mode; NaN if it diverged.
        seconds: of training.
    """

    arm: str
    rate: float
    seed: int
    train_loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """An arm at one learning rate: mean and standard deviation of the accuracy over seeds (NaN if any run diverged)."""

    arm: str
    rate: float
    accuracy: float
    deviation: float
    train_loss: float
    seconds: float
    runs: int

    def __str__(self) -> str:
        if math.isnan(self.accuracy):
            return "diverged"
        return f"{self.accuracy:.2%}" + (f" ± {self.deviation:.2%}" if self.runs > 1 else "")


def outcomes(trials: Sequence[Trial]) -> list[Outcome]:
    """Each arm at each rate, in the order in which they first ran."""
    groups: dict[tuple[str, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.arm, trial.rate), []).append(trial)
    return [_outcome(group) for group in groups.values()]


def _outcome(group: Sequence[Trial]) -> Outcome:
    accuracies = [trial.accuracy for trial in group]
    mean, loss, seconds = (statistics.fmean(getattr(t, name) for t in group) for name in _MEASURED)
    # statistics.stdev fails on NaN
    deviation = mean if math.isnan(mean) else statistics.stdev(accuracies) if len(group) > 1 else 0.0
    return Outcome(group[0].arm, group[0].rate, mean, deviation, loss, seconds, len(group))


_MEASURED = ("accuracy", "train_loss", "seconds")


def best_of(trials: Sequence[Trial], arm: str) -> Outcome:
    """The arm at its best rate."""
    mine = [outcome for outcome in outcomes(trials) if outcome.arm == arm]
    return max(mine, key=lambda outcome: -1.0 if math.isnan(outcome.accuracy) else outcome.accuracy)


def is_better(a: Outcome, b: Outcome) -> bool:
    """Whether a's accuracy exceeds b's by more than the noise: the two standard deviations of the runs together."""
    if math.isnan(a.accuracy) or math.isnan(b.accuracy):
        return not math.isnan(a.accuracy)
    return a.accuracy - b.accuracy > a.deviation + b.deviation


def relation(
    other: Outcome,
    base: Outcome,
    neither: str = "no different beyond the noise",
    higher: str = "higher",
    lower: str = "lower",
) -> str:
    """How the accuracy of one compares with the base's, in words."""
    if is_better(other, base):
        return higher
    return lower if is_better(base, other) else neither


def accuracy_table(trials: Sequence[Trial], title: str, note: str = "") -> Table:
    """Arms by learning rates."""
    found = {(outcome.arm, outcome.rate): outcome for outcome in outcomes(trials)}
    arms = list(dict.fromkeys(arm for arm, _ in found))
    rates = list(dict.fromkeys(rate for _, rate in found))
    rows = [[arm, *(str(found[arm, rate]) if (arm, rate) in found else "" for rate in rates)] for arm in arms]
    return Table(title, ["", *(f"rate {rate:g}" for rate in rates)], rows, note)
