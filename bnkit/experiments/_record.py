"""What a comparison measured: one record a network, over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (0.15, 0.50, 0.85)


@dataclass(frozen=True)
class Snapshot:
    """All networks of a stack at one moment.

    Args:
        step: steps done.
        accuracy, loss: on the test images, (configuration, seed); NaN for a network that has diverged.
        percentiles: of the last hidden layer's sigmoid inputs, first seed, (configuration, unit, 3).
        diverged: the step at which a network's loss stopped being finite, (configuration, seed); 0 where it is finite.
    """

    step: int
    accuracy: np.ndarray
    loss: np.ndarray
    percentiles: np.ndarray
    diverged: np.ndarray


@dataclass(frozen=True)
class Configuration:
    """One way to train the network: its norm, learning rate and the standard deviation of its initial weights.

    `init_std` is None where the model's own initialization is used.
    """

    norm: str
    learning_rate: float
    init_std: float | None = None


def label_of(norm: str) -> str:
    """What a network with this norm is called in tables and legends."""
    return {"none": "without BN", "batch": "with BN"}.get(norm, f"{norm} norm")


@dataclass
class NetRecord:
    """The test accuracy and loss of one configuration over training.

    Args:
        label: what tables and legends call it.
        configuration: how it was trained.
        seeds: the seed of each run.
        steps: steps done at each evaluation.
        accuracy, loss: on the test images, `[evaluation][seed]`.
        seconds: training time at each evaluation, of one run alone, evaluation excluded.
        percentiles: the 15th, 50th and 85th of the last hidden layer's sigmoid inputs, (evaluation, unit, 3), of the
            first seed until it diverged; empty where they were not recorded.
        diverged: seed → step at which its loss stopped being finite.
    """

    label: str
    configuration: Configuration
    seeds: Sequence[int]
    steps: list[int] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    loss: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    percentiles: list[np.ndarray] = field(default_factory=list)
    diverged: dict[int, int] = field(default_factory=dict)

    def add(
        self,
        step: int,
        seconds: float,
        accuracy: Sequence[float],
        loss: Sequence[float],
        percentiles: np.ndarray | None = None,
    ) -> None:
        """Append one evaluation; accuracy and loss have one value a seed."""
        self.steps.append(step)
        self.seconds.append(seconds)
        self.accuracy.append(list(accuracy))
        self.loss.append(list(loss))
        if percentiles is not None:
            self.percentiles.append(percentiles)

    def add_snapshot(self, snapshot: Snapshot, row: int, step_seconds: float) -> None:
        """Append the evaluation of the network in this row of a stack."""
        accuracy, loss = snapshot.accuracy[row].tolist(), snapshot.loss[row].tolist()
        percentiles = None if snapshot.diverged[row][0] else snapshot.percentiles[row]
        self.add(snapshot.step, snapshot.step * step_seconds, accuracy, loss, percentiles)
        diverged = zip(self.seeds, snapshot.diverged[row].tolist(), strict=True)
        self.diverged |= {seed: step for seed, step in diverged if step}

    def latest(self) -> float:
        """Mean test accuracy at the last evaluation, over the seeds that have not diverged."""
        finite = [value for value in self.accuracy[-1] if math.isfinite(value)] if self.accuracy else []
        return float(np.mean(finite)) if finite else math.nan

    def curve(self, i: int) -> list[float]:
        """Test accuracy of the i-th seed, one value an evaluation; NaN once it has diverged."""
        return [row[i] for row in self.accuracy]

    def best(self) -> list[float]:
        """Each seed's highest test accuracy."""
        return [max(filter(math.isfinite, self.curve(i)), default=math.nan) for i in range(len(self.seeds))]

    def final(self) -> list[float]:
        """Each seed's test accuracy at its last evaluation; NaN if it diverged."""
        return list(self.accuracy[-1]) if self.accuracy else [math.nan] * len(self.seeds)

    def steps_to(self, accuracies: Sequence[float]) -> list[float]:
        """Steps at the first evaluation that reached `accuracies[i]`; infinite for a seed that never did."""
        return [
            next(
                (float(step) for step, value in zip(self.steps, self.curve(i), strict=True) if value >= goal), math.inf
            )
            for i, goal in enumerate(accuracies)
        ]

    def seconds_at(self, step: float) -> float:
        """Training seconds of one run after `step` steps."""
        return self.seconds[self.steps.index(int(step))] if math.isfinite(step) else math.inf


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; the spread of a single value is NaN."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def drift(percentiles: Sequence[np.ndarray]) -> np.ndarray:
    """How far each unit's input distribution is from where it ends, (evaluation, unit).

    drift = mean over the 15th, 50th and 85th percentile of |q(t) - q(T)|, over q₈₅(T) - q₁₅(T): 1 means that the
    distribution is off by its own final width.
    """
    q = np.stack(percentiles)
    width = q[-1, :, 2] - q[-1, :, 0]
    return np.abs(q - q[-1]).mean(-1) / np.maximum(width, np.finfo(q.dtype).tiny)


def typical_unit(percentiles: Sequence[np.ndarray]) -> int:
    """The unit whose drift, averaged over training, is the median of all units."""
    total = drift(percentiles).mean(0)
    return int(np.argsort(total)[(len(total) - 1) // 2])
