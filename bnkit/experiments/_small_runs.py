"""Small training runs of models that take more than images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import ImageSet
from ..report import Page
from ._progress import Progress
from ._trials import Trial, accuracy_table, best_of, relation

Batch = tuple[tuple[Any, ...], Tensor]
"""The model's arguments, and the labels."""

T = TypeVar("T", bound=Trial)


def run_trials(
    arms: Iterable[str],
    rates: Sequence[float],
    seeds: int,
    trial: Callable[[str, float, int], T],
    progress: Progress,
    what: str = "runs",
) -> list[T]:
    """Every arm with every rate and seed; the progress display calls them `what`."""
    runs = [(arm, rate, seed) for arm in arms for rate in rates for seed in range(seeds)]
    progress.phase(f"{len(runs)} {what}", len(runs))
    trials: list[T] = []
    for arm, rate, seed in runs:
        trials.append(trial(arm, rate, seed))
        progress.update(len(trials), {trial.arm: trial.accuracy for trial in trials})
    return trials


def train(model: nn.Module, batches: Iterator[Batch], steps: int, rate: float) -> tuple[float, float]:
    """So many steps of SGD with momentum 0.9; the mean loss over the last tenth, and seconds."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        arguments, labels = next(batches)
        loss = F.cross_entropy(model(*arguments), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(steps // 10, 1) :])
    return last.mean().item(), time.perf_counter() - started


def parts_for_testing(images: ImageSet, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` test images and their labels, 500 at a time."""
    return zip(*(of_all[:count].split(500) for of_all in (images.test_images, images.test_labels)), strict=True)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The part of the labels that the model gets right, in eval mode."""
    model.eval()
    right = [model(*arguments).argmax(1) == labels for arguments, labels in batches]
    return torch.cat(right).double().mean().item()


def page(title: str, claim: str, result: Any, baseline: str, command: str) -> Page:
    """The report of a result with `config` and `trials`: every arm against the baseline, each at its best rate."""
    caption = f"Test accuracy after {result.config.steps:,} updates (mean ± standard deviation over seeds)"
    return Page(
        title=title,
        claim=claim,
        summary=sentences(result.trials, baseline),
        tables=[accuracy_table(result.trials, caption)],
        configuration=dataclasses.asdict(result.config),
        command=command,
    )


def sentences(trials: Sequence[Trial], baseline: str) -> list[str]:
    """Each arm at its best rate, and how it compares with the baseline."""
    base = best_of(trials, baseline)
    others = [best_of(trials, arm) for arm in dict.fromkeys(trial.arm for trial in trials) if arm != baseline]
    first = f"With {baseline}: {base} (rate {base.rate:g})."
    return [first, *(f"With {other.arm}: {other} (rate {other.rate:g}), {relation(other, base)}." for other in others)]
