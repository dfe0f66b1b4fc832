"""Every learning rate with every initial scale, each for a short time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .._checks import require
from ..data import ImageSet
from ._lockstep import create_stacks, train_stacks
from ._progress import Progress
from ._record import Configuration, label_of
from ._task import Task

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
INIT_STDS = (0.01, 0.03, 0.1, 0.3, 1.0)
HELD_OUT = 5000


@dataclass(frozen=True)
class Grid:
    """Accuracy on held-out training images after `steps` steps of those planned.

    `accuracy` is (norm, initial scale, learning rate), NaN where a network diverged.
    """

    norms: Sequence[str]
    rates: Sequence[float]
    init_stds: Sequence[float]
    accuracy: np.ndarray
    steps: int
    planned: int
    held_out: int

    @property
    def complete(self) -> bool:
        """Whether no interrupt ended it early."""
        return self.steps == self.planned

    @property
    def cells(self) -> int:
        """Pairs of learning rate and initial scale."""
        return len(self.rates) * len(self.init_stds)

    def best(self, norm: str) -> tuple[int, int]:
        """(initial scale, learning rate) indices of the highest accuracy."""
        cells = np.nan_to_num(self.accuracy[self.norms.index(norm)], nan=-1.0)
        row, column = np.unravel_index(cells.argmax(), cells.shape)
        return int(row), int(column)

    def highest(self, norm: str) -> float:
        """The accuracy of the best cell."""
        return float(self.accuracy[(self.norms.index(norm), *self.best(norm))])

    def best_configuration(self, norm: str) -> Configuration:
        """The configuration of the cell with the highest accuracy."""
        row, column = self.best(norm)
        return Configuration(norm, self.rates[column], self.init_stds[row])

    def share_above(self, norm: str, accuracy: float) -> float:
        """The fraction of cells that reached `accuracy`."""
        return float(np.mean(np.nan_to_num(self.accuracy[self.norms.index(norm)], nan=-1.0) >= accuracy))


def run_grid(
    data: ImageSet,
    task: Task,
    norms: Sequence[str],
    batch_size: int,
    steps: int,
    seed: int,
    progress: Progress,
) -> Grid:
    """Train every cell for `steps` steps, all of them in lockstep, on all but the last training images.

    An interrupt ends it early: the grid then says after how many steps.
    """
    held_out = min(HELD_OUT, len(task.x) // 10)
    require(held_out > 0, f"the grid holds out a tenth of the training images, got {len(task.x)}: leave it out.")
    configurations = [Configuration(norm, rate, std) for norm, std, rate in itertools.product(norms, INIT_STDS, RATES)]
    stacks = create_stacks(configurations, [seed], data, task)
    progress.phase("grid of learning rates and initial scales", steps)
    evaluations = sorted({steps * i // 5 for i in range(1, 6)} - {0})
    held_out_task = task.with_held_out(held_out)
    snapshots = train_stacks(stacks, held_out_task, [seed], batch_size, evaluations, percentiles=False)
    nothing = np.full((len(norms), len(INIT_STDS), len(RATES)), np.nan)
    grid = Grid(norms, RATES, INIT_STDS, nothing, 0, steps, held_out)
    try:
        for snapshot in snapshots:
            grid = dataclasses.replace(
                grid, accuracy=snapshot.accuracy.reshape(grid.accuracy.shape), steps=snapshot.step
            )
            progress.update(snapshot.step, {label_of(norm): grid.highest(norm) for norm in norms})
    except KeyboardInterrupt:
        pass
    return grid
