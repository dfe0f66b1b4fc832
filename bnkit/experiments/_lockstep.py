"""Train stacks of small networks side by side on one data set, evaluating as it goes.

The matrices are too small for several threads to share one of them: they would wait for each other at every operator.
So the networks are split into as many stacks as there are threads, and each stack runs on a thread of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..data import BatchOrder, ImageSet
from ._pace import Pace
from ._record import PERCENTILES, Configuration, Snapshot
from ._stacked_layers import Inputs
from ._stacked_mlp import StackedMLP

PERCENTILE_IMAGES = 500
_CHUNK = 500
_GATHERED = 32


@dataclass(frozen=True)
class Task:
    """Images as rows of pixels 0 to 255, as bytes because a batch is gathered from memory, and their classes.

    Args:
        x: of the training images, without the pixels that are 0 in all of them.
        used: which pixels those of `x` are.
        y, one_hot: classes of the training images.
        test_x, test_y: the test images, all pixels, and their classes.
    """

    x: Tensor
    used: Tensor
    y: Tensor
    one_hot: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, data: ImageSet, device: torch.device) -> Task:
        """The test images test, all the others train."""
        x, test_x = (images.to(device).flatten(1) for images in (data.train_images, data.test_images))
        y, test_y = data.train_labels.to(device), data.test_labels.to(device)
        used = x.any(0).nonzero()[:, 0]
        return cls(x[:, used], used, y, nn.functional.one_hot(y, data.num_classes).float(), test_x, test_y)

    def with_held_out(self, count: int) -> Task:
        """The same task, tested on the last `count` training images instead, which no longer train.

        For choosing a learning rate without a look at the test images.
        """
        held_out = self.test_x.new_zeros(count, self.test_x.shape[1])
        held_out[:, self.used] = self.x[-count:]
        return Task(self.x[:-count], self.used, self.y[:-count], self.one_hot[:-count], held_out, self.y[-count:])


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
    """The configurations in order, in as many stacks as there are threads, each of two networks at least.

    For less, the threads would wait more for Python's lock than for one another. Off the CPU there is one stack.
    """
    most = torch.get_num_threads() if task.x.device.type == "cpu" else 1
    count = max(1, min(most, len(configurations), len(configurations) * len(seeds) // 2))
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
    return StackedMLP(nets, rates, Inputs(scale=1 / 255, used=task.used))


class Batches:
    """The mini-batches of every seed, each seed in its own order."""

    def __init__(self, task: Task, seeds: Sequence[int], batch_size: int) -> None:
        self.task = task
        self.orders = [BatchOrder(len(task.x), batch_size, seed) for seed in seeds]
        self.ready: Iterator[tuple[Tensor, Tensor]] = iter(())

    def next(self) -> tuple[Tensor, Tensor]:
        """Used pixels (S, B, F) and one-hot classes (S, B, classes)."""
        batch = next(self.ready, None)
        if batch is None:
            self.ready = self._gather()
            batch = next(self.ready)
        x, target = batch
        return x.float(), target

    def _gather(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Many batches at once, since one is so small that the call costs more than the copy.
        index = torch.cat([next(order) for _ in range(_GATHERED) for order in self.orders]).to(self.task.x.device)
        x, target = self.task.x.index_select(0, index), self.task.one_hot.index_select(0, index)
        shape = (_GATHERED, len(self.orders), -1)
        return zip(x.view(*shape, x.shape[1]).unbind(), target.view(*shape, target.shape[1]).unbind(), strict=True)


class Training:
    """A stack on its way.

    Args:
        seeds: of the order of the batches.
        pace: decides about threads.
        stop: once set, no further step is begun.
    """

    def __init__(
        self, stack: StackedMLP, task: Task, seeds: Sequence[int], batch_size: int, pace: Pace, stop: threading.Event
    ) -> None:
        self.stack, self.task, self.pace, self.stop = stack, task, pace, stop
        self.batches = Batches(task, seeds, batch_size)
        self.diverged = np.zeros(stack.shape, dtype=np.int64)
        self.done = 0

    def run(self, goal: int) -> None:
        """Train until `goal` steps are done."""
        # A NaN in the loss stays in the output's bias, so one copy of it a step tells afterwards when it came.
        trace = self.stack.bias.new_zeros(goal - self.done, len(self.stack.bias))
        for row in trace:
            if self.stop.is_set():
                return
            self.pace.run(lambda: self.stack.step(*self.batches.next()))
            row.copy_(self.stack.bias[:, 0])
        _note_divergence(self.diverged, trace, self.done)
        self.done = goal

    def snapshot(self, percentiles: bool = True) -> Snapshot:
        """How the networks do now."""
        return _snapshot(self.stack, self.task, self.done, self.diverged.copy(), percentiles)


def train_stacks(
    stacks: Sequence[StackedMLP],
    task: Task,
    seeds: Sequence[int],
    batch_size: int,
    steps: Sequence[int],
    *,
    percentiles: bool = True,
    adapt_threads: bool = False,
) -> Iterator[Snapshot]:
    """Train to the last of `steps`, yielding a snapshot of all stacks' networks at each of them.

    Args:
        percentiles: whether snapshots have them.
        adapt_threads: run a single stack on one thread where that is faster than on all, see `Pace`.
    """
    adapt = adapt_threads and len(stacks) == 1 and task.x.device.type == "cpu"
    stop = threading.Event()
    with Pace(adapt) as pace, side_by_side(len(stacks)) as on_each:
        trainings = [Training(stack, task, seeds, batch_size, pace, stop) for stack in stacks]

        def advance(training: Training, goal: int) -> Snapshot:
            try:
                training.run(goal)
                return training.snapshot(percentiles)
            except BaseException:
                stop.set()
                raise

        try:
            for goal in steps:
                yield _merged(on_each(advance, trainings, itertools.repeat(goal)))
        finally:
            stop.set()


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[Callable[..., Iterable]]:
    """A `map` that calls its function on `count` threads at once; each runs its operators without further ones."""
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def _merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """One snapshot of all configurations."""
    parts = list(snapshots)
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
    correct, loss, percentiles = [], [], np.empty(0)
    for x, y in zip(task.test_x.split(_CHUNK), task.test_y.split(_CHUNK), strict=True):
        logits, z = stack.evaluate(x.float())
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


def step_seconds(
    stack: StackedMLP, task: Task, batch_size: int, count: int = 300, *, adapt_threads: bool = False
) -> float:
    """Median seconds of one training step, data included; the stack is trained meanwhile."""
    batches = Batches(task, list(range(stack.shape[1])), batch_size)
    with Pace(adapt=adapt_threads and task.x.device.type == "cpu") as pace:
        times = [pace.run(lambda: stack.step(*batches.next())) for _ in range(count)]
    return float(np.median(times))
