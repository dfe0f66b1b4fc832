"""Train stacks of small networks side by side on one data set, evaluating as it goes.

The matrices are too small for several threads to share one of them: they would wait for each other at every operator.
So the networks are split into as many stacks as there are threads, and each stack runs in a process of its own.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..data import ImageSet
from ._record import PERCENTILES, Configuration, Snapshot
from ._side_by_side import possible, side_by_side, threads
from ._stacked_mlp import StackedMLP
from ._task import TEST_CHUNK, Task, batches

PERCENTILE_IMAGES = TEST_CHUNK


def evaluation_steps(steps: int, count: int = 200) -> list[int]:
    """`count` evaluations or a few more (at most one a step): four fifths evenly spaced, the others near the start."""
    if steps <= 2 * count:
        return list(range(steps + 1))
    even = np.linspace(0, steps, count * 4 // 5 + 1)
    early = np.geomspace(10, steps, count // 4)
    return sorted({round(step) for step in (*even, *early)})


def create_stacks(
    configurations: Sequence[Configuration], seeds: Sequence[int], data: ImageSet, task: Task
) -> list[StackedMLP]:
    """The configurations in order, in as many stacks as can be trained side by side on the CPU; elsewhere in one."""
    count = min(possible() if task.x.device.type == "cpu" else 1, len(configurations))
    bounds = [len(configurations) * i // count for i in range(count + 1)]
    return [create_stack(configurations[a:b], seeds, data, task) for a, b in itertools.pairwise(bounds)]


def create_stack(
    configurations: Sequence[Configuration], seeds: Sequence[int], data: ImageSet, task: Task
) -> StackedMLP:
    """A stack of `mlp` networks; one seed gives all configurations the same weights but for their scale."""
    channels, height, _ = data.shape

    def create(configuration: Configuration, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return models.create(
            "mlp",
            norm=configuration.norm,
            num_classes=data.num_classes,
            in_channels=channels,
            image_size=height,
            init=configuration.init_std or "small-gaussian",
        ).to(task.x.device)

    nets = [[create(configuration, seed) for seed in seeds] for configuration in configurations]
    rates = [configuration.learning_rate for configuration in configurations]
    return StackedMLP(nets, rates, task.inputs)


class Training:
    """A stack on its way; `seeds` are those of the order of the batches."""

    def __init__(self, stack: StackedMLP, task: Task, seeds: Sequence[int], batch_size: int) -> None:
        self.stack, self.task = stack, task
        self.batches = batches(task, seeds, batch_size)
        self.diverged = np.zeros(stack.shape, dtype=np.int64)
        self.done = 0

    def run(self, goal: int) -> None:
        """Train until `goal` steps are done."""
        # A NaN in the loss stays in the output's bias, so one copy of it a step tells afterwards when it came.
        trace = self.stack.bias.new_zeros(goal - self.done, len(self.stack.bias))
        for row in trace:
            self.stack.step(*next(self.batches))
            row.copy_(self.stack.bias[:, 0])
        _note_divergence(self.diverged, trace, self.done)
        self.done = goal

    def advance(self, goal: int, percentiles: bool = True) -> Snapshot:
        """Train until `goal` steps are done; how the networks do then."""
        self.run(goal)
        return _snapshot(self.stack, self.task, goal, self.diverged.copy(), percentiles)


def train_stacks(
    stacks: Sequence[StackedMLP],
    task: Task,
    seeds: Sequence[int],
    batch_size: int,
    steps: Sequence[int],
    *,
    percentiles: bool = True,
) -> Iterator[Snapshot]:
    """Train to the last of `steps`, yielding a snapshot of all stacks' networks at each of them.

    Several stacks are trained in other processes: those that were given stay as they were.

    Args:
        percentiles: whether snapshots have them.
    """
    trainings = [Training(stack, task, seeds, batch_size) for stack in stacks]
    calls = [functools.partial(training.advance, percentiles=percentiles) for training in trainings]
    with side_by_side(calls) as advance:
        for goal in steps:
            yield _merged(advance(goal))


def _merged(parts: Sequence[Snapshot]) -> Snapshot:
    """One snapshot of all configurations."""
    names = ("accuracy", "loss", "percentiles", "diverged")
    return Snapshot(parts[0].step, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _note_divergence(diverged: np.ndarray, trace: Tensor, done: int) -> None:
    """Enter the first row of `trace` that is not finite for each network that has none yet."""
    bad = ~trace.isfinite().cpu().numpy().reshape(-1, *diverged.shape)
    new = bad.any(0) & (diverged == 0)
    if not new.any():
        return
    diverged[new] = done + 1 + bad.argmax(0)[new]


@torch.no_grad()
def _snapshot(stack: StackedMLP, task: Task, step: int, diverged: np.ndarray, with_percentiles: bool) -> Snapshot:
    """Accuracy and mean cross-entropy on the test images, under population statistics."""
    evaluate = stack.frozen()
    correct, loss, percentiles = [], [], np.empty(0)
    for x, y in task.tests:
        logits, z = evaluate(x)
        index = y.view(-1, 1, 1, 1).expand(*logits.shape[:-1], 1)
        correct.append((logits.argmax(-1) == index[..., 0]).sum(0))
        loss.append((logits.logsumexp(-1) - logits.gather(-1, index)[..., 0]).sum(0))
        if with_percentiles and len(correct) == 1:
            percentiles = _percentiles(z[:PERCENTILE_IMAGES, :, 0])
    means = (torch.stack(part).sum(0).cpu().numpy() / len(task.test_x) for part in (correct, loss))
    accuracy, loss = (np.where(diverged > 0, np.nan, mean) for mean in means)
    return Snapshot(step, accuracy, loss, percentiles, diverged)


def _percentiles(z: Tensor) -> np.ndarray:
    """(N, K, H) → (K, H, 3), the nearest-rank percentiles over N."""
    ranks = [round(p * (len(z) - 1)) for p in PERCENTILES]
    return np.partition(z.movedim(0, -1).cpu().numpy(), ranks, axis=-1)[..., ranks]


def step_seconds(stack: StackedMLP, task: Task, batch_size: int, count: int = 300) -> float:
    """Median seconds of one training step, data included; the stack is trained meanwhile."""
    steps, times = batches(task, list(range(stack.shape[1])), batch_size), []
    with threads(1):
        for _ in range(count):
            start = time.perf_counter()
            stack.step(*next(steps))
            times.append(time.perf_counter() - start)
    return float(np.median(times))
